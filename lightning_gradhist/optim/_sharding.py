"""Parameters that are spread over ranks: the local part of a DTensor, and sums over all parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in its own memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A DTensor laid out as another; to be called on every rank, as a sum over ranks may be due."""
    if isinstance(tensor, DTensor) and isinstance(other, DTensor) and tensor.placements != other.placements:
        return tensor.redistribute(placements=other.placements)
    return tensor


def mesh_of(tensor: Tensor) -> DeviceMesh | None:
    """The device mesh that a DTensor is spread over; None for any other tensor, with which it takes no common steps."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def is_sharded(param: Tensor) -> bool:
    """Whether other ranks hold other parts of a parameter."""
    return isinstance(param, DTensor) and bool(_sharded_dims(param))


def refuse_flat(params: Iterable[Tensor], whom: str) -> None:
    """Refuse parameters that are one rank's parts of a flat buffer, and do not say so by their type.

    Args:
        params: Parameters.
        whom: Name of the optimizer, whose norms of layers would silently be those of parts.

    Raises:
        TypeError: For the parameters of FSDP1 and of DeepSpeed's ZeRO stage 3.
    """
    # FSDP1 and DeepSpeed mark their parameters so; neither has a public test for it.
    for mark, name in (("_fsdp_flattened", "FSDP1 (FullyShardedDataParallel)"), ("ds_id", "DeepSpeed ZeRO")):
        for param in params:
            if hasattr(param, mark):
                raise TypeError(
                    f"{whom} needs the norm of each layer, but a parameter of shape {tuple(param.shape)} belongs to a "
                    f"flat partition of {name}. Shard with FSDP2 (torch.distributed.fsdp.fully_shard, Lightning's "
                    "ModelParallelStrategy), use DDP, or set layerwise=False."
                )


def sum_over_shards(params: Iterable[Tensor], sums: Mapping[Tensor, Tensor]) -> None:
    """Add up what each rank found for its part of a parameter, in place, in one all-reduce for each mesh dimension.

    To be called on every rank with the same parameters: every sharded one takes its place in the collective, whether
    or not this rank has a part of it or a gradient for it.

    Args:
        params: All parameters, in an order that is the same on every rank.
        sums: Parameters and their local sums ``[2]``.
    """
    by_mesh: dict[tuple[DeviceMesh, tuple[int, ...]], list[DTensor]] = {}
    for param in params:
        if isinstance(param, DTensor) and is_sharded(param):
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
