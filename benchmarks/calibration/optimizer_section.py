"""The sections of the page on epsilon, and on the optimizers for large batches."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from evidence import Evidence, by_batch_size, seed_spread
from grid import SETTINGS, Results, Setting, alike, best, half_octaves, losses, missing, rate
from grid import claims as wanted
from page import Page, listed, number
from reporting import Row
from training import EPS, Run

from lightning_gradhist.noise.interval import student_quantile

Found = Mapping[str, Evidence]
Curve = Mapping[float, float]  # the loss at the best of three rates by epsilon, ascending
SPACES = {"authors": ("lower", "upper"), "pooled": ("pooled_lower", "pooled_upper")}
"""The kinds of search space, and the columns of their ends."""
TRIAL_AND_ERROR = 16  # decades of epsilon that are tuned over without a search space, as the paper on epsilon says
DEFAULT = EPS["Adam"]
GOAL, FROM = 0.01, 4096  # the share of test accuracy that ALTO is to gain on Lamb, and the batch size from which on
PAIRS = (("ALTO", "Lamb"), ("ALTO", "AdamW"), ("Lamb", "AdamW"), ("AdamE", "AdamW"))


def epsilon(page: Page, found: Found, ranges: Sequence[Row]) -> None:
    """The search space, the default and ``"auto"`` against the grid's best epsilon."""
    spaces = {(row["workload"], row["loss_scale"]): row for row in ranges}
    if not spaces:
        return
    page.fill("epsilon_range", ranges=ranges)
    curves = {name: curve for name, evidence in found.items() if len(curve := by_epsilon(evidence)) > 1}
    rows = [_epsilon_row(found[name], curve, spaces[name, 1.0]) for name, curve in curves.items()]
    if rows:
        page.fill("epsilon", epsilon=page.keep("epsilon", rows), judged=[_judged(page, rows, kind) for kind in SPACES])
        _scaled(page, found, curves, spaces)


def by_epsilon(evidence: Evidence) -> Curve:
    results, middle = evidence.results, replace(evidence.middle, eps=1.0)
    runs = [run for run in results if replace(run, eps=1.0, learning_rate=1.0) == middle]
    rates = {run.learning_rate for run in runs if run.eps != DEFAULT}
    return _lowest({run: results[run] for run in runs if run.learning_rate in rates})


def _lowest(runs: Results) -> Curve:
    found: dict[float, float] = defaultdict(lambda: math.inf)
    for run, row in runs.items():
        found[run.eps] = min(found[run.eps], math.inf if row["diverged"] else row["train_loss"])
    return dict(sorted(found.items()))


def _tolerance(evidence: Evidence) -> float:
    return 2 * seed_spread(evidence.losses[evidence.middle.batch_size])


def _at(curve: Curve, eps: float) -> float:
    """The loss at the epsilon of the grid that is nearest; below the grid epsilon is idle."""
    return curve[min(curve, key=lambda known: abs(math.log(known / eps)))]


def _epsilon_row(evidence: Evidence, curve: Curve, space: Row) -> Row:
    best, tolerance = min(curve, key=lambda eps: curve[eps]), _tolerance(evidence)
    good = {eps: loss <= (1 + tolerance) * curve[best] for eps, loss in curve.items()}
    sides = ([eps for eps in curve if eps <= best][::-1], [eps for eps in curve if eps >= best])
    plateau = [list(itertools.takewhile(good.__getitem__, side))[-1] for side in sides]
    at_auto, default = _at(curve, space["auto"]), curve[DEFAULT]
    judged: Row = {}
    for kind, columns in SPACES.items():
        lower, upper = (space[column] for column in columns)
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


def _judged(page: Page, rows: Sequence[Row], kind: str) -> Row:
    """Whether search spaces of one kind hold the best epsilon, and how wide they are, against the goals."""
    without = [row["workload"] for row in rows if not row[f"{kind}_held"]]
    page.tell(f"Search spaces ({kind}) without an epsilon of the plateau", without)
    widths = [row[f"{kind}_decades"] for row in rows]
    middle, widest = float(np.median(widths)), max(widths)
    return {
        **{"kind": kind, "held": len(rows) - len(without), "inside": sum(row[f"{kind}_best_inside"] for row in rows)},
        **{"median": middle, "widest": widest, "narrower": TRIAL_AND_ERROR / widest if widest else math.inf},
        "goals": not without and middle <= 4 and widest <= 8,
    }


def _scaled(page: Page, found: Found, curves: Mapping[str, Curve], spaces: Mapping[tuple[str, float], Row]) -> None:
    rows = [
        _scaled_row(found[name], curve, scale, spaces[name, scale]["auto"])
        for name, curve in curves.items()
        for scale in sorted({run.loss_scale for run in found[name].results} - {1.0})
    ]
    if not rows:
        return
    judged = [row for row in rows if not math.isnan(row["tolerance"])]  # the default has more than one seed
    worse = [f"{r['workload']} times {r['loss_scale']:g}" for r in judged if r["auto_excess"] > r["tolerance"]]
    within = {"within": len(judged) - len(worse), "judged": len(judged)}
    page.fill("epsilon_scaled", epsilon_scaled=page.keep("epsilon_scaled", rows), **within)
    page.tell('`epsilon="auto"` is worse than the unscaled default', worse)


