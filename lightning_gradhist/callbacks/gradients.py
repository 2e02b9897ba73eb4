"""The gradient that an optimizer is about to use, and which part of it this rank answers for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.rows import plain_name


@dataclass(frozen=True)
class Replicas:
    """How the averaged gradient lies on the ranks: every one of ``ranks`` holds all of it, and this is ``rank``."""

    rank: int
    ranks: int


def is_a(thing: object, *names: str) -> bool:
    """Whether a class of one of these names is among a thing's own, or those of the optimizer within an adaptor.

    By name, so that both packages of Lightning count, and optimizers that are not installed here.
    """
    classes = {cls.__name__ for cls in type(getattr(thing, "inner", thing)).__mro__}
    return not classes.isdisjoint(names)


def replicas(trainer: Trainer) -> Replicas | None:
    """The replicas of a strategy that replicates the gradient, and None for one that does not."""
    strategy: Any = trainer.strategy
    if is_a(strategy, "DDPStrategy") and not is_a(strategy, "DeepSpeedStrategy"):
        return Replicas(strategy.global_rank, strategy.world_size)
    return Replicas(0, 1) if is_a(strategy, "SingleDeviceStrategy") else None


def effective_batch_size(trainer: Trainer, batch_size: int | None = None) -> int | None:
    """Samples of an optimizer step: per-device batch, times accumulation, times data-parallel ranks.

    Args:
        trainer: with its training data set up.
        batch_size: per-device batch size where the user has given it; else it is read from the loader. Under manual
            optimization, where only the user knows how much is accumulated, samples of a step on one device.

    Returns:
        None where it cannot be read: no loader or several, one that does not tell its batch size, or manual
        optimization.
    """
    automatic = trainer.lightning_module.automatic_optimization
    if batch_size is None and automatic:
        loader = trainer.train_dataloader
        batch_size = getattr(loader, "batch_size", None)
        if batch_size is None:
            batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    if not isinstance(batch_size, int):
        return None
    return batch_size * (trainer.accumulate_grad_batches if automatic else 1) * trainer.world_size


def full_batches(trainer: Trainer) -> float:
    """Number of batches of an epoch on this rank that are as large as the others; infinite where it is not known."""
    loader = trainer.train_dataloader
    batches = trainer.num_training_batches
    uneven = (
        isinstance(loader, DataLoader)
        and isinstance(loader.batch_size, int)
        and not loader.drop_last
        and math.isfinite(batches)
        and batches == len(loader)
        and isinstance(loader.sampler, Sized)
        and len(loader.sampler) % loader.batch_size > 0
    )
    return batches - 1 if uneven else batches


def is_short_step(trainer: Trainer) -> bool:
    """Whether the present optimizer step has fewer samples than the others: the last of an epoch may."""
    seen = trainer.fit_loop.epoch_loop.batch_idx + 1
    short_window = seen % trainer.accumulate_grad_batches > 0
    return trainer.is_last_batch and (short_window or full_batches(trainer) < trainer.num_training_batches)


def least_over_ranks(value: float, trainer: Trainer) -> float:
    """The smallest of the ranks' values; to be called on every rank."""
    if trainer.world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=trainer.lightning_module.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return float(least)


def model_shapes(module: LightningModule) -> dict[str, list[int]]:
    """Names and shapes of the parameters that are trained, by which a record knows its model."""
    return {
        plain_name(name): list(p.shape)  # the same model, compiled or not
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def optimizer_parameters(module: LightningModule, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by their names in the module, in the order of its groups."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names.get(id(parameter), f"parameter_{i}"): parameter for i, parameter in enumerate(parameters)}


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, which is how Adam treats it; any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def ready_gradients(
    trainer: Trainer, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The gradients in ``on_before_optimizer_step``: accumulated, averaged over ranks, unscaled, before clipping.

    They are dense and real, whatever the layer made.
    """
    gradients = {name: _dense(p.grad.detach()) for name, p in parameters.items() if p.grad is not None}
    scale = _remaining_scale(trainer, optimizer)
    return gradients if scale == 1.0 else {name: gradient / scale for name, gradient in gradients.items()}


def loss_scale(trainer: Trainer) -> float:
    """The factor of the loss under 16-mixed, else 1."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def _dense(gradient: Tensor) -> Tensor:
    return as_real(gradient.to_dense() if gradient.layout != torch.strided else gradient)


def _remaining_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    # Lightning leaves the unscaling to a fused optimizer's step, and tells by this private attribute of torch.
    return loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
