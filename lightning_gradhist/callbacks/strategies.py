"""Which rank holds what of a tensor, under which strategy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_gradhist import _flat
from lightning_gradhist._dtensor import is_dtensor, local
from lightning_gradhist._flat import FlatPiece
from lightning_gradhist.callbacks._deepspeed import is_deepspeed, is_told_apart, zero_pieces
from lightning_gradhist.callbacks._lightning import Trainer, is_a
from lightning_gradhist.histogram import flat_values
from lightning_gradhist.tensors import as_real

_DATA = "data_parallel"  # what Lightning calls the dimension of a mesh over which ranks have other samples
_HOOKS = "torch.distributed.algorithms.ddp_comm_hooks"
_AVERAGING = (f"{_HOOKS}.default_hooks", f"{_HOOKS}.post_localSGD_hook")
"""Modules whose hooks leave the ranks' mean; what then differs from rank to rank is noticed."""


@dataclass(frozen=True)
class Replicas:
    """How tensors lie on the ranks: every one of ``ranks`` holds all of a whole tensor, and this is ``rank``."""

    rank: int  # from 0 to ``ranks - 1``
    ranks: int
    over: tuple[tuple[DeviceMesh, int], ...] = ()  # what tells these ranks from others of the same number
    pieces: Mapping[int, FlatPiece] = field(default_factory=dict, compare=False)  # that FSDP1 or ZeRO left, by ``id``
    mesh: DeviceMesh | None = field(default=None, compare=False)  # all ranks, where DTensors may be on a part alone

    def holders(self, parameter: Tensor) -> Replicas:
        """The ranks that hold the same of a parameter as this one does."""
        piece = self.pieces.get(id(parameter))
        if piece is not None:
            group = piece.group
            return Replicas(0, 1) if group is None else Replicas(group.rank(), group.size())
        return _replicated(parameter, self.mesh) if isinstance(parameter, DTensor) else self

    def are_whole(self, parameter: Tensor) -> bool:
        """Whether every rank holds all of a parameter."""
        return not isinstance(parameter, DTensor) and id(parameter) not in self.pieces


def is_cut_up(trainer: Trainer) -> bool:
    """Whether ranks hold parts of parameters, so that none has a gradient of its own before they are averaged."""
    return is_sharded(trainer) or is_fsdp(trainer) or is_deepspeed(trainer)


def averages_in_backward(trainer: Trainer) -> bool:
    """Whether only a backward pass gives gradients, which are then the ranks' mean; else each rank can have its own first."""
    return is_sharded(trainer) or is_fsdp(trainer)


def is_fsdp(trainer: Trainer) -> bool:
    """Whether the strategy is FSDP1."""
    return is_a(trainer.strategy, "FSDPStrategy")


def is_sharded(trainer: Trainer) -> bool:
    """Whether the strategy is one under which parameters are DTensors: FSDP2, tensor parallelism."""
    return is_a(trainer.strategy, "ModelParallelStrategy")


def changing_hook(trainer: Trainer) -> str | None:
    """The name of a communication hook of DDP's that may leave another gradient than the ranks' mean, as PowerSGD's.

    Private, as there is no public way to ask.
    """
    for hook, state in getattr(trainer.strategy.model, "_comm_hooks", ()):
        averages = getattr(hook, "__module__", None) in _AVERAGING and not is_a(state, "PowerSGDState")
        if not averages:
            return getattr(hook, "__name__", repr(hook))
    return None


def replicas(trainer: Trainer) -> Replicas | None:
    """How a tensor that is not a DTensor lies on the ranks: each of them holds all of it.

    None where nobody knows: with other strategies, and where a DTensor's mesh leaves out ranks and is no part of the
    strategy's own. Along the dimensions that a part leaves out, ranks are taken to hold the same.
    """
    strategy: Any = trainer.strategy
    if is_sharded(trainer):
        mesh = strategy.device_mesh
        sharded = [p for p in trainer.lightning_module.parameters() if isinstance(p, DTensor)]
        known = all(_left_out(p.device_mesh, mesh) is not None for p in sharded)
        return Replicas(trainer.global_rank, trainer.world_size, mesh=mesh) if known else None
    if is_deepspeed(trainer) and not is_told_apart(trainer):
        return None
    if is_fsdp(trainer) or is_deepspeed(trainer):
        return Replicas(trainer.global_rank, trainer.world_size, pieces=flat_pieces(trainer))
    if is_a(strategy, "DDPStrategy"):
        return Replicas(strategy.global_rank, strategy.world_size)
    return Replicas(0, 1) if is_a(strategy, "SingleDeviceStrategy") else None


def flat_pieces(trainer: Trainer) -> dict[int, FlatPiece]:
    """The parameters of which each rank has a flat piece, by ``id``."""
    if is_deepspeed(trainer):
        return zero_pieces(trainer) if is_told_apart(trainer) else {}
    return {id(parameter): piece for parameter, piece in _flat.fsdp_pieces(_fsdp_modules(trainer)) if piece is not None}


