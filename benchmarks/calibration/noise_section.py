"""The section of the page on the noise scale along runs, and on its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import figures
import numpy as np
from estimates import is_bounded, median_of
from evidence import Evidence
from page import NOT_MEASURED, Columns, Page, Row, between, number, percent, text, verdict
from probes import DRAWS

Found = Mapping[str, Evidence]
Group = tuple[str, str, str]
"""Workload, weights and noise scale."""

HELD = 0.9
"""The goal for the share of intervals that hold the value."""
ENDS = ("lower", "upper")
SHARES: Columns = {
    "covered": ("held", lambda point: f"{percent(point[0])} ({between(point[1:], percent)})"),
    "of": ("of", text),
    "unbounded": ("without a bound", percent),
    "width": ("upper end over lower, median", number),
}


def growth(page: Page, found: Found) -> None:
    """The noise scale along the runs."""
    page.heading("Growth of the noise scale along a run")
    measured = {name: evidence for name, evidence in found.items() if evidence.noise}
    if not measured:
        page.say(NOT_MEASURED)
        return
    rows = [_growth_row(name, ev, size) for name, ev in measured.items() for size in ev.noise]
    page.say(
        "Each moment of a run has a measurement of its own, from 32 fresh gradients. Start: the initial weights. After warm-up:"
        " the first moment after 5% of the samples. Mean: over the samples of the run, without the moments whose interval has no"
        " bound (its upper end is infinite or its lower end zero); median: over the samples, of all moments. All are medians over"
        " the runs of the batch size, in samples. Unbounded: share of the moments whose interval of `B_adam` has no bound."
    )
    page.table(
        "noise_scale",
        rows,
        {
            "workload": ("workload", text),
            "batch_size": ("batch size", number),
            "runs": ("runs", text),
            "B_simple start": ("B_simple: start", number),
            "B_simple mean": ("mean", number),
            "B_adam start": ("B_adam: start", number),
            "B_adam after warm-up": ("after warm-up", number),
            "B_adam mean": ("mean", number),
            "B_adam median": ("median", number),
            "growth": ("last over start", number),
            "unbounded": ("unbounded", percent),
        },
    )
    page.figure(
        "noise_scale",
        figures.growth(
            {n: {size: [m for _, m in runs] for size, runs in ev.noise.items()} for n, ev in measured.items()}
        ),
        "The noise scale along runs. Thick: the middle batch size, median over its runs, with the median ends of the intervals"
        " (an end that is infinite or zero is cut off). Thin: the other batch sizes.",
    )
    grown = [row["growth"] for row in rows]
    page.say(f"`B_adam` at the last moment is {number(min(grown))} to {number(max(grown))} times that at the start.")
    unbounded = max(rows, key=lambda row: row["unbounded"])
    if unbounded["unbounded"]:
        page.bad.append(
            f"Up to {percent(unbounded['unbounded'])} of the intervals of `B_adam` along a run have no bound"
            f" ({unbounded['workload']}, batch size {unbounded['batch_size']:,})."
        )


def _growth_row(name: str, evidence: Evidence, size: int) -> Row:
    column = list(evidence.losses).index(size)
    moments = [m for _, m in evidence.noise[size]]
    bounded = [is_bounded(m, "adam") for run in moments for m in run]
    return {
        "workload": name,
        "batch_size": size,
        "runs": len(moments),
        **{estimate: median_of(values[:, column]) for estimate, values in evidence.estimates.items()},
        "growth": float(np.median([run[-1]["adam"] / run[0]["adam"] for run in moments])),
        "unbounded": 1 - sum(bounded) / len(bounded),
    }


def coverage(page: Page, rows: Sequence[Row]) -> None:
    """How often the interval of the noise scale holds the value from ten times the data."""
    page.heading("Coverage of its interval", 3)
    if not rows:
        page.say(NOT_MEASURED)
        return
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        for workload in (row["workload"], "all"):
            groups.setdefault((workload, row["state"], row["metric"]), []).append(row)
    table = [_coverage_row(group, own) for group, own in sorted(groups.items(), key=lambda g: (g[0][0] == "all", g[0]))]
    page.say(
        "Measured apart from the runs: at fixed weights, the initial ones and those after a tenth of the samples, intervals"
        " from 32 gradients each, and whether they hold the value from ten times as many other gradients. That value has an"
        " error of its own, about a third of theirs, so a correct 95% interval holds it in somewhat less than 95%."
    )
    page.table(
        "coverage_summary",
        table,
        {
            "workload": ("workload", text),
            "state": ("weights", text),
            "metric": ("noise scale", text),
            **SHARES,
            "off": ("value over that from ten times the data, median", number),
        },
    )
    total = [row for row in table if row["workload"] == "all"]
    for row in total:
        share = percent(row["covered"][0])
        page.say(verdict(f"{row['metric']} {row['state']}: {share} held", row["covered"][0] >= HELD, percent(HELD)))
        if row["covered"][0] < HELD:
            page.bad.append(f"The interval of `{row['metric']}` {row['state']} holds the value in {share}.")
    if "bootstrap_lower" in rows[0]:
        _bootstrap(page, {group: own for group, own in groups.items() if group[0] == "all"})


def _bootstrap(page: Page, groups: Mapping[Group, Sequence[Row]]) -> None:
    """A bootstrap's intervals beside Fieller's, of the same gradients."""
    page.say(
        f"These are Fieller's intervals. Beside them the percentile bootstrap's: the gradients of each half drawn again {DRAWS}"
        " times, the whole measurement made again of each draw."
    )
    page.table(
        "coverage_bootstrap",
        [
            {"interval": name, **_coverage_row(group, own, columns)}
            for group, own in sorted(groups.items())
            for name, columns in (("Fieller", ENDS), ("bootstrap", ("bootstrap_lower", "bootstrap_upper")))
        ],
        {"state": ("weights", text), "metric": ("noise scale", text), "interval": ("interval", text), **SHARES},
    )


def _coverage_row(group: Group, rows: Sequence[Row], ends: tuple[str, str] = ENDS) -> Row:
    values = np.array([[float(row[key]) for key in ("value", *ends, "from_ten_times_the_data")] for row in rows])
    value, lower, upper, truth = values.T
    return {
        **dict(zip(("workload", "state", "metric"), group, strict=True)),
        "covered": _share(int(((lower <= truth) & (truth <= upper)).sum()), len(rows)),
        "of": len(rows),
        "unbounded": float(((lower <= 0) | np.isinf(upper)).mean()),
        "width": float(np.median(np.divide(upper, lower, out=np.full(len(rows), math.inf), where=lower > 0))),
        "off": float(np.median(value / truth)),
    }


def _share(number: int, of: int) -> tuple[float, float, float]:
    """A share with Wilson's 95% interval."""
    z = 1.96**2 / of
    middle, width = (number / of + z / 2) / (1 + z), math.sqrt(z * (number / of * (1 - number / of) + z / 4)) / (1 + z)
    return number / of, max(middle - width, 0.0), min(middle + width, 1.0)
