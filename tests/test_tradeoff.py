"""What more GPUs would buy, against Theorem 5 as it is written, and against a loss that descends by its law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from lightning_gradhist.noise.interval import NoiseEstimate
from lightning_gradhist.tradeoff import FACTORS, batch_size_tradeoff, critical_batch_size

NOISE = NoiseEstimate(1000.0, 700.0, 1500.0, 0.95, 100)


def exactly(value: float) -> NoiseEstimate:
    return NoiseEstimate(value, value, value, 0.95, 100)


@pytest.mark.parametrize("batch", [1.0, 256.0, 1e5])
def test_theorem_5(batch: float) -> None:
    def steps(b: float) -> float:
        return 1 + 1000 / b

    def samples(b: float) -> float:
        return 1 + b / 1000

    rows = batch_size_tradeoff(NOISE, batch)
    assert [row.factor for row in rows] == list(FACTORS)
    for row in rows:
        assert row.batch_size == row.factor * batch
        assert row.steps.value == pytest.approx(steps(row.batch_size) / steps(batch), rel=1e-12)
        assert row.samples.value == pytest.approx(samples(row.batch_size) / samples(batch), rel=1e-12)
        # (S / S_min - 1) (E / E_min - 1) = 1, in terms of now
        spare_steps, spare_samples = row.steps.value * steps(batch) - 1, row.samples.value * samples(batch) - 1
        assert spare_steps * spare_samples == pytest.approx(1.0, rel=1e-9)


def test_steps_of_a_loss_that_falls_by_the_law() -> None:
    # Each step gains 1 / (1 + Bn / B) of what a noiseless one would, from 1.0 down to 0.5.
    def steps_to_target(batch: float) -> int:
        loss, steps = 1.0, 0
        while loss > 0.5:
            loss -= 1e-4 / (1 + 1000 / batch)
            steps += 1
        return steps

    now = steps_to_target(500)
    for row in batch_size_tradeoff(NOISE, 500, (0.25, 8)):
        assert row.steps.value == pytest.approx(steps_to_target(row.batch_size) / now, rel=1e-3)
        assert row.samples.value == pytest.approx(row.factor * row.steps.value)


def test_the_band_is_that_of_the_ends_of_the_interval() -> None:
    for row in batch_size_tradeoff(NOISE, 256):
        for name in ("steps", "samples"):
            band = getattr(row, name)
            ends = [getattr(batch_size_tradeoff(exactly(s), 256, [row.factor])[0], name).value for s in (700, 1500)]
            assert (band.lower, band.upper) == (pytest.approx(min(ends)), pytest.approx(max(ends)))
            assert band.lower <= band.value <= band.upper


@pytest.mark.parametrize(
    ("noise_scale", "steps", "samples"),
    [pytest.param(0.0, 1.0, 8.0, id="no-noise"), pytest.param(1e15, 1 / 8, 1.0, id="only-noise")],
)
def test_limits(noise_scale: float, steps: float, samples: float) -> None:
    (row,) = batch_size_tradeoff(exactly(noise_scale), 64, [8])
    assert (row.steps.value, row.samples.value) == (pytest.approx(steps), pytest.approx(samples))


def test_the_critical_batch_size_of_the_evidence() -> None:
    """Of the three workloads where it could be measured: 0.5, 0.0743 and 0.0442 times the mean B_adam."""
    found = critical_batch_size(exactly(1000.0))
    assert found.lower <= 62.5 <= found.value <= 500 <= found.upper
    assert found.value == pytest.approx(1000 * (0.5 * 0.0743 * 0.0442) ** (1 / 3), rel=0.02)
    widened = critical_batch_size(NOISE)
    assert widened.lower / found.lower == pytest.approx(0.7) and widened.upper / found.upper == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: batch_size_tradeoff(NoiseEstimate(5.0, 1.0, math.inf, 0.95, 9), 1),
            "bounded interval, got 1 to inf",
            id="unbounded",
        ),
        pytest.param(lambda: batch_size_tradeoff(NOISE, 0), "batch_size must be positive, got 0", id="batch"),
        pytest.param(lambda: batch_size_tradeoff(NOISE, 1, [2, -1]), "factors must be positive, got -1", id="factor"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
