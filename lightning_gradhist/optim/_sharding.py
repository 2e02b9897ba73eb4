"""Parameters of which each rank has a part: what the ranks find for theirs is added up, so that it is the whole one's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gradhist._dtensor import is_dtensor, local
from lightning_gradhist._flat import fsdp_piece

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(param: Tensor) -> bool:
    """Whether other ranks hold other parts of a parameter."""
    return bool(_sharded_dims(param)) if is_dtensor(param) else fsdp_piece(param) is not None


def any_sharded(params: Iterable[Tensor]) -> bool:
    """Whether one of them is; plain parameters without a mark, mostly all, are not asked one by one."""
    if torch.compiler.is_compiling():  # which cannot look into a parameter's dictionary
        return any(map(is_sharded, params))
    return any(is_sharded(param) for param in params if type(param) is not Parameter or param.__dict__)


def sum_over_shards(params: Iterable[Tensor], sums: Mapping[Tensor, Tensor]) -> None:
    """Add up what each rank found for its shard of a parameter, in place, in one all-reduce for each mesh dimension.

    To be called on every rank with the same parameters in the same order: every sharded one takes its place in the
    collective, whether or not this rank has a part of it or a gradient for it. ``sums`` are the local ones, ``[2]`` each.
    """
    by_ranks: dict[Any, list[Tensor]] = {}
    for param in params:
        if is_sharded(param):
            by_ranks.setdefault(_ranks(param), []).append(param)
    for (where, how), sharded in by_ranks.items():
        groups, device = [where], how
        if is_dtensor(sharded[0]):
            groups, device = [where.get_group(dim) for dim in how], local(sharded[0]).device
        zero = torch.zeros(2, dtype=torch.float64, device=device)
        table = torch.stack([sums[param].to(zero) if param in sums else zero for param in sharded])
        for group in groups:
            torch.distributed.all_reduce(table, group=group)
        for row, param in zip(table, sharded, strict=True):
            if param in sums:
                sums[param].copy_(row)


def _ranks(param: Tensor) -> tuple[Any, Any]:
    """Equal for parameters whose parts are on the same ranks: mesh and dimensions, or process group and device."""
    if is_dtensor(param):
        return param.device_mesh, _sharded_dims(param)
    piece = fsdp_piece(param)
    assert piece is not None
    return piece.others, piece.device


def _sharded_dims(param: DTensor) -> tuple[int, ...]:
    # not is_shard(): FSDP2 over tensor parallelism has strided shards, for which that is False
    return tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
