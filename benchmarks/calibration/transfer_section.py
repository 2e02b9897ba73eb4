"""The sections of the page on carrying a learning rate from one batch size to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import figures
import numpy as np
from evidence import FIT, MEAN, Evidence
from page import Page, cell, listed, number, percent
from reporting import Row
from training import NOISE_GRADIENTS
from transfers import (
    AS_IT_IS,
    BEST,
    FACTORS,
    FROM_OTHERS,
    LAWS,
    NONE,
    ONE,
    Method,
    Name,
    Outcome,
    Score,
    best_factors,
    outcomes,
    scores,
    with_interval,
)

GOAL_MEAN, GOAL_WORST = 0.02, 0.10
SHOWN = 8
DEFAULT: Name = ("surge", MEAN, AS_IT_IS)
"""What the package does with the record of a run."""

Found = Mapping[str, Evidence]
Outcomes = Mapping[str, Mapping[Method, Outcome]]


@dataclass(frozen=True)
class Summary:
    """How a method does on all workloads.

    Attributes:
        scores: by workload.
        beaten: workloads where every plain law has a higher mean excess.
    """

    scores: Mapping[str, Score]
    beaten: Sequence[str]

    @property
    def mean(self) -> tuple[float, float, float]:
        """Mean over workloads of the mean excess, with its interval."""
        return with_interval(np.mean([score.means for score in self.scores.values()], 0))

    @property
    def by_workload(self) -> dict[str, tuple[float, float, float]]:
        """Mean excess with its interval."""
        return {name: with_interval(score.means) for name, score in self.scores.items()}

    @property
    def worst(self) -> float:
        """The largest excess of all transfers."""
        return max(score.worst for score in self.scores.values())

    @property
    def diverged(self) -> int:
        """Number of transfers that diverge."""
        return sum(score.diverged for score in self.scores.values())

    @property
    def below(self) -> bool:
        """Whether the mean excess is at most 2%, and below every plain law's on every workload."""
        return self.mean[0] <= GOAL_MEAN and len(self.beaten) == len(self.scores)

    @property
    def safe(self) -> bool:
        """Whether the worst transfer costs at most 10%, and none diverges."""
        return self.worst <= GOAL_WORST and not self.diverged

    def row(self, method: Name) -> Row:
        """How the method of a name does, as the page shows it."""
        return {
            **dict(zip(("law", "estimate", "source"), method, strict=True)),
            **self.by_workload,
            "mean": self.mean,
            "worst": self.worst,
            "diverged": self.diverged,
            "bounds": sum(score.bounds for score in self.scores.values()),
            "beaten": len(self.beaten),
        }


Methods = Mapping[Name, Summary]


def carried(found: Found, losses: str, draws: int) -> Outcomes:
    """All transfers on every workload, of the losses that an attribute of the evidence has."""
    generator = np.random.default_rng(0)
    return {name: outcomes(ev.bench(getattr(ev, losses)), draws, generator) for name, ev in found.items()}


def ranked(results: Outcomes) -> Methods:
    """The methods that can be had on every workload, the lowest mean excess first."""
    found = {name: {score.method: score for score in own} for name, own in scores(results).items()}
    plain = {name: min(own[m].means[0] for m in own if m[1] == NONE) for name, own in found.items()}
    shared = [method for method in next(iter(found.values())) if all(method in own for own in found.values())]
    summaries = [
        Summary(
            {name: own[method] for name, own in found.items()},
            [name for name, own in found.items() if own[method].means[0] < plain[name]],
        )
        for method in shared
    ]
    return dict(sorted(zip(shared, summaries, strict=True), key=lambda item: item[1].mean[0]))


def label(method: Name) -> str:
    """The name of a method in a sentence."""
    law, estimate, source = method
    if estimate == NONE:
        return law
    return f"{law} with {estimate}" + {AS_IT_IS: "", FROM_OTHERS: " (factor of the others)", BEST: " (oracle)"}[source]


def in_short(page: Page, methods: Methods) -> None:
    """The best methods, and which meet the goals."""
    # those that need no run at the batch size that the rate is carried to
    honest = {method: summary for method, summary in methods.items() if method[2] != BEST and method[1] != FIT}
    below, safe = ([m for m, s in honest.items() if of(s)] for of in (attrgetter("below"), attrgetter("safe")))
    both = [method for method in below if method in safe]
    if not both:
        page.bad.append("No law with any estimate meets the goals for the mean and for the worst transfer together.")
    page.fill(
        "in_short",
        measured=_best(methods, [m for m in honest if m[1] not in (NONE, ONE)]),
        never_measured=_best(methods, [m for m in honest if m[1] == ONE]),
        without=_best(methods, [m for m in honest if m[1] == NONE]),
        default=_told(methods, DEFAULT) if DEFAULT in methods else "not measured yet.",
        **{name: _labels(of) for name, of in (("below", below), ("safe", safe), ("both", both))},
    )


