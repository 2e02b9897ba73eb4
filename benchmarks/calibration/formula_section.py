"""The section of the page on the noise scale from Theorem 3's formula."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from evidence import FORMULA, MEAN, Evidence
from formula import HALF
from page import NOT_MEASURED, Page, Row, number, percent, text
from transfer_section import Name, Summary, label, mean_point, summary_columns, summary_row
from transfers import BEST, ONE

Found = Mapping[str, Evidence]
MOMENTS = ("start", "tenth", "half", "nine_tenths")


def formula(page: Page, found: Found, methods: Mapping[Name, Summary]) -> None:
    """What the formula gives along runs, and what it costs to carry rates with it."""
    page.heading("The noise scale from Theorem 3's formula", 3)
    rows = [row for name, ev in found.items() for size in ev.losses if (row := _row(name, ev, size))]
    if not rows:
        page.say(NOT_MEASURED)
        return
    page.say(
        "`pi sum H_ii / (2 sum_{i != j} s_i s_j H_ij)` with `s = mu / sigma`, at fixed weights along the run at the best rate,"
        f" seed 0 (`formula.py`): two disjoint halves of {HALF} gradients, products with the Hessian from finite differences of"
        f" gradients, its diagonal from {HALF} of Hutchinson's vectors. In samples, with 95% bootstrap intervals over the"
        " gradients. Dash: the trace or the sum off the diagonal is not positive, so that there is no value. Mean: over the"
        " samples of the run, of the values that there are."
    )
    page.table(
        "formula",
        rows,
        {
            "workload": ("workload", text),
            "batch_size": ("batch size", number),
            "start": ("at the start", _cell),
            "tenth": ("after a tenth", _cell),
            "half": ("half", _cell),
            "nine_tenths": ("nine tenths", _cell),
            "mean": ("mean", number),
            "adam": ("B_adam: mean", number),
        },
    )
    moments = [row for ev in found.values() for row in ev.formula]
    lacking = np.mean([math.isnan(row["value"]) for row in moments])
    unbounded = np.mean([math.isinf(row["upper"]) for row in moments])
    ratios = [row["mean"] / row["adam"] for row in rows if row["mean"] > 0 and row["adam"] > 0]
    page.say(
        f"Of {len(moments)} moments {percent(float(lacking))} have no positive value, and {percent(float(unbounded))} have one"
        f" whose interval has no upper end. Its mean over a run is {number(min(ratios, default=math.nan))} to"
        f" {number(max(ratios, default=math.nan))} times that of `B_adam`"
        f" ({number(float(np.median(ratios)) if ratios else math.nan)} in the median)."
    )
    if lacking:
        page.bad.append(f"Theorem 3's formula has no positive value at {percent(float(lacking))} of the moments.")
    _transfers(page, found, methods)


def _row(name: str, evidence: Evidence, size: int) -> Row | None:
    moments = [row for row in evidence.formula if row["batch_size"] == size]
    if not moments:
        return None
    column = list(evidence.losses).index(size)
    adam = evidence.estimates.get(MEAN)
    measured = np.array([math.nan]) if adam is None else adam[:, column][~np.isnan(adam[:, column])]
    return {
        "workload": name,
        "batch_size": size,
        **{at: (row["value"], row["lower"], row["upper"]) for at, row in zip(MOMENTS, moments, strict=True)},
        "mean": float(evidence.estimates[FORMULA][0, column]),
        "adam": float(np.median(measured)) if measured.size else math.nan,
    }


def _transfers(page: Page, found: Found, methods: Mapping[Name, Summary]) -> None:
    """The transfers with the formula beside those with ``B_adam`` and with nothing measured."""
    own = {method: summary for method, summary in methods.items() if method[1] == FORMULA}
    if not own:
        page.say("To carry a rate with it: not measured yet on every workload.")
        return
    page.say("Carrying the best rate with it, beside the mean `B_adam` and one noise scale that is not measured:")
    page.show(
        [summary_row(method, s) for method, s in methods.items() if method[1] in (FORMULA, MEAN, ONE)],
        summary_columns(list(found)),
    )
    honest = {method: summary for method, summary in own.items() if method[2] != BEST}
    null, adam = (
        min((s.means[0] for m, s in methods.items() if m[1] == estimate and m[2] != BEST), default=math.nan)
        for estimate in (ONE, MEAN)
    )
    best = next(iter(honest))
    page.say(
        f"The best with the formula that does not know the workload is {label(best)}: mean excess"
        f" {percent(mean_point(honest[best])[0])}; with the mean `B_adam` it is {percent(float(adam))}, with one noise scale for"
        f" all that nobody measures {percent(float(null))}."
    )
    if not honest[best].means[0] < adam:
        page.bad.append("Theorem 3's formula carries rates no better than the mean `B_adam`.")
    if not honest[best].means[0] < null:
        page.bad.append("Theorem 3's formula carries rates no better than one noise scale that is not measured at all.")


def _cell(point: tuple[float, float, float]) -> str:
    value, low, high = point
    return "–" if math.isnan(value) else f"{number(value)} ({number(low)}–{number(high)})"
