"""Final training loss over learning rate, as the grid measured it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from grid import FAR
from runs import CLEAR, Results, alike, half_octaves
from training import Run
from workloads import Workload

CAP = FAR - 1
"""An excess loss is counted up to here: beyond it the grid is not meant to know more."""


@dataclass(frozen=True)
class Curve:
    """Loss over learning rate at one batch size: straight between measured rates, both in logs.

    Attributes:
        rates: log2 of the learning rates, ascending, ``[n]``.
        losses: mean over seeds, ``[n]``; infinite where a run diverged. One is finite.
    """

    rates: np.ndarray
    losses: np.ndarray

    @property
    def best_rate(self) -> float:
        """Log2 of the rate with the lowest loss."""
        return float(self.rates[np.argmin(self.losses)])

    @property
    def interior(self) -> bool:
        """Whether the loss is 5% above the best on both sides."""
        high, best = self.losses > CLEAR * self.losses.min(), int(np.argmin(self.losses))
        return bool(high[:best].any() and high[best + 1 :].any())

    def excess(self, rates: np.ndarray) -> np.ndarray:
        """Loss over that of the best rate, less 1, at log2 rates of any shape; at most :data:`CAP`, there where it diverges.

        Beyond the rates that were measured it is that of the last one, and so a lower bound.
        """
        finite = np.isfinite(self.losses)
        logs = np.log(self.losses[finite] / self.losses.min())
        excess = np.minimum(np.expm1(np.interp(rates, self.rates[finite], logs)), CAP)
        return np.where(self.diverges(rates), CAP, excess)

    def diverges(self, rates: np.ndarray) -> np.ndarray:
        """Whether the measured rate next to each of the log2 rates diverged."""
        middles = (self.rates[1:] + self.rates[:-1]) / 2
        return np.isinf(self.losses)[np.searchsorted(middles, rates)]

    def is_bound(self, rates: np.ndarray) -> np.ndarray:
        """Whether the excess at each of the log2 rates is only known to be at least as high as :meth:`excess` says."""
        outside = (rates < self.rates[0]) | (rates > self.rates[-1])
        return outside | (self.excess(rates) >= CAP)


@dataclass(frozen=True)
class Measured:
    """Final losses at one batch size.

    Attributes:
        rates: log2 of the learning rates, ascending, ``[n]``.
        losses: ``[n, seeds]``; infinite where the run diverged, NaN where there is none.
    """

    rates: np.ndarray
    losses: np.ndarray

    @property
    def seeds(self) -> int:
        """How many seeds there are at the best rate."""
        return int((~np.isnan(self.losses[self.rates == self.mean().best_rate])).sum())

    def mean(self) -> Curve:
        """The mean over seeds, at a batch size that has a rate which did not diverge."""
        curve = self.curve()
        assert curve is not None
        return curve

    def curve(self, weights: np.ndarray | None = None) -> Curve | None:
        """The mean over seeds with weights ``[seeds]``, 1 by default; None where every rate diverged.

        A rate of whose runs none has a weight keeps the plain mean of those that it has.
        """
        there = ~np.isnan(self.losses)
        weight = np.where(there, 1.0 if weights is None else weights, 0.0)
        weight = np.where(weight.any(1, keepdims=True), weight, there)
        terms = np.where(weight > 0, self.losses, 0.0) * np.where(weight > 0, weight, 1.0)
        means = terms.sum(1) / weight.sum(1)
        return Curve(self.rates, means) if np.isfinite(means).any() else None


def measured(results: Results, like: Run) -> Measured | None:
    """The runs that differ from one in rate and seed only; None where there are none."""
    found: dict[int, dict[int, float]] = {}
    for run, row in alike(results, like).items():
        at_rate = found.setdefault(half_octaves(run.learning_rate), {})
        at_rate[run.seed] = math.inf if row["diverged"] else row["train_loss"]
    if not found:
        return None
    seeds = 1 + max(seed for at_rate in found.values() for seed in at_rate)
    losses = [[found[k].get(seed, math.nan) for seed in range(seeds)] for k in sorted(found)]
    return Measured(np.array(sorted(found)) / 2, np.array(losses))


def by_batch_size(results: Results, references: Sequence[Run]) -> dict[int, Measured]:
    """The losses at each batch size that has a rate which did not diverge."""
    found = {like.batch_size: measured(results, like) for like in references}
    return {size: losses for size, losses in found.items() if losses is not None and losses.curve() is not None}


def seed_spread(losses: Measured) -> float:
    """Standard deviation of the log loss over seeds: root mean square over the rates within half an octave of the best.

    NaN where none of them has two seeds.
    """
    near = losses.losses[np.abs(losses.rates - losses.mean().best_rate) <= 0.5]
    of_rates = [np.log(at_rate[np.isfinite(at_rate)]) for at_rate in near]
    variances = [logs.var(ddof=1) for logs in of_rates if len(logs) > 1]
    return math.sqrt(sum(variances) / len(variances)) if variances else math.nan


def noise_runs(results: Results, workload: Workload, best: Mapping[int, float]) -> dict[int, list[tuple[Run, Any]]]:
    """The runs along which the noise scale was measured, by batch size, in the order of their seeds.

    Args:
        results: of the workload.
        workload: whose they are.
        best: log2 of the best rate by batch size; the runs are those at the rate nearest to it.
    """
    found: dict[int, list[tuple[Run, Any]]] = {}
    for size in best:
        of_size = [run for run in results if run.noise and run.batch_size == size and run.samples == workload.samples]
        if of_size:
            away = {run: abs(math.log2(run.learning_rate) - best[size]) for run in of_size}
            nearest = [run for run in of_size if away[run] == min(away.values())]
            found[size] = [(run, results[run]["noise_scale"]) for run in sorted(nearest, key=lambda run: run.seed)]
    return found