def _best(methods: Methods, group: Sequence[Name]) -> str:
    return f"the best of {len(group)}: {_told(methods, group[0])}" if group else "not measured yet."


def _told(methods: Methods, method: Name) -> str:
    summary = methods[method]
    by_workload = listed([f"{name} {cell(point, 1)}" for name, point in summary.by_workload.items()])
    return (
        f"**{label(method)}**: mean excess loss {cell(summary.mean, 1)} over all transfers, worst {percent(summary.worst)},"
        f" {summary.diverged} divergences; by workload {by_workload}."
    )


def _labels(methods: Iterable[Name]) -> str:
    return listed([label(method) for method in methods], "; ")


def transfers(page: Page, found: Found, results: Outcomes, draws: int) -> None:
    """What it costs to carry a rate."""
    methods = ranked(results)
    page.keep("transfers", [_score_row(name, score) for name, own in scores(results).items() for score in own])
    candidates = [m for m in methods if m[2] != BEST or m[1] == ONE]
    shown = [m for rank, m in enumerate(candidates) if rank < SHOWN or m[1] in (NONE, ONE) or m[1:] == (MEAN, AS_IT_IS)]
    page.fill(
        "transfers",
        draws=draws,
        best=[methods[method].row(method) for method in shown],
        candidates=len(candidates),
        shown=SHOWN,
        cost=[_cost(name, evidence) for name, evidence in found.items()],
    )
    wanted = [(MEAN, AS_IT_IS), (MEAN, FROM_OTHERS), (ONE, FROM_OTHERS), (ONE, BEST), (FIT, AS_IT_IS)]
    drawn = {m: summary.by_workload for m, summary in methods.items() if m[1] == NONE or m[1:] in wanted}
    points = {name: [by_workload[name] for by_workload in drawn.values()] for name in found}
    page.draw("transfers", figures.scores_by_method([label(method) for method in drawn], points))


def _score_row(workload: str, score: Score) -> Row:
    mean, lower, upper = with_interval(score.means)
    return {
        "workload": workload,
        **dict(zip(("law", "estimate", "source"), score.method, strict=True)),
        **{"factor": score.factor, "mean": mean, "lower": lower, "upper": upper, "worst": score.worst},
        **{"diverged": score.diverged, "at_least": score.bounds},
        **{"transfers": score.transfers, "left_out": score.left_out},
    }


def _cost(name: str, evidence: Evidence) -> Row:
    """What tuning costs against a measurement of the noise scale."""
    tuning = sum(row["stage"] in ("rates", "refine") for row in evidence.results.values())
    return {
        "workload": name,
        "runs": tuning / len(evidence.losses),
        "passes": NOISE_GRADIENTS,
        "share": NOISE_GRADIENTS * evidence.workload.noise_batch_size / evidence.workload.samples,
    }


def factors(page: Page, results: Outcomes) -> None:
    """Whether one factor links an estimate to the noise scale of a law on every workload."""
    by_method = {
        method: {name: own.get(method) for name, own in results.items()} for method in next(iter(results.values()))
    }
    linked: dict[Method, dict[str, Outcome]] = {
        method: own
        for method, own in by_method.items()
        if method[1] != NONE and all(of is not None and not np.isnan(of.excess).all() for of in own.values())
    }
    if not any(estimate == MEAN for _, estimate in linked):
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
    steps = [ev.workload.samples // size for ev in found.values() for size in list(ev.losses)[-2:-1]]
    page.fill("without_largest", steps=min(steps), transfers=_again(page, found, "losses_without_largest", draws))


def equal_steps(page: Page, found: Found, draws: int) -> None:
    """The same at equal steps."""
    equal = {name: evidence for name, evidence in found.items() if evidence.losses_at_equal_steps}
    if equal:
        fewest = {name: min(of.seeds for of in ev.losses_at_equal_steps.values()) for name, ev in equal.items()}
        rows = _again(page, equal, "losses_at_equal_steps", draws)
        page.fill("at_equal_steps", seeds=listed([f"{name} {n}" for name, n in fewest.items()]), transfers=rows)


def _again(page: Page, found: Found, losses: str, draws: int) -> list[Row]:
    methods = ranked(carried(found, losses, draws))
    rows = [summary.row(m) for m, summary in methods.items() if m[2] != BEST or m[1] == ONE]
    page.keep(f"transfers_{losses}", rows)
    return [row for row in rows if row["estimate"] in (NONE, ONE, MEAN)]
