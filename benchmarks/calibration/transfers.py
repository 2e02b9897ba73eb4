"""What it costs to carry the best learning rate of one batch size to another, by law and estimate of the noise scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from evidence import Curve, Measured
from reporting import Row

from lightning_gradhist.learning_rate import BOUND, PLAIN_LAWS, SurgeLaw, plain_law

Ratio = Callable[[float, float], float]
"""The rate at a batch size as a multiple of that at another one."""


def saturating(noise_scale: float) -> Ratio:
    """The rate goes with ``(1 + noise_scale / B) ** -0.5``: it rises like the square root, then levels off."""
    return lambda batch, known: (batch / known * ((known + noise_scale) / (batch + noise_scale))) ** 0.5


LAWS: dict[str, Callable[[float], Ratio]] = {
    "falling_surge": lambda scale: SurgeLaw(scale).ratio,
    "surge": lambda scale: SurgeLaw(scale, valid_until=BOUND * scale).ratio,
    "saturating": saturating,
}
"""The laws that take a noise scale; the second levels off at Theorem 3's bound, as in the package."""
NONE, ONE = "none", "one for all"
"""Estimates: none at all, and one noise scale for every batch size and workload, which nobody measures."""
AS_IT_IS, FROM_OTHERS, BEST = "1", "from the others", "best"
"""Where the factor of an estimate comes from: there is none, from the other workloads, from the workload itself."""
FACTORS = 2.0 ** np.arange(-8, 8.25, 0.25)
SCALES = 2.0 ** np.arange(0, 20.25, 0.25)
"""Factors of an estimate that are tried, and noise scales in samples for :data:`ONE`."""
_LOW, _HIGH, _STEPS_AN_OCTAVE = -12, 40, 4

Method = tuple[str, str]
"""Law and estimate."""
Noise = Mapping[str, np.ndarray]
"""Noise scales in samples by name of the estimate, ``[runs, batch sizes]``; NaN where there is none."""


class Outcome(NamedTuple):
    """Excess losses of one law with one estimate on one workload."""

    factors: np.ndarray  # of the estimate that were tried, [factors]
    means: np.ndarray  # over all transfers, [1 + draws, factors]: as measured, then with the seeds drawn again
    excess: np.ndarray  # as measured, [factors, runs, from, to]; NaN from a size to itself and where the estimate lacks
    diverged: np.ndarray
    bounds: np.ndarray  # where the excess is a lower bound

    @property
    def usable(self) -> bool:
        """Whether there is an estimate for any transfer."""
        return not np.isnan(self.excess).all()


def outcomes(
    losses: Mapping[int, Measured], noise: Noise, draws: int, generator: np.random.Generator
) -> dict[Method, Outcome]:
    """Every law with every estimate, of the losses by batch size.

    In a draw the seeds are drawn again, with repetition; the losses are averaged over them and the best rate of each
    batch size is chosen again. Of the runs that measured the noise scale, too, as many are drawn.
    """
    seeds = max(of_size.losses.shape[1] for of_size in losses.values())
    runs = max((values.shape[0] for values in noise.values()), default=1)
    curves, drawn = [drawn_curves(losses, None)], [np.arange(runs)]
    for _ in range(draws):
        curves.append(drawn_curves(losses, drawn_seeds(seeds, generator)))
        drawn.append(generator.integers(runs, size=runs))
    sizes = list(losses)
    rows = np.ones((1, len(sizes)))
    found = {}
    for law in PLAIN_LAWS:
        ratios = _log_ratios(lambda _scale, law=law: plain_law(law).ratio, sizes, rows[None])
        found[law, NONE] = _outcome(ratios, curves, drawn, np.ones(1))
    for law, make in LAWS.items():
        for estimate, scales in {**noise, ONE: rows}.items():
            factors = SCALES if estimate == ONE else FACTORS
            ratios = _log_ratios(make, sizes, factors[:, None, None] * scales)
            found[law, estimate] = _outcome(ratios, curves, drawn, factors)
    return found


def drawn_seeds(seeds: int, generator: np.random.Generator) -> np.ndarray:
    """How often each seed comes in a draw with repetition, ``[seeds]``."""
    return np.bincount(generator.integers(seeds, size=seeds), minlength=seeds)


def drawn_curves(losses: Mapping[int, Measured], weights: np.ndarray | None) -> list[Curve]:
    """Of every batch size, the seeds weighted; the plain one where all rates with a weight diverged."""
    return [m.curve(None if weights is None else weights[: m.losses.shape[1]]) or m.mean() for m in losses.values()]


