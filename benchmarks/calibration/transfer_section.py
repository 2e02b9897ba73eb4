"""The sections of the page on carrying a learning rate from one batch size to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    Outcome,
    best_factors,
    outcomes,
    scores,
    with_interval,
)

GOAL_MEAN, GOAL_WORST = 0.02, 0.10
SHOWN = 8
DEFAULT = ("surge", MEAN, AS_IT_IS)
"""What the package does with the record of a run."""

Found = Mapping[str, Evidence]
Outcomes = Mapping[str, Mapping[Method, Outcome]]


def carried(found: Found, losses: str, draws: int) -> Outcomes:
    """All transfers on every workload, of the losses that an attribute of the evidence has."""
    generator = np.random.default_rng(0)
    of_each = {name: getattr(evidence, losses) for name, evidence in found.items()}
    return {name: outcomes(own, found[name].noise_scales(own), draws, generator) for name, own in of_each.items()}


def ranked(results: Outcomes) -> list[Row]:
    """How the methods that can be had on every workload do there and on average, the lowest mean excess first."""
    found = {name: {_method(row): row for row in scores(results, name)} for name in results}
    plain = {
        name: min(row["means"][0] for row in own.values() if row["estimate"] == NONE) for name, own in found.items()
    }
    rows = []
    for method in next(iter(found.values())):
        if all(method in own for own in found.values()):
            own = {name: of[method] for name, of in found.items()}
            rows.append(
                {
                    **dict(zip(("law", "estimate", "source"), method, strict=True)),
                    **{name: with_interval(row["means"]) for name, row in own.items()},
                    "mean": with_interval(np.mean([row["means"] for row in own.values()], 0)),
                    "worst": max(row["worst"] for row in own.values()),
                    "diverged": sum(row["diverged"] for row in own.values()),
                    "bounds": sum(row["at_least"] for row in own.values()),
                    "beaten": sum(row["means"][0] < plain[name] for name, row in own.items()),
                }
            )
    return sorted(rows, key=lambda row: row["mean"][0])


def _method(row: Row) -> tuple[str, str, str]:
    return row["law"], row["estimate"], row["source"]


def label(row: Row) -> str:
    """The name of a method in a sentence."""
    law, estimate, source = _method(row)
    sources = {AS_IT_IS: "", FROM_OTHERS: " (factor of the others)", BEST: " (oracle)"}
    return law if estimate == NONE else f"{law} with {estimate}{sources[source]}"


def in_short(page: Page, methods: Sequence[Row], names: Sequence[str]) -> None:
    """The best methods, and which meet the goals, of those that need no run at the batch size that the rate is carried to."""
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


def transfers(page: Page, found: Found, results: Outcomes, draws: int) -> None:
    """What it costs to carry a rate."""
    rows = []
    for name in results:
        for row in scores(results, name):
            ends = dict(zip(("mean", "lower", "upper"), with_interval(row["means"]), strict=True))
            before = {key: row[key] for key in ("law", "estimate", "source", "factor")}
            rows.append({"workload": name, **before, **ends, **{k: v for k, v in row.items() if k != "means"}})
    page.keep("transfers", rows)
    methods = ranked(results)
    candidates = _candidates(methods)
    page.fill(
        "transfers",
        draws=draws,
        best=[
            row
            for rank, row in enumerate(candidates)
            if rank < SHOWN or row["estimate"] in (NONE, ONE) or _method(row)[1:] == (MEAN, AS_IT_IS)
        ],
        candidates=len(candidates),
        shown=SHOWN,
        cost=[_cost(name, evidence) for name, evidence in found.items()],
    )
    wanted = [(MEAN, AS_IT_IS), (MEAN, FROM_OTHERS), (ONE, FROM_OTHERS), (ONE, BEST), (FIT, AS_IT_IS)]
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
