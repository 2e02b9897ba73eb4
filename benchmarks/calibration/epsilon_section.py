"""The sections of the page on epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import figures
import numpy as np
from evidence import Evidence, seed_spread
from grid import Results
from page import Page, listed, number, verdict
from reporting import Row
from training import EPS

Found = Mapping[str, Evidence]
Curve = Mapping[float, float]
"""The loss at the best of three rates by epsilon, ascending."""
SPACES = {"authors": ("lower", "upper"), "pooled": ("pooled_lower", "pooled_upper")}
"""The kinds of search space, and the columns of their ends."""
TRIAL_AND_ERROR = 16
"""Decades of epsilon that are tuned over without a search space, as the paper on epsilon says."""
DEFAULT = EPS["Adam"]


def epsilon(page: Page, found: Found, ranges: Sequence[Row]) -> None:
    """The search space, the default and ``"auto"`` against the grid's best epsilon."""
    spaces = {(row["workload"], row["loss_scale"]): row for row in ranges}
    if not spaces:
        return
    page.fill("epsilon_range", ranges=ranges)
    curves = {name: curve for name, evidence in found.items() if len(curve := by_epsilon(evidence)) > 1}
    if not curves:
        return
    rows = [_row(found[name], curve, spaces[name, 1.0]) for name, curve in curves.items()]
    verdicts = [line for kind in SPACES for line in _judged(page, rows, kind)]
    page.fill("epsilon", epsilon=page.keep("epsilon", rows), verdicts="\n".join(verdicts))
    panels = {}
    for row, (name, curve) in zip(rows, curves.items(), strict=True):
        losses = np.array(list(curve.values()))
        pooled = _ends(spaces[name, 1.0], "pooled")
        panels[name] = (np.array(list(curve)), losses / losses.min() - 1, pooled, row["tolerance"])
    page.draw("epsilon", figures.epsilon(panels))
    _scaled(page, found, curves, spaces)


def by_epsilon(evidence: Evidence) -> Curve:
    """The losses at the middle batch size with seed 0."""
    runs = {
        run: row
        for run, row in evidence.results.items()
        if replace(run, eps=1.0, learning_rate=1.0, seed=0) == replace(evidence.middle, eps=1.0) and run.seed == 0
    }
    rates = {run.learning_rate for run in runs if run.eps != DEFAULT}
    return _lowest({run: row for run, row in runs.items() if run.learning_rate in rates})


def _lowest(runs: Results) -> Curve:
    found: dict[float, float] = {}
    for run, row in runs.items():
        loss = math.inf if row["diverged"] else row["train_loss"]
        found[run.eps] = min(loss, found.get(run.eps, math.inf))
    return dict(sorted(found.items()))


def _tolerance(evidence: Evidence) -> float:
    return 2 * seed_spread(evidence.losses[evidence.middle.batch_size])


def _at(curve: Curve, eps: float) -> float:
    """The loss at the epsilon of the grid that is nearest; below the grid epsilon is idle."""
    return curve[min(curve, key=lambda known: abs(math.log(known / eps)))]


def _ends(space: Row, kind: str) -> tuple[float, float]:
    lower, upper = SPACES[kind]
    return space[lower], space[upper]


def _row(evidence: Evidence, curve: Curve, space: Row) -> Row:
    best, tolerance = min(curve, key=lambda eps: curve[eps]), _tolerance(evidence)
    good = {eps: loss <= (1 + tolerance) * curve[best] for eps, loss in curve.items()}
    plateau = (_end([e for e in curve if e <= best][::-1], good), _end([e for e in curve if e >= best], good))
    at_auto, default = _at(curve, space["auto"]), curve[DEFAULT]
    judged: Row = {}
    for kind in SPACES:
        lower, upper = _ends(space, kind)
        judged |= {
            kind: f"{number(lower)} to {number(upper)}",
            f"{kind}_decades": math.log10(upper / lower),
            f"{kind}_best_inside": lower <= best <= upper,
            f"{kind}_held": plateau[0] <= upper and lower <= plateau[1],
        }
    return {
        **{"workload": evidence.workload.name, "best": best, "tolerance": tolerance},
        "plateau": f"{number(plateau[0])} to {number(plateau[1])}",
        **judged,
        "default_excess": default / curve[best] - 1,
        "auto": space["auto"],
        "auto_excess": at_auto / curve[best] - 1,
        "auto_harmless": not at_auto > default * (1 if math.isnan(tolerance) else 1 + tolerance),
    }


def _end(epsilons: Sequence[float], good: Mapping[float, bool]) -> float:
    """The last of the epsilons before one that is not good."""
    bad = next((index for index, eps in enumerate(epsilons) if not good[eps]), len(epsilons))
    return epsilons[max(bad - 1, 0)]


def _judged(page: Page, rows: Sequence[Row], kind: str) -> list[str]:
    """Whether search spaces of one kind hold the best epsilon, and how wide they are, against the goals."""
    held, widths = [row[f"{kind}_held"] for row in rows], [row[f"{kind}_decades"] for row in rows]
    inside = sum(row[f"{kind}_best_inside"] for row in rows)
    middle, widest = float(np.median(widths)), max(widths)
    if not all(held):
        without = listed([row["workload"] for row in rows if not row[f"{kind}_held"]])
        page.bad.append(f"Search spaces ({kind}) without an epsilon of the plateau: {without}.")
    said = f"{sum(held)} of {len(held)} search spaces ({kind}) hold an epsilon of the plateau, and {inside} the best one itself"
    width = f"they are {number(middle)} decades wide in the median and {number(widest)} at worst"
    narrower = f"{number(TRIAL_AND_ERROR / widest if widest else math.inf)} times narrower"
    claim = f"; their claim, twice at worst, {'holds' if 2 * widest <= TRIAL_AND_ERROR else 'does **not** hold'} here"
    return [
        verdict(said, all(held), "95%"),
        verdict(width, middle <= 4 and widest <= 8, "4 and 8"),
        f"- the widest is {narrower} than the {TRIAL_AND_ERROR} decades that the authors find tuned over by trial and error"
        f"{claim if kind == 'authors' else ''}.",
    ]


def _scaled(page: Page, found: Found, curves: Mapping[str, Curve], spaces: Mapping[tuple[str, float], Row]) -> None:
    rows: list[Row] = []
    for name, curve in curves.items():
        results = found[name].results
        for scale in sorted({run.loss_scale for run in results} - {1.0}):
            if (name, scale) not in spaces:
                continue
            scaled = _lowest({r: row for r, row in results.items() if r.loss_scale == scale and r.seed == 0})
            auto, unscaled = spaces[name, scale]["auto"], curve[DEFAULT]
            excess = {
                "default_excess": scaled[DEFAULT] / unscaled - 1,
                "auto": auto,
                "auto_excess": _at(curve, auto / scale) / unscaled - 1,
            }
            rows.append({"workload": name, "loss_scale": scale, **excess, "tolerance": _tolerance(found[name])})
    if not rows:
        return
    judged = [row for row in rows if not math.isnan(row["tolerance"])]  # the default has more than one seed
    worse = [
        f"{row['workload']} times {row['loss_scale']:g}" for row in judged if row["auto_excess"] > row["tolerance"]
    ]
    within = f"`auto` is within the tolerance in {len(judged) - len(worse)} of {len(judged)} cases"
    page.fill(
        "epsilon_scaled", epsilon_scaled=page.keep("epsilon_scaled", rows), verdict=verdict(within, not worse, "all")
    )
    if worse:
        page.bad.append(f'`epsilon="auto"` is worse than the unscaled default: {listed(worse)}.')
