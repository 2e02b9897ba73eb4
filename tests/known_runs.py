"""Runs of the benchmarks' grids whose results follow a known law."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from grid import FIELDS, MACHINE
from training import Run


def row_of(run: Run, stage: str) -> dict[str, Any]:
    """What a run would give where the square root is the law, 1e-3 the largest idle epsilon, and the noise scale is 100."""
    away = math.log2(run.learning_rate) - (-8 + math.log2(run.batch_size) / 2)
    loss = (1 + 0.05 * away**2) * (1 + 0.01 * run.seed) * (1 + max(0.0, math.log10(run.eps / run.loss_scale) + 3))
    moment = {
        key + end: value
        for key in ("simple", "adam")
        for end, value in (("", 100.0), ("_lower", 80.0), ("_upper", 125.0))
    }
    needed = 700 * (1 + run.batch_size / 50)
    return {
        **asdict(run),
        "stage": stage,
        "steps": run.steps,
        "train_loss": loss,
        "test_loss": loss,
        "test_accuracy": 0.5 + 0.02 * (run.optimizer == "ALTO"),
        "diverged": 0,
        "seconds": 1.0,
        "noise_passes": 0,
        "curve": [(0, 5.0), (2048, loss)],
        "samples_to_target": [(2.0, needed), (1.5, None)],
        "noise_scale": [{"samples": s, "loss": 1.0, **moment} for s in (0, 500, 1000)] if run.noise else [],
        **dict.fromkeys(MACHINE, "known"),
    }


def claimed(run: Run) -> dict[str, Any]:
    """A result that is best at a rate of 2**-5, where ALTO gains two points, and one more at every second seed."""
    accuracy = (
        0.8 + 0.02 * (run.optimizer == "ALTO") - 0.02 * (math.log2(run.learning_rate) + 5) ** 2 + 0.001 * run.seed
    )
    return {
        **{name: getattr(run, name) for name in FIELDS},
        "steps": run.steps,
        "validation_error": 1 - accuracy,
        "test_accuracy": accuracy + 0.01 * (run.seed % 2) * (run.optimizer == "ALTO"),
        **{"train_loss": 0.5, "diverged": 0, "seconds": 1.0},
    }
