"""The section of the page on the optimizers for large batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from curves import measured
from evidence import Evidence
from page import NOT_MEASURED, Page, Row, number, percent, text, yes
from training import EPS, Run

from lightning_gradhist.intervals import student_quantile

Found = Mapping[str, Evidence]


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
        "Each at its best rate (lowest final training loss, mean over seeds), at equal samples. Intervals: 95%, Student's t over"
        " seeds."
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
    loss, loss_error = student([row["train_loss"] for row in at_best])
    accuracy, accuracy_error = student([row["test_accuracy"] for row in at_best])
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


def student(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval; NaN of a single value."""
    if len(values) < 2:
        return values[0], math.nan
    return float(np.mean(values)), student_quantile(0.975, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(
        len(values)
    )
