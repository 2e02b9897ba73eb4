"""The section of the page on epsilon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import figures
import numpy as np
from curves import seed_spread
from evidence import Evidence
from grid import Results
from page import NOT_MEASURED, Page, Row, between, listed, number, percent, text, verdict, yes
from training import EPS

Found = Mapping[str, Evidence]
SPACES = {"authors": ("lower", "upper"), "pooled": ("pooled_lower", "pooled_upper")}
"""The kinds of search space, and the columns of their ends."""
TRIAL_AND_ERROR = 16
"""Decades of epsilon that are tuned over without a search space, as the paper on epsilon says."""


def epsilon(page: Page, found: Found, ranges: Sequence[Row]) -> None:
    """The search space, the default and ``"auto"`` against the grid's best epsilon."""
    page.heading("Epsilon")
    spaces = {(row["workload"], float(row["loss_scale"])): row for row in ranges}
    if spaces:
        page.say(
            "Search spaces at the initial weights, rounded to powers of ten: the authors' (2% and 98% quantiles of each tensor,"
            " smallest and largest), and the pooled one (those of all coordinates together). And what"
            ' `epsilon="auto"` makes of the default.'
        )
        page.show(
            [{k: float(v) if k not in ("workload",) else v for k, v in row.items()} for row in ranges],
            {
                "workload": ("workload", text),
                "batch_size": ("batch size", number),
                "loss_scale": ("loss times", number),
                "lower": ("authors', lower end", number),
                "upper": ("upper end", number),
                "pooled_lower": ("pooled, lower end", number),
                "pooled_upper": ("upper end", number),
                "damped_by_default": ("damped by 1e-8", percent),
                "auto": ("auto", number),
            },
        )
    curves = {name: by_epsilon(evidence) for name, evidence in found.items()}
    curves = {name: curve for name, curve in curves.items() if len(curve) > 1}
    if not curves or not spaces:
        page.say(f"Epsilon's grid: {NOT_MEASURED[0].lower()}{NOT_MEASURED[1:]}")
        return
    rows = [_epsilon_row(found[name], curve, spaces[name, 1.0]) for name, curve in curves.items()]
    page.say(
        "One seed, each epsilon at the best of three rates an octave apart. Tolerance: twice the standard deviation over seeds of"
        " the default's loss. Plateau: the epsilons around the best whose loss is within it. Held: the search space holds an"
        " epsilon of the plateau."
    )
    page.table(
        "epsilon",
        rows,
        {
            "workload": ("workload", text),
            "best": ("best", number),
            "tolerance": ("tolerance", percent),
            "plateau": ("plateau", text),
            "authors": ("authors' search space", text),
            "authors_decades": ("decades", number),
            "authors_best_inside": ("best inside", yes),
            "authors_held": ("held", yes),
            "pooled": ("pooled search space", text),
            "pooled_decades": ("decades", number),
            "pooled_best_inside": ("best inside", yes),
            "pooled_held": ("held", yes),
            "default_excess": ("1e-8 above the best", percent),
            "auto": ("auto", number),
            "auto_excess": ("auto above the best", percent),
            "auto_harmless": ("auto no worse than 1e-8", yes),
        },
    )
    for kind in SPACES:
        _judge(page, rows, kind)
    page.figure(
        "epsilon",
        figures.epsilon({r["workload"]: _epsilon_panel(curves[r["workload"]], r, spaces) for r in rows}),
        "Final training loss over epsilon, in percent above the best. Shaded: the pooled search space at the start (orange) and"
        " the noise of the seeds (grey). Dashed: the default.",
    )
    _scaled(page, found, curves, spaces)


def _judge(page: Page, rows: Sequence[Row], kind: str) -> None:
    """Whether search spaces of one kind hold the best epsilon, and how wide they are, against the goals."""
    held, widths = [row[f"{kind}_held"] for row in rows], [row[f"{kind}_decades"] for row in rows]
    middle, widest = float(np.median(widths)), max(widths)
    said = f"{sum(held)} of {len(held)} search spaces ({kind}) hold an epsilon of the plateau"
    inside = sum(row[f"{kind}_best_inside"] for row in rows)
    page.say(verdict(f"{said}, and {inside} the best one itself", all(held), "95%"))
    width = f"they are {number(middle)} decades wide in the median and {number(widest)} at worst"
    page.say(verdict(width, middle <= 4 and widest <= 8, "4 and 8"))
    narrower = f"{number(TRIAL_AND_ERROR / widest if widest else math.inf)} times narrower"
    claim = f"; their claim, twice at worst, {'holds' if 2 * widest <= TRIAL_AND_ERROR else 'does **not** hold'} here"
    page.say(
        f"- the widest is {narrower} than the {TRIAL_AND_ERROR} decades that the authors find tuned over by trial and error"
        + (claim if kind == "authors" else "")
        + "."
    )
    if not all(held):
        without = listed([row["workload"] for row in rows if not row[f"{kind}_held"]])
        page.bad.append(f"Search spaces ({kind}) without an epsilon of the plateau: {without}.")