def _scaled_row(evidence: Evidence, curve: Curve, scale: float, auto: float) -> Row:
    scaled = _lowest({r: row for r, row in evidence.results.items() if r.loss_scale == scale and r.seed == 0})
    unscaled = curve[DEFAULT]
    return {
        **{"workload": evidence.workload.name, "loss_scale": scale, "default_excess": scaled[DEFAULT] / unscaled - 1},
        **{"auto": auto, "auto_excess": _at(curve, auto / scale) / unscaled - 1, "tolerance": _tolerance(evidence)},
    }


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval; NaN of a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return float(np.mean(values)), student_quantile(0.975, len(values) - 1) * _standard_error(values)


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def optimizers(page: Page, found: Mapping[str, Evidence]) -> None:
    """Adam and the optimizers for large batches at the two largest batch sizes."""
    rows: list[Row] = []
    for evidence in found.values():
        for reference in evidence.references[-2:]:
            likes = [replace(reference, optimizer=name, eps=EPS[name]) for name in EPS]
            known = [like for like in likes if by_batch_size(evidence.results, [like])]
            rows += [_row(evidence, like) for like in known] if len(known) > 1 else []
    if not rows:
        return
    by_name = {(row["workload"], row["batch_size"], row["optimizer"]): row["accuracy"] for row in rows}
    gains = [
        {"workload": name, "batch_size": size, "gain": accuracy - by_name[name, size, "Lamb"]}
        for (name, size, optimizer), accuracy in by_name.items()
        if optimizer == "ALTO" and (name, size, "Lamb") in by_name
    ]
    page.tell("ALTO gains less than a point of test accuracy on Lamb", _below(gains))
    page.fill("optimizers", optimizers=page.keep("optimizers", rows), gains=gains)


def _below(gains: Sequence[Row]) -> list[str]:
    return [f"{r['workload']} at {r['batch_size']:,} ({100 * r['gain']:+.2f})" for r in gains if r["gain"] < GOAL]


def _row(evidence: Evidence, like: Run) -> Row:
    at_best, how = tuned(evidence.results, like)
    loss, loss_error = student([row["train_loss"] for row in at_best.values()])
    accuracy, accuracy_error = student([row["test_accuracy"] for row in at_best.values()])
    return {
        **{"workload": like.workload, "batch_size": like.batch_size, **how},
        **{"loss": loss, "loss_error": loss_error, "accuracy": accuracy, "accuracy_error": accuracy_error},
    }


def tuned(results: Results, like: Run, column: str = "train_loss") -> tuple[dict[int, Row], Row]:
    """The runs of an optimizer by seed, at the rate where the mean of a column is lowest, and how that was found."""
    known = losses(results, like, column)
    top = best(known)
    own = {run.seed: row for run, row in alike(results, like).items() if half_octaves(run.learning_rate) == top}
    found = {"optimizer": like.optimizer, "rate": rate(top), "interior": not missing(known, top), "seeds": len(own)}
    return dict(sorted(own.items())), found


def claims(page: Page, results: Results) -> None:
    """Test accuracy by optimizer with five seeds, and the differences."""
    finished = [setting for setting in SETTINGS if next(wanted((setting,), results), None) is None]
    rows, differences = [], []
    for setting in finished:
        found = {name: tuned(results, setting.run(name), "validation_error") for name in setting.optimizers}
        rows += [_claim_row(setting, [*own.values()], how) for own, how in found.values()]
        differences += _differences(setting, {name: own for name, (own, _) in found.items()})
    if not differences:
        return
    pairs = [row for row in differences if row["pair"] == "ALTO - Lamb" and row["batch_size"] >= FROM]
    large = [{**row, "gain": row["gain"][0]} for row in pairs]
    page.tell("With both rates tuned and over five seeds ALTO gains less than a point on Lamb", _below(large))
    tables = {"claims_by_optimizer": rows, "claims_differences": differences}
    kept = {name: page.keep(name, of) for name, of in tables.items()}
    unfinished = listed([f"{s.workload} at {s.batch_size:,}" for s in SETTINGS if s not in finished])
    page.fill("claims", **kept, met=len(large) - len(_below(large)), large=len(large), unfinished=unfinished)


def _claim_row(setting: Setting, own: Sequence[Row], how: Row) -> Row:
    accuracies = [row["test_accuracy"] for row in own]
    where = {"workload": setting.workload, "batch_size": setting.batch_size, "steps": setting.steps}
    accuracy = {"accuracy": float(np.mean(accuracies)), "error": _standard_error(accuracies)}
    return {**where, **how, **accuracy, "train_loss": float(np.mean([row["train_loss"] for row in own]))}


def _differences(setting: Setting, found: Mapping[str, Mapping[int, Row]]) -> list[Row]:
    rows = []
    for one, other in (pair for pair in PAIRS if found.keys() >= {*pair}):
        seeds = sorted(found[one].keys() & found[other].keys())
        accuracies = ([found[name][seed]["test_accuracy"] for seed in seeds] for name in (one, other))
        gain, half = student([mine - theirs for mine, theirs in zip(*accuracies, strict=True)])
        where = {"workload": setting.workload, "batch_size": setting.batch_size, "pair": f"{one} - {other}"}
        rows.append({**where, "seeds": len(seeds), "gain": (gain, gain - half, gain + half)})
    return rows
