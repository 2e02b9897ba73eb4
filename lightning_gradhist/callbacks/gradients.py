"""The gradient that an optimizer is about to use, and which part of it this rank answers for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import (
    DDPStrategy,
    DeepSpeedStrategy,
    LightningModule,
    MixedPrecision,
    SingleDeviceStrategy,
    Trainer,
)


@dataclass(frozen=True)
class Replicas:
    """How the averaged gradient lies on the ranks: every one of ``ranks`` holds all of it, and this is ``rank``."""

    rank: int
    ranks: int


def replicas(trainer: Trainer) -> Replicas | None:
    """The replicas of a strategy that replicates the gradient, and None for one that does not."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy):
        return Replicas(strategy.global_rank, strategy.world_size)
    return Replicas(0, 1) if isinstance(strategy, SingleDeviceStrategy) else None


def effective_batch_size(trainer: Trainer, batch_size: int | None = None) -> int | None:
    """Samples of an optimizer step: per-device batch, times accumulation, times data-parallel ranks.

    Args:
        trainer: with its training data set up.
        batch_size: per-device batch size where the user has given it; else it is read from the loader.

    Returns:
        None where it cannot be read: no loader or several, or one that does not tell its batch size.
    """
    if batch_size is None:
        loader = trainer.train_dataloader
        batch_size = getattr(loader, "batch_size", None)
        if batch_size is None:
            batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(batch_size, int):
        return None
    return batch_size * trainer.accumulate_grad_batches * trainer.world_size


def optimizer_parameters(module: LightningModule, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by their names in the module, in the order of its groups."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names.get(id(parameter), f"parameter_{i}"): parameter for i, parameter in enumerate(parameters)}


def ready_gradients(
    trainer: Trainer, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The gradients in ``on_before_optimizer_step``: accumulated, averaged over ranks, unscaled, before clipping."""
    gradients = {name: p.grad.detach() for name, p in parameters.items() if p.grad is not None}
    scale = _remaining_scale(trainer, optimizer)
    return gradients if scale == 1.0 else {name: gradient / scale for name, gradient in gradients.items()}


def loss_scale(trainer: Trainer) -> float:
    """The factor of the loss under 16-mixed, else 1."""
    plugin = trainer.precision_plugin
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return scaler.get_scale() if scaler is not None else 1.0


def _remaining_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    # Lightning leaves the unscaling to a fused optimizer's step, and tells by this private attribute of torch.
    return loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
