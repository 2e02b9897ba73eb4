"""Tables that are added up over ranks, of which none is left waiting."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradhist.callbacks.strategies import Replicas
from lightning_gradhist.histogram import flat_values

_PIECE = 2**19  # values that a RankSum sends at once, which bounds its reserve


def checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """20 bits of the first values of each tensor, int64 ``[1]``: the same on ranks that have the same tensors."""
    few = [flat_values(tensor)[0][:64].float() for tensor in tensors.values()] or [torch.zeros(1, device="cpu")]
    bits = torch.cat([values.to(few[0].device) for values in few]).view(torch.int32)
    return bits.sum(dim=0, keepdim=True, dtype=torch.int64) % 2**20


class RankSum:
    """Adds up tables of all ranks, in place. A rank that could not make its own still takes part, from a reserve.

    Each method is to be called on every rank, and nothing but the reserve, which is made once on the device that they
    communicate on, can fail on one alone.
    """

    def __init__(self, replicas: Replicas, device: torch.device) -> None:
        self._ranks = replicas.ranks
        self._reserve = torch.empty(_PIECE if self._ranks > 1 else 0, dtype=torch.int64, device=device)

    def add_up(self, table: Tensor | None, size: int, missing: float) -> None:
        """Makes of the tables, int64 or float64 of so many values, their sum, 524,288 values at most in one all-reduce.

        A rank that could not make its own (None) has ``missing`` in each place, by which the others know.
        """
        for start in range(0, size if self._ranks > 1 else 0, _PIECE):
            if table is None:
                dtype = torch.float64 if isinstance(missing, float) else torch.int64
                piece = self._reserve[: size - start].view(dtype).fill_(missing)
            else:
                piece = table.view(-1)[start : start + _PIECE]
            torch.distributed.all_reduce(piece)

    def check(self, table: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Writes into the last two places of a table, before it is added up, what tells :meth:`mark_unlike`."""
        if self._ranks > 1:
            bits = checksum(gradients)
            table[-2:] = torch.cat([bits, bits**2]).to(table)

    def mark_unlike(self, table: Tensor, mark: float) -> None:
        """Fills the sum of tables, but for the last two places, if not all ranks have checked the same gradients."""
        if self._ranks > 1:  # the sum of squares is least where all are alike
            differ = (self._ranks * table[-1] != table[-2] ** 2) & (table[-1] >= 0)  # below 0 where a rank has no table
            table[:-2].masked_fill_(differ, mark)

    def all_true(self, mine: bool) -> bool:
        """Whether something is so on every rank."""
        if self._ranks == 1:
            return mine
        others = self._reserve[:1].fill_(int(not mine))
        torch.distributed.all_reduce(others)
        return int(others) == 0
