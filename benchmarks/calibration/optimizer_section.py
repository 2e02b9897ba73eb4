"""The sections of the page on the optimizers for large batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from evidence import Evidence, measured
from grid import SETTINGS, Results, Setting, alike, best, half_octaves, losses, missing, wanted
from page import Page, listed, verdict
from reporting import Row
from training import EPS, Run

from lightning_gradhist.noise.interval import student_quantile

GOAL, FROM = 0.01, 4096
"""The share of test accuracy that ALTO is to gain on Lamb, and the batch size from which on."""
PAIRS = (("ALTO", "Lamb"), ("ALTO", "AdamW"), ("Lamb", "AdamW"), ("AdamE", "AdamW"))


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
            likes = (replace(reference, optimizer=name, eps=EPS[name]) for name in EPS)
            of_size = [row for like in likes if (row := _row(evidence, like)) is not None]
            rows += of_size if len(of_size) > 1 else []
    if not rows:
        return
    gains = []
    by_name = {(row["workload"], row["batch_size"], row["optimizer"]): row["accuracy"] for row in rows}
    for workload, size in dict.fromkeys((row["workload"], row["batch_size"]) for row in rows):
        alto, lamb = (by_name.get((workload, size, name), math.nan) for name in ("ALTO", "Lamb"))
        gain = alto - lamb
        if math.isnan(gain):
            continue
        gains.append(f"- {workload} at {size:,}: ALTO's test accuracy less Lamb's: {100 * gain:+.2f} points.")
        if gain < GOAL:
            page.bad.append(f"ALTO gains {100 * gain:+.2f} points of test accuracy on Lamb ({workload} at {size:,}).")
    page.fill("optimizers", optimizers=page.keep("optimizers", rows), gains="\n".join(gains))


def _row(evidence: Evidence, like: Run) -> Row | None:
    found = measured(evidence.results, like)
    curve = None if found is None else found.curve()
    if curve is None:
        return None
    at_best = [row for run, row in alike(evidence.results, like).items() if run.learning_rate == 2**curve.best_rate]
    loss, loss_error = student([row["train_loss"] for row in at_best])
    accuracy, accuracy_error = student([row["test_accuracy"] for row in at_best])
    return {
        **{"workload": like.workload, "batch_size": like.batch_size, "optimizer": like.optimizer},
        **{"rate": 2**curve.best_rate, "interior": curve.interior, "seeds": len(at_best)},
        **{"loss": loss, "loss_error": loss_error, "accuracy": accuracy, "accuracy_error": accuracy_error},
    }


def claims(page: Page, results: Results) -> None:
    """Test accuracy by optimizer with five seeds, and the differences."""
    finished = [setting for setting in SETTINGS if next(wanted((setting,), results), None) is None]
    found = {setting: at_best(setting, results) for setting in finished}
    rows = [row for setting, own in found.items() for row in _claim_rows(setting, own, results)]
    differences = [row for setting, own in found.items() for row in _differences(setting, own)]
    if not differences:
        return
    verdicts = []
    large = [row for row in differences if row["pair"] == "ALTO - Lamb" and row["batch_size"] >= FROM]
    for row in large:
        gain, low, high = (f"{100 * value:+.2f}" for value in row["gain"])
        what = f"{row['workload']} at {row['batch_size']:,}: ALTO's test accuracy less Lamb's is {gain} ({low} to {high}) points"
        verdicts.append(verdict(what, row["gain"][0] >= GOAL, f"at least {100 * GOAL:+.2f}"))
    below = [f"{row['workload']} at {row['batch_size']:,}" for row in large if row["gain"][0] < GOAL]
    if below:
        page.bad.append(
            f"With both rates tuned and over five seeds ALTO gains less than a point on Lamb: {listed(below)}."
        )
    page.fill(
        "claims",
        claims_by_optimizer=page.keep("claims_by_optimizer", rows),
        claims_differences=page.keep("claims_differences", differences),
        verdicts="\n".join(verdicts),
        fewer=listed([_where(setting) for setting in finished if "AdamE" not in setting.optimizers]),
        unfinished=listed([_where(setting) for setting in SETTINGS if setting not in finished]),
    )


def _where(setting: Setting) -> str:
    return f"{setting.workload} at {setting.batch_size:,}"


def at_best(setting: Setting, results: Results) -> dict[str, dict[int, Row]]:
    """The rows by optimizer and seed, at the rate with the lowest mean validation error."""
    found = {}
    for name in setting.optimizers:
        like = setting.run(name)
        top = best(losses(results, like, "validation_error"))
        own = {run.seed: row for run, row in alike(results, like).items() if half_octaves(run.learning_rate) == top}
        if own:
            found[name] = dict(sorted(own.items()))
    return found


def _claim_rows(setting: Setting, found: Mapping[str, Mapping[int, Row]], results: Results) -> list[Row]:
    rows = []
    for name, by_seed in found.items():
        like = setting.run(name)
        known = losses(results, like, "validation_error")
        accuracies = [row["test_accuracy"] for row in by_seed.values()]
        rows.append(
            {
                **{"workload": setting.workload, "batch_size": setting.batch_size, "steps": setting.steps},
                **{"optimizer": name, "rate": next(iter(by_seed.values()))["learning_rate"]},
                "interior": not missing(known, half_octaves(like.learning_rate)),
                "seeds": len(accuracies),
                "accuracy": float(np.mean(accuracies)),
                "error": _standard_error(accuracies),
                "train_loss": float(np.mean([row["train_loss"] for row in by_seed.values()])),
            }
        )
    return rows


def _differences(setting: Setting, found: Mapping[str, Mapping[int, Row]]) -> list[Row]:
    rows = []
    for one, other in PAIRS:
        seeds = sorted(found.get(one, {}).keys() & found.get(other, {}).keys())
        if len(seeds) < 2:
            continue
        gain, half = student(
            [found[one][seed]["test_accuracy"] - found[other][seed]["test_accuracy"] for seed in seeds]
        )
        where = {"workload": setting.workload, "batch_size": setting.batch_size, "pair": f"{one} - {other}"}
        rows.append({**where, "seeds": len(seeds), "gain": (gain, gain - half, gain + half)})
    return rows
