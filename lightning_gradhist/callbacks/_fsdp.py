"""What FSDP1, ``FullyShardedDataParallel``, has made of the parameters; the one place that reads its private attributes."""

from __future__ import annotations

import torch

from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.pieces import FlatPiece


def is_fsdp(trainer: Trainer) -> bool:
    """Whether the strategy is FSDP1; by name, as Lightning's classes are there twice."""
    return any(cls.__name__ == "FSDPStrategy" for cls in type(trainer.strategy).__mro__)


def fsdp_pieces(trainer: Trainer) -> dict[int, FlatPiece]:
    """The parameters that FSDP1 has cut up, by ``id``; empty without FSDP1, and where it shards nothing (NO_SHARD).

    There is no public way to a parameter's whole shape but to gather it (``summon_full_params``), nor to the ranks that hold
    the same piece.
    """
    if not is_fsdp(trainer):
        return {}
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    found: dict[int, FlatPiece] = {}
    for part in FSDP.fsdp_modules(trainer.strategy.model):  # type: ignore[arg-type]
        handle = part._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        group = getattr(part, "_inter_node_pg", None)
        flat = handle.flat_param
        if flat._params is None:  # use_orig_params=False: the optimizer has the flat parameter itself
            values = flat.shape[0] - flat._shard_numel_padded
            found[id(flat)] = FlatPiece(torch.Size([sum(shape.numel() for shape in flat._shapes)]), values, group)
        else:
            for parameter, shape in zip(flat._params, flat._shapes, strict=True):
                found[id(parameter)] = FlatPiece(shape, None, group)
    return found
