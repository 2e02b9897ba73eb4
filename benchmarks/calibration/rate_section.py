"""The sections of the page on the runs, on the best learning rates, and on the small grids beside the main one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

import figures
import numpy as np
from evidence import Evidence, Measured, drawn_curves, drawn_seeds, seed_spread
from grid import STAGES
from page import Page, listed
from reporting import Row

Found = Mapping[str, Evidence]
PLATEAU = 1.02  # rates whose loss is at most this many times the best are as good as the best


def runs(page: Page, found: Found) -> None:
    """How many runs there are, where they were made, and which stages lack."""
    rows = [row for evidence in found.values() for row in evidence.results.values()]
    known = ("cores", "cpu", "python", "torch", "lightning_gradhist")
    machines = Counter(listed([f"{name} {row[name]}" for name in known]) for row in rows)
    table = [
        {
            "workload": name,
            "batch_sizes": listed([f"{size:,}" for size in evidence.workload.batch_sizes]),
            "samples": evidence.workload.samples,
            "steps_at_largest": evidence.workload.samples // evidence.workload.batch_sizes[-1],
            **dict.fromkeys(STAGES, 0),
            **Counter(row["stage"] for row in evidence.results.values()),
        }
        for name, evidence in found.items()
    ]
    lacking = {stage: [row["workload"] for row in table if not row[stage]] for stage in STAGES}
    page.fill(
        "runs",
        number=f"{len(rows):,} runs",
        first=min(row["date"] for row in rows),
        last=max(row["date"] for row in rows),
        hours=f"{sum(row['seconds'] for row in rows) / 3600:.1f}",
        diverged=sum(row["diverged"] for row in rows),
        machines=listed([f"{of} runs on {machine}" for machine, of in machines.most_common()], "; "),
        runs=page.keep("runs", table),
        lacking=listed([f"{stage} ({listed(names)})" for stage, names in lacking.items() if names]),
    )


def best_rates(page: Page, found: Found, draws: int) -> None:
    """The best rate at each batch size, how sharp it is, and whether it falls at the largest."""
    rows = [rate_row(name, size, evidence) for name, evidence in found.items() for size in evidence.losses]
    edge = [f"{row['workload']} at {row['batch_size']:,}" for row in rows if not row["interior"]]
    if edge:
        page.bad.append(f"The optimum is at the edge of what was measured: {listed(edge)}.")
    generator, peaks = np.random.default_rng(0), []
    for of, steps in (("losses", "samples"), ("losses_at_equal_steps", "steps")):
        for name, losses in ((name, getattr(evidence, of)) for name, evidence in found.items()):
            if losses:
                share, peak = falls(losses, draws, generator)
                peaks.append({"workload": name, "equal": steps, "peak": peak, "lower": share})
    page.fill("best_rates", best_rates=page.keep("best_rates", rows), edge=listed(edge), peaks=peaks)
    page.draw("loss_curves", figures.loss_curves({name: evidence.losses for name, evidence in found.items()}))


def rate_row(name: str, size: int, evidence: Evidence) -> Row:
    """The best rate of a batch size, and how sharp it is."""
    losses = evidence.losses[size]
    curve = losses.mean()
    dense = np.linspace(curve.rates[0], curve.rates[-1], 1001)
    good = dense[curve.excess(dense) <= PLATEAU - 1]
    return {
        **{"workload": name, "batch_size": size, "rate": 2**curve.best_rate},
        **{"as_good_octaves": float(good[-1] - good[0]), "loss": float(curve.losses.min())},
        **{"seed_noise": seed_spread(losses), "seeds": losses.seeds},
        **{"rates": len(curve.rates), "interior": curve.interior},
    }


def falls(losses: Mapping[int, Measured], draws: int, generator: np.random.Generator) -> tuple[float, int]:
    """The share of draws of the seeds in which a batch larger than that with the highest best rate has a lower one; and that."""
    seeds = max(measured.losses.shape[1] for measured in losses.values())
    plain = [curve.best_rate for curve in drawn_curves(losses.values(), None)]
    drawn = (drawn_curves(losses.values(), drawn_seeds(seeds, generator)) for _ in range(draws))
    lower = [curves[-1].best_rate < max(curve.best_rate for curve in curves) for curves in drawn]
    return float(np.mean(lower)) if draws else math.nan, list(losses)[len(plain) - 1 - int(np.argmax(plain[::-1]))]


def surge(page: Page, side: Found, draws: int) -> None:
    """Whether the best rate falls past a peak at the batch sizes of the surge law's paper."""
    found = [side[name] for name in ("surge_small", "surge_large") if name in side]
    if not found:
        return
    generator = np.random.default_rng(0)
    rows = [rate_row("mlp", size, evidence) for evidence in found for size in evidence.losses]
    seconds = sum(row["seconds"] for evidence in found for row in evidence.results.values())
    page.fill(
        "surge",
        minutes=f"{seconds / 60:.0f}",
        surge_sizes=page.keep("surge_sizes", rows),
        peaks=[_peak(evidence, draws, generator) for evidence in found],
    )


def _peak(evidence: Evidence, draws: int, generator: np.random.Generator) -> Row:
    sizes, rates = list(evidence.best_rates), np.array(list(evidence.best_rates.values()))
    share, peak = falls(evidence.losses, draws, generator)
    samples = evidence.workload.samples
    return {
        **{"sizes": f"{sizes[0]:,} to {sizes[-1]:,}", "samples": samples, "steps": samples // sizes[-1]},
        **{"first": sizes[int(np.argmax(rates))], "last": peak, "lower": share},
        "cost": float(evidence.losses[sizes[-1]].mean().excess(np.array([rates.max()]))[0]),
        "power": float(np.polyfit(np.log2(sizes), rates, 1)[0]) if len(sizes) > 1 else math.nan,
    }
