"""DTensors, told from other tensors without importing them, which takes long, and which not every build of torch has.

Who has a DTensor has imported ``torch.distributed.tensor``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


def is_dtensor(tensor: object) -> TypeIs[DTensor]:
    if type(tensor) in (Tensor, Parameter):  # so that torch.compile does not come to look at sys.modules
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, in its own memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def from_shard(shard: Tensor, like: Tensor) -> Tensor:
    """A DTensor of this rank's shard, laid out as another; where the other is none, the shard as it is."""
    if not is_dtensor(like):
        return shard
    mesh, placements, stride = like.device_mesh, like.placements, like.stride()
    return like.from_local(shard, mesh, placements, run_check=False, shape=like.shape, stride=stride)


def placed_as(tensor: Tensor, other: Tensor) -> Tensor:
    """A DTensor laid out as another; to be called on every rank, as a sum over ranks may be due."""
    if is_dtensor(tensor) and is_dtensor(other) and tensor.placements != other.placements:
        return tensor.redistribute(placements=other.placements)
    return tensor
