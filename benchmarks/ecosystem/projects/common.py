"""What the examples share: a Trainer of thirty steps of whichever Lightning a project uses, and a module of ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

STEPS = 30


def options(callbacks: list[Any], **more: Any) -> dict[str, Any]:
    """Arguments of a Trainer on the CPU, quiet, with whatever logger is its default."""
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return {"accelerator": "cpu", "devices": 1, "callbacks": callbacks, "max_steps": STEPS, **quiet, **more}


def optimizer_of(chosen: type | None, parameters: Any) -> Any:
    """The chosen optimizer, or AdamW."""
    return (chosen or torch.optim.AdamW)(parameters, lr=1e-3)


class Module(L.LightningModule):
    """A network of a project, and a function of this module and a batch that gives the loss."""

    def __init__(self, network: torch.nn.Module, loss: Callable[..., Any], optimizer: type | None) -> None:
        super().__init__()
        self.network, self.loss, self.chosen = network, loss, optimizer

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch)

    def configure_optimizers(self):
        return optimizer_of(self.chosen, self.parameters())
