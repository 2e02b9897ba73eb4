"""What it costs to carry the best learning rate of one batch size to another, by law and estimate of the noise scale.

The arithmetic comes first, then the sections of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import figures
import numpy as np
from evidence import FIT, MEAN, Curve, Evidence, Measured
from page import Page, cell, listed, number, percent
from reporting import Row
from training import NOISE_GRADIENTS

from lightning_gradhist.learning_rate import BOUND, PLAIN_LAWS, SurgeLaw, plain_law

Ratio = Callable[[float, float], float]  # the rate at a batch size as a multiple of that at another one


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

GOAL_MEAN, GOAL_WORST = 0.02, 0.10
SHOWN = 8
DEFAULT = ("surge", MEAN, AS_IT_IS)  # what the package does with the record of a run


Method = tuple[str, str]  # law and estimate
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


Found = Mapping[str, Evidence]
Outcomes = Mapping[str, Mapping[Method, Outcome]]


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
    means = []
    for at, runs in zip(curves, drawn, strict=True):
        flat = _carried(ratios[:, runs] if ratios.shape[1] > 1 else ratios, at, Curve.excess).reshape(len(ratios), -1)
        there = ~np.isnan(flat)
        means.append(np.where(there, flat, 0.0).sum(1) / np.where(there.any(1), there.sum(1), np.nan))
    excess, diverged, bounds = (
        _carried(ratios, curves[0], of) for of in (Curve.excess, Curve.diverges, Curve.is_bound)
    )
    return Outcome(factors, np.array(means), excess, diverged == 1, bounds == 1)


def _carried(ratios: np.ndarray, curves: list[Curve], of: Callable[[Curve, np.ndarray], np.ndarray]) -> np.ndarray:
    """What a curve says of the rates carried to it, ``[factors, runs, from, to]``; NaN where nothing is carried."""
    rates = np.array([curve.best_rate for curve in curves])[:, None] + ratios
    arrived = np.stack([of(curve, rates[..., j]) for j, curve in enumerate(curves)], -1)
    return np.where(np.isnan(ratios) | np.eye(len(curves), dtype=bool), np.nan, arrived)


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
    at, means = indices[0], np.take_along_axis(outcome.means, indices[:, None], 1)[:, 0]
    excess = outcome.excess[at]
    transfers = int((~np.isnan(excess)).sum())
    return {
        **{"law": method[0], "estimate": method[1], "source": source, "factor": float(outcome.factors[at])},
        **{"means": means, "mean": with_interval(means), "worst": float(np.nanmax(excess))},
        **{"diverged": int(outcome.diverged[at].sum()), "at_least": int(outcome.bounds[at].sum())},
        **{"transfers": transfers, "left_out": excess.size - excess.shape[0] * excess.shape[1] - transfers},
    }


def carried(found: Found, losses: str, draws: int) -> Outcomes:
    """All transfers on every workload, of the losses that an attribute of the evidence has."""
    generator = np.random.default_rng(0)
    of_each = {name: getattr(evidence, losses) for name, evidence in found.items()}
    return {name: outcomes(own, found[name].noise_scales(own), draws, generator) for name, own in of_each.items()}


def ranked(results: Outcomes) -> list[Row]:
    """How the methods that can be had on every workload do there and on average, the lowest mean excess first."""
    found = {name: {_method(row): row for row in scores(results, name)} for name in results}
    plain = {n: min(row["means"][0] for row in of.values() if row["estimate"] == NONE) for n, of in found.items()}
    rows = []
    for method in set.intersection(*map(set, found.values())):
        own = {name: of[method] for name, of in found.items()}
        sums = {key: sum(row[key] for row in own.values()) for key in ("diverged", "at_least")}
        rows.append(
            {
                **dict(zip(("law", "estimate", "source"), method, strict=True)),
                **{name: row["mean"] for name, row in own.items()},
                "mean": with_interval(np.mean([row["means"] for row in own.values()], 0)),
                "worst": max(row["worst"] for row in own.values()),
                **{"diverged": sums["diverged"], "bounds": sums["at_least"]},
                "beaten": sum(row["means"][0] < plain[name] for name, row in own.items()),
            }
        )
    return sorted(rows, key=lambda row: (row["mean"][0], _method(row)))


def _method(row: Row) -> tuple[str, str, str]:
    return row["law"], row["estimate"], row["source"]


def label(row: Row) -> str:
    """The name of a method in a sentence."""
    law, estimate, source = _method(row)
    sources = {AS_IT_IS: "", FROM_OTHERS: " (factor of the others)", BEST: " (oracle)"}
    return law if estimate == NONE else f"{law} with {estimate}{sources[source]}"


def in_short(page: Page, methods: Sequence[Row], names: Sequence[str]) -> None:
    """The best methods, and which meet the goals, of those that need no run at the batch size they carry a rate to."""
    honest = [row for row in methods if row["source"] != BEST and row["estimate"] != FIT]
    below = [row for row in honest if row["mean"][0] <= GOAL_MEAN and row["beaten"] == len(names)]
    safe = [row for row in honest if row["worst"] <= GOAL_WORST and not row["diverged"]]
    both = [row for row in below if row in safe]
    if not both:
        page.bad.append("No law with any estimate meets the goals for the mean and for the worst transfer together.")

    def told(rows: Sequence[Row], which: str = "") -> str:
        if not rows:
            return "not measured yet."
        by_workload = listed([f"{name} {cell(rows[0][name], 1)}" for name in names])
        return (
            f"{which}**{label(rows[0])}**: mean excess loss {cell(rows[0]['mean'], 1)} over all transfers, worst"
            f" {percent(rows[0]['worst'])}, {rows[0]['diverged']} divergences; by workload {by_workload}."
        )

    groups = {
        "measured": [row for row in honest if row["estimate"] not in (NONE, ONE)],
        "never_measured": [row for row in honest if row["estimate"] == ONE],
        "without": [row for row in honest if row["estimate"] == NONE],
    }
    page.fill(
        "in_short",
        **{name: told(group, f"the best of {len(group)}: ") for name, group in groups.items()},
        default=told([row for row in methods if _method(row) == DEFAULT]),
        **{name: listed([*map(label, of)], "; ") for name, of in (("below", below), ("safe", safe), ("both", both))},
    )


def carrying(page: Page, found: Found, results: Outcomes, draws: int) -> None:
    """What it costs to carry a rate."""
    rows = [{"workload": name, **row} for name in results for row in scores(results, name)]
    page.keep("transfers", [{key: value for key, value in row.items() if key != "means"} for row in rows])
    methods = ranked(results)
    candidates = _candidates(methods)
    always = [row for row in candidates if row["estimate"] in (NONE, ONE) or _method(row)[1:] == (MEAN, AS_IT_IS)]
    page.fill(
        "transfers",
        draws=draws,
        best=[row for row in candidates if row in always or row in candidates[:SHOWN]],
        candidates=len(candidates),
        shown=SHOWN,
        cost=[_cost(name, evidence) for name, evidence in found.items()],
    )
    wanted = ((MEAN, AS_IT_IS), (MEAN, FROM_OTHERS), (ONE, FROM_OTHERS), (ONE, BEST), (FIT, AS_IT_IS))
    drawn = [row for row in methods if row["estimate"] == NONE or _method(row)[1:] in wanted]
    points = {name: [row[name] for row in drawn] for name in found}
    page.draw("transfers", figures.scores_by_method([label(row) for row in drawn], points))


def _candidates(methods: Sequence[Row]) -> list[Row]:
    return [row for row in methods if row["source"] != BEST or row["estimate"] == ONE]


def _cost(name: str, evidence: Evidence) -> Row:
    """What tuning costs against a measurement of the noise scale."""
    tuning = sum(row["stage"] in ("rates", "refine") for row in evidence.results.values())
    share = NOISE_GRADIENTS * evidence.workload.noise_batch_size / evidence.workload.samples
    return {"workload": name, "runs": tuning / len(evidence.losses), "passes": NOISE_GRADIENTS, "share": share}


def factors(page: Page, results: Outcomes) -> None:
    """Whether one factor links an estimate to the noise scale of a law on every workload."""
    linked: dict[Method, dict[str, Outcome]] = {}
    for method in next(iter(results.values())):
        own = {name: of[method] for name, of in results.items() if method in of and of[method].usable}
        if method[1] != NONE and len(own) == len(results):
            linked[method] = own
    if (next(iter(LAWS)), MEAN) not in linked:
        return
    rows = page.keep("factors", [_factor_row(*method, own) for method, own in linked.items()])
    apart = [f"{row['law']} with {MEAN}" for row in rows if row["overlap"] == "none" and row["estimate"] == MEAN]
    if apart:
        page.bad.append(f"No one factor lies in the intervals of all workloads: {listed(apart)}.")
    shown = [row for row in rows if row["estimate"] == ONE or row["estimate"].endswith(" mean")]
    page.fill("factors", lowest=number(FACTORS[0]), highest=number(FACTORS[-1]), factors=shown)
    of_mean = {law: {name: (of.factors, of.means) for name, of in linked[law, MEAN].items()} for law in LAWS}
    page.draw("factors", figures.excess_by_factor(of_mean, MEAN))


def _factor_row(law: str, estimate: str, own: Mapping[str, Outcome]) -> Row:
    best = {name: with_interval(outcome.factors[best_factors(outcome)]) for name, outcome in own.items()}
    low, high = max(point[1] for point in best.values()), min(point[2] for point in best.values())
    one = int(best_factors(*own.values())[0])
    return {
        **{"law": law, "estimate": estimate, **best},
        "overlap": f"{number(low)} to {number(high)}" if low <= high else "none",
        "one": float(next(iter(own.values())).factors[one]),
        "mean": float(np.mean([outcome.means[0, one] for outcome in own.values()])),
    }


def without_largest(page: Page, found: Found, draws: int) -> None:
    """The same without the largest batch sizes, whose runs are short."""
    steps = min(evidence.workload.samples // list(evidence.losses)[-2] for evidence in found.values())
    page.fill("without_largest", steps=steps, transfers=_again(page, found, "losses_without_largest", draws))


def equal_steps(page: Page, found: Found, draws: int) -> None:
    """The same at equal steps."""
    equal = {name: evidence for name, evidence in found.items() if evidence.losses_at_equal_steps}
    if equal:
        fewest = {name: min(of.seeds for of in ev.losses_at_equal_steps.values()) for name, ev in equal.items()}
        rows = _again(page, equal, "losses_at_equal_steps", draws)
        page.fill("at_equal_steps", seeds=listed([f"{name} {n}" for name, n in fewest.items()]), transfers=rows)


def _again(page: Page, found: Found, losses: str, draws: int) -> list[Row]:
    rows = page.keep(f"transfers_{losses}", _candidates(ranked(carried(found, losses, draws))))
    return [row for row in rows if row["estimate"] in (NONE, ONE, MEAN)]
