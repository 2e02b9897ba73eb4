"""How large the first step of a run may be: the critical rate, above which it raises the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_FINENESS, _SMALLEST = math.sqrt(2.0), 1 / 64


def largest_factor(loss_at: Callable[[float], float], largest: float) -> float | None:
    r"""By how much a first step may be multiplied before it raises the loss: from ``largest`` down, by :math:`\sqrt2` each.

    Args:
        loss_at: the loss after the step times a factor, the same number on all ranks; NaN where it is not finite.
        largest: the factor that is tried first.

    Returns:
        None where no factor down to 1/64 lowers the loss, or where the loss before the step is not known.
    """
    start, factor = loss_at(0.0), largest
    while factor >= _SMALLEST and not math.isnan(start):
        if loss_at(factor) <= start:
            return factor
        factor /= _FINENESS
    return None


def first_step(mean: Tensor, rate: float, eps: float) -> Tensor:
    r"""What Adam takes off the weights first, :math:`\eta\, g / (|g| + \epsilon)`, of a mean gradient."""
    return mean * rate / (mean.abs() + max(eps, torch.finfo(mean.dtype).tiny))
