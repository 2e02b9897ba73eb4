"""Parameters that are sharded over ranks, and sums over all shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_gradhist._dtensor import is_dtensor, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def is_sharded(param: Tensor) -> bool:
    """Whether other ranks hold other parts of a parameter."""
    return is_dtensor(param) and bool(_sharded_dims(param))


def sum_over_shards(params: Iterable[Tensor], sums: Mapping[Tensor, Tensor]) -> None:
    """Add up what each rank found for its shard of a parameter, in place, in one all-reduce for each mesh dimension.

    To be called on every rank with the same parameters: every sharded one takes its place in the collective, whether
    or not this rank has a part of it or a gradient for it.

    Args:
        params: All parameters, in an order that is the same on every rank.
        sums: Parameters and their local sums ``[2]``.
    """
    by_mesh: dict[tuple[DeviceMesh, tuple[int, ...]], list[DTensor]] = {}
    for param in params:
        if is_dtensor(param) and is_sharded(param):
            by_mesh.setdefault((param.device_mesh, _sharded_dims(param)), []).append(param)
    for (mesh, dims), sharded in by_mesh.items():
        zero = torch.zeros(2, dtype=torch.float64, device=local(sharded[0]).device)
        table = torch.stack([sums[param].double() if param in sums else zero for param in sharded])
        for dim in dims:
            torch.distributed.all_reduce(table, group=mesh.get_group(dim))
        for row, param in zip(table, sharded, strict=True):
            if param in sums:
                sums[param].copy_(row)


def _sharded_dims(param: DTensor) -> tuple[int, ...]:
    # not is_shard(): FSDP2 over tensor parallelism has strided shards, for which that is False
    return tuple(dim for dim, placement in enumerate(param.placements) if not placement.is_replicate())
