"""The care with which a law is applied: bounds, intervals and refusals."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_gradhist.intervals import NoiseEstimate
from lightning_gradhist.ratio import careful_ratio, choose_ratio
from lightning_gradhist.surge import NOISE_FACTORS, NOISE_LAWS, PLAIN_LAWS, SurgeLaw, scaling_law


def noise(value: float, lower: float | None = None, upper: float | None = None, measurements: int = 16) -> Any:
    low, high = value / 1.2 if lower is None else lower, value * 1.2 if upper is None else upper
    return NoiseEstimate(value, low, high, 0.95, measurements)


@pytest.mark.parametrize(("batch", "reference"), [(64, 256), (1024, 256), (4096, 256), (256, 4096), (256, 256)])
@pytest.mark.parametrize("value", [1e-9, 1.0, 100.0, 400.0, 5_000.0, 1e9])
@pytest.mark.parametrize("law", NOISE_LAWS)
def test_a_probe_stays_between_one_and_the_square_root(law: str, batch: float, reference: float, value: float) -> None:
    ratio = choose_ratio(law, batch, reference, noise(value, value, value))
    low, high = sorted((1.0, math.sqrt(batch / reference)))
    assert low <= ratio.lower <= ratio.value <= ratio.upper <= high
    assert ratio.law == law and ratio.reasons[0].startswith(f"{law} law with the noise scale of a probe")


@pytest.mark.parametrize(("batch", "reference"), [(64, 256), (1024, 256), (256, 1024)])
@pytest.mark.parametrize("value", [900.0, 3_000.0, 1e6])
@pytest.mark.parametrize("law", NOISE_LAWS)
def test_a_record_gives_the_full_law(law: str, batch: float, reference: float, value: float) -> None:
    ratio = choose_ratio(law, batch, reference, noise(value), from_record=True)
    assert ratio.value == pytest.approx(scaling_law(law, value).ratio(batch, reference))
    assert ratio.reasons == (f"{law} law with the noise scale of a recorded run",)


@pytest.mark.parametrize("law", NOISE_LAWS)
def test_the_measured_noise_scale_is_put_on_the_laws_scale(law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NOISE_FACTORS, law, 5.0)
    ratio = choose_ratio(law, 1024, 256, noise(700), from_record=True)
    assert ratio.value == pytest.approx(scaling_law(law, 3500).ratio(1024, 256))
    assert ratio.lower == pytest.approx(scaling_law(law, 3500 / 1.2).ratio(1024, 256))


def test_a_record_may_lower_the_rate_past_the_peak() -> None:
    assert careful_ratio("surge", 1000, 1500, 1000, from_record=True) < 1.0
    assert careful_ratio("surge", 1000, 1500, 1000, from_record=False) == 1.0


@pytest.mark.parametrize("from_record", [False, True], ids=["probe", "record"])
def test_beyond_the_bound_it_levels_off_and_says_so(from_record: bool) -> None:
    bound = math.pi / 2 * 1000
    within = choose_ratio("surge", bound * 0.99, 256, noise(1000), from_record=from_record)
    beyond = choose_ratio("surge", bound * 9, 256, noise(1000), from_record=from_record)
    assert len(within.reasons) == 1 and len(beyond.reasons) == 2
    assert "beyond the bound of the law, 1.57e+03: the rate levels off" in beyond.reasons[1]
    assert beyond.value == pytest.approx(SurgeLaw(1000).ratio(bound, 256))


def test_the_falling_one_does_not_level_off() -> None:
    ratio = choose_ratio("falling_surge", 16_000, 256, noise(1000), from_record=True)
    assert ratio.value == pytest.approx(SurgeLaw(1000).ratio(16_000, 256)) and len(ratio.reasons) == 1
    assert ratio.value < 0.5 * choose_ratio("surge", 16_000, 256, noise(1000), from_record=True).value


def test_the_saturating_law_levels_off_by_itself() -> None:
    ratio = choose_ratio("saturating", 1e6, 256, noise(1000), from_record=True)
    assert ratio.value == pytest.approx(math.sqrt(1 + 1000 / 256), rel=1e-3) and len(ratio.reasons) == 1


@pytest.mark.parametrize(
    ("estimate", "why"),
    [
        pytest.param(None, "there is no noise scale", id="none"),
        pytest.param(noise(math.inf, 0.0, math.inf, 0), "there is no noise scale", id="no-measurements"),
        pytest.param(
            noise(500, 0.0, math.inf),
            r"too uncertain \(0 to unbounded samples\): .* by (1|0\.658) or by 4",
            id="unbounded",
        ),
        pytest.param(noise(math.inf, 100.0, math.inf), "no signal stands out", id="no-signal"),
    ],
)
@pytest.mark.parametrize(("fallback", "value"), [("keep", 1.0), ("sqrt", 4.0), ("fourth_root", 2.0), ("linear", 16.0)])
@pytest.mark.parametrize("law", NOISE_LAWS)
def test_refusal(law: str, estimate: NoiseEstimate | None, why: str, fallback: str, value: float) -> None:
    ratio = choose_ratio(law, 4096, 256, estimate, fallback=fallback)
    assert (ratio.value, ratio.lower, ratio.upper, ratio.law) == (value, value, value, fallback)
    (reason,) = ratio.reasons
    assert reason.startswith(f"{law} law refused: ") and reason.endswith(f"fallback={fallback!r} is used")
    assert re.search(why, reason)


@pytest.mark.parametrize("interval", [(0.0, 900.0), (100.0, math.inf), (20.0, 300_000.0)])
@pytest.mark.parametrize("from_record", [False, True], ids=["probe", "record"])
@pytest.mark.parametrize("law", NOISE_LAWS)
def test_a_poor_interval_is_refused_before_a_probe_is_bounded(
    law: str, interval: tuple[float, float], from_record: bool
) -> None:
    ratio = choose_ratio(law, 4096, 256, noise(500, *interval), from_record=from_record)
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
    assert ratio.value == ratio.lower == ratio.upper == scaling_law(law).ratio(1024, 256)
    assert ratio.law == law and ratio.reasons == ()


POSITIVE = st.floats(1e-3, 1e9)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    batch=POSITIVE,
    reference=POSITIVE,
    ends=st.tuples(*[st.floats(0, 1e9)] * 3),
    record=st.booleans(),
    law=st.sampled_from(NOISE_LAWS),
)
def test_property_the_value_lies_in_its_interval(
    batch: float, reference: float, ends: Any, record: bool, law: str
) -> None:
    lower, value, upper = sorted(ends)
    ratio = choose_ratio(law, batch, reference, noise(value, lower, upper), from_record=record)
    assert 0 < ratio.lower <= ratio.value <= ratio.upper < math.inf
    assert ratio.law == "keep" or ratio.upper <= 2 * ratio.lower


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: choose_ratio("cubic", 1, 1), "got 'cubic'", id="name"),
        pytest.param(lambda: choose_ratio("surge", 1, 1, fallback="cubic"), "got 'cubic'", id="fallback-name"),
        pytest.param(lambda: choose_ratio("keep", 1, 1, fallback="surge"), "must be another than", id="fallback"),
        pytest.param(lambda: choose_ratio("surge", 0, 1, noise(1)), "batch_size must be", id="batch"),
        pytest.param(
            lambda: choose_ratio("saturating", 1, 0, noise(1)), "reference_batch_size must be", id="reference"
        ),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("law", NOISE_LAWS)
@pytest.mark.parametrize("noise", [None, NoiseEstimate(100.0, 0.0, math.inf, confidence=0.95, measurements=5)])
def test_at_the_batch_size_of_the_reference_there_is_nothing_to_refuse(law: str, noise: NoiseEstimate | None) -> None:
    ratio = choose_ratio(law, 256, 256, noise, fallback="linear")
    assert (ratio.value, ratio.lower, ratio.upper, ratio.law, ratio.reasons) == (1.0, 1.0, 1.0, law, ())
    with pytest.raises(ValueError, match="positive"):
        choose_ratio(law, 0, 0, noise)
