"""epsilon_range against the authors' rule, written straight from the paper on sorted tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_gradhist.epsilon import choose_epsilon, epsilon_range, without_rounding_noise
from lightning_gradhist.histogram import MagnitudeHistogram


def authors_rule(rms: dict[str, Tensor]) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Per tensor: drop zeros, sort, ``r[int((1 - 0.98) * n)]`` and ``r[int(0.98 * n)]``; then min and max."""
    per_name = {}
    for name, tensor in rms.items():
        r = np.sort(tensor.flatten().numpy())
        r = r[r != 0]
        if len(r):
            per_name[name] = (float(r[int((1 - 0.98) * len(r))]), float(r[int(0.98 * len(r))]))
    return min(low for low, _ in per_name.values()), max(high for _, high in per_name.values()), per_name


def layers(seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"conv": (16, 3, 3, 3), "norm": (16,), "linear": (40, 50), "bias": (1,), "two": (2,)}
    rms = {
        name: scale * torch.exp(2 * torch.randn(shape, generator=generator, dtype=dtype) - 3 - 2 * i)
        for i, (name, shape) in enumerate(sizes.items())
    }
    rms["linear"][:7] = 0.0
    rms["dead"] = torch.zeros(100, dtype=dtype)
    return rms


def histogram_of(rms: dict[str, Tensor]) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(list(rms))
    histogram.update(rms)
    return histogram


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_for_tensors(seed: int, dtype: torch.dtype) -> None:
    rms = layers(seed, dtype=dtype)
    low, high, per_name = authors_rule(rms)
    found = epsilon_range(rms)
    assert (found.lower_unrounded, found.upper_unrounded) == (low, high)
    assert found.per_name == per_name and "dead" not in found.per_name
    assert (found.lower, found.upper) == tuple(float(f"1e{round(math.log10(end))}") for end in (low, high))


@pytest.mark.parametrize("seed", range(4))
def test_one_bin_off_at_most_for_a_histogram(seed: int) -> None:
    rms = layers(seed)
    _, _, per_name = authors_rule(rms)
    found = epsilon_range(histogram_of(rms))
    assert found.per_name.keys() == per_name.keys()
    for name, pair in per_name.items():
        assert found.per_name[name] == pytest.approx(pair, rel=1 / 8)
    assert found.lower_unrounded == min(low for low, _ in found.per_name.values())
    assert found.upper_unrounded == max(high for _, high in found.per_name.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("as_histogram", [False, True], ids=["tensors", "histogram"])
def test_the_pooled_ends_are_those_of_all_coordinates(seed: int, as_histogram: bool) -> None:
    rms = layers(seed)
    everything = torch.cat([tensor.flatten() for tensor in rms.values()])
    low, high, _ = authors_rule({"all": everything})
    found = epsilon_range(histogram_of(rms) if as_histogram else rms)
    slack = math.log10(1 + 1 / 8) if as_histogram else 0.0
    for pooled, end in ((found.pooled_lower, low), (found.pooled_upper, high)):
        assert math.log10(pooled) == round(math.log10(pooled))
        assert abs(math.log10(pooled) - math.log10(end)) <= 0.5 + slack
    assert found.lower <= found.pooled_lower <= found.pooled_upper <= found.upper


@pytest.mark.parametrize("number", [1, 2, 49, 50, 51, 99, 100, 101, 150, 1000])
def test_ends_at_every_size(number: int) -> None:
    rms = {"w": torch.arange(number, 0, -1).float()}
    assert epsilon_range(rms).per_name["w"] == authors_rule(rms)[2]["w"]


@pytest.mark.parametrize("as_histogram", [False, True], ids=["tensors", "histogram"])
def test_zeros_are_dropped_and_told(as_histogram: bool) -> None:
    rms = layers()
    number, zeros = sum(t.numel() for t in rms.values()), sum(int((t == 0).sum()) for t in rms.values())
    found = epsilon_range(histogram_of(rms) if as_histogram else rms)
    assert found.zero_share == zeros / number
    padded = {name: torch.cat([t.flatten(), torch.zeros(1000)]) for name, t in rms.items()}
    assert epsilon_range(histogram_of(padded) if as_histogram else padded).per_name == found.per_name


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 3.3e-4, 1e-3, 0.1, 1e6])
def test_damped_share(eps: float) -> None:
    rms = layers()
    everything = torch.cat([t.flatten() for t in rms.values()]).double()
    everything = everything[everything > 0]
    in_its_bin = float(((everything > eps / 1.13) & (everything < eps * 1.13)).double().mean())
    exact = float((everything < eps).double().mean())
    assert abs(epsilon_range(rms).damped_share(eps) - exact) <= in_its_bin
    assert float((everything / (everything + eps) < 0.5).double().mean()) == exact  # what the share means


