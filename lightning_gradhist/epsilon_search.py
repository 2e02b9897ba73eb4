"""Which epsilon short runs are better with, and whether that stands out of their noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradhist.epsilon import EpsilonRange, choose_epsilon, largest_idle
from lightning_gradhist.intervals import average, covariance, student_quantile

SEARCH = "search"
MOST_DECADES = 5
"""Powers of ten that are tried at most."""
TRAJECTORIES = 6
"""Independent short runs of each epsilon."""
STEPS, LEAST_STEPS = 16, 4
"""Optimizer steps of a short run: where the data last, and at least."""
HELD_OUT = 4
"""Batches on each rank that the loss after a short run is measured on."""
CONTROLS = (0.5, 2.0, 4.0, 8.0)
"""Multiples of the learning rate at which the present epsilon is run too; :func:`control_rates` goes on from there."""
HIGHEST = 128.0
"""The highest of these multiples."""


@dataclass(frozen=True)
class Candidate:
    """An epsilon to be tried.

    Attributes:
        eps: in the units of the gradient.
        equal_rms: whether the learning rate is scaled so that the updates are as large as those of the present epsilon;
            else it stays.
    """

    eps: float
    equal_rms: bool = True


@dataclass(frozen=True)
class Difference:
    """A difference of losses, with its interval.

    Attributes:
        value: mean over the trajectories; infinite where a run diverged.
        lower: lower end of the interval.
        upper: upper end of the interval.
    """

    value: float
    lower: float
    upper: float


@dataclass(frozen=True)
class EpsilonTrial:
    """What the short runs of one epsilon came to.

    Attributes:
        candidate: what was tried.
        factor: of the learning rate.
        to_present: loss after the runs, minus that of the present epsilon at its rate.
        to_control: minus that of the present epsilon at the best of the :func:`control_rates`.
    """

    candidate: Candidate
    factor: float
    to_present: Difference
    to_control: Difference

    @property
    def better(self) -> bool:
        """Whether its loss is lower, with confidence, than that of the present epsilon, and this not for its rate."""
        return self.to_present.upper < 0 and self.to_control.upper < 0


@dataclass(frozen=True)
class EpsilonSearch:
    """A search for epsilon: the trials, and what they took.

    Attributes:
        present: epsilon that the others were compared with.
        control: the multiple of the learning rate, of the :func:`control_rates`, at which the present epsilon does best.
        control_to_present: loss at that rate, minus that at the present rate.
        trials: in the order of :func:`candidates`.
        confidence: with which all the intervals together are meant to hold.
        trajectories: independent runs of each.
        steps: optimizer steps of a run.
        gradients: number of gradients that the search took, over all ranks.
        forwards: number of forward passes beside, over all ranks.
    """

    present: float
    control: float
    control_to_present: Difference
    trials: tuple[EpsilonTrial, ...]
    confidence: float
    trajectories: int
    steps: int
    gradients: int
    forwards: int

    @property
    def chosen(self) -> EpsilonTrial | None:
        """The trial with the lowest mean loss of those that are better; None where the present epsilon stays."""
        better = (trial for trial in self.trials if trial.better)
        return min(better, key=lambda trial: trial.to_present.value, default=None)


def candidates(present: float, search_space: EpsilonRange, floor: float = 0.0) -> tuple[Candidate, ...]:
    """What is tried beside the present epsilon.

    The powers of ten from the largest that is idle to the upper end of the authors' search space, at most
    :data:`MOST_DECADES` of them, evenly spread. An epsilon below is the same as the largest that is idle; one above the
    pooled search space may still be good where a few coordinates carry the signal. Where the present one is not idle, also
    what ``"auto"`` would set, the largest that is, with the learning rate as it is: at updates as small as those of an
    epsilon that damps all, nothing would train.

    Args:
        present: from 0 up.
        search_space: of the gradients that the optimizer will see.
        floor: the smallest epsilon that the optimizer's dtype can hold.

    Example:
        >>> import torch
        >>> from lightning_gradhist import epsilon_range
        >>> space = epsilon_range({"weight": torch.logspace(-6, -3, 1001)})
        >>> [candidate.eps for candidate in candidates(1e-8, space)]
        [1e-05, 0.0001, 0.001]
        >>> [(candidate.eps, candidate.equal_rms) for candidate in candidates(1e-4, space)]
        [(1e-06, True), (1e-05, True), (0.001, True), (1e-06, False)]
    """
    idle = largest_idle(search_space)
    present_is_idle = choose_epsilon(present, search_space) == present
    lowest, highest = (round(math.log10(eps)) for eps in (idle, max(search_space.upper, idle)))
    decades = [float(f"1e{exponent}") for exponent in range(lowest + present_is_idle, highest + 1)]
    tried = [eps for eps in decades if eps != present and eps >= floor]
    last = len(tried) - 1
    if last >= MOST_DECADES:
        tried = [tried[round(i * last / (MOST_DECADES - 1))] for i in range(MOST_DECADES)]
    unscaled = max(idle, floor)
    as_auto = () if present_is_idle or unscaled == present else (Candidate(unscaled, equal_rms=False),)
    return (*(Candidate(eps) for eps in tried), *as_auto)


def control_rates(gains: Sequence[float]) -> tuple[float, ...]:
    """Multiples of the learning rate at which the present epsilon is run too: :data:`CONTROLS`, and further up by twos.

    The last is at least twice what makes the present epsilon descend as fast, to first order, as any candidate at equal
    update RMS, since descent along a noisy gradient is partly along its noise; but no more than :data:`HIGHEST`.

    Args:
        gains: descent along the gradient of these candidates' updates, as a multiple of that of the present epsilon's.
    """
    wanted = min(2 * max((gain for gain in gains if math.isfinite(gain)), default=0.0), HIGHEST)
    rates = [*CONTROLS]
    while rates[-1] < wanted:
        rates.append(2 * rates[-1])
    return tuple(rates)


def search_result(
    present: float,
    rates: Sequence[float],
    tried: Sequence[Candidate],
    factors: Sequence[float],
    losses: Sequence[Sequence[float]],
    confidence: float = 0.95,
    **cost: int,
) -> EpsilonSearch:
    r"""Compares the losses after short runs, with an interval for each difference.

    Runs are paired: those of one trajectory begin at the same weights and see the same batches, each trajectory others.
    The interval is that of Student's t over the trajectories' differences, two-sided, at :math:`1 - (1 - c) / n` for
    ``n`` candidates (Bonferroni), so that with confidence ``c`` none passes for better that is not.

    To be better than the present epsilon at its rate is not enough. At updates of one size the loss falls fastest, to first
    order, along the gradient itself, so that at a small rate, or in a short run, the largest epsilon always wins; over a
    whole run it loses. A higher rate then lowers the loss as well. So a candidate has to be better than the present epsilon
    also at the best of the :func:`control_rates`.

    Args:
        present: epsilon that the others are compared with.
        rates: multiples of the learning rate that it was run at beside.
        tried: candidates.
        factors: of the learning rate, one for each.
        losses: one row a trajectory: the loss after the run of the present epsilon, at its rate and at the others,
            then of the candidates.
        confidence: between 0 and 1.
        cost: ``steps``, ``gradients`` and ``forwards`` of the result.

    Raises:
        ValueError: where fewer than three trajectories have a finite loss of the present epsilon.
    """
    rows = [row for row in losses if math.isfinite(row[0])]
    if len(rows) < 3:
        raise ValueError(f"only {len(rows)} of {len(losses)} short runs with the present epsilon gave a finite loss")
    t = student_quantile(1 - (1 - confidence) / (2 * len(tried)), len(rows) - 1)
    own, *columns = zip(*rows, strict=True)
    controls, trials = columns[: len(rates)], columns[len(rates) :]
    best = min(range(len(rates)), key=lambda i: average(controls[i]))
    return EpsilonSearch(
        present=present,
        control=rates[best],
        control_to_present=_difference(controls[best], own, t),
        trials=tuple(
            EpsilonTrial(candidate, factor, _difference(after, own, t), _difference(after, controls[best], t))
            for candidate, factor, after in zip(tried, factors, trials, strict=True)
        ),
        confidence=confidence,
        trajectories=len(rows),
        **cost,
    )


def _difference(losses: Sequence[float], others: Sequence[float], t: float) -> Difference:
    if not all(map(math.isfinite, losses)):
        return Difference(math.inf, math.inf, math.inf)
    if not all(map(math.isfinite, others)):  # any loss is better than none
        return Difference(-math.inf, -math.inf, -math.inf)
    differences = [one - other for one, other in zip(losses, others, strict=True)]
    middle = average(differences)
    reach = t * math.sqrt(covariance(differences, differences) / len(differences))
    return Difference(middle, middle - reach, middle + reach)
