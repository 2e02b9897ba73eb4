"""What the examples share: a Trainer of thirty steps of whichever Lightning a project uses."""

from __future__ import annotations

from typing import Any

STEPS = 30


def options(callbacks: list[Any], **more: Any) -> dict[str, Any]:
    """Arguments of a Trainer on the CPU, quiet, with whatever logger is its default."""
    return {
        "accelerator": "cpu",
        "devices": 1,
        "callbacks": callbacks,
        "max_steps": STEPS,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        **more,
    }


def optimizer_of(chosen: type | None, parameters: Any, lr: float = 1e-3) -> Any:
    """The chosen optimizer, or AdamW."""
    import torch

    return (chosen or torch.optim.AdamW)(parameters, lr=lr)
