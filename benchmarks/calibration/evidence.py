"""All that the grids have measured so far, as the sections of the page want it."""

import itertools
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from grid import CLEAR, FAR, SIDE, Results, alike, at_equal_steps, by_seed, half_octaves, middle, read, references
from training import Run
from workloads import WORKLOADS, Workload

CAP = FAR - 1  # an excess loss is counted up to here: beyond it the grid is not meant to know more
WARM = 0.05  # the first moment after this share of the samples is the one after warm-up
METRICS = {"simple": "B_simple", "adam": "B_adam"}
FIT, MEAN = "Theorem 5 fit", "B_adam mean"
SAMPLES, STEPS = "samples", "steps"  # what all runs of a grid have as many of

Moments = Sequence[Mapping[str, Any]]  # what a run measured of the noise scale, one after another


@dataclass(frozen=True)
class Curve:
    """Loss over learning rate at one batch size: straight between measured rates, both in logs."""

    rates: np.ndarray  # log2 of the learning rates, ascending, [n]
    losses: np.ndarray  # mean over seeds, [n]; infinite where a run diverged. One is finite

    @property
    def best_rate(self) -> float:
        """Log2 of the rate with the lowest loss."""
        return float(self.rates[np.argmin(self.losses)])

    @cached_property
    def vertex(self) -> float:
        """Log2 of the rate at the vertex of the parabola through the lowest loss and its neighbours, in logs; else the best."""
        k = int(np.argmin(self.losses))
        rates, logs = self.rates[max(k - 1, 0) : k + 2], np.log(self.losses[max(k - 1, 0) : k + 2])
        if len(rates) < 3 or not np.isfinite(logs).all():
            return self.best_rate
        bend, slope, _ = np.polyfit(rates - self.rates[k], logs, 2)
        return float(self.rates[k] - slope / bend / 2) if bend > 0 else self.best_rate

    @property
    def interior(self) -> bool:
        high, best = self.losses > CLEAR * self.losses.min(), int(np.argmin(self.losses))
        return bool(high[:best].any() and high[best + 1 :].any())

    def excess(self, rates: np.ndarray) -> np.ndarray:
        """Loss over that of the best rate, less 1, at log2 rates: :data:`CAP` where it diverges, that of the last one beyond."""
        finite = np.isfinite(self.losses)
        logs = np.log(self.losses[finite] / self.losses.min())
        excess = np.minimum(np.expm1(np.interp(rates, self.rates[finite], logs)), CAP)
        return np.where(self.diverges(rates), CAP, excess)

    def diverges(self, rates: np.ndarray) -> np.ndarray:
        """Whether the measured rate next to each of the log2 rates diverged."""
        middles = (self.rates[1:] + self.rates[:-1]) / 2
        return np.isinf(self.losses)[np.searchsorted(middles, rates)]


@dataclass(frozen=True)
class Measured:
    rates: np.ndarray  # log2 of the learning rates, ascending, [n]
    losses: np.ndarray  # [n, seeds]; infinite where the run diverged, NaN where there is none

    @property
    def seeds(self) -> int:
        return int((~np.isnan(self.losses[self.rates == self.mean().best_rate])).sum())

    def mean(self) -> Curve:
        """The mean over seeds, at a batch size that has a rate which did not diverge."""
        curve = self.curve()
        assert curve is not None
        return curve

    def curve(self, weights: np.ndarray | None = None) -> Curve | None:
        """The mean over seeds with weights ``[seeds]``, at a rate where none has one the plain mean; None where all diverged."""
        there = ~np.isnan(self.losses)
        weight = np.where(there, 1.0 if weights is None else weights, 0.0)
        weight = np.where(weight.any(1, keepdims=True), weight, there)
        means = (np.where(weight > 0, self.losses, 0.0) * weight).sum(1) / weight.sum(1)
        return Curve(self.rates, means) if np.isfinite(means).any() else None


@dataclass(frozen=True)
class Cell:
    """Losses over the learning rate of runs of one batch size and length."""

    grid: str  # cells of a grid have equal samples, or equal steps
    batch_size: int
    steps: int
    measured: Measured
    noise: Sequence[float] = ()  # in samples, of each run that measured it
    critical: Sequence[float] = (math.inf,)  # log2 of rates above which the first step raises the loss, one a seed