def by_epsilon(evidence: Evidence) -> dict[float, float]:
    """The loss at the best of three rates by epsilon, ascending, at the middle batch size with seed 0."""
    runs = {
        run: row
        for run, row in evidence.results.items()
        if replace(run, eps=1.0, learning_rate=1.0, seed=0) == replace(evidence.middle, eps=1.0) and run.seed == 0
    }
    rates = {run.learning_rate for run in runs if run.eps != EPS["Adam"]}
    return _lowest({run: row for run, row in runs.items() if run.learning_rate in rates})


def _lowest(runs: Results) -> dict[float, float]:
    found: dict[float, float] = {}
    for run, row in runs.items():
        loss = math.inf if row["diverged"] else row["train_loss"]
        found[run.eps] = min(loss, found.get(run.eps, math.inf))
    return dict(sorted(found.items()))


def _tolerance(evidence: Evidence) -> float:
    return 2 * seed_spread(evidence.losses[evidence.middle.batch_size])


def _at(curve: Mapping[float, float], eps: float) -> float:
    """The loss at the epsilon of the grid that is nearest; below the grid epsilon is idle."""
    return curve[min(curve, key=lambda known: abs(math.log(known / eps)))]


def _epsilon_row(evidence: Evidence, curve: Mapping[float, float], space: Row) -> Row:
    best, tolerance = min(curve, key=lambda eps: curve[eps]), _tolerance(evidence)
    good = {eps: loss <= (1 + tolerance) * curve[best] for eps, loss in curve.items()}
    below, above = [e for e in curve if e <= best][::-1], [e for e in curve if e >= best]
    plateau = (_end(below, good), _end(above, good))
    auto, default = float(space["auto"]), curve[EPS["Adam"]]
    judged: Row = {}
    for kind in SPACES:
        lower, upper = _ends(space, kind)
        judged |= {
            kind: between((lower, upper)),
            f"{kind}_decades": math.log10(upper / lower),
            f"{kind}_best_inside": lower <= best <= upper,
            f"{kind}_held": plateau[0] <= upper and lower <= plateau[1],
        }
    return {
        "workload": evidence.workload.name,
        "best": best,
        "tolerance": tolerance,
        "plateau": between(plateau),
        **judged,
        "default_excess": default / curve[best] - 1,
        "auto": auto,
        "auto_excess": _at(curve, auto) / curve[best] - 1,
        "auto_harmless": not _at(curve, auto) > default * (1 if math.isnan(tolerance) else 1 + tolerance),
    }


def _ends(space: Row, kind: str) -> tuple[float, float]:
    lower, upper = SPACES[kind]
    return float(space[lower]), float(space[upper])


def _end(epsilons: Sequence[float], good: Mapping[float, bool]) -> float:
    """The last of the epsilons before one that is not good."""
    last = epsilons[0]
    for eps in epsilons:
        if not good[eps]:
            break
        last = eps
    return last


def _epsilon_panel(
    curve: Mapping[float, float], row: Row, spaces: Mapping[tuple[str, float], Row]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float], float]:
    space = spaces[row["workload"], 1.0]
    losses = np.array(list(curve.values()))
    return (
        np.array(list(curve)),
        losses / losses.min() - 1,
        _ends(space, "pooled"),
        row["tolerance"],
    )


def _scaled(
    page: Page, found: Found, curves: Mapping[str, Mapping[float, float]], spaces: Mapping[tuple[str, float], Row]
) -> None:
    page.heading("With the loss multiplied", 3)
    rows: list[Row] = []
    for name, curve in curves.items():
        evidence = found[name]
        for scale in sorted({run.loss_scale for run in evidence.results} - {1.0}):
            if (name, scale) not in spaces:
                continue
            scaled = _lowest({r: row for r, row in evidence.results.items() if r.loss_scale == scale and r.seed == 0})
            auto = float(spaces[name, scale]["auto"])
            unscaled = curve[EPS["Adam"]]
            rows.append(
                {
                    "workload": name,
                    "loss_scale": scale,
                    "default_excess": scaled[EPS["Adam"]] / unscaled - 1,
                    "auto": auto,
                    "auto_excess": _at(curve, auto / scale) / unscaled - 1,
                    "tolerance": _tolerance(evidence),
                }
            )
    if not rows:
        page.say(NOT_MEASURED)
        return
    page.say(
        "Against the default without a scale. The default's loss was measured; that of `auto` is the loss without a scale at its"
        " epsilon over the scale, which gives the same run but for rounding."
    )
    page.table(
        "epsilon_scaled",
        rows,
        {
            "workload": ("workload", text),
            "loss_scale": ("loss times", number),
            "default_excess": ("1e-8 above the unscaled", percent),
            "auto": ("auto", number),
            "auto_excess": ("auto above the unscaled", percent),
            "tolerance": ("tolerance", percent),
        },
    )
    judged = [row for row in rows if not math.isnan(row["tolerance"])]  # the default has more than one seed
    worse = [row for row in judged if row["auto_excess"] > row["tolerance"]]
    names = [f"{row['workload']} times {row['loss_scale']:g}" for row in worse]
    page.say(
        verdict(
            f"`auto` is within the tolerance in {len(judged) - len(worse)} of {len(judged)} cases", not worse, "all"
        )
    )
    if worse:
        page.bad.append(f'`epsilon="auto"` is worse than the unscaled default: {listed(names)}.')
