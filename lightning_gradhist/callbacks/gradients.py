"""The gradient that an optimizer is about to use, and which part of it this rank answers for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.rows import plain_name
from lightning_gradhist.histogram import slice_of


@dataclass(frozen=True)
class Replicas:
    """How a whole tensor lies on the ranks: every one of ``ranks`` holds all of it, and this is ``rank``."""

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


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy is one under which parameters are DTensors: FSDP2, tensor parallelism."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def shares(trainer: Trainer) -> Replicas | None:
    """As :func:`replicas`, and with sharded strategies how a tensor lies that is not a DTensor: on every rank.

    None also where a DTensor's mesh leaves out ranks, of which nobody knows whether they hold the same.
    """
    if not is_sharded(trainer):
        return replicas(trainer)
    sharded = [p for p in trainer.lightning_module.parameters() if isinstance(p, DTensor)]
    whole = all(p.device_mesh.size() == trainer.world_size for p in sharded)
    return Replicas(trainer.global_rank, trainer.world_size) if whole else None


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
    if automatic:
        batch_size = batch_of_rank(trainer, batch_size)
    if not isinstance(batch_size, int):
        return None
    sampler = trainer.distributed_sampler_kwargs  # the ranks of a tensor-parallel group share their samples
    ranks = sampler["num_replicas"] if sampler else trainer.world_size
    return batch_size * (trainer.accumulate_grad_batches if automatic else 1) * ranks


def batch_of_rank(trainer: Trainer, batch_size: int | None = None) -> int | None:
    """Samples of a micro-batch on this rank: as given, else what the loader tells; None where it does not."""
    if batch_size is None:
        loader = trainer.train_dataloader
        batch_size = getattr(loader, "batch_size", None)
        if batch_size is None:
            batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return batch_size if isinstance(batch_size, int) else None


def full_batches(trainer: Trainer) -> float:
    """Number of batches of an epoch on this rank that are as large as the others; infinite where it is not known."""
    loader = trainer.train_dataloader
    batches = trainer.num_training_batches
    uneven = (
        isinstance(loader, DataLoader)
        and isinstance(loader.batch_size, int)
        and not loader.drop_last
        and math.isfinite(batches)
        and isinstance(loader.sampler, Sized)  # not so of an IterableDataset, which may have no length
        and batches == len(loader)
        and len(loader.sampler) % loader.batch_size > 0
    )
    return batches - 1 if uneven else batches


def is_short_step(trainer: Trainer) -> bool:
    """Whether the present optimizer step has fewer samples than the others: the last of an epoch may."""
    seen = trainer.fit_loop.epoch_loop.batch_idx + 1
    short_window = seen % trainer.accumulate_grad_batches > 0
    return trainer.is_last_batch and (short_window or full_batches(trainer) < trainer.num_training_batches)


def parts_of_a_step(trainer: Trainer) -> int:
    """Micro-batches of a step over all ranks, where this rank's gradient of the first of them can be told; else 1."""
    if not trainer.lightning_module.automatic_optimization or is_sharded(trainer):
        return 1
    return trainer.accumulate_grad_batches * trainer.world_size


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
    """The gradients from ``on_before_optimizer_step`` on: accumulated, averaged over ranks, unscaled.

    They are dense, real and in this rank's memory, whatever the layer made: of a DTensor this rank's shard.
    """
    gradients = {name: local_gradient(p) for name, p in parameters.items() if p.grad is not None}
    return _divided(gradients, _remaining_scale(trainer, optimizer))


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, dense and real: of a DTensor this rank's shard, laid out as the parameter's."""
    assert parameter.grad is not None
    gradient = parameter.grad.detach()
    if isinstance(parameter, DTensor) and isinstance(gradient, DTensor):
        gradient = gradient.redistribute(placements=parameter.placements)  # does nothing where it lies so already
    gradient = local(gradient)
    return as_real(gradient.to_dense() if gradient.layout != torch.strided else gradient)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def own_parts(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], replicas: Replicas) -> dict[str, Tensor]:
    """What this rank answers for, so that over all ranks each value of each tensor occurs once.

    Args:
        tensors: as this rank holds them, laid out as the parameters are; names may be missing, on all ranks the same.
        parameters: in the order of all ranks.
        replicas: of a tensor that is not a DTensor.

    Returns:
        A flat piece of each tensor, which may be empty, in the order of the parameter's memory: where ``n`` ranks hold the
        same, as whole tensors or as shards that are replicated over a dimension of a mesh, about an ``n``-th of all such
        tensors together.
    """
    own = {name: as_real(local(parameter.detach())) for name, parameter in parameters.items()}
    flat = {name: _flat(tensor, own[name]) for name, tensor in tensors.items()}
    by_holders: dict[Replicas, dict[str, int]] = {}
    for name, parameter in parameters.items():
        by_holders.setdefault(_holders(parameter, replicas), {})[name] = own[name].numel()
    shared = {holders: sizes for holders, sizes in by_holders.items() if holders.ranks > 1}
    pieces = {name: tensor[:0] for sizes in shared.values() for name, tensor in flat.items() if name in sizes}
    for holders, sizes in shared.items():
        pieces |= slice_of(flat, sizes, holders.rank, holders.ranks)
    return flat | pieces


class LocalGradients:
    """Copies of what backward leaves on this rank, before DDP averages it, until :meth:`take`.

    A backward replaces the copies of the one before it, so that with accumulation the last holds the whole step's.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.untouched = True
        """Whether no backward has come yet, and one is still awaited."""
        self._copies: dict[str, Tensor] = {}
        self._error: Exception | None = None
        self._handles = [
            parameter.register_post_accumulate_grad_hook(partial(self._copy, name))
            for name, parameter in parameters.items()
            if parameter.requires_grad
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # hooks stay with the parameters of this process: a copy is None

    def take(self, trainer: Trainer, times: int = 1) -> dict[str, Tensor]:
        """The gradients, unscaled, divided by a number; nothing is copied any more.

        Raises:
            Exception: what a copy has raised, as for want of memory.
        """
        self.remove()
        if self._error is not None:
            raise self._error
        return _divided(self._copies, loss_scale(trainer) / times)

    def remove(self) -> None:
        """Copies nothing any more."""
        self.untouched = False
        for handle in self._handles:
            handle.remove()

    def _copy(self, name: str, parameter: Tensor) -> None:
        self.untouched = False
        try:
            self._copies[name] = local_gradient(parameter).clone()  # type: ignore[arg-type]
        except Exception as error:  # within the user's backward, which goes on
            self._error = error


def before_update(optimizer: Optimizer, then: Callable[[], None]) -> RemovableHandle:
    """Calls a function whenever an optimizer is about to change the weights, and nothing more is done to gradients.

    Lightning hands backward and clipping to the optimizer's step as its closure, but under a GradScaler, where both come
    before the step. A step that the scaler skips does not come here, unless the optimizer is fused.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        closure = kwargs.get("closure")
        if closure is None:
            then()
            return None

        def closure_and_then() -> Any:
            loss = closure()
            then()
            return loss

        return args, {**kwargs, "closure": closure_and_then}

    return optimizer.register_step_pre_hook(hook)


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """Within the step of a fused optimizer under a GradScaler, whether it skips the step: 1 or 0, on the device."""
    return getattr(optimizer, "found_inf", None)


def loss_scale(trainer: Trainer) -> float:
    """The factor of the loss under 16-mixed, else 1."""
    scaler = loss_scaler(trainer)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def loss_scaler(trainer: Trainer) -> Any:
    """The GradScaler of 16-mixed, which may skip steps, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def clips_by_norm(trainer: Trainer) -> bool:
    """Whether a trainer with a ``gradient_clip_val`` clips the norm, as it does unless told, and not each value."""
    return trainer.gradient_clip_algorithm in (None, "norm")  # else an enumeration, whose members equal their values


def clip(trainer: Trainer, parameters: Iterable[Tensor]) -> None:
    """Clips gradients as the trainer would by itself."""
    limit = trainer.gradient_clip_val
    if limit:
        utils = torch.nn.utils
        (utils.clip_grad_norm_ if clips_by_norm(trainer) else utils.clip_grad_value_)(parameters, limit)


def gradient_for(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A real gradient in the form that the optimizer takes it in."""
    return (torch.view_as_complex(gradient) if parameter.is_complex() else gradient).to(parameter.dtype)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_once(optimizer: Optimizer) -> None:
    """A step of an optimizer that is a copy: a scheduler has put its own in the place of the original's ``step``."""
    type(optimizer).step(optimizer)  # type: ignore[call-arg]


def _holders(parameter: Tensor, replicas: Replicas) -> Replicas:
    """The ranks that hold the same of a parameter as this one does."""
    if not isinstance(parameter, DTensor):
        return replicas
    mesh, rank, ranks = parameter.device_mesh, 0, 1
    for dim, (placement, position) in enumerate(zip(parameter.placements, mesh.get_coordinate() or (), strict=False)):
        if placement.is_replicate():
            rank, ranks = rank * mesh.size(dim) + position, ranks * mesh.size(dim)
    return Replicas(rank, ranks)


def _flat(tensor: Tensor, like: Tensor) -> Tensor:
    # One order for gradient and second moment; no copy where they lie in memory as the parameter does (channels_last).
    if like.is_contiguous():
        return tensor.reshape(-1)
    return tensor.permute(sorted(range(like.dim()), key=like.stride, reverse=True)).reshape(-1)


def _divided(gradients: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return gradients if scale == 1.0 else {name: gradient / scale for name, gradient in gradients.items()}


def _remaining_scale(trainer: Trainer, optimizer: Optimizer) -> float:
    # Lightning leaves the unscaling to a fused optimizer's step, and tells by this private attribute of torch.
    return loss_scale(trainer) if getattr(optimizer, "_step_supports_amp_scaling", False) else 1.0
