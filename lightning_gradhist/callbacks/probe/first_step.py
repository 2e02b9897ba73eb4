"""How large the first step of a run may be: the critical rate, above which it raises the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FINENESS = math.sqrt(2.0)
"""From one factor that is tried to the next."""
_SMALLEST = 1 / 64


def largest_factor(loss_at: Callable[[float], float], largest: float) -> float | None:
    """By how much a first step may be multiplied before it raises the loss: from ``largest`` down, by :data:`FINENESS` each.

    Args:
        loss_at: the loss after the step times a factor, the same number on all ranks; NaN where it is not known.
        largest: the factor that is tried first.

    Returns:
        The first factor that does not raise the loss: infinite where that is ``largest``, 0 where none down to 1/64 is,
        and None where a loss is not known.
    """
    start, factor = loss_at(0.0), largest
    while factor >= _SMALLEST:
        loss = loss_at(factor)
        if not math.isfinite(start) or math.isnan(loss):
            return None
        if loss <= start:
            return factor if factor < largest else math.inf
        factor /= FINENESS
    return 0.0


def first_step(mean: Tensor, rate: float, eps: float) -> Tensor:
    r"""What Adam takes off the weights first, :math:`\eta\, g / (|g| + \epsilon)`, of a mean gradient."""
    return mean * rate / (mean.abs() + max(eps, torch.finfo(mean.dtype).tiny))
