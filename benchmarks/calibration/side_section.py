"""The sections of the page on the grids beside the main one: the paper's batch sizes, and Adam without momentum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import grid
import numpy as np
from evidence import Evidence
from page import NOT_MEASURED, Page, Row, between, listed, number, percent, text, yes
from rate_section import falls, rate_row
from side_grids import GRIDS
from transfers import LAWS, ONE, Bench, best_factors, interval, outcomes

Found = Mapping[str, Evidence]
SURGE = ("surge_small", "surge_large")
NO_MOMENTUM = "no_momentum"
MOMENTUM = 0.9


def collect(folder: Path) -> dict[str, Evidence]:
    """The grids that have a finished run, by name."""
    found = {name: Evidence(workload, grid.read(folder / f"{name}.csv")) for name, workload in GRIDS.items()}
    return {name: evidence for name, evidence in found.items() if evidence.losses}


def surge(page: Page, side: Found, draws: int) -> None:
    """Whether the best rate falls past a peak at the batch sizes of the surge law's paper."""
    page.heading("The batch sizes of the surge law's paper", 3)
    found = {name: side[name] for name in SURGE if name in side}
    if not found:
        page.say(NOT_MEASURED)
        return
    seconds = sum(row["seconds"] for evidence in found.values() for row in evidence.results.values())
    page.say(
        f"The paper sees its peak at batch sizes from 1 to 12 and from 64 to 1,164. `mlp` at those ({seconds / 60:.0f} minutes of"
        " one shared core), rates a factor of sqrt(2) apart, three seeds. "
        + "; ".join(_range(evidence) for evidence in found.values())
        + "."
    )
    rows = [rate_row("mlp", size, evidence) for evidence in found.values() for size in evidence.losses]
    page.table(
        "surge_sizes",
        rows,
        {
            "batch_size": ("batch size", number),
            "rate": ("best rate", number),
            "as_good_octaves": ("as good, octaves wide", number),
            "loss": ("loss", number),
            "seed_noise": ("seed noise", percent),
            "seeds": ("seeds", text),
            "interior": ("interior", yes),
        },
    )
    generator = np.random.default_rng(0)
    for evidence in found.values():
        page.say(_peak(evidence, draws, generator))


def _range(evidence: Evidence) -> str:
    low, *_, high = sizes = evidence.workload.batch_sizes
    samples = evidence.workload.samples
    return f"A run from {low:,} to {high:,} has {samples:,} samples, {samples // max(sizes)} steps at the largest"


def _peak(evidence: Evidence, draws: int, generator: np.random.Generator) -> str:
    sizes = list(evidence.best_rates)
    share, peak = falls(evidence.losses, draws, generator)
    last = evidence.losses[sizes[-1]].curve()
    assert last is not None  # it has a best rate
    rates = np.array(list(evidence.best_rates.values()))
    first = sizes[int(np.argmax(rates))]
    slope = float(np.polyfit(np.log2(sizes), rates, 1)[0]) if len(sizes) > 1 else math.nan
    cost = float(last.excess(np.array([rates.max()]))[0])
    return (
        f"- {sizes[0]:,} to {sizes[-1]:,}: the highest best rate is that of {first:,} first, and of {peak:,} last; in"
        f" {percent(share)} of the draws of the seeds a batch larger than its last has a lower one. That rate costs"
        f" {percent(cost)} of the loss at {sizes[-1]:,}. The best rate goes with the batch size to the power of {number(slope)}"
        " (least squares)."
    )


def momentum(page: Page, found: Found, side: Found, draws: int) -> None:
    """The noise scale of the laws with and without momentum."""
    page.heading("Does momentum change the noise scale of the best rate?", 3)
    if NO_MOMENTUM not in side or "mlp" not in found:
        page.say(NOT_MEASURED)
        return
    factor = (1 + MOMENTUM) / (1 - MOMENTUM)
    page.say(
        f"A first moment with decay {MOMENTUM} averages gradients, as a batch {number(factor)} times as large would. If that were"
        " all, the noise scale that fits the best rates would be so many times smaller with it. `mlp`, Adam's beta1 0 and"
        f" {MOMENTUM}, tuned apart; the noise scale, one for all batch sizes, with the lowest mean excess over all transfers, and"
        " its 95% interval over the seeds."
    )
    grids = {"0": side[NO_MOMENTUM], str(MOMENTUM): found["mlp"]}
    sizes = sorted(set.intersection(*(set(evidence.best_rates) for evidence in grids.values())))
    page.show(
        [
            {"beta1": name, **{str(size): 2 ** evidence.best_rates[size] for size in sizes}}
            for name, evidence in grids.items()
        ],
        {"beta1": ("beta1", text), **{str(size): (f"best rate at {size:,}", number) for size in sizes}},
    )
    rows = _noise_rows(grids, draws)
    page.table(
        "momentum",
        rows,
        {
            "law": ("law", text),
            "without": ("noise scale, beta1 0", _cell),
            "with": (f"beta1 {MOMENTUM}", _cell),
            "ratio": ("ratio", number),
        },
    )
    apart = [row["law"] for row in rows if row["without"][1] > row["with"][2]]
    ratios = [row["ratio"] for row in rows]
    page.say(
        f"Without momentum the noise scale is {number(min(ratios))} to {number(max(ratios))} times that with it, not"
        f" {number(factor)} times. Laws where it is larger and the intervals are apart: {listed(apart)}."
    )


def _noise_rows(grids: Mapping[str, Evidence], draws: int) -> list[Row]:
    without, with_it = (_noise_scales(evidence, draws) for evidence in grids.values())
    return [
        {"law": law, "without": without[law], "with": with_it[law], "ratio": without[law][0] / with_it[law][0]}
        for law in LAWS
    ]


def _noise_scales(evidence: Evidence, draws: int) -> dict[str, tuple[float, float, float]]:
    found = outcomes(Bench(evidence.losses, {}), draws, np.random.default_rng(0))
    scales = {law: found[law, ONE].factors[best_factors(found[law, ONE])] for law in LAWS}
    return {
        law: (float(values[0]), *(interval(values[1:]) if draws else (math.nan, math.nan)))
        for law, values in scales.items()
    }


def _cell(point: tuple[float, float, float]) -> str:
    return f"{number(point[0])} ({between(point[1:])})"
