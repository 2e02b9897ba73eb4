"""The best single step, from the loss at a few lengths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lightning_gradhist.greedy import (
    PILOT_SHARES,
    NoGreedyRateError,
    find_minimum,
    fitted_lengths,
    greedy_rate,
)


def parabola(best: float, lengths: Any, slope: float = 1.0) -> list[float]:
    return [slope * (length**2 / (2 * best) - length) for length in lengths]


@pytest.mark.parametrize("best", [2e-4, 1e-3, 0.03, 0.9])
def test_the_minimum_of_a_parabola_is_found_from_afar(best: float) -> None:
    center = find_minimum(PILOT_SHARES, [parabola(best, PILOT_SHARES)])
    assert center == pytest.approx(best, rel=1e-6)
    lengths = fitted_lengths(center)
    found = greedy_rate(lengths, [parabola(best, lengths, slope) for slope in (0.9, 1.0, 1.1)])
    assert found.value == pytest.approx(best) and found.steps == 3
    assert found.lower == pytest.approx(best) == found.upper


def test_what_is_not_finite_is_too_long() -> None:
    rows = [[math.nan if length > 0.1 else change for length, change in zip(PILOT_SHARES, row, strict=True)]
            for row in [parabola(0.01, PILOT_SHARES)] * 2]  # fmt: skip
    assert find_minimum(PILOT_SHARES, rows) == pytest.approx(0.01, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param([], "no batch gave a finite loss", id="nothing"),
        pytest.param([[0.1] * len(PILOT_SHARES)], "the loss falls at no length", id="rises"),
        pytest.param([[math.nan] * len(PILOT_SHARES)], "the loss falls at no length", id="not finite"),
        pytest.param([[-length for length in PILOT_SHARES]], "falls along the whole range", id="falls for ever"),
    ],
)
def test_no_minimum_is_found_where_there_is_none(changes: Any, message: str) -> None:
    with pytest.raises(NoGreedyRateError, match=message):
        find_minimum(PILOT_SHARES, changes)


LENGTHS = (0.5, 1.0, 2.0)
FLAT = [-length for length in LENGTHS]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param([parabola(1, LENGTHS)] * 2, "only 2 of its steps", id="two steps"),
        pytest.param([parabola(1, LENGTHS), FLAT, [-0.1, 0.1, math.inf]], "not finite at a step of 2", id="not finite"),
        pytest.param([FLAT] * 4, "no minimum", id="no curvature"),
        pytest.param([parabola(-1, LENGTHS)] * 4, "no minimum", id="rises first"),
        pytest.param(
            [parabola(1, LENGTHS, slope) for slope in (1, -1, 2, -1.5)], "no minimum|too uncertain", id="noise"
        ),
        pytest.param([parabola(best, LENGTHS) for best in (0.6, 2.0, 1.0, 1.4)], "too uncertain", id="spread"),
        pytest.param([parabola(3, LENGTHS)] * 4, "the best step, 3, lies beyond", id="beyond"),
    ],
)
def test_what_the_data_do_not_support_is_refused(changes: Any, message: str) -> None:
    with pytest.raises(NoGreedyRateError, match=message):
        greedy_rate(LENGTHS, changes)


def test_the_interval_covers_lemma_one() -> None:
    """Random steps on a quadratic with noise in slope and curvature: 95 of 100 intervals hold the ratio of the means."""
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        slopes, curvatures = 2 + 0.3 * torch.randn(2, 12, generator=generator, dtype=torch.float64)
        rows = [[-a * x + b * x * x / 2 for x in LENGTHS] for a, b in zip(slopes, curvatures, strict=True)]
        found = greedy_rate(LENGTHS, torch.tensor(rows).tolist())
        covered += found.lower <= 1.0 <= found.upper
    assert 0.93 < covered / 400 < 0.97
