"""The sections of the page but for the transfers: each writes its tables, its figure and what follows from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import figures
import numpy as np
import theorem5
from curves import Measured, measured, seed_spread
from estimates import is_bounded
from evidence import FIT, MEAN, Evidence
from grid import STAGES, Results
from page import NOT_MEASURED, Page, Row, between, count, listed, number, percent, text, yes
from training import EPS, Run
from transfers import FACTORS

from lightning_gradhist.intervals import student_quantile

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
    table = [
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
        " seeds. Seed noise: standard deviation of a single run. As good: rates whose loss, straight between measured rates"
        f" in logs, is within {percent(PLATEAU - 1)} of the best."
    )
    rows = [_rate_row(name, size, losses) for name, ev in found.items() for size, losses in ev.losses.items()]
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
                share, peak = _falls(losses, draws, generator)
                lines.append(
                    f"- {name}: highest best rate at {peak:,}; in {percent(share)} of the draws a larger batch has a lower one."
                )
        page.say(f"Does the best rate fall again past a peak, as the surge law says? At {title}:")
        page.say("\n".join(lines) if lines else NOT_MEASURED)


def _rate_row(name: str, size: int, losses: Measured) -> Row:
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
        "seeds": int((~np.isnan(losses.losses[np.argmin(curve.losses)])).sum()),
        "rates": len(curve.rates),
        "interior": curve.interior,
    }


def _falls(losses: Mapping[int, Measured], draws: int, generator: np.random.Generator) -> tuple[float, int]:
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


# --- the noise scale --------------------------------------------------------------------------------------------------


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
        **{estimate: _median(values[:, column]) for estimate, values in evidence.estimates.items()},
        "growth": float(np.median([run[-1]["adam"] / run[0]["adam"] for run in moments])),
        "unbounded": 1 - sum(bounded) / len(bounded),
    }


def _median(values: np.ndarray) -> float:
    there = values[~np.isnan(values)]
    return float(np.median(there)) if there.size else math.nan


def coverage(page: Page, rows: Sequence[Row]) -> None:
    """How often the interval of the noise scale holds the value from ten times the data."""
    page.heading("Coverage of its interval", 3)
    if not rows:
        page.say(NOT_MEASURED)
        return
    groups: dict[tuple[str, str, str], list[Row]] = {}
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
            "covered": ("held", percent),
            "of": ("of", text),
            "width": ("upper end over lower, median", number),
            "off": ("value over that from ten times the data, median", number),
        },
    )
    total = [row for row in table if row["workload"] == "all"]
    for row in total:
        page.say(
            _verdict(f"{row['metric']} {row['state']}: {percent(row['covered'])} held", row["covered"] >= 0.9, "90%")
        )
        if row["covered"] < 0.9:
            page.bad.append(
                f"The interval of `{row['metric']}` {row['state']} holds the value in {percent(row['covered'])}."
            )


def _coverage_row(group: tuple[str, str, str], rows: Sequence[Row]) -> Row:
    values = np.array(
        [[float(row[key]) for key in ("value", "lower", "upper", "from_ten_times_the_data")] for row in rows]
    )
    value, lower, upper, truth = values.T
    return {
        **dict(zip(("workload", "state", "metric"), group, strict=True)),
        "covered": float(((lower <= truth) & (truth <= upper)).mean()),
        "of": len(rows),
        "width": float(np.median(np.divide(upper, lower, out=np.full(len(rows), math.inf), where=lower > 0))),
        "off": float(np.median(value / truth)),
    }


def _verdict(what: str, met: bool, goal: str) -> str:
    return f"- {what}; the goal, {goal}, is {'met' if met else '**not** met'}."


# --- Theorem 5 --------------------------------------------------------------------------------------------------------


def tradeoff(page: Page, found: Found) -> None:
    """Steps and samples to a loss, against Theorem 5."""
    page.heading("Theorem 5: steps and samples to a loss")
    reached = {name: evidence for name, evidence in found.items() if evidence.common}
    if not reached:
        page.say(NOT_MEASURED)
        return
    page.say(
        "Samples to a target loss at the rate where they are fewest, mean over seeds; steps are these over the batch size."
        " Dash: no rate reaches it with all its seeds. Fit: the noise scale of the straight line of 1/steps over 1/samples."
    )
    rows = [
        {
            "workload": name,
            "target": target,
            **_sizes(by_size),
            "fit": evidence.fits[target],
            "reached_by": len(by_size),
        }
        for name, evidence in found.items()
        for target, by_size in sorted(evidence.needed.items(), reverse=True)
        if by_size
    ]
    for name in found:
        own = [row for row in rows if row["workload"] == name]
        sizes = list(found[name].losses)
        page.show(
            [{**row, **{str(s): found[name].needed[row["target"]].get(s, math.nan) for s in sizes}} for row in own],
            {
                "workload": ("workload", text),
                "target": ("loss", number),
                **{str(size): (f"samples at {size:,}", number) for size in sizes},
                "fit": ("fitted noise scale", number),
            },
        )
    predicted = [row for name in reached for row in _prediction_rows(name, reached)]
    page.say(
        "Prediction of the samples (and so of the steps) at every batch size from those at every other one, for the targets that"
        " all batch sizes reach. Error: predicted over measured or the reverse, whichever is above 1."
    )
    page.table(
        "theorem5",
        predicted,
        {
            "workload": ("workload", text),
            "estimate": ("noise scale from", text),
            "source": ("factor", text),
            "factor": ("", number),
            "typical": ("typical error, times", number),
            "worst": ("worst", number),
        },
    )
    page.figure(
        "theorem5",
        figures.tradeoff(
            {n: (min(ev.common), list(ev.losses), ev.common[min(ev.common)]) for n, ev in reached.items()},
            {n: ev.fits[min(ev.common)] for n, ev in reached.items()},
            {n: _median(ev.estimates[MEAN]) if MEAN in ev.estimates else math.nan for n, ev in reached.items()},
        ),
        "Samples over steps to the lowest loss that every batch size reaches, each at its best rate (batch size beside the dot),"
        " and Theorem 5's curves: with the fitted noise scale and with the median over runs of the mean `B_adam`.",
    )


def _sizes(by_size: Mapping[int, float]) -> Row:
    return {"samples_by_batch_size": "; ".join(f"{size}: {samples:.6g}" for size, samples in by_size.items())}


def _prediction_rows(name: str, reached: Found) -> list[Row]:
    own = reached[name]
    candidates = {FIT: np.full((1, len(own.losses)), own.fitted_noise)} if not math.isnan(own.fitted_noise) else {}
    rows = []
    for estimate, values in {**candidates, **own.estimates}.items():
        if np.isnan(values).all():
            continue
        chosen = {"1": 1.0}
        if estimate != FIT:
            chosen["from the others"] = _best_factor(estimate, [ev for n, ev in reached.items() if n != name])
            chosen["best"] = _best_factor(estimate, [own])
        rows += [_prediction_row(own, estimate, values, source, factor) for source, factor in chosen.items()]
    nothing = np.full((1, len(own.losses)), 1e30)
    rows.append(_prediction_row(own, "none: the same samples", nothing, "1", 1.0))
    return [row for row in rows if not math.isnan(row["factor"])]


def _best_factor(estimate: str, found: Sequence[Evidence]) -> float:
    """The factor with the lowest mean error over workloads; NaN without any."""
    usable = [ev for ev in found if estimate in ev.estimates and not np.isnan(ev.estimates[estimate]).all()]
    if not usable:
        return math.nan
    errors = [theorem5.by_factor(ev.estimates[estimate], ev.common, list(ev.losses)) for ev in usable]
    return float(FACTORS[np.argmin(np.sum(errors, 0))])


def _prediction_row(own: Evidence, estimate: str, values: np.ndarray, source: str, factor: float) -> Row:
    errors = np.abs(theorem5.errors(factor * values, own.common, list(own.losses)))
    known = errors[~np.isnan(errors)]
    typical, worst = (2.0 ** float(of) for of in (known.mean(), known.max())) if known.size else (math.nan, math.nan)
    return {
        "workload": own.workload.name,
        "estimate": estimate,
        "source": source,
        "factor": factor,
        "typical": typical,
        "worst": worst,
    }


# --- epsilon ----------------------------------------------------------------------------------------------------------


def epsilon(page: Page, found: Found, ranges: Sequence[Row]) -> None:
    """The search space, the default and ``"auto"`` against the grid's best epsilon."""
    page.heading("Epsilon")
    spaces = {(row["workload"], float(row["loss_scale"])): row for row in ranges}
    if spaces:
        page.say(
            "The authors' search space at the initial weights (2% and 98% quantiles of each tensor, smallest and largest, rounded"
            ' to powers of ten), and what `epsilon="auto"` makes of the default.'
        )
        page.show(
            [{k: float(v) if k not in ("workload",) else v for k, v in row.items()} for row in ranges],
            {
                "workload": ("workload", text),
                "batch_size": ("batch size", number),
                "loss_scale": ("loss times", number),
                "lower": ("lower end", number),
                "upper": ("upper end", number),
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
            "space": ("search space", text),
            "decades": ("decades", number),
            "best_inside": ("best inside", yes),
            "held": ("held", yes),
            "default_excess": ("1e-8 above the best", percent),
            "auto": ("auto", number),
            "auto_excess": ("auto above the best", percent),
            "auto_harmless": ("auto no worse than 1e-8", yes),
        },
    )
    held, widths = [row["held"] for row in rows], [row["decades"] for row in rows]
    page.say(_verdict(f"{sum(held)} of {len(held)} search spaces hold the best epsilon", all(held), "95%"))
    page.say(
        _verdict(
            f"they are {number(float(np.median(widths)))} decades wide in the median and {number(max(widths))} at worst",
            float(np.median(widths)) <= 4 and max(widths) <= 8,
            "4 and 8",
        )
    )
    if not all(held):
        page.bad.append(
            f"Search spaces of epsilon without the best one: {listed([r['workload'] for r in rows if not r['held']])}."
        )
    page.figure(
        "epsilon",
        figures.epsilon({r["workload"]: _epsilon_panel(curves[r["workload"]], r, spaces) for r in rows}),
        "Final training loss over epsilon, in percent above the best. Shaded: the search space at the start (orange) and the"
        " noise of the seeds (grey). Dashed: the default.",
    )
    _scaled(page, found, curves, spaces)


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
    lower, upper, auto = (float(space[key]) for key in ("lower", "upper", "auto"))
    default = curve[EPS["Adam"]]
    return {
        "workload": evidence.workload.name,
        "best": best,
        "tolerance": tolerance,
        "plateau": between(plateau),
        "space": between((lower, upper)),
        "decades": math.log10(upper / lower),
        "best_inside": lower <= best <= upper,
        "held": plateau[0] <= upper and lower <= plateau[1],
        "default_excess": default / curve[best] - 1,
        "auto": auto,
        "auto_excess": _at(curve, auto) / curve[best] - 1,
        "auto_harmless": _at(curve, auto) <= (1 + tolerance) * default,
    }


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
        (float(space["lower"]), float(space["upper"])),
        row["tolerance"],
    )