@pytest.mark.parametrize("power", [-20, -3, 7, 20])
def test_scaling_the_loss_scales_the_range(power: int) -> None:
    scale = 2.0**power
    for make in (lambda rms: rms, histogram_of):
        one, other = epsilon_range(make(layers())), epsilon_range(make(layers(scale=scale)))
        assert other.lower_unrounded == pytest.approx(scale * one.lower_unrounded, rel=1e-6)
        assert other.upper_unrounded == pytest.approx(scale * one.upper_unrounded, rel=1e-6)
        assert other.damped_share(scale * 1e-3) == pytest.approx(one.damped_share(1e-3), abs=1e-12)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1e-6, 1e-6), (3.1e-6, 1e-6), (3.2e-6, 1e-5), (0.9, 1.0), (4.0, 10.0), (1e-30, 1e-30), (2.9e38, 1e38)],
)
def test_rounding_to_a_power_of_ten(value: float, rounded: float) -> None:
    found = epsilon_range({"w": torch.tensor([value])})
    assert (found.lower, found.upper) == (rounded, rounded)


def test_other_quantiles() -> None:
    rms = {"w": torch.arange(1.0, 101.0)}
    assert epsilon_range(rms, lower=0.0, upper=1.0).per_name["w"] == (1.0, 100.0)
    assert epsilon_range(rms, lower=0.5, upper=0.5).per_name["w"] == (51.0, 51.0)
    for made in (rms, histogram_of(rms)):
        found = epsilon_range(made, lower=0.0, upper=0.5)
        assert (found.pooled_lower, found.pooled_upper) == (1.0, 100.0)  # 51 is nearer to 100 than to 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_below_all_bins(dtype: torch.dtype) -> None:
    found = epsilon_range({"w": torch.full((4,), 1e-40, dtype=dtype)})
    assert found.lower == found.upper == found.pooled_lower == found.pooled_upper == 1e-40


def test_the_result_does_not_move_with_the_callers_histogram() -> None:
    histogram = histogram_of(layers())
    found = epsilon_range(histogram)
    before = found.damped_share(1e-3)
    histogram.reset()
    histogram.update({"dead": torch.full((10_000,), 1e-9)})
    assert found.damped_share(1e-3) == before


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(current=st.floats(0, 1e3), value=st.floats(1e-30, 1e30))
def test_choose_epsilon_never_raises_it(current: float, value: float) -> None:
    space = epsilon_range({"w": torch.tensor([value])})
    chosen = choose_epsilon(current, space)
    assert chosen <= current and space.damped_share(chosen) <= 0.02
    assert chosen == current or value / 11.3 <= chosen <= value  # a power of ten, and one bin


@pytest.mark.parametrize(
    ("small", "chosen"),
    [
        pytest.param(15, 1e-8, id="1.5%-damped"),
        pytest.param(25, 1e-10, id="2.5%-damped"),
        pytest.param(0, 1e-8, id="none"),
    ],
)
def test_all_coordinates_count_alike(small: int, chosen: float) -> None:
    rms = {"weight": torch.full((1000 - small,), 1e-4), "bias": torch.full((small,), 3e-10)}
    assert choose_epsilon(1e-8, epsilon_range(rms)) == chosen
    assert choose_epsilon(1e-8, epsilon_range(histogram_of(rms))) == chosen


