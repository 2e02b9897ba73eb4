from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_gradhist.batch_scaling import scaled_beta, scaled_epsilon, scaled_weight_decay


def half_life(beta: float, batch_size: int) -> float:
    """Samples after which an average has forgotten half, counted step by step."""
    left, steps = 1.0, 0
    while left > 0.5:
        left, steps = left * beta, steps + 1
    return steps * batch_size


@pytest.mark.parametrize("batch_size", [8, 64, 1024])
def test_the_half_life_of_beta2_is_the_same_in_samples(batch_size: int) -> None:
    assert half_life(scaled_beta(0.999, batch_size / 64), batch_size) == pytest.approx(693 * 64, abs=batch_size)


@pytest.mark.parametrize(("batch_size", "rate"), [(8, 5e-4), (64, 1e-3), (1024, 4e-3)])
def test_weights_shrink_as_much_per_sample(batch_size: int, rate: float) -> None:
    decay = scaled_weight_decay(0.1, batch_size / 64, rate / 1e-3)
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([weight], lr=rate, weight_decay=decay)
    weight.grad = torch.zeros_like(weight)
    for _ in range(64 * 1024 // batch_size):
        optimizer.step()
    assert float(weight.detach()) == pytest.approx(math.exp(-1e-3 * 0.1 * 1024), rel=1e-3)


def test_epsilon_stays_at_its_place_among_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    sigma = torch.rand(200, generator=generator) * 1e-4

    def damped(batch_size: int, eps: float) -> float:
        gradients = sigma * torch.randn(400, batch_size, 200, generator=generator).mean(1)
        return float((gradients.square().mean(0).sqrt() < eps).float().mean())

    share = damped(1, 3e-5)
    assert 0.2 < share < 0.4
    assert damped(16, scaled_epsilon(3e-5, 16)) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled_beta(1.0, 2), "beta must be at least 0 and below 1, got 1.0"),
        (lambda: scaled_beta(0.9, 0), "batch_ratio must be a positive number, got 0"),
        (lambda: scaled_weight_decay(-1.0, 2, 1), "weight_decay must be a number from 0 up, got -1.0"),
        (lambda: scaled_weight_decay(0.1, 2, math.inf), "rate_ratio must be a positive number, got inf"),
        (lambda: scaled_epsilon(math.nan, 2), "eps must be a number from 0 up, got nan"),
    ],
)
def test_values_out_of_range_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