def end_forward(trainer: Trainer) -> None:
    """Ends a forward pass that no backward pass follows, by which FSDP1 would lose gradients of the next one."""
    _flat.end_forward(_fsdp_modules(trainer))


def _fsdp_modules(trainer: Trainer) -> list[Any]:
    if not is_fsdp(trainer):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    return list(FSDP.fsdp_modules(trainer.strategy.model))  # type: ignore[arg-type]


def least_over_ranks(value: float, trainer: Trainer) -> float:
    """The smallest of the ranks' values; to be called on every rank."""
    if trainer.world_size == 1:
        return value
    least = torch.tensor(value, dtype=torch.float64, device=trainer.lightning_module.device)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return float(least)


def sum_over_ranks(trainer: Trainer, *numbers: float) -> list[float]:
    """The sums of the ranks' numbers; to be called on every rank."""
    if trainer.world_size == 1:
        return [*numbers]
    summed = torch.tensor(numbers, dtype=torch.float64, device=trainer.lightning_module.device)
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def own_parts(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], replicas: Replicas) -> dict[str, Tensor]:
    """What this rank answers for, so that over all ranks each value of each tensor occurs once.

    Tensors are laid out as the parameters are, and names may be missing, on all ranks the same. Of each there is a flat
    piece, which may be empty, in the order of the parameter's memory: where ``n`` ranks hold the same, as whole tensors or
    as shards that are replicated over a dimension of a mesh, about an ``n``-th of all such tensors together.
    """
    flat: dict[str, Tensor] = {}
    shared: dict[Replicas, dict[str, int]] = {}  # sizes of what several ranks hold
    for name, parameter in parameters.items():
        held, holders, piece = _held(parameter), replicas.holders(parameter), replicas.pieces.get(id(parameter))
        if name in tensors:
            values = _flattened(tensors[name], held)
            flat[name] = values if piece is None else values[: piece.values]
        if holders.ranks > 1:
            shared.setdefault(holders, {})[name] = held.numel()
    pieces = {name: flat[name][:0] for sizes in shared.values() for name in sizes if name in flat}
    for holders, sizes in shared.items():
        pieces |= slice_of(flat, sizes, holders.rank, holders.ranks)
    return flat | pieces


def _replicated(parameter: DTensor, whole: DeviceMesh | None) -> Replicas:
    """The ranks that hold the same shard of a DTensor as this one does."""
    mesh = parameter.device_mesh
    over = [(mesh, dim) for dim, placement in enumerate(parameter.placements) if placement.is_replicate()]
    over += [(whole, dim) for dim in _left_out(mesh, whole) or ()] if whole is not None else []
    rank, ranks = 0, 1
    for of, dim in over:
        rank, ranks = rank * of.size(dim) + of.get_local_rank(dim), ranks * of.size(dim)
    return Replicas(rank, ranks, tuple(over))


@lru_cache(64)
def _left_out(mesh: DeviceMesh, whole: DeviceMesh) -> list[int] | None:
    """The dimensions of a mesh that a part of it is without; None where it is no part, nor of all ranks.

    None, too, where it is without the data's: nobody averages such gradients, but perhaps the module.
    """
    names, all_names = mesh.mesh_dim_names or (), whole.mesh_dim_names or ()
    if mesh.size() == whole.size():
        return []
    if not set(names) < set(all_names) or whole[names] != mesh:
        return None
    left_out = [dim for dim, name in enumerate(all_names) if name not in names]
    return None if any(all_names[dim] == _DATA and whole.size(dim) > 1 for dim in left_out) else left_out


def _held(parameter: Tensor) -> Tensor:
    """What this rank holds of a parameter, in real numbers."""
    is_plain = not (is_dtensor(parameter) or parameter.dtype.is_complex)  # of thousands of them nearly all are
    return parameter if is_plain else as_real(local(parameter.detach()))


def _flattened(tensor: Tensor, like: Tensor) -> Tensor:
    # One order for gradient and second moment; no copy where they lie in memory as the parameter does (channels_last).
    if like.is_contiguous():
        return tensor.reshape(-1)
    return tensor.permute(sorted(range(like.dim()), key=like.stride, reverse=True)).reshape(-1)


def slice_of(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], rank: int, ranks: int
) -> Iterator[tuple[str, Tensor]]:
    """The part of a rank when all values of dense tensors, one after another, are cut into ``ranks`` equal parts.

    ``sizes`` has the numbers of values of all tensors in order, those that are not there, on any rank, included.
    """
    total = sum(sizes.values())
    first, last = rank * total // ranks, (rank + 1) * total // ranks
    start = 0
    for name, size in sizes.items():
        low, high = max(first - start, 0), min(last - start, size)
        start += size
        if name in tensors and low < high:
            yield name, flat_values(tensors[name])[0][low:high]