def test_a_lowered_epsilon_is_that_of_all_tensors_together() -> None:
    # A tenth is damped; the lower end of the search space is that of the one coordinate at 1e-30.
    rms = {"weight": torch.logspace(-9, 1, 10_001), "bias": torch.tensor([1e-30])}
    space = epsilon_range(rms)
    assert space.lower == 1e-30
    assert choose_epsilon(1e-8, space) == 1e-9  # the 2% quantile is 1.6e-9
    assert space.damped_share(1e-9) < 0.02 < space.damped_share(1e-8)


@pytest.mark.parametrize("power", range(-12, 5))
def test_a_scaled_loss_leaves_no_more_damped(power: int) -> None:
    space = epsilon_range({"w": 10.0**power * torch.logspace(-7, -1, 6001, dtype=torch.float64)})
    assert space.damped_share(choose_epsilon(1e-8, space)) <= 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: epsilon_range(layers(), lower=-0.1), "got -0.1 and 0.98", id="low"),
        pytest.param(lambda: epsilon_range(layers(), upper=1.1), "got 0.02 and 1.1", id="high"),
        pytest.param(lambda: epsilon_range(layers(), lower=0.9, upper=0.1), "got 0.9 and 0.1", id="crossed"),
        pytest.param(lambda: epsilon_range(layers(), lower=math.nan), "got nan and 0.98", id="nan-quantile"),
        pytest.param(lambda: epsilon_range({"w": torch.tensor([1.0, math.nan])}), "rms must be finite", id="nan"),
        pytest.param(lambda: epsilon_range({"w": torch.tensor([1.0, math.inf])}), "rms must be finite", id="inf"),
        pytest.param(lambda: epsilon_range({"w": torch.zeros(3)}), "every coordinate is zero", id="zero"),
        pytest.param(lambda: epsilon_range({}), "every coordinate is zero", id="nothing"),
        pytest.param(lambda: epsilon_range(MagnitudeHistogram(["w"])), "every coordinate is zero", id="no-counts"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def left_out(rms: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, int]:
    histogram = MagnitudeHistogram(list(rms))
    histogram.update(rms)
    before = histogram.table.clone()
    found = without_rounding_noise(histogram, torch.finfo(dtype).eps)
    assert torch.equal(histogram.table, before) and torch.equal(found.total(), histogram.total())
    return dict(zip(rms, (found.zeros - histogram.zeros).tolist(), strict=True))


def test_what_is_zero_but_for_rounding_is_told_layer_by_layer() -> None:
    unit = torch.finfo(torch.float32).eps
    rms = {
        "a.weight": torch.tensor([1.0, 20 * unit, 12 * unit]),
        "a.bias": torch.tensor([2 * unit, 0.5]),
        "b.weight": torch.tensor([1e-6, 12 * unit]),  # of a layer whose gradients are all small
        "c": torch.tensor([1.0, 12 * unit]),
        "d": torch.zeros(2),
    }
    assert left_out(rms) == {"a.weight": 1, "a.bias": 1, "b.weight": 0, "c": 1, "d": 0}
    assert left_out({"a": torch.tensor([1.0, 1e-2, 3e-3])}, torch.bfloat16) == {"a": 1}


@pytest.mark.parametrize("batch_size", [8, 64])
def test_gradients_that_are_rounding_noise_are_found(batch_size: int) -> None:
    """Of a convolution's bias before a normalization, and of the bias of an attention's keys."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 16)]
    convolution, attention = nn.Sequential(*layers), nn.MultiheadAttention(16, 4, batch_first=True)
    convolution(torch.randn(batch_size, 1, 8, 8)).square().mean().backward()
    tokens = torch.randn(batch_size, 6, 16)
    attention(tokens, tokens, tokens, need_weights=False)[0].square().mean().backward()
    named = [*convolution.named_parameters("convolution"), *attention.named_parameters("attention")]
    rms = {name: p.grad.abs() for name, p in named}
    zeros = {name: int((r < 2**-126).sum()) for name, r in rms.items()}
    found = {name: count + zeros[name] for name, count in left_out(rms).items()}
    noise = {"convolution.0.bias": 8, "attention.in_proj_bias": 16}
    assert {name: found[name] for name in noise} == noise
    assert all(found[name] - zeros[name] == 0 for name in rms.keys() - noise.keys())
