"""The sections of the page on the runs, the best rates, and the noise scale: along runs, its interval, and Theorem 5."""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import figures
import numpy as np
from evidence import FIT, MEAN, Evidence, Measured, drawn_curves, is_bounded, seed_spread
from grid import STAGES
from page import Page, listed, number, percent
from reporting import Row

Found = Mapping[str, Evidence]
Group = tuple[str, str, str]  # workload, weights and noise scale
HELD = 0.9  # the goal for the share of intervals that hold the value
SAME = "none: the same samples"
PLATEAU = 1.02  # rates whose loss is at most this many times the best are as good as the best


def runs(page: Page, found: Found) -> None:
    """How many runs there are, where they were made, and which stages lack."""
    rows = [row for evidence in found.values() for row in evidence.results.values()]
    known = ("cores", "cpu", "python", "torch", "lightning_gradhist")
    machines = Counter(listed([f"{name} {row[name]}" for name in known]) for row in rows)
    table = [_runs_row(evidence) for evidence in found.values()]
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


def _runs_row(evidence: Evidence) -> Row:
    workload, stages = evidence.workload, Counter(row["stage"] for row in evidence.results.values())
    sizes = listed([f"{size:,}" for size in workload.batch_sizes])
    of_runs = {"samples": workload.samples, "steps_at_largest": workload.samples // workload.batch_sizes[-1]}
    return {"workload": workload.name, "batch_sizes": sizes, **of_runs, **dict.fromkeys(STAGES, 0), **stages}


def best_rates(page: Page, found: Found, draws: int) -> None:
    """The best rate at each batch size, how sharp it is, and whether it falls at the largest."""
    rows = [rate_row(name, size, evidence) for name, evidence in found.items() for size in evidence.losses]
    edge = [f"{row['workload']} at {row['batch_size']:,}" for row in rows if not row["interior"]]
    page.tell("The optimum is at the edge of what was measured", edge)
    generator, peaks = np.random.default_rng(0), []
    for of, steps in (("losses", "samples"), ("losses_at_equal_steps", "steps")):
        for name, losses in ((name, getattr(evidence, of)) for name, evidence in found.items()):
            if losses:
                share, peak = falls(losses, draws, generator)
                peaks.append({"workload": name, "equal": steps, "peak": peak, "lower": share})
    page.fill("best_rates", best_rates=page.keep("best_rates", rows), edge=listed(edge), peaks=peaks)
    page.draw("loss_curves", figures.loss_curves({name: evidence.losses for name, evidence in found.items()}))


def rate_row(name: str, size: int, evidence: Evidence) -> Row:
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
    curves = drawn_curves(losses.values(), draws, generator)
    plain, *drawn = ([curve.best_rate for curve in of_draw] for of_draw in curves)
    peak = max(zip(plain, losses, strict=True))[1]  # the last one of the highest, as batch sizes ascend
    return float(np.mean([rates[-1] < max(rates) for rates in drawn])) if drawn else math.nan, peak


def surge(page: Page, side: Found, draws: int) -> None:
    """Whether the best rate falls past a peak at the batch sizes of the surge law's paper."""
    found = [side[name] for name in ("surge_small", "surge_large") if name in side]
    if not found:
        return
    generator = np.random.default_rng(0)
    rows = [rate_row("mlp", size, evidence) for evidence in found for size in evidence.losses]
    seconds = sum(row["seconds"] for evidence in found for row in evidence.results.values())
    peaks = [_peak(evidence, draws, generator) for evidence in found]
    page.fill("surge", minutes=f"{seconds / 60:.0f}", surge_sizes=page.keep("surge_sizes", rows), peaks=peaks)


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


def growth(page: Page, found: Found) -> None:
    measured = {name: evidence for name, evidence in found.items() if evidence.noise}
    if not measured:
        return
    rows = [_growth_row(name, evidence, size) for name, evidence in measured.items() for size in evidence.noise]
    grown = [row["growth"] for row in rows]
    ends = {"lowest": number(min(grown)), "highest": number(max(grown))}
    page.fill("growth", noise_scale=page.keep("noise_scale", rows), **ends)
    page.draw("noise_scale", figures.growth(measured))
    worst = max(rows, key=lambda row: row["unbounded"])
    if worst["unbounded"]:
        where = f"{worst['workload']}, batch size {worst['batch_size']:,}"
        share = percent(worst["unbounded"])
        page.bad.append(f"Up to {share} of the intervals of `B_adam` along a run have no bound ({where}).")


def _growth_row(name: str, evidence: Evidence, size: int) -> Row:
    column = list(evidence.losses).index(size)
    moments = [m for _, m in evidence.noise[size]]
    bounded = [is_bounded(m, "adam") for run in moments for m in run]
    return {
        **{"workload": name, "batch_size": size, "runs": len(moments)},
        **{estimate: float(np.nanmedian(values[:, column])) for estimate, values in evidence.estimates.items()},
        "growth": float(np.median([run[-1]["adam"] / run[0]["adam"] for run in moments])),
        "unbounded": 1 - sum(bounded) / len(bounded),
    }


def coverage(page: Page, rows: Sequence[Row]) -> None:
    if not rows:
        return
    groups: dict[Group, list[Row]] = defaultdict(list)
    for row in rows:
        for workload in (row["workload"], "all"):
            groups[workload, row["state"], row["metric"]].append(row)
    ordered = sorted(groups.items(), key=lambda group: (group[0][0] == "all", group[0]))
    table = page.keep("coverage_summary", [_coverage_row(group, own) for group, own in ordered])
    whole = [row for row in table if row["workload"] == "all"]
    short = [row for row in whole if row["covered"][0] < HELD]
    for row in short:
        share = percent(row["covered"][0])
        page.bad.append(f"The interval of `{row['metric']}` {row['state']} holds the value in {share}.")
    page.fill("coverage", coverage_summary=table, met=len(whole) - len(short))


def _coverage_row(group: Group, rows: Sequence[Row]) -> Row:
    keys = ("value", "lower", "upper", "from_ten_times_the_data")
    value, lower, upper, truth = np.array([[row[key] for key in keys] for row in rows]).T
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


def errors(noise: np.ndarray, samples: Mapping[float, np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Log2 of predicted over measured samples, from each size to each other, ``[..., targets, n, n]``; NaN on the diagonal.

    Theorem 5 predicts the ratio ``(B + B_noise) / (B_0 + B_noise)``, the noise ``[..., n]`` being known at each size ``B_0``.
    """
    batch, known = np.array(sizes, float), noise[..., None]
    predicted = np.log2((batch + known) / (batch[:, None] + known))
    logs = np.log2(list(samples.values()))
    found = predicted[..., None, :, :] - (logs[:, None, :] - logs[:, :, None])
    return np.where(np.eye(len(sizes), dtype=bool), np.nan, found)


def tradeoff(page: Page, found: Found) -> None:
    reached = {name: evidence for name, evidence in found.items() if evidence.common}
    if not reached:
        return
    needed = []
    for name, evidence in found.items():
        for target, by_size in ((target, of) for target, of in sorted(evidence.needed.items(), reverse=True) if of):
            samples = "; ".join(f"{size:,}: {number(samples)}" for size, samples in by_size.items())
            needed.append({"workload": name, "target": target, "samples": samples, "fit": evidence.fits[target]})
    predicted = page.keep("theorem5", [row for evidence in reached.values() for row in _predictions(evidence)])
    shown = [row for row in predicted if row["estimate"] in (FIT, MEAN, SAME)]
    left_out = listed([name for name in found if name not in reached])
    page.fill("theorem5", needed=needed, left_out=left_out, predicted=shown)
    typical = {(row["workload"], row["estimate"]): row["typical"] for row in predicted}
    useless = [name for name in reached if typical.get((name, MEAN), 0.0) >= typical[name, SAME]]
    page.tell(f"Theorem 5 with the {MEAN} as it is predicts no better than the same samples", useless)


def _predictions(own: Evidence) -> list[Row]:
    """How far each noise scale is off, on average and at worst, as a factor."""
    shape, rows = (1, len(own.losses)), []
    for estimate, noise in {FIT: np.full(shape, own.fitted_noise), **own.estimates, SAME: np.full(shape, 1e30)}.items():
        found = np.abs(errors(noise, own.common, list(own.losses)))
        known = found[~np.isnan(found)]
        if known.size:
            typical, worst = (2.0 ** float(of) for of in (known.mean(), known.max()))
            rows.append({"workload": own.workload.name, "estimate": estimate, "typical": typical, "worst": worst})
    return rows
