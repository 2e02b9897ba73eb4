"""How a parameter lies on the ranks, where a strategy leaves each of them a flat piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class FlatPiece:
    """How a parameter lies on the ranks.

    Attributes:
        shape: of the whole parameter, which a rank has a flat piece of.
        values: of the piece, where it has been padded; else None.
        group: process group of the ranks that hold the same piece; None where no other does.
    """

    shape: torch.Size
    values: int | None
    group: Any
