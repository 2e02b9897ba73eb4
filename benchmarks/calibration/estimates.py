"""One noise scale out of the many that a run measured, and the one that steps and samples to a loss tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from grid import Results, half_octaves
from training import Run

WARM = 0.05
"""The first moment after this share of the samples is the one after warm-up."""
METRICS = {"simple": "B_simple", "adam": "B_adam"}

Moments = Sequence[Mapping[str, Any]]


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


def mean_of_positive(moments: Moments, samples: int) -> float:
    """The mean of ``value`` over the samples of the run, without the moments that have none: NaN where none has."""
    values = np.array([m["value"] for m in moments], float)
    there = ~np.isnan(values)
    if not there.any():
        return math.nan
    return float(np.average(values[there], weights=_weights(moments, samples)[there]))


OF_A_RUN: dict[str, Callable[[Moments, str, int], float]] = {
    "start": at_start,
    "after warm-up": warmed_up,
    "mean": mean,
    "median": median,
}


def median_of(values: np.ndarray) -> float:
    """The median of what there is; NaN of nothing."""
    there = values[~np.isnan(values)]
    return float(np.median(there)) if there.size else math.nan


def is_bounded(moment: Mapping[str, Any], metric: str) -> bool:
    """Whether the interval of a measurement is bounded above, and below by more than zero."""
    return bool(moment[f"{metric}_lower"] > 0 and moment[f"{metric}_upper"] < math.inf)


def _weights(moments: Moments, samples: int) -> np.ndarray:
    """Samples that each moment stands for: those nearer to it than to its neighbours."""
    at = np.array([float(m["samples"]) for m in moments])
    edges = np.concatenate([at[:1], (at[1:] + at[:-1]) / 2, [samples]])
    return np.diff(edges)


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
    return {
        target: {size: samples for size, samples in by_size.items() if math.isfinite(samples)}
        for target, by_size in fewest.items()
    }


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
