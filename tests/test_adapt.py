from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lightning_gradhist import NoiseEstimate, SurgeLaw
from lightning_gradhist.adapt import HALF_LIFE, AdaptedRatio, warmup_end


def ratio(mode: str, batch_size: int = 1024, reference: int = 64, start: float = 1.0) -> AdaptedRatio:
    end = warmup_end(batch_size, reference, None)
    return AdaptedRatio("surge", mode, batch_size, reference, start, end, start)


def noise(value: float, spread: float = 1.1) -> NoiseEstimate:
    return NoiseEstimate(value, value / spread, value * spread, 0.95, 50)


def followed(one: AdaptedRatio, *estimates: NoiseEstimate) -> list[float]:
    values = []
    for estimate in estimates:
        one = replace(one, value=one.after(estimate))
        values.append(one.value)
    return values


def surge(scale: float, batch_size: int = 1024, reference: int = 64) -> float:
    return SurgeLaw(scale, valid_until=math.pi / 2 * scale).ratio(batch_size, reference)


@pytest.mark.parametrize("batch_size", [16, 1024])
def test_half_of_the_way_is_gone_after_a_half_life(batch_size: int) -> None:
    aim = surge(500, batch_size)
    values = followed(ratio("always", batch_size), *[noise(500)] * (20 * HALF_LIFE))
    assert values[HALF_LIFE - 1] == pytest.approx(math.sqrt(aim))
    assert values[-1] == pytest.approx(aim, rel=1e-5)


def test_always_goes_back_and_a_warmup_does_not() -> None:
    rise, fall = [noise(2000)] * 30, [noise(100)] * 30
    always = followed(ratio("always"), *rise, *fall)
    assert always[29] > 1.3 > always[59]
    warmup = followed(ratio("warmup"), *rise, *fall)
    assert warmup[29] > 1.3 and warmup[30:] == [warmup[29]] * 30


@pytest.mark.parametrize(("batch_size", "sure"), [(1024, 400), (16, 400)])
def test_a_warmup_goes_as_far_as_the_interval_makes_sure(batch_size: int, sure: float) -> None:
    values = followed(ratio("warmup", batch_size), *[noise(600, 1.5)] * 200)
    assert values[-1] == pytest.approx(surge(sure, batch_size), rel=1e-5)
    assert all((b - a) * (values[-1] - 1) >= 0 for a, b in zip(values[:-1], values[1:], strict=True))


@pytest.mark.parametrize(("batch_size", "recorded"), [(1024, 1.5), (16, 0.8)])
def test_a_warmup_ends_at_the_ratio_of_the_record(batch_size: int, recorded: float) -> None:
    one = replace(ratio("warmup", batch_size), end=warmup_end(batch_size, 64, recorded))
    values = followed(one, *[noise(1e6)] * 60)
    assert values[-1] == recorded
    assert replace(one, value=recorded).arrived and not one.arrived
    assert not replace(one, mode="always", value=recorded).arrived


@pytest.mark.parametrize(
    "estimate",
    [
        pytest.param(NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 50), id="no signal"),
        pytest.param(NoiseEstimate(900.0, 0.0, math.inf, 0.95, 50), id="no bound"),
        pytest.param(noise(300, 30.0), id="too uncertain"),
        pytest.param(NoiseEstimate(math.nan, math.nan, math.nan, 0.95, 0), id="nothing"),
    ],
)
@pytest.mark.parametrize("mode", ["warmup", "always"])
def test_what_is_refused_moves_nothing(mode: str, estimate: NoiseEstimate) -> None:
    assert ratio(mode, start=1.2).after(estimate) == 1.2


def test_the_bounds_are_those_of_a_probe() -> None:
    assert followed(ratio("always", start=1.5), *[noise(1e9)] * 200)[-1] == pytest.approx(4.0)
    assert followed(ratio("always", start=1.5), *[noise(1e-3)] * 200)[-1] == pytest.approx(1.0)
