"""How the result of a calibration reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_gradhist.epsilon import epsilon_range
from lightning_gradhist.logging.calibration_result import CalibrationResult, GroupChange
from lightning_gradhist.noise.interval import NoiseEstimate

CHANGES = (
    GroupChange(0, "eps", 1e-8, 1e-10),
    GroupChange(1, "eps", 1e-8, 1e-10),
    GroupChange(0, "lr", 1e-3, 2.5e-3),
    GroupChange(1, "lr", 1e-4, 2.5e-4),
    GroupChange(0, "alpha", "auto", -5.0),
)


def result(**changes: Any) -> CalibrationResult:
    plain: dict[str, Any] = {
        "applied": True,
        "optimizer": "AdamW",
        "epsilon": 1e-10,
        "epsilon_range": epsilon_range({"w": torch.logspace(-9, -2, 1001), "b": torch.full((2,), 1e-12)}),
        "learning_rate": 2.5e-3,
        "ratio": 2.5,
        "ratio_interval": (2.0, 3.0),
        "law": "surge",
        "noise_scale": NoiseEstimate(1234.4, 20.06, math.inf, 0.95, 16),
        "noise_source": "probe",
        "effective_batch_size": 2048.0,
        "reference_batch_size": 256.0,
        "changes": CHANGES,
        "reasons": ("first reason", "second reason"),
        "gradients": 32,
    }
    return CalibrationResult(**{**plain, **changes})


def test_numbers_without_an_end_and_intervals_without_a_width_read_well() -> None:
    rows = dict(result(noise_scale=NoiseEstimate(math.inf, 20.06, math.inf, 0.95, 16)).rows())
    assert rows["noise scale (probe)"] == "no signal out of the noise, 95%: 20.1 or more"
    assert dict(result(ratio=1.993, ratio_interval=(1.991, 1.994)).rows())["learning rate"] == "times 1.993 (surge)"


def test_rows() -> None:
    assert result().rows() == [
        ("optimizer", "AdamW"),
        ("samples a step", "2,048"),
        ("samples a step of the reference", "256"),
        ("epsilon search space, pooled", "1e-09 to 0.01"),
        ("epsilon search space, authors'", "1e-12 to 0.01"),
        ("noise scale (probe)", "1,234 samples, 95%: 20.1 or more"),
        (
            "what more GPUs would buy",
            "not known: the noise scale of a probe at the start of a run is far too small for it; record a run with"
            " GradientHistogramMonitor",
        ),
        ("learning rate", "times 2.5 (surge; 2 to 3)"),
        ("eps (group 0, 1)", "1e-08 -> 1e-10"),
        ("lr (group 0)", "0.001 -> 0.0025"),
        ("lr (group 1)", "0.0001 -> 0.00025"),
        ("alpha (group 0)", "auto -> -5"),
    ]


def test_rows_of_a_result_that_knows_nothing() -> None:
    assert CalibrationResult(applied=False, optimizer="SGD").rows() == [
        ("optimizer", "SGD"),
        ("samples a step", "unknown"),
        ("learning rate", "times 1 (keep)"),
        ("changes", "none"),
    ]


def test_text() -> None:
    lines = result().to_text().splitlines()
    assert lines[0] == "Calibration of the optimizer"
    assert lines[-2:] == ["  - first reason", "  - second reason"]
    columns = {line.index(value) for line, (_, value) in zip(lines[1:], result().rows(), strict=False)}
    assert len(columns) == 1 and len(lines) == 1 + len(result().rows()) + 2
    assert result(problems=("a refusal",)).to_text().splitlines()[-3:] == ["  - a refusal", *lines[-2:]]
    assert result(applied=False).to_text().startswith("Calibration of the optimizer (apply=False: nothing was changed)")


def test_markdown() -> None:
    lines = result().to_markdown().splitlines()
    assert lines[:2] == ["| calibration | applied |", "|---|---|"]
    assert all(line.count("|") == 3 for line in lines[: 2 + len(result().rows()) - 0] if not line.startswith("|---"))
    assert lines[-2:] == ["- first reason", "- second reason"]
    assert "| not applied (apply=False) |" in result(applied=False).to_markdown()


RECORDED = {"noise_source": "record", "noise_scale": NoiseEstimate(3000.0, 2300.0, 4200.0, 0.95, 200)}


def test_what_more_gpus_would_buy_in_text() -> None:
    found = result(**RECORDED)
    lines = found.to_text().splitlines()
    assert not any("not known" in line for line in lines)
    start = lines.index("  what more GPUs would buy, as multiples of now")
    assert lines[start - 1] == "  - second reason"
    header, *rows = lines[start + 1 :]
    assert header == "    samples a step  steps to the same loss  samples to the same loss"
    assert [row.split()[0].replace(",", "") for row in rows] == [f"{2048 * 2**i:g}" for i in range(-3, 4)] + [
        "32768", "65536", "131072",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(header)}
    # (B + Bn) / (B0 + Bn), over B / B0 for the steps, at Bn = 0.12 * 3000, 0.04 * 2300 and 0.5 * 4200
    assert ("critical batch size", "360 samples, 92 to 2,100") in found.rows()
    assert rows[0].split()[1:] == ["2.05", "(1.3", "to", "4.54)", "0.256", "(0.163", "to", "0.568)"]
    assert rows[3].split() == ["2,048", "1", "1"]


def test_what_more_gpus_would_buy_in_markdown() -> None:
    table = (
        result(**RECORDED).to_markdown().split("**what more GPUs would buy**, as multiples of now\n\n")[1].splitlines()
    )
    assert table[0] == "| samples a step | steps to the same loss | samples to the same loss |"
    assert table[1] == "| --- | --- | --- |" and len(table) == 12
    assert table[2] == "| 256 | 2.05 (1.3 to 4.54) | 0.256 (0.163 to 0.568) |"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        pytest.param({"noise_source": "probe"}, "far too small", id="probe"),
        pytest.param({"noise_scale": NoiseEstimate(9.0, 5.0, math.inf, 0.95, 8)}, "has no bound", id="unbounded"),
        pytest.param({"effective_batch_size": None}, "takes a noise scale and the batch size", id="no-batch"),
    ],
)
def test_what_more_gpus_would_buy_is_not_made_up(changes: dict[str, Any], why: str) -> None:
    found = result(**{**RECORDED, **changes})
    assert found.tradeoff() == ()
    assert [value for name, value in found.rows() if name == "what more GPUs would buy" and why in value]
    assert "to the same loss" not in found.to_text() + found.to_markdown()


@pytest.mark.parametrize(
    ("changes", "left_out"),
    [
        pytest.param({}, {"noise_scale_upper"}, id="unbounded"),
        pytest.param({"noise_scale": NoiseEstimate(9.0, 5.0, 20.0, 0.95, 8)}, set(), id="bounded"),
        pytest.param(
            {"noise_scale": NoiseEstimate(math.inf, 5.0, math.inf, 0.95, 8)},
            {"noise_scale", "noise_scale_upper"},
            id="no-signal",
        ),
        pytest.param(
            {"noise_scale": None, "epsilon": None, "effective_batch_size": None},
            {"noise_scale", "noise_scale_lower", "noise_scale_upper", "epsilon", "effective_batch_size"},
            id="unknown",
        ),
    ],
)
def test_scalars(changes: dict[str, Any], left_out: set[str]) -> None:
    found = result(**changes)
    numbers = {
        "epsilon": found.epsilon,
        "effective_batch_size": found.effective_batch_size,
        "learning_rate": 2.5e-3,
        "learning_rate_ratio": 2.5,
        "noise_scale": found.noise_scale and found.noise_scale.value,
        "noise_scale_lower": found.noise_scale and found.noise_scale.lower,
        "noise_scale_upper": found.noise_scale and found.noise_scale.upper,
    }
    assert found.scalars() == {f"calibration/{k}": v for k, v in numbers.items() if k not in left_out}
