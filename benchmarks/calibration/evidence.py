"""All that the grids have measured so far, as the sections of the page want it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from curves import Measured, by_batch_size, noise_runs
from grid import SIDE, at_equal_steps, middle, references
from runs import Results, half_octaves, read
from training import Run
from transfers import Bench
from workloads import WORKLOADS, Workload

WARM = 0.05
"""The first moment after this share of the samples is the one after warm-up."""
METRICS = {"simple": "B_simple", "adam": "B_adam"}
FIT, MEAN = "Theorem 5 fit", "B_adam mean"

Moments = Sequence[Mapping[str, Any]]
"""What a run measured of the noise scale, one after another."""


def at_start(moments: Moments, metric: str, samples: int) -> float:
    """The value at the initial weights."""
    return float(moments[0][metric])


def warmed_up(moments: Moments, metric: str, samples: int) -> float:
    """The first value after 5% of the samples."""
    return next((float(m[metric]) for m in moments if m["samples"] >= WARM * samples), math.nan)


def mean(moments: Moments, metric: str, samples: int) -> float:
    """The mean over the samples of the run, without the moments whose interval has no bound: NaN where none has."""
    bounded = np.array([is_bounded(m, metric) for m in moments])
    weights = _weights(moments, samples)[bounded]
    values = np.array([m[metric] for m in moments])[bounded]
    return float((weights * values).sum() / weights.sum()) if bounded.any() else math.nan


def median(moments: Moments, metric: str, samples: int) -> float:
    """The median over the samples of the run, of all moments."""
    values = np.array([m[metric] for m in moments])
    order = np.argsort(values)
    cumulative = _weights(moments, samples)[order].cumsum()
    return float(values[order][np.searchsorted(cumulative, cumulative[-1] / 2)])


OF_A_RUN: dict[str, Callable[[Moments, str, int], float]] = {
    "start": at_start,
    "after warm-up": warmed_up,
    "mean": mean,
    "median": median,
}
"""One noise scale out of the many that a run measured."""


def _weights(moments: Moments, samples: int) -> np.ndarray:
    """Samples that each moment stands for: those nearer to it than to its neighbours."""
    at = np.array([float(m["samples"]) for m in moments])
    return np.diff(np.concatenate([at[:1], (at[1:] + at[:-1]) / 2, [samples]]))


def is_bounded(moment: Mapping[str, Any], metric: str) -> bool:
    """Whether the interval of a measurement is bounded above, and below by more than zero."""
    return bool(moment[f"{metric}_lower"] > 0 and moment[f"{metric}_upper"] < math.inf)


def median_of(values: np.ndarray) -> float:
    """The median of what there is; NaN of nothing."""
    there = values[~np.isnan(values)]
    return float(np.median(there)) if there.size else math.nan


def samples_to_target(results: Results, references: Collection[Run]) -> dict[float, dict[int, float]]:
    """Samples to each target loss by batch size, at the rate where they are fewest; targets and sizes in ascending order.

    They are averaged over seeds; a rate with a run that does not reach the target does not count.
    """
    found: dict[float, dict[int, dict[int, list[float]]]] = {}
    settings = {(like.optimizer, like.eps, like.samples, like.loss_scale, like.batch_size) for like in references}
    for run, row in results.items():
        if run.noise or (run.optimizer, run.eps, run.samples, run.loss_scale, run.batch_size) not in settings:
            continue
        for target, samples in row["samples_to_target"]:
            by_rate = found.setdefault(target, {}).setdefault(run.batch_size, {})
            by_rate.setdefault(half_octaves(run.learning_rate), []).append(math.inf if samples is None else samples)
    fewest = {
        target: {size: min(sum(s) / len(s) for s in by_rate.values()) for size, by_rate in sorted(by_size.items())}
        for target, by_size in sorted(found.items())
    }
    return {t: {size: s for size, s in by_size.items() if math.isfinite(s)} for t, by_size in fewest.items()}


def tradeoff_fit(samples: Mapping[int, float]) -> tuple[float, float]:
    """Theorem 5's line ``1/S = -B_noise / E + 1/S_min`` through the samples ``E`` and steps ``S = E / B``, least squares.

    Returns:
        the noise scale in samples and ``S_min``; NaN where there are fewer than three sizes or the line rises.
    """
    if len(samples) < 3:
        return math.nan, math.nan
    sizes, needed = np.array(list(samples), float), np.array(list(samples.values()))
    slope, intercept = np.polyfit(1 / needed, sizes / needed, 1)
    return (float(-slope), float(1 / intercept)) if slope < 0 < intercept else (math.nan, math.nan)


@dataclass(frozen=True)
class Evidence:
    """The runs of one workload, and what follows from them at once.

    Attributes:
        workload: whose they are.
        results: its table.
    """

    workload: Workload
    results: Results

    @cached_property
    def references(self) -> list[Run]:
        """A run of Adam at equal samples for each batch size."""
        return references(self.workload)

    @property
    def middle(self) -> Run:
        """The run at equal samples at the middle batch size."""
        return next(run for run in self.references if run.batch_size == middle(self.workload))

    @cached_property
    def losses(self) -> dict[int, Measured]:
        """Adam's losses at equal samples, by batch size."""
        return by_batch_size(self.results, self.references)

    @property
    def losses_without_largest(self) -> dict[int, Measured]:
        """Adam's losses at equal samples, but for the largest batch size."""
        return dict(list(self.losses.items())[:-1])

    @cached_property
    def losses_at_equal_steps(self) -> dict[int, Measured]:
        """Adam's losses at equal steps, by batch size; none until every batch size has some."""
        losses = by_batch_size(self.results, [at_equal_steps(self.workload, like) for like in self.references])
        return losses if len(losses) == len(self.references) else {}

    @cached_property
    def best_rates(self) -> dict[int, float]:
        """Log2 of the best rate at equal samples, by batch size."""
        return {size: losses.mean().best_rate for size, losses in self.losses.items()}

    @cached_property
    def noise(self) -> dict[int, list[tuple[Run, Moments]]]:
        """The runs that measured the noise scale, by batch size."""
        return noise_runs(self.results, self.workload, self.best_rates)

    @cached_property
    def needed(self) -> dict[float, dict[int, float]]:
        """Samples to each target by batch size."""
        return samples_to_target(self.results, self.references)

    @cached_property
    def common(self) -> dict[float, np.ndarray]:
        """Samples at each batch size to the targets that all of them reach."""
        return {t: np.array(list(of.values())) for t, of in self.needed.items() if list(of) == list(self.losses)}

    @cached_property
    def fits(self) -> dict[float, float]:
        """Theorem 5's noise scale by target; NaN where the line has the wrong slope."""
        return {target: tradeoff_fit(by_size)[0] for target, by_size in self.needed.items()}

    @cached_property
    def fitted_noise(self) -> float:
        """The geometric mean of the fits to the targets that all batch sizes reach; NaN of none."""
        fits = [math.log(self.fits[t]) for t in self.common if not math.isnan(self.fits[t])]
        return math.exp(sum(fits) / len(fits)) if fits else math.nan

    @cached_property
    def estimates(self) -> dict[str, np.ndarray]:
        """Noise scales by name of the estimate, ``[runs, batch sizes]``; NaN where there is none."""
        found = {}
        runs = max(map(len, self.noise.values()), default=0)
        for metric, called in METRICS.items() if runs else ():
            for name, estimate in OF_A_RUN.items():
                values = np.full((runs, len(self.losses)), math.nan)
                for column, size in enumerate(self.losses):
                    for row, (run, moments) in enumerate(self.noise.get(size, [])):
                        values[row, column] = estimate(moments, metric, run.samples)
                found[f"{called} {name}"] = values
        return found

    def bench(self, losses: Mapping[int, Measured]) -> Bench:
        """What transfers need: losses, and the noise scales that the runs at equal samples gave."""
        columns = [list(self.losses).index(size) for size in losses]
        noise = {name: values[:, columns] for name, values in self.estimates.items()}
        if not math.isnan(self.fitted_noise):
            noise[FIT] = np.full((1, len(losses)), self.fitted_noise)
        return Bench(losses, noise)


def collect(folder: Path, side: bool = False) -> dict[str, Evidence]:
    """By name the workloads, or the small grids beside them, that have a batch size with a finished run."""
    workloads = SIDE if side else WORKLOADS
    found = {name: Evidence(workload, read(folder / f"{name}.csv")) for name, workload in workloads.items()}
    return {name: evidence for name, evidence in found.items() if evidence.losses}
