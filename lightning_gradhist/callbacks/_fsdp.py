"""FSDP1, as Lightning's ``FSDPStrategy`` uses it."""

from __future__ import annotations

from typing import Any

from lightning_gradhist import _flat
from lightning_gradhist._flat import FlatPiece
from lightning_gradhist.callbacks._lightning import Trainer


def is_fsdp(trainer: Trainer) -> bool:
    """Whether the strategy is FSDP1; by name, as Lightning's classes are there twice."""
    return any(cls.__name__ == "FSDPStrategy" for cls in type(trainer.strategy).__mro__)


def fsdp_pieces(trainer: Trainer) -> dict[int, FlatPiece]:
    """The parameters that FSDP1 has cut up, by ``id``; empty without FSDP1, and where it shards nothing (NO_SHARD)."""
    return {id(parameter): piece for parameter, piece in _flat.fsdp_pieces(_modules(trainer)) if piece is not None}


def end_forward(trainer: Trainer) -> None:
    """Ends a forward pass that no backward pass follows, by which FSDP1 would lose gradients of the next one."""
    _flat.end_forward(_modules(trainer))


def _modules(trainer: Trainer) -> list[Any]:
    if not is_fsdp(trainer):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    return list(FSDP.fsdp_modules(trainer.strategy.model))  # type: ignore[arg-type]
