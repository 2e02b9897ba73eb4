"""Which epsilons are tried, and when one of them is better."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_gradhist.epsilon import EpsilonRange, epsilon_range, largest_idle
from lightning_gradhist.epsilon_search import (
    CONTROLS,
    MOST_DECADES,
    Candidate,
    candidates,
    control_rates,
    search_result,
)


def space(low: float, high: float) -> EpsilonRange:
    return epsilon_range({"w": torch.logspace(low, high, 4001)})


@pytest.mark.parametrize(
    ("present", "floor", "expected", "as_auto"),
    [
        pytest.param(1e-8, 0.0, [1e-5, 1e-4, 1e-3], None, id="idle"),
        pytest.param(0.0, 0.0, [1e-5, 1e-4, 1e-3], None, id="zero"),
        pytest.param(1e-6, 0.0, [1e-5, 1e-4, 1e-3], None, id="the largest that is idle"),
        pytest.param(1.1e-6, 0.0, [1e-5, 1e-4, 1e-3], None, id="idle, if not as a power of ten"),
        pytest.param(1e-4, 0.0, [1e-6, 1e-5, 1e-3], 1e-6, id="damps"),
        pytest.param(3e-5, 0.0, [1e-6, 1e-5, 1e-4, 1e-3], 1e-6, id="between powers"),
        pytest.param(1.0, 0.0, [1e-6, 1e-5, 1e-4, 1e-3], 1e-6, id="beyond"),
        pytest.param(1e-4, 1e-5, [1e-5, 1e-3], 1e-5, id="floor"),
        pytest.param(1e-4, 1e-4, [1e-3], None, id="present at the floor"),
    ],
)
def test_candidates(present: float, floor: float, expected: list[float], as_auto: float | None) -> None:
    found = candidates(present, space(-6, -3), floor)
    assert [c.eps for c in found if c.equal_rms] == expected
    assert [c.eps for c in found if not c.equal_rms] == ([] if as_auto is None else [as_auto])


def test_a_wide_search_space_is_thinned_and_keeps_its_ends() -> None:
    wide = space(-14, -1)
    found = [c.eps for c in candidates(1e-20, wide)]
    assert len(found) == MOST_DECADES
    assert found[0] == pytest.approx(10 * largest_idle(wide)) and found[-1] == wide.upper
    steps = {round(math.log10(b / a)) for a, b in zip(found, found[1:], strict=False)}
    assert max(steps) - min(steps) <= 1


def test_nothing_is_tried_where_nothing_matters() -> None:
    assert candidates(1e-8, epsilon_range({"w": torch.full((9,), 1.3e-3)})) == ()


def test_where_all_are_alike_there_are_only_those_above_and_below() -> None:
    assert [c.eps for c in candidates(1.0, epsilon_range({"w": torch.full((9,), 1.3e-3)}))] == [1e-3, 1e-3]


TRIED = (Candidate(1e-6), Candidate(1e-5))
WOBBLE = (0.01, -0.02, 0.0, 0.015, -0.005, 0.0)


def found(*shifts: float, rates: Any = (0.3, 0.2, 0.4, 0.5), confidence: float = 0.95, noise: float = 1.0) -> Any:
    """Losses that differ by some shifts: of the present epsilon at other rates, then of the candidates."""
    rows = [
        [base, *(base + s for s in rates), *(base + s + noise * w * (i + 1) for i, s in enumerate(shifts))]
        for base, w in zip((1.0, 3.0, 2.0, 2.5, 1.5, 0.5), WOBBLE, strict=True)
    ]
    return search_result(1e-8, CONTROLS, TRIED, (1.0, 1.2), rows, confidence, steps=16, gradients=1, forwards=2)


def test_the_interval_is_that_of_pairs() -> None:
    from scipy import stats

    trial = found(-0.1, 0.1).trials[0]
    differences = [-0.1 + w for w in WOBBLE]
    error = stats.sem(differences)
    reach = stats.t.ppf(1 - 0.05 / 2 / 2, 5) * error
    assert trial.to_present.value == pytest.approx(sum(differences) / 6)
    assert trial.to_present.lower == pytest.approx(trial.to_present.value - reach)
    assert trial.to_present.upper == pytest.approx(trial.to_present.value + reach)
    assert trial.to_control.value == pytest.approx(trial.to_present.value - 0.2)
    assert found(-0.1, 0.1).control == CONTROLS[1]


@pytest.mark.parametrize(
    ("shifts", "options", "expected"),
    [
        pytest.param((-0.1, -0.2), {}, 1e-5, id="the lower"),
        pytest.param((-0.1, 0.2), {}, 1e-6, id="the only"),
        pytest.param((-0.01, 0.0), {}, None, id="within the noise"),
        pytest.param((-0.01, 0.0), {"noise": 0.1}, 1e-6, id="less noise"),
        pytest.param((0.1, 0.2), {}, None, id="worse"),
        pytest.param((-0.1, -0.2), {"rates": (0.3, -0.5, 0.1, 0.1)}, None, id="another rate buys more"),
        pytest.param((-0.1, -0.7), {"rates": (0.3, -0.5, 0.1, 0.1)}, 1e-5, id="more than another rate"),
        pytest.param((-0.1, -0.2), {"rates": (math.inf,) * 4}, 1e-5, id="other rates diverge"),
        pytest.param((math.inf, -0.2), {}, 1e-5, id="one diverges"),
        pytest.param((math.nan, math.inf), {}, None, id="all diverge"),
    ],
)
def test_the_choice(shifts: tuple[float, float], options: Any, expected: float | None) -> None:
    chosen = found(*shifts, **options).chosen
    assert (chosen.candidate.eps if chosen else None) == expected


def test_none_passes_for_better_that_is_not() -> None:
    """Pure noise: a candidate wins in at most one search of forty, as the interval has two sides."""
    noise = torch.randn(1500, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    wins = 0
    for rows in noise:
        losses = [[a, *[math.inf] * len(CONTROLS), b, c] for a, b, c in rows]
        wins += (
            search_result(1e-8, CONTROLS, TRIED, (1.0, 1.0), losses, steps=1, gradients=1, forwards=1).chosen
            is not None
        )
    assert 0.01 < wins / 1500 < 0.035


def test_without_finite_losses_there_is_no_comparison() -> None:
    rows = [[math.nan, *[1.0] * 6]] * 4 + [[1.0] * 7] * 2
    with pytest.raises(ValueError, match="only 2 of 6 short runs with the present epsilon gave a finite loss"):
        search_result(1e-8, CONTROLS, TRIED, (1.0, 1.0), rows, steps=1, gradients=1, forwards=1)


@pytest.mark.parametrize(
    ("gains", "further"),
    [
        ([], ()),
        ([1.2, 4.0], ()),
        ([1.2, 9.0], (16.0, 32.0)),
        ([math.inf, math.nan, 7.0], (16.0,)),
        ([1e9], (16.0, 32.0, 64.0, 128.0)),
    ],
)
def test_the_rates_leave_no_gap_up_to_where_the_present_epsilon_descends_as_fast(
    gains: list[float], further: tuple[float, ...]
) -> None:
    assert control_rates(gains) == (*CONTROLS, *further)
