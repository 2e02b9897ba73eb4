"""The sections of the page on the noise scale along runs, and on its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import figures
import numpy as np
from evidence import Evidence, is_bounded, median_of
from page import Page, number, percent, verdict
from reporting import Row

Group = tuple[str, str, str]
"""Workload, weights and noise scale."""
HELD = 0.9
"""The goal for the share of intervals that hold the value."""
INTERVALS = {"Fieller": ("lower", "upper"), "bootstrap": ("bootstrap_lower", "bootstrap_upper")}


def growth(page: Page, found: Mapping[str, Evidence]) -> None:
    """The noise scale along the runs."""
    measured = {name: evidence for name, evidence in found.items() if evidence.noise}
    if not measured:
        return
    rows = [_growth_row(name, evidence, size) for name, evidence in measured.items() for size in evidence.noise]
    grown = [row["growth"] for row in rows]
    page.fill(
        "growth",
        noise_scale=page.keep("noise_scale", rows),
        lowest=number(min(grown)),
        highest=number(max(grown)),
    )
    moments = {name: {size: [m for _, m in of] for size, of in ev.noise.items()} for name, ev in measured.items()}
    page.draw("noise_scale", figures.growth(moments))
    worst = max(rows, key=lambda row: row["unbounded"])
    if worst["unbounded"]:
        page.bad.append(
            f"Up to {percent(worst['unbounded'])} of the intervals of `B_adam` along a run have no bound"
            f" ({worst['workload']}, batch size {worst['batch_size']:,})."
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
    """How often the interval of the noise scale holds the value from ten times the data; beside it a bootstrap's."""
    if not rows:
        return
    groups: dict[Group, list[Row]] = {}
    for row in rows:
        for workload in (row["workload"], "all"):
            groups.setdefault((workload, row["state"], row["metric"]), []).append(row)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0] == "all", group[0]))
    table = page.keep("coverage_summary", [_coverage_row(group, own, "Fieller") for group, own in ordered])
    verdicts = []
    for row in (row for row in table if row["workload"] == "all"):
        share = row["covered"][0]
        verdicts.append(verdict(f"{row['metric']} {row['state']}: {percent(share)} held", share >= HELD, percent(HELD)))
        if share < HELD:
            page.bad.append(f"The interval of `{row['metric']}` {row['state']} holds the value in {percent(share)}.")
    beside = [
        {"interval": name, **_coverage_row(group, own, name)}
        for group, own in ordered
        if group[0] == "all"
        for name in INTERVALS
    ]
    page.fill(
        "coverage",
        coverage_summary=table,
        verdicts="\n".join(verdicts),
        coverage_bootstrap=page.keep("coverage_bootstrap", beside),
    )


def _coverage_row(group: Group, rows: Sequence[Row], interval: str) -> Row:
    values = np.array(
        [[row[key] for key in ("value", *INTERVALS[interval], "from_ten_times_the_data")] for row in rows]
    )
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