def by_batch_size(results: Results, references: Sequence[Run]) -> dict[int, Measured]:
    """The losses of runs like the references, at each batch size that has a rate which did not diverge."""
    found = {}
    for like in references:
        by_rate = by_seed(results, like)
        seeds = range(1 + max((seed for at_rate in by_rate.values() for seed in at_rate), default=0))
        losses = [[at_rate.get(seed, math.nan) for seed in seeds] for at_rate in by_rate.values()]
        measured = Measured(np.array([*by_rate]) / 2, np.array(losses).reshape(-1, len(seeds)))
        if measured.curve() is not None:
            found[like.batch_size] = measured
    return found


def drawn_curves(losses: Collection[Measured], draws: int, generator: np.random.Generator) -> Iterator[list[Curve]]:
    """The mean curves, then those of draws of the seeds with repetition; the mean where all rates that are drawn diverged."""
    yield [measured.mean() for measured in losses]
    seeds = max(measured.losses.shape[1] for measured in losses)
    for _ in range(draws):
        weights = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds)
        yield [measured.curve(weights[: measured.losses.shape[1]]) or measured.mean() for measured in losses]


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """A value ``[0]``, and the ends of the 95% interval of what was drawn ``[1:]``; NaN where nothing was."""
    low, high = np.quantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (math.nan, math.nan)
    return float(values[0]), float(low), float(high)


def seed_spread(losses: Measured) -> float:
    """Standard deviation of the log loss over seeds, root mean square over the rates within half an octave of the best."""
    near = losses.losses[np.abs(losses.rates - losses.mean().best_rate) <= 0.5]
    of_rates = [np.log(at_rate[np.isfinite(at_rate)]) for at_rate in near]
    variances = [logs.var(ddof=1) for logs in of_rates if len(logs) > 1]
    return math.sqrt(sum(variances) / len(variances)) if variances else math.nan


