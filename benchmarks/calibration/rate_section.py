"""The sections of the page on the runs, and on the best learning rates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import figures
import numpy as np
from curves import Measured, seed_spread
from evidence import Evidence
from grid import STAGES
from page import NOT_MEASURED, Page, Row, count, listed, number, percent, text, yes

Found = Mapping[str, Evidence]

PLATEAU = 1.02
"""Rates whose loss is at most this many times the best are as good as the best."""


def runs(page: Page, found: Found) -> None:
    """How many runs there are, where they were made, and which stages lack."""
    rows = [row for evidence in found.values() for row in evidence.results.values()]
    machines = Counter(
        tuple(row[key] for key in ("cpu", "cores", "python", "torch", "lightning_gradhist")) for row in rows
    )
    dates = sorted({row["date"] for row in rows})
    page.heading("The runs")
    page.say(
        f"{count(len(rows), 'run')}, made from {dates[0]} to {dates[-1]}, {sum(r['seconds'] for r in rows) / 3600:.1f} hours of"
        f" one core in all, which other work shared. {sum(map(int, (r['diverged'] for r in rows)))} of them diverged. Machines: "
        + "; ".join(
            f"{number} runs on {cores} cores of {cpu}, Python {python}, torch {torch}, lightning_gradhist {ours}"
            for (cpu, cores, python, torch, ours), number in machines.most_common()
        )
        + "."
    )
    table: list[Row] = [
        {
            "workload": name,
            "batch_sizes": listed([f"{size:,}" for size in evidence.workload.batch_sizes]),
            "samples": evidence.workload.samples,
            "steps_at_largest": evidence.workload.samples // evidence.workload.batch_sizes[-1],
            **Counter(dict.fromkeys(STAGES, 0)),
            **Counter(row["stage"] for row in evidence.results.values()),
        }
        for name, evidence in found.items()
    ]
    page.table(
        "runs",
        table,
        {
            "workload": ("workload", text),
            "batch_sizes": ("batch sizes", text),
            "samples": ("samples a run", number),
            "steps_at_largest": ("steps at the largest batch", number),
            **{stage: (stage, text) for stage in STAGES},
        },
    )
    lacking = [f"{stage} ({listed([r['workload'] for r in table if not r[stage]])})" for stage in STAGES]
    lacking = [line for line, stage in zip(lacking, STAGES, strict=True) if any(not r[stage] for r in table)]
    page.say(
        f"Stages without any run yet: {listed(lacking)}. Each stage is described in `benchmarks/calibration/grid.py`."
    )


def best_rates(page: Page, found: Found, draws: int) -> None:
    """The best rate at each batch size, how sharp it is, and whether it falls at the largest."""
    page.heading("The best learning rate at each batch size")
    page.say(
        "Adam, epsilon at its default, the same number of samples at every batch size. Loss: final training loss, mean over"
        " seeds. Seed noise: standard deviation of a single run, over the rates within half an octave. As good: rates whose"
        f" loss, straight between measured rates in logs, is within {percent(PLATEAU - 1)} of the best."
    )
    rows = [rate_row(name, size, ev) for name, ev in found.items() for size in ev.losses]
    page.table(
        "best_rates",
        rows,
        {
            "workload": ("workload", text),
            "batch_size": ("batch size", number),
            "rate": ("best rate", number),
            "as_good_octaves": ("as good, octaves wide", number),
            "loss": ("loss", number),
            "seed_noise": ("seed noise", percent),
            "seeds": ("seeds", text),
            "rates": ("rates", text),
            "interior": ("interior", yes),
        },
    )
    page.figure(
        "loss_curves",
        figures.loss_curves({name: evidence.losses for name, evidence in found.items()}),
        "Final training loss over learning rate, in percent above the best; darker: larger batches; rings: the best rates.",
    )
    edge = [f"{row['workload']} at {row['batch_size']:,}" for row in rows if not row["interior"]]
    if edge:
        page.bad.append(f"The optimum is at the edge of what was measured: {listed(edge)}.")
    page.say(f"Optima at the edge of the grid: {listed(edge)}.")
    generator = np.random.default_rng(0)
    for title, of in (("equal samples", "losses"), ("equal steps", "losses_at_equal_steps")):
        lines = []
        for name, evidence in found.items():
            losses: dict[int, Measured] = getattr(evidence, of)
            if losses:
                share, peak = falls(losses, draws, generator)
                lines.append(
                    f"- {name}: highest best rate at {peak:,}; in {percent(share)} of the draws a larger batch has a lower one."
                )
        page.say(f"Does the best rate fall again past a peak, as the surge law says? At {title}:")
        page.say("\n".join(lines) if lines else NOT_MEASURED)


def rate_row(name: str, size: int, evidence: Evidence) -> Row:
    """The best rate of a batch size, and how sharp it is."""
    losses = evidence.losses[size]
    curve = losses.curve()
    assert curve is not None
    dense = np.linspace(curve.rates[0], curve.rates[-1], 1001)
    good = dense[curve.excess(dense) <= PLATEAU - 1]
    return {
        "workload": name,
        "batch_size": size,
        "rate": 2**curve.best_rate,
        "as_good_octaves": float(good[-1] - good[0]),
        "loss": float(curve.losses.min()),
        "seed_noise": seed_spread(losses),
        "seeds": evidence.losses[size].seeds,
        "rates": len(curve.rates),
        "interior": curve.interior,
    }


def falls(losses: Mapping[int, Measured], draws: int, generator: np.random.Generator) -> tuple[float, int]:
    """The share of draws of the seeds in which a batch larger than that with the highest best rate has a lower one; and that."""
    seeds = max(measured.losses.shape[1] for measured in losses.values())
    falls, peak = [], 0
    for draw in range(draws + 1):
        weights = np.bincount(generator.integers(seeds, size=seeds), minlength=seeds) if draw else np.ones(seeds)
        curves = [m.curve(weights[: m.losses.shape[1]]) or m.curve() for m in losses.values()]
        best = [curve.best_rate for curve in curves if curve is not None]
        if draw:
            falls.append(best[-1] < max(best))
        else:
            peak = list(losses)[len(best) - 1 - int(np.argmax(best[::-1]))]
    return float(np.mean(falls)) if draws else math.nan, peak