def _log_ratios(make: Callable[[float], Ratio], sizes: list[int], scales: np.ndarray) -> np.ndarray:
    """Log2 of a law's ratio of rates from each batch size to each other, ``[..., n, n]``.

    The noise scales ``[..., n]`` are those measured at each size; infinite is the limit of the law, NaN is NaN. Ratios
    are exact at quarter octaves of the noise scale and straight between.
    """
    known = np.arange(_LOW * _STEPS_AN_OCTAVE, _HIGH * _STEPS_AN_OCTAVE + 1) / _STEPS_AN_OCTAVE
    laws = [make(scale) for scale in 2.0**known]
    at = np.clip(np.log2(np.where(np.isnan(scales), 1.0, scales)), _LOW, _HIGH)
    ratios = np.empty((*scales.shape, len(sizes)))
    for i, origin in enumerate(sizes):
        for j, target in enumerate(sizes):
            ratios[..., i, j] = np.interp(at[..., i], known, [math.log2(ratio(target, origin)) for ratio in laws])
    ratios[np.isnan(scales)] = np.nan
    return ratios


def _outcome(ratios: np.ndarray, curves: list[list[Curve]], drawn: list[np.ndarray], factors: np.ndarray) -> Outcome:
    """Of log2 ratios ``[factors, runs, n, n]``, on curves and with runs as measured and as drawn."""
    means = [
        _mean(_carried(ratios[:, runs] if ratios.shape[1] > 1 else ratios, at, Curve.excess))
        for at, runs in zip(curves, drawn, strict=True)
    ]
    excess, diverged, bounds = (
        _carried(ratios, curves[0], of) for of in (Curve.excess, Curve.diverges, Curve.is_bound)
    )
    return Outcome(factors, np.array(means), excess, diverged == 1, bounds == 1)


def _carried(ratios: np.ndarray, curves: list[Curve], of: Callable[[Curve, np.ndarray], np.ndarray]) -> np.ndarray:
    """What a curve says of the rates carried to it, ``[factors, runs, from, to]``; NaN where nothing is carried."""
    rates = np.array([curve.best_rate for curve in curves])[:, None] + ratios
    arrived = np.stack([of(curve, rates[..., j]) for j, curve in enumerate(curves)], -1)
    return np.where(np.isnan(ratios) | np.eye(len(curves), dtype=bool), np.nan, arrived)


def _mean(excess: np.ndarray) -> np.ndarray:
    """Over all but the first dimension, of what there is; NaN of nothing."""
    flat = excess.reshape(len(excess), -1)
    there = ~np.isnan(flat)
    return np.where(there, flat, 0.0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)


def best_factors(*outcomes: Outcome) -> np.ndarray:
    """Index of the factor with the lowest mean excess, over several workloads where there are, ``[1 + draws]``."""
    return np.argmin(sum(outcome.means for outcome in outcomes), 1)


def with_interval(values: np.ndarray) -> tuple[float, float, float]:
    """A value ``[0]``, and the ends of the 95% interval of what was drawn ``[1:]``; NaN where nothing was."""
    low, high = np.quantile(values[1:], [0.025, 0.975]) if len(values) > 1 else (math.nan, math.nan)
    return float(values[0]), float(low), float(high)


def scores(found: Mapping[str, Mapping[Method, Outcome]], name: str) -> list[Row]:
    """How every law with every estimate and source of its factor does on a workload, where it can be had.

    ``means`` is the mean excess over all transfers, ``[1 + draws]``; ``transfers`` are over all runs that measured a noise
    scale, and ``left_out`` the pairs of batch sizes without an estimate.
    """
    rows = []
    for method, outcome in found[name].items():
        if outcome.usable:
            others = [own[method] for n, own in found.items() if n != name and method in own and own[method].usable]
            rows += [_score(method, source, outcome, at) for source, at in _chosen(method, outcome, others).items()]
    return rows


def _chosen(method: Method, outcome: Outcome, others: list[Outcome]) -> dict[str, np.ndarray]:
    """Index of the factor by its source, ``[1 + draws]``."""
    one = np.full(len(outcome.means), int(np.argmin(np.abs(np.log(outcome.factors)))))
    if method[1] == NONE:
        return {AS_IT_IS: one}
    chosen = {BEST: best_factors(outcome)} | ({} if method[1] == ONE else {AS_IT_IS: one})
    return chosen | ({FROM_OTHERS: best_factors(*others)} if others else {})


def _score(method: Method, source: str, outcome: Outcome, indices: np.ndarray) -> Row:
    at = indices[0]
    excess = outcome.excess[at]
    transfers = int((~np.isnan(excess)).sum())
    return {
        **{"law": method[0], "estimate": method[1], "source": source, "factor": float(outcome.factors[at])},
        "means": np.take_along_axis(outcome.means, indices[:, None], 1)[:, 0],
        "worst": float(np.nanmax(excess)),
        "diverged": int(outcome.diverged[at].sum()),
        "at_least": int(outcome.bounds[at].sum()),
        "transfers": transfers,
        "left_out": excess.size - excess.shape[0] * excess.shape[1] - transfers,
    }