def noise_runs(results: Results, workload: Workload, best: Mapping[int, float]) -> dict[int, list[tuple[Run, Any]]]:
    """The runs that measured the noise scale at the rate nearest to the best, in log2: by batch size, in order of seeds."""
    by_size: dict[int, dict[float, list[tuple[Run, Any]]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(results, key=lambda run: run.seed):
        if run.noise and run.samples == workload.samples and run.batch_size in best:
            away = abs(math.log2(run.learning_rate) - best[run.batch_size])
            by_size[run.batch_size][away].append((run, results[run]["noise_scale"]))
    return {size: by_size[size][min(by_size[size])] for size in best if size in by_size}


def of_a_run(moments: Moments, metric: str, samples: int) -> dict[str, float]:
    """One noise scale out of the many that a run of so many samples measured, by name; NaN where there is none.

    Mean and median are over samples: each moment stands for those nearest to it. The mean is without unbounded ones.
    """
    at, values = (np.array([float(m[key]) for m in moments]) for key in ("samples", metric))
    weights = np.diff(np.concatenate([at[:1], (at[1:] + at[:-1]) / 2, [samples]]))
    bounded, order = np.array([is_bounded(m, metric) for m in moments]), np.argsort(values)
    share = weights[order].cumsum() / weights.sum()
    return {
        "start": float(values[0]),
        "after warm-up": next((float(v) for a, v in zip(at, values, strict=True) if a >= WARM * samples), math.nan),
        "mean": float(np.average(values[bounded], weights=weights[bounded])) if bounded.any() else math.nan,
        "median": float(values[order][np.searchsorted(share, 0.5)]),
    }


def is_bounded(moment: Mapping[str, Any], metric: str) -> bool:
    """Whether the interval of a measurement is bounded above, and below by more than zero."""
    return bool(moment[f"{metric}_lower"] > 0 and moment[f"{metric}_upper"] < math.inf)


def samples_to_target(results: Results, references: Collection[Run]) -> dict[float, dict[int, float]]:
    """Samples to each target loss by batch size, mean over seeds, at the rate where they are fewest and all reach it."""
    found: dict[float, dict[int, float]] = {}
    for like in references:
        of_size: dict[tuple[float, int], list[float]] = defaultdict(list)
        for run, row in alike(results, like).items():
            for target, samples in row["samples_to_target"]:
                of_size[target, half_octaves(run.learning_rate)].append(math.inf if samples is None else samples)
        for (target, _), samples in of_size.items():
            by_size, mean = found.setdefault(target, {}), sum(samples) / len(samples)
            if mean < by_size.get(like.batch_size, math.inf):
                by_size[like.batch_size] = mean
    return dict(sorted(found.items()))


def tradeoff_fit(samples: Mapping[int, float]) -> tuple[float, float]:
    """``B_noise`` and ``S_min`` of Theorem 5's line ``1/S = -B_noise / E + 1/S_min`` through samples ``E`` and ``S = E / B``."""
    if len(samples) < 3:
        return math.nan, math.nan
    sizes, needed = np.array(list(samples), float), np.array(list(samples.values()))
    slope, intercept = np.polyfit(1 / needed, sizes / needed, 1)
    return (float(-slope), float(1 / intercept)) if slope < 0 < intercept else (math.nan, math.nan)


class Evidence:
    """The runs of one workload, and what follows from them at once. Best rates are in log2, noise scales in samples."""

    def __init__(self, workload: Workload, results: Results) -> None:
        self.workload, self.results = workload, results
        # log2 of the first step's critical rates, by batch size
        self.critical: dict[int, list[float]] = defaultdict(list)
        # a run of Adam at equal samples for each batch size, and that at the middle one
        self.references = references(workload)
        self.middle = next(run for run in self.references if run.batch_size == middle(workload))
        # Adam's losses by batch size; at equal steps none until every batch size has some
        self.losses = by_batch_size(results, self.references)
        equal = by_batch_size(results, [at_equal_steps(workload, like) for like in self.references])
        self.losses_at_equal_steps = equal if len(equal) == len(self.references) else {}
        self.best_rates = {size: losses.mean().best_rate for size, losses in self.losses.items()}
        # the runs that measured the noise scale, by batch size
        self.noise = noise_runs(results, workload, self.best_rates)
        self.estimates = self._estimates()
        # samples to each target by batch size, to those that all reach as arrays; and Theorem 5's noise scales
        self.needed = samples_to_target(results, self.references)
        self.common = {t: np.array(list(of.values())) for t, of in self.needed.items() if list(of) == list(self.losses)}
        self.fits = {target: tradeoff_fit(by_size)[0] for target, by_size in self.needed.items()}
        fits = [math.log(self.fits[target]) for target in self.common if not math.isnan(self.fits[target])]
        self.fitted_noise = math.exp(sum(fits) / len(fits)) if fits else math.nan

    def _estimates(self) -> dict[str, np.ndarray]:
        """Noise scales by name of the estimate, ``[runs, batch sizes]``; NaN where there is none."""
        shape = (max(map(len, self.noise.values()), default=0), len(self.losses))
        found: dict[str, np.ndarray] = defaultdict(lambda: np.full(shape, math.nan))
        for (metric, called), (column, size) in itertools.product(METRICS.items(), enumerate(self.losses)):
            for row, (run, moments) in enumerate(self.noise.get(size, [])):
                for name, value in of_a_run(moments, metric, run.samples).items():
                    found[f"{called} {name}"][row, column] = value
        return dict(found)


def cells_of(evidence: Evidence) -> list[Cell]:
    """The cells of a workload, at equal samples and then at equal steps, those without a noise scale too."""
    workload, noise = evidence.workload, evidence.estimates.get(MEAN, np.empty((0, len(evidence.losses))))
    by_size = {size: noise[:, i][~np.isnan(noise[:, i])] for i, size in enumerate(evidence.losses)}
    equal = {n: m for n, m in evidence.losses_at_equal_steps.items() if workload.samples // n != workload.steps}
    runs = [(SAMPLES, n, workload.samples // n, m) for n, m in evidence.losses.items()]
    runs += [(STEPS, n, workload.steps, m) for n, m in equal.items()]
    return [Cell(*run, by_size.get(run[1], ()), evidence.critical.get(run[1], (math.inf,))) for run in runs]


def collect(folder: Path, side: bool = False) -> dict[str, Evidence]:
    """By name the workloads, or the small grids beside them, that have a batch size with a finished run."""
    workloads = SIDE if side else WORKLOADS
    found = {name: Evidence(workload, read(folder / f"{name}.csv")) for name, workload in workloads.items()}
    return {name: evidence for name, evidence in found.items() if evidence.losses}