def _scaled(
    page: Page, found: Found, curves: Mapping[str, Mapping[float, float]], spaces: Mapping[tuple[str, float], Row]
) -> None:
    page.heading("With the loss multiplied", 3)
    rows = []
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
    worse = [row for row in rows if row["auto_excess"] > row["tolerance"]]
    names = [f"{row['workload']} times {row['loss_scale']:g}" for row in worse]
    page.say(
        _verdict(f"`auto` is within the tolerance in {len(rows) - len(worse)} of {len(rows)} cases", not worse, "all")
    )
    if worse:
        page.bad.append(f'`epsilon="auto"` is worse than the unscaled default: {listed(names)}.')


# --- optimizers -------------------------------------------------------------------------------------------------------


def optimizers(page: Page, found: Found) -> None:
    """Adam and the optimizers for large batches at the two largest batch sizes."""
    page.heading("Optimizers at large batches")
    rows = []
    for evidence in found.values():
        for reference in evidence.references[-2:]:
            of = {name: _optimizer_row(evidence, replace(reference, optimizer=name, eps=EPS[name])) for name in EPS}
            if sum(row is not None for row in of.values()) > 1:
                rows += [row for row in of.values() if row is not None]
    if not rows:
        page.say(NOT_MEASURED)
        return
    page.say(
        "Each at its best rate (lowest final training loss, mean over seeds). Intervals: 95%, Student's t over seeds. Edge: the"
        " optimum is not interior."
    )
    page.table(
        "optimizers",
        rows,
        {
            "workload": ("workload", text),
            "batch_size": ("batch size", number),
            "optimizer": ("optimizer", text),
            "rate": ("best rate", number),
            "interior": ("interior", yes),
            "seeds": ("seeds", text),
            "loss": ("training loss", number),
            "loss_error": ("±", number),
            "accuracy": ("test accuracy", percent),
            "accuracy_error": ("±", percent),
        },
    )
    by_name = {(row["workload"], row["batch_size"], row["optimizer"]): row for row in rows}
    for workload, size in dict.fromkeys((row["workload"], row["batch_size"]) for row in rows):
        alto, lamb = (by_name.get((workload, size, name)) for name in ("ALTO", "Lamb"))
        if alto is None or lamb is None:
            continue
        gain = alto["accuracy"] - lamb["accuracy"]
        page.say(f"- {workload} at {size:,}: ALTO's test accuracy less Lamb's: {100 * gain:+.2f} points.")
        if gain < 0.01:
            page.bad.append(f"ALTO gains {100 * gain:+.2f} points of test accuracy on Lamb ({workload} at {size:,}).")


def _optimizer_row(evidence: Evidence, like: Run) -> Row | None:
    losses = measured(evidence.results, like)
    curve = None if losses is None else losses.curve()
    if curve is None:
        return None
    best = 2**curve.best_rate
    at_best = [
        row
        for run, row in evidence.results.items()
        if replace(run, seed=0) == replace(like, learning_rate=best, seed=0)
    ]
    loss, loss_error = _student([row["train_loss"] for row in at_best])
    accuracy, accuracy_error = _student([row["test_accuracy"] for row in at_best])
    return {
        "workload": like.workload,
        "batch_size": like.batch_size,
        "optimizer": like.optimizer,
        "rate": best,
        "interior": curve.interior,
        "seeds": len(at_best),
        "loss": loss,
        "loss_error": loss_error,
        "accuracy": accuracy,
        "accuracy_error": accuracy_error,
    }


def _student(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval; NaN of a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return float(np.mean(values)), student_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(
        len(values)
    )
