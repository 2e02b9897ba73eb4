from __future__ import annotations

import math

import pytest
import torch

from lightning_gradhist.noise.sample import Sample

SIZES = {"scale": 5, "bias": 16, "small": 4096, "weight": 4097, "large": 70_001, "larger": 1_000_003}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def test_of_few_values_all_are_looked_at_as_they_are() -> None:
    some = tensors()
    sample = Sample.at(3, SIZES, most=sum(SIZES.values()))
    for found in (sample.of(some), sample.of_gradients(some)):
        assert all(found[name] is some[name] for name in SIZES)


def test_of_many_values_the_sample_is_small_and_has_more_of_small_tensors() -> None:
    sample = Sample.at(0, SIZES, most=5000)
    found = {name: values.numel() for name, values in sample.of(tensors()).items()}
    assert 4500 < sum(found[name] for name in ("weight", "large", "larger")) < 5500
    assert all(found[name] == SIZES[name] for name in ("scale", "bias", "small"))
    assert found["larger"] / found["weight"] == pytest.approx(math.sqrt(SIZES["larger"] / SIZES["weight"]), rel=0.1)


def test_over_the_steps_every_value_is_looked_at_equally_often() -> None:
    sizes, turns = {"one": 13_003, "other": 4_700}, 400
    places = {name: torch.arange(size) for name, size in sizes.items()}
    seen = {name: torch.zeros(size) for name, size in sizes.items()}
    strides = Sample.at(0, sizes, most=2000).strides
    for step in range(0, 50 * turns, 50):  # as the monitor's cadence is by default
        for name, values in Sample.at(step, sizes, most=2000).of(places).items():
            seen[name][values.flatten()] += strides[name] / turns
    assert min(strides.values()) > 4
    for name, often in seen.items():
        assert often.min() > 0.8 and often.max() < 1.2, name


def test_sums_of_products_are_on_average_those_of_all_values() -> None:
    one, other = tensors(), {name: 1 + values for name, values in tensors().items()}
    whole = sum(float((one[name] * other[name]).double().sum()) for name in SIZES)
    sums = []
    for step in range(300):
        sample = Sample.at(step, SIZES, most=20_000)
        left, right = sample.of_gradients(one), sample.of_gradients(other)
        sums.append(sum(float((left[name] * right[name]).double().sum()) for name in left))
    assert sum(sums) / len(sums) == pytest.approx(whole, rel=2e-3)
    assert max(sums) < 1.1 * whole and min(sums) > 0.9 * whole


def test_half_precision_does_not_overflow_by_the_factor() -> None:
    gradients = {"w": torch.full((100_000,), 6e4, dtype=torch.float16)}
    found = Sample.at(0, {"w": 100_000}, most=1_000).of_gradients(gradients)["w"]
    assert found.isfinite().all() and found.dtype == torch.float32
