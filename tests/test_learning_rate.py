"""The laws against closed forms, and the care with which they are applied: bounds, intervals and refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradhist.learning_rate import (
    PLAIN_LAWS,
    SurgeLaw,
    choose_ratio,
    plain_ratio,
    share_of_equal_samples,
    surge_ratio,
)
from lightning_gradhist.noise import NoiseEstimate

SIZES = [(32, 32), (64, 1024), (1024, 64), (300, 7), (1, 65_536)]


@pytest.mark.parametrize(("batch", "reference"), SIZES)
@pytest.mark.parametrize("noise_scale", [0.5, 100.0, 1000.0, 1e6])
def test_ratio(batch: float, reference: float, noise_scale: float) -> None:
    def rate(b: float) -> float:
        return 0.03 / ((math.sqrt(noise_scale / b) + math.sqrt(b / noise_scale)) / 2)

    assert SurgeLaw(noise_scale).ratio(batch, reference) == pytest.approx(rate(batch) / rate(reference), rel=1e-12)


def test_the_peak_is_at_the_noise_scale() -> None:
    law = SurgeLaw(700)
    assert all(law.ratio(b, 700) < 1 for b in (1, 350, 699, 701, 1400, 1e6))
    assert law.ratio(350, 1400) == pytest.approx(1)  # symmetric in the logarithm


@pytest.mark.parametrize(("batch", "reference"), SIZES)
def test_limits(batch: float, reference: float) -> None:
    root = math.sqrt(batch / reference)
    assert SurgeLaw(math.inf).ratio(batch, reference) == pytest.approx(root, rel=1e-12)
    assert SurgeLaw(1e12).ratio(batch, reference) == pytest.approx(root, rel=1e-6)
    assert SurgeLaw(1e-9).ratio(batch, reference) == pytest.approx(1 / root, rel=1e-6)


def test_levels_off_beyond_its_bound() -> None:
    law = SurgeLaw(100, valid_until=400)
    assert law.ratio(1e9, 100) == law.ratio(400, 100) < 1.0
    assert law.ratio(5000, 400) == law.ratio(400, 5000) == 1.0
    assert law.ratio(5000, 10) == law.ratio(400, 10) == SurgeLaw(100).ratio(400, 10)
    assert SurgeLaw(math.inf, valid_until=64).ratio(1024, 16) == 2.0


@pytest.mark.parametrize(("name", "exponent"), [("sqrt", 0.5), ("fourth_root", 0.25), ("linear", 1.0), ("keep", 0.0)])
def test_power_laws(name: str, exponent: float) -> None:
    for batch, reference in SIZES:
        assert plain_ratio(name, batch, reference) == (batch / reference) ** exponent


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: SurgeLaw(True), "noise_scale must be a positive number of samples, got True", id="flag"),
        pytest.param(lambda: SurgeLaw(0.0), "noise_scale must be a positive number of samples, got 0.0", id="zero"),
        pytest.param(lambda: SurgeLaw(-1.0), "noise_scale must be .* got -1.0", id="negative"),
        pytest.param(lambda: SurgeLaw(math.nan), "noise_scale must be .* got nan", id="nan"),
        pytest.param(lambda: SurgeLaw(1.0, valid_until=0), "valid_until must be", id="valid-until"),
        pytest.param(lambda: SurgeLaw(1.0).ratio(1, 0), "reference_batch_size must be", id="reference"),
        pytest.param(lambda: SurgeLaw(1.0).ratio(math.inf, 1), "batch_size must be .* got inf", id="infinite"),
        pytest.param(lambda: plain_ratio("linear", -4, 1), "batch_size must be .* got -4", id="power"),
        pytest.param(lambda: plain_ratio("cubic", 4, 1), r"one of \('surge', .* got 'cubic'", id="name"),
    ],
)
def test_errors_of_the_laws(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def noise(value: float, lower: float | None = None, upper: float | None = None, measurements: int = 16) -> Any:
    low, high = value / 1.2 if lower is None else lower, value * 1.2 if upper is None else upper
    return NoiseEstimate(value, low, high, 0.95, measurements)


@pytest.mark.parametrize(("batch", "reference"), [(64, 256), (1024, 256), (4096, 256), (256, 4096), (256, 256)])
@pytest.mark.parametrize("value", [1e-9, 1.0, 100.0, 400.0, 5_000.0, 1e9])
def test_a_probe_stays_between_one_and_the_square_root(batch: float, reference: float, value: float) -> None:
    ratio = choose_ratio("surge", batch, reference, noise(value, value, value))
    low, high = sorted((1.0, math.sqrt(batch / reference)))
    assert low <= ratio.lower <= ratio.value <= ratio.upper <= high
    assert ratio.law == "surge" and ratio.reasons[0].startswith("surge law with the noise scale of a probe")


@pytest.mark.parametrize(("batch", "reference"), [(64, 256), (1024, 256), (256, 1024)])
@pytest.mark.parametrize("value", [900.0, 3_000.0, 1e6])
def test_a_record_gives_the_full_law(batch: float, reference: float, value: float) -> None:
    ratio = choose_ratio("surge", batch, reference, noise(value), from_record=True)
    assert ratio.value == pytest.approx(SurgeLaw(value, valid_until=math.pi / 2 * value).ratio(batch, reference))
    assert ratio.reasons == ("surge law with the noise scale of a recorded run",)


@pytest.mark.parametrize(
    ("batch", "steps", "share"),
    [
        pytest.param(1024, 1000, 1.0, id="equal samples"),
        pytest.param(1024, 4000, 0.0, id="equal steps"),
        pytest.param(1024, 2000, 0.5, id="between"),
        pytest.param(1024, 10, 1.0, id="fewer samples"),
        pytest.param(1024, 9000, 0.0, id="more steps"),
        pytest.param(64, 16_000, 1.0, id="equal samples, smaller"),
        pytest.param(64, 8000, 0.5, id="between, smaller"),
        pytest.param(256, 40, 1.0, id="one batch size"),
    ],
)
def test_how_near_a_run_is_to_equal_samples(batch: float, steps: float, share: float) -> None:
    assert share_of_equal_samples(batch, 256, steps, reference_steps=4000) == pytest.approx(share)


@pytest.mark.parametrize("batch", [16, 64, 256, 1024, 65_536])
@pytest.mark.parametrize("value", [10.0, 900.0, 1e6])
def test_at_equal_steps_a_record_stays_within_the_fourth_root(batch: float, value: float) -> None:
    samples, steps, between = (surge_ratio(value, batch, 256, True, share) for share in (1.0, 0.0, 0.5))
    assert samples == surge_ratio(value, batch, 256, from_record=True)
    low, high = sorted((1.0, plain_ratio("fourth_root", batch, 256)))
    assert low <= steps <= high and (steps == samples or steps in (low, high))
    assert between == pytest.approx(math.sqrt(samples * steps))
    assert choose_ratio("surge", batch, 256, noise(value), from_record=True, share=0.0).value == steps


def test_a_probe_knows_no_length() -> None:
    assert surge_ratio(900, 1024, 256, False, share=0.0) == surge_ratio(900, 1024, 256, from_record=False)


def test_what_no_noise_scale_could_make_uncertain_is_not_refused() -> None:
    far = noise(500, 20.0, 300_000.0)
    assert choose_ratio("surge", 4096, 256, far, from_record=True).law == "keep"
    found = choose_ratio("surge", 1024, 256, far, from_record=True, share=0.0)
    assert (found.law, found.share, found.upper) == ("surge", 0.0, pytest.approx(math.sqrt(2))) and found.lower == 1


def test_a_record_may_lower_the_rate_past_the_peak() -> None:
    assert surge_ratio(1000, 1500, 1000, from_record=True) < 1.0
    assert surge_ratio(1000, 1500, 1000, from_record=False) == 1.0


@pytest.mark.parametrize("from_record", [False, True], ids=["probe", "record"])
def test_beyond_the_bound_it_levels_off_and_says_so(from_record: bool) -> None:
    bound = math.pi / 2 * 1000
    within = choose_ratio("surge", bound * 0.99, 256, noise(1000), from_record=from_record)
    beyond = choose_ratio("surge", bound * 9, 256, noise(1000), from_record=from_record)
    assert len(within.reasons) == 1 and len(beyond.reasons) == 2
    assert "beyond the bound of the law, 1.57e+03: the rate levels off" in beyond.reasons[1]
    assert beyond.value == pytest.approx(SurgeLaw(1000).ratio(bound, 256))


def test_a_refusal_names_no_two_ratios_that_read_the_same() -> None:
    (reason,) = choose_ratio("surge", 1024, 1023, noise(500, 0.0, math.inf), from_record=True).reasons
    assert "too uncertain (0 samples or more) (record a longer run" in reason and "anything" not in reason


@pytest.mark.parametrize(
    ("estimate", "why"),
    [
        pytest.param(None, "there is no noise scale", id="none"),
        pytest.param(noise(math.inf, 0.0, math.inf, 0), "there is no noise scale", id="no-measurements"),
        pytest.param(
            noise(500, 0.0, math.inf),
            r"too uncertain \(0 samples or more\): .* by anything from (1|0\.658) to 4",
            id="unbounded",
        ),
        pytest.param(noise(math.inf, 100.0, math.inf), "no signal stands out", id="no-signal"),
    ],
)
@pytest.mark.parametrize(("fallback", "value"), [("keep", 1.0), ("sqrt", 4.0), ("fourth_root", 2.0), ("linear", 16.0)])
def test_refusal(estimate: NoiseEstimate | None, why: str, fallback: str, value: float) -> None:
    ratio = choose_ratio("surge", 4096, 256, estimate, fallback=fallback)
    assert (ratio.value, ratio.lower, ratio.upper, ratio.law) == (value, value, value, fallback)
    (reason,) = ratio.reasons
    assert reason.startswith("surge law refused: ") and reason.endswith(f"fallback={fallback!r} is used")
    assert re.search(why, reason)


@pytest.mark.parametrize("interval", [(0.0, 900.0), (100.0, math.inf), (20.0, 300_000.0)])
@pytest.mark.parametrize("from_record", [False, True], ids=["probe", "record"])
def test_a_poor_interval_is_refused_before_a_probe_is_bounded(interval: tuple[float, float], from_record: bool) -> None:
    ratio = choose_ratio("surge", 4096, 256, noise(500, *interval), from_record=from_record)
    assert (ratio.law, ratio.value) == ("keep", 1.0) and "too uncertain" in ratio.reasons[0]


@pytest.mark.parametrize(("measurements", "said"), [(9, True), (10, False)])
def test_a_refused_record_of_few_measurements_is_told_to_be_longer(measurements: int, said: bool) -> None:
    estimate = NoiseEstimate(500.0, 0.0, math.inf, 0.95, measurements)
    (reason,) = choose_ratio("surge", 4096, 256, estimate, from_record=True).reasons
    assert (f"the record has {measurements} measurements, and some 10 are wanted" in reason) is said
    assert "record" not in choose_ratio("surge", 4096, 256, estimate).reasons[0]


@pytest.mark.parametrize("law", PLAIN_LAWS)
def test_other_laws_need_no_noise_scale(law: str) -> None:
    ratio = choose_ratio(law, 1024, 256)
    assert ratio.value == ratio.lower == ratio.upper == plain_ratio(law, 1024, 256)
    assert ratio.law == law and ratio.reasons == ()


POSITIVE = st.floats(1e-3, 1e9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    batch=POSITIVE,
    reference=POSITIVE,
    ends=st.tuples(*[st.floats(0, 1e9)] * 3),
    record=st.booleans(),
)
def test_property_the_value_lies_in_its_interval(batch: float, reference: float, ends: Any, record: bool) -> None:
    lower, value, upper = sorted(ends)
    ratio = choose_ratio("surge", batch, reference, noise(value, lower, upper), from_record=record)
    assert 0 < ratio.lower <= ratio.value <= ratio.upper < math.inf
    assert ratio.law == "keep" or ratio.upper <= 2 * ratio.lower


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: choose_ratio("cubic", 1, 1), "got 'cubic'", id="name"),
        pytest.param(lambda: choose_ratio("surge", 1, 1, fallback="cubic"), "got 'cubic'", id="fallback-name"),
        pytest.param(lambda: choose_ratio("keep", 1, 1, fallback="surge"), "must be another than", id="fallback"),
        pytest.param(lambda: choose_ratio("surge", 0, 1, noise(1)), "batch_size must be", id="batch"),
        pytest.param(lambda: choose_ratio("surge", 1, 0, noise(1)), "reference_batch_size must be", id="reference"),
    ],
)
def test_errors_of_a_ratio(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("noise", [None, NoiseEstimate(100.0, 0.0, math.inf, confidence=0.95, measurements=5)])
def test_at_the_batch_size_of_the_reference_there_is_nothing_to_refuse(noise: NoiseEstimate | None) -> None:
    ratio = choose_ratio("surge", 256, 256, noise, fallback="linear")
    assert (ratio.value, ratio.lower, ratio.upper, ratio.law, ratio.reasons) == (1.0, 1.0, 1.0, "surge", ())
    with pytest.raises(ValueError, match="positive"):
        choose_ratio("surge", 0, 0, noise)
