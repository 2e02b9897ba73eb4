"""An absolute learning rate without a reference: the best single step along the optimizer's own direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradhist.intervals import ratio_estimate
from lightning_gradhist.ratio import MAX_SPREAD

GREEDY = "greedy"
PILOT_SHARES = tuple(4.0**k for k in range(-7, 3))
"""Lengths of the steps that look for the minimum, as shares of the length of all weights together."""
PILOT_STEPS, FITTED_STEPS = 2, 6
"""The fewest steps that find the minimum, and that measure it."""


class NoGreedyRateError(ValueError):
    """The loss along the optimizer's steps does not tell a best length; the message says why."""


@dataclass(frozen=True)
class GreedyRate:
    """The best length of a single step, with its interval.

    Attributes:
        value: in the units of the lengths that it was measured with.
        lower: lower end of the interval.
        upper: upper end of the interval.
        confidence: probability that the interval is meant to hold the true value with.
        steps: number of independent steps that were measured.
    """

    value: float
    lower: float
    upper: float
    confidence: float
    steps: int


def find_minimum(lengths: Sequence[float], changes: Sequence[Sequence[float]]) -> float:
    """Roughly the length at which the loss is lowest, from steps of very different lengths.

    Args:
        lengths: ascending, positive, each four times the one before.
        changes: one row a step: the change of the loss at each length; what is not finite counts as higher than all.

    Returns:
        within a factor of two of the best of the lengths, by the parabola through the two ends before it and itself.

    Raises:
        NoGreedyRateError: where there is no step, where no length lowers the loss, and where the longest does so most.
    """
    if not changes:
        raise NoGreedyRateError("no batch gave a finite loss")
    mean = _table(changes).nan_to_num(nan=math.inf).mean(0).tolist()
    best = min(range(len(lengths)), key=lambda i: mean[i])
    if not mean[best] < 0:
        raise NoGreedyRateError(
            "the loss falls at no length of the optimizer's step, or by less than its noise; more probe_batches tell"
        )
    if best == len(lengths) - 1:
        raise NoGreedyRateError(f"the loss falls along the whole range, up to a step of {lengths[-1]:.3g}")
    if best == 0:
        return lengths[0]
    slope, curvature = (
        float(column) for column in _parabolas(lengths[best - 1 : best + 1], [mean[best - 1 : best + 1]])
    )
    vertex = slope / curvature if curvature > 0 else math.inf
    return min(max(vertex, lengths[best] / 2), lengths[best] * 2)


def fitted_lengths(center: float) -> tuple[float, float, float]:
    """The lengths that :func:`greedy_rate` is given, around what :func:`find_minimum` found."""
    return center / 2, center, center * 2


def greedy_rate(lengths: Sequence[float], changes: Sequence[Sequence[float]], confidence: float = 0.95) -> GreedyRate:
    r"""The length of a step that lowers the loss most, from the loss at a few lengths of independent steps.

    .. math:: \eta^* = \frac{G \cdot E[V]}{E[V^T H V]}

    for a step :math:`-\eta V` (Li et al. 2024, arXiv 2405.14578, Lemma 1). Along each step the change of the loss is fitted
    by :math:`-a \eta + b \eta^2 / 2`, by least squares; then :math:`\eta^* = E[a] / E[b]`, with Fieller's interval from the
    steps' own ``a`` and ``b``. It is greedy: the best for one step from these weights. A run, which takes many, is often
    best at another rate.

    Args:
        lengths: at least two, positive, on both sides of the minimum.
        changes: one row an independent step, at least three: the change of the loss at each length, on data that the step
            was not made of, the same at each length.
        confidence: of the interval, between 0 and 1.

    Raises:
        NoGreedyRateError: where there are fewer than three steps, where a loss is not finite, where the curvature is not
            positive, where the interval spans a factor of two or more, and where the minimum lies beyond the lengths.

    Example:
        >>> slopes = (1.0, 1.1, 0.9, 1.05)  # of a loss with curvature 4
        >>> changes = [[-a * length + 2 * length**2 for length in (0.1, 0.2, 0.4)] for a in slopes]
        >>> rate = greedy_rate((0.1, 0.2, 0.4), changes)
        >>> round(rate.value, 3), rate.lower < 0.25 < rate.upper
        (0.253, True)
    """
    if len(changes) < 3:
        raise NoGreedyRateError(f"only {len(changes)} of its steps gave a finite loss")
    if not _table(changes).isfinite().all():
        raise NoGreedyRateError(f"the loss is not finite at a step of {lengths[-1]:.3g} or less")
    slopes, curvatures = (column.tolist() for column in _parabolas(lengths, changes))
    found = ratio_estimate(slopes, curvatures, scale=1.0, confidence=confidence)
    if not found.bounded:
        raise NoGreedyRateError("the loss has no minimum along the optimizer's steps that stands out of the noise")
    if not found.upper < MAX_SPREAD * found.lower:
        raise NoGreedyRateError(
            f"the best step is too uncertain: {found.lower:.3g} to {found.upper:.3g}; more probe_batches make it surer"
        )
    if not lengths[0] <= found.value <= lengths[-1]:
        raise NoGreedyRateError(
            f"the best step, {found.value:.3g}, lies beyond those that were tried, {lengths[0]:.3g} to {lengths[-1]:.3g}"
        )
    return GreedyRate(found.value, found.lower, found.upper, confidence, found.measurements)


def _parabolas(lengths: Sequence[float], changes: Sequence[Sequence[float]]) -> Tensor:
    """Slope downwards and curvature of each row, ``[2, steps]``."""
    unit = lengths[-1]  # so that the columns are of one size
    shares = torch.tensor(lengths, dtype=torch.float64) / unit
    design = torch.stack([-shares, shares.square() / 2], 1)
    fitted = torch.linalg.lstsq(design, _table(changes).T).solution
    return fitted / torch.tensor([[unit], [unit**2]], dtype=torch.float64)


def _table(changes: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(changes, dtype=torch.float64)
