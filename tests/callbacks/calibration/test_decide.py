"""Decisions from evidence alone: no Trainer, no module, no optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lightning_gradhist.callbacks.calibration.decide import decide
from lightning_gradhist.callbacks.calibration.evidence import (
    Evidence,
    ParamGroup,
    ProbeFindings,
    needs_probe,
)
from lightning_gradhist.epsilon import epsilon_range
from lightning_gradhist.logging.calibration_result import GroupChange
from lightning_gradhist.noise import NoiseEstimate, OptimizerRecord
from lightning_gradhist.noise.run_record import RunLength


@dataclass
class Asked:
    """What a user asked for; the defaults are those of ``OptimizerCalibration``."""

    reference_batch_size: int | None = None
    epsilon: float | str = "auto"
    learning_rate: str = "surge"
    probe_batches: int = 32
    apply: bool = True
    batch_size: int | None = None
    fallback: str = "keep"


SPACE = epsilon_range({"w": torch.logspace(-6, -2, 10_001)})
NOISE = NoiseEstimate(1000.0, 900.0, 1100.0, 0.95, 100)


def group(
    lr: float | None = 1e-3, eps: float | None = 1e-8, least_eps: float = 0.0, alpha: str | None = None
) -> ParamGroup:
    return ParamGroup(lr, eps, least_eps, alpha)


def evidence(*groups: ParamGroup, **known: Any) -> Evidence:
    found: dict[str, Any] = {"optimizer": "AdamW", "adaptive": True, "batch_size": 1024, **known}
    return Evidence(groups=groups or (group(),), **found)


def recorded(name: str = "AdamW", rates: tuple[float, ...] = (4e-3,), noise: NoiseEstimate = NOISE) -> OptimizerRecord:
    return OptimizerRecord(name, list(rates), 256.0, {"adam": noise}, [])


def test_nothing_known_changes_nothing() -> None:
    result = decide(Asked(), evidence(batch_size=None))
    assert result.changes == () and (result.ratio, result.law) == (1.0, "keep")
    assert (result.epsilon, result.learning_rate) == (1e-8, 1e-3)


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        pytest.param("auto", 1e-8, 1e-8, id="idle"),
        pytest.param("auto", 1e-3, 1e-6, id="lowered"),
        pytest.param("keep", 1e-3, 1e-3, id="kept"),
        pytest.param(3e-5, 1e-3, 3e-5, id="given"),
    ],
)
def test_epsilon(option: Any, before: float, after: float) -> None:
    result = decide(
        Asked(epsilon=option, learning_rate="keep"), evidence(group(eps=before), probe=ProbeFindings(SPACE))
    )
    assert result.epsilon == after and result.problems == ()
    assert result.changes == (() if after == before else (GroupChange(0, "eps", before, after),))


def test_an_epsilon_that_float16_cannot_hold_is_raised() -> None:
    result = decide(Asked(learning_rate="keep"), evidence(group(least_eps=1e-7), group(), probe=ProbeFindings(SPACE)))
    assert result.changes == (GroupChange(0, "eps", 1e-8, 1e-7),)
    assert "raised to 1e-07" in result.reasons[0] and "group 1 is kept" in result.reasons[1]


def test_an_optimizer_without_epsilon_is_left_alone() -> None:
    sgd = evidence(group(eps=None), optimizer="SGD", adaptive=False)
    result = decide(Asked(reference_batch_size=256), sgd)
    assert result.changes == () and result.epsilon is None
    assert [problem.split(",")[0] for problem in result.problems] == ["the surge law is for optimizers like Adam"]
    no_epsilon = "SGD is not known to have an epsilon of Adam's kind, so none is set; pass epsilon='keep'"
    assert result.reasons == (no_epsilon,)
    for asked in (Asked(epsilon=1e-8), Asked(learning_rate="keep")):  # which is all that is asked for
        assert decide(asked, sgd).problems == (no_epsilon,)


def test_a_record_brings_rate_and_noise() -> None:
    result = decide(Asked(), evidence(recorded=recorded(), probe=ProbeFindings(SPACE)))
    expected = math.sqrt(4) * (1000 + 256) / (1000 + 1024)
    assert result.ratio == pytest.approx(expected) and result.noise_source == "record"
    (change,) = result.changes
    assert (change.name, change.before) == ("lr", 1e-3) and change.after == pytest.approx(4e-3 * expected)


def of_length(steps: int | None, reference: int | None, batch_size: int = 1024) -> Any:
    record = replace(recorded(), length=RunLength(reference))
    return decide(Asked(epsilon="keep"), evidence(recorded=record, length=RunLength(steps), batch_size=batch_size))


@pytest.mark.parametrize(
    ("steps", "reference", "ratio", "said"),
    [
        pytest.param(100, 400, 1.241, "as at equal samples, the surge law", id="equal samples"),
        pytest.param(400, 400, 1.241, "as at equal steps, the ratio of the surge law is kept", id="equal steps"),
        pytest.param(200, 400, 1.241, "50% equal samples", id="between"),
        pytest.param(None, 400, 1.241, "the length of this run is not known; Trainer(max_steps", id="this run"),
        pytest.param(400, None, 1.241, "the record does not tell the length of its run", id="record"),
    ],
)
def test_the_lengths_of_the_runs_count_and_are_told(steps: Any, reference: Any, ratio: float, said: str) -> None:
    result = of_length(steps, reference)
    assert result.ratio == pytest.approx(ratio, abs=1e-3) and said in " ".join(result.reasons)


@pytest.mark.parametrize(
    ("critical", "before", "now", "ratio"),
    [
        pytest.param(None, 0.1, 1.0, 1.241, id="not known"),
        pytest.param(2.0, 0.1, 1.0, 1.241, id="not reached"),
        pytest.param(1.1, 0.1, 1.0, 1.1, id="reached"),
        pytest.param(0.5, 0.1, 1.0, 0.5, id="the reference began with a shorter step"),
        pytest.param(0.05, 0.1, 1.0, 0.1, id="and that is the least"),
        pytest.param(0.5, 0.1, 0.1, 1.0, id="the reference began with the same step"),
        pytest.param(0.5, 0.1, 0.01, 1.241, id="the reference began with a longer step"),
        pytest.param(0.5, None, 1.0, 1.0, id="nobody knows how the reference began"),
        pytest.param(0.5, 0.1, None, 1.0, id="nobody knows how this run goes on"),
        pytest.param(0.5, 0.0, 1.0, 1.0, id="the reference began with rate zero"),
        pytest.param(0.0, 0.1, 1.0, 0.1, id="every first step raises the loss"),
        pytest.param(math.inf, 0.1, 1.0, 1.241, id="the largest that was tried does not"),
    ],
)
def test_a_first_step_that_raises_the_loss_bounds_the_rate(critical: Any, before: Any, now: Any, ratio: float) -> None:
    record = replace(recorded(), length=RunLength(400, 1, [] if before is None else [before]))
    known = {"recorded": record, "length": RunLength(100, 1, [] if now is None else [now])}
    result = decide(Asked(epsilon="keep"), evidence(probe=ProbeFindings(critical=critical), **known))
    assert result.ratio == pytest.approx(ratio, abs=1e-3) and result.learning_rate == pytest.approx(4e-3 * result.ratio)
    assert result.ratio_interval[0] <= result.ratio <= result.ratio_interval[1] + 1e-12
    told = [reason for reason in result.reasons if reason.startswith("the law gives times 1.24, but")]
    assert len(told) == (ratio < 1.2)
    assert all(("not known how" in reason) == (not before or not now) for reason in told)


@pytest.mark.parametrize(("critical", "told"), [(1.5, "times 2.12 it raises the loss"), (0.0, "however"), (2.0, None)])
def test_a_plain_law_is_used_as_it_is_and_warned_of(critical: float, told: Any) -> None:
    known = {"recorded": recorded(), "probe": ProbeFindings(critical=critical)}
    result = decide(Asked(epsilon="keep", learning_rate="sqrt"), evidence(**known))
    assert result.ratio == pytest.approx(2.0)
    assert [told in problem for problem in result.problems] == [True] * (told is not None)


def test_at_equal_steps_the_rate_stays_within_the_fourth_root() -> None:
    small = replace(recorded(), batch_size=16.0)
    results = [
        decide(
            Asked(epsilon="keep"),
            evidence(recorded=replace(small, length=RunLength(400)), length=RunLength(steps), batch_size=256),
        )
        for steps in (25, 100, 400)
    ]
    full = math.sqrt(16) * (1000 + 16) / (1000 + 256)
    assert [result.ratio for result in results] == pytest.approx([full, math.sqrt(full * 2), 2.0])
    assert [result.equal_samples_share for result in results] == pytest.approx([1.0, 0.5, 0.0])


def test_reference_batch_size_alone_takes_equal_samples_and_says_so() -> None:
    asked = Asked(reference_batch_size=256, epsilon="keep")
    result = decide(asked, evidence(probe=ProbeFindings(noise=NOISE), length=RunLength(400)))
    assert "taken to see as many samples as that of the reference: reference_batch_size" in result.reasons[-1]
    same = decide(asked, evidence(probe=ProbeFindings(noise=NOISE), batch_size=256))
    assert "as many samples" not in " ".join(same.reasons)  # every length gives 1


@pytest.mark.parametrize("law", ["surge", "sqrt"])
def test_short_runs_and_warm_ups_that_do_not_end_are_named(law: str) -> None:
    record = replace(recorded(), length=RunLength(30))
    known = evidence(recorded=record, length=RunLength(20, warm_up=20))
    reasons = " ".join(decide(Asked(epsilon="keep", learning_rate=law), known).reasons)
    assert "this run has 20 steps: below some 50" in reasons and "the recorded run has 30 steps" in reasons
    assert "the warm-up of this run does not end within its 20 steps" in reasons
    longer = evidence(recorded=replace(record, length=RunLength(50)), length=RunLength(50, warm_up=3))
    assert "steps: below" not in " ".join(decide(Asked(epsilon="keep", learning_rate=law), longer).reasons)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        pytest.param(recorded("Adam"), "is of Adam", id="class"),
        pytest.param(recorded(rates=(1.0, 2.0)), "has other parameter groups", id="groups"),
        pytest.param(recorded("AdamW(SGD)"), "is of AdamW(SGD)", id="what it wraps"),
        pytest.param(recorded(rates=()), "tells no learning rate", id="no rates"),
    ],
)
def test_a_record_of_something_else_brings_the_ratio_alone(record: OptimizerRecord, why: str) -> None:
    result = decide(Asked(epsilon="keep"), evidence(recorded=record))
    assert result.learning_rate == pytest.approx(1e-3 * result.ratio) and why in " ".join(result.reasons)


@pytest.mark.parametrize("known", [{"recorded": recorded()}, {}], ids=["record", "reference_batch_size"])
def test_the_rates_of_a_schedule_of_its_own_are_multiplied_and_not_told(known: dict[str, Any]) -> None:
    asked = Asked(None if known else 256, epsilon="keep", learning_rate="sqrt")
    result = decide(asked, evidence(own_schedule="Peak", **known))
    assert result.learning_rate is None and result.changes == (GroupChange(0, "lr", 1e-3, 2e-3),)
    assert "Peak makes the rates" in result.reasons[-1] and "each of them times 2" in result.reasons[-1]
    assert ("lr (group 0)", "times 2") in result.rows()


@pytest.mark.parametrize(
    ("order", "rates", "own", "used"),
    [
        pytest.param("ab", (1e-3, 1e-2), (2e-3, 2e-2), True, id="as they were"),
        pytest.param("ba", (1e-3, 1e-2), (2e-2, 2e-3), False, id="in another order"),
        pytest.param("ba", (1e-3, 1e-3), (2e-2, 2e-3), False, id="with other ratios"),
        pytest.param("ba", (1e-3, 1e-3), (2e-3, 2e-3), True, id="of one rate"),
    ],
)
def test_recorded_rates_are_those_of_the_same_groups(order: str, rates: Any, own: Any, used: bool) -> None:
    record = replace(recorded(rates=rates), parameters=["a", "b"])
    result = decide(Asked(epsilon="keep"), evidence(*map(group, own), recorded=record, parameters=order))
    expected = [result.ratio * rate for rate in (rates if used else own)]
    assert [change.after for change in result.changes] == pytest.approx(expected)
    assert ("has other parameter groups" in " ".join(result.reasons)) is not used


def test_groups_keep_their_ratio_and_a_frozen_one_its_zero() -> None:
    asked = Asked(reference_batch_size=256, learning_rate="sqrt", epsilon="keep")
    result = decide(asked, evidence(group(1e-3), group(0.0), group(1e-4)))
    assert [(change.group, change.after) for change in result.changes] == [(0, 2e-3), (2, 2e-4)]


@pytest.mark.parametrize(
    ("known", "problem"),
    [
        pytest.param(
            {"batch_size": None, "why_no_batch_size": "it is odd"}, "it is odd, so the learning rate", id="batch size"
        ),
        pytest.param({}, "surge law refused: there is no noise scale", id="noise"),
    ],
)
def test_what_keeps_a_rate_from_being_carried_over(known: dict[str, Any], problem: str) -> None:
    result = decide(Asked(reference_batch_size=256, epsilon="keep"), evidence(**known))
    assert (result.ratio, result.changes) == (1.0, ()) and problem in " ".join(result.problems)


def test_a_rate_that_a_scheduler_would_not_follow_is_kept() -> None:
    asked, tried = Asked(reference_batch_size=256, learning_rate="sqrt", epsilon="keep"), []

    def stray(factors: Any) -> str:
        tried.extend(factors)
        return "Own (base)"

    result = decide(asked, evidence(group(1e-3), group(0.0), stray=stray))
    assert tried == [2.0, None] and (result.ratio, result.changes) == (1.0, ())
    assert "Own (base) would not follow" in " ".join(result.problems)


def test_a_group_whose_rate_is_no_number_keeps_them_all() -> None:
    asked = Asked(reference_batch_size=256, learning_rate="sqrt", epsilon="keep")
    result = decide(asked, evidence(group(1e-3), group(None)))
    assert result.changes == () and "lr is no number" in " ".join(result.problems)


def test_rates_that_are_all_zero_are_told_of() -> None:
    asked = Asked(reference_batch_size=256, learning_rate="sqrt", epsilon="keep")
    result = decide(asked, evidence(group(0.0), group(0.0)))
    assert (result.ratio, result.changes) == (1.0, ()) and "every rate is 0 when training begins" in result.problems[0]


@pytest.mark.parametrize(
    ("rates", "own", "told"),
    [
        pytest.param((1.0,), (1e-3,), "the recorded rate 1 and the 0.001 of the optimizer are", id="too large"),
        pytest.param((1e-6,), (1e-3,), "the recorded rate 1e-06 and the 0.001 of the optimizer are", id="too small"),
        pytest.param((1e14,), (1e-3,), "the recorded rate 1e+14", id="absurd"),
        pytest.param((1e-3, 2.0), (1e-3, 1e-2), "the recorded rate 2 and the 0.01 of", id="of another group"),
        pytest.param((0.05,), (1e-3,), None, id="apart"),
        pytest.param((1e-3, 1.0), (1e-3, 0.0), None, id="frozen"),
    ],
)
def test_a_recorded_rate_that_is_far_off_is_used_and_told_of(rates: Any, own: Any, told: str | None) -> None:
    record = recorded(rates=rates)
    result = decide(Asked(epsilon="keep"), evidence(*map(group, own), recorded=record))
    found = {change.group: change.after for change in result.changes}
    assert found == pytest.approx({i: r * result.ratio for i, (r, o) in enumerate(zip(rates, own, strict=True)) if o})
    assert [told in problem for problem in result.problems] == [True] if told else result.problems == ()


@pytest.mark.parametrize(("batch_size", "numbers"), [(64, (0.5, 0.01)), (1024, (-5.0, 0.99))])
def test_adaptor_e_is_chosen_where_it_was_left_on_auto(batch_size: int, numbers: tuple[float, float]) -> None:
    groups = (group(alpha="explore_alpha"), group())
    result = decide(Asked(epsilon="keep", learning_rate="keep"), evidence(*groups, batch_size=batch_size))
    assert result.changes == tuple(
        GroupChange(0, name, "auto", number)
        for name, number in zip(("explore_alpha", "explore_beta"), numbers, strict=True)
    )


@pytest.mark.parametrize(
    ("asked", "known", "needed"),
    [
        pytest.param(Asked(), {}, True, id="epsilon"),
        pytest.param(Asked(epsilon="keep"), {}, False, id="nothing"),
        pytest.param(Asked(epsilon="keep", reference_batch_size=8), {}, True, id="noise"),
        pytest.param(Asked(epsilon="keep", reference_batch_size=8, learning_rate="sqrt"), {}, False, id="plain law"),
        pytest.param(Asked(epsilon="keep", reference_batch_size=8), {"adaptive": False}, False, id="not adaptive"),
        pytest.param(Asked(epsilon="keep", reference_batch_size=8), {"batch_size": None}, False, id="no batch size"),
        pytest.param(Asked(epsilon=1e-6), {}, False, id="given"),
    ],
)
def test_a_probe_is_made_only_where_something_hangs_on_it(asked: Asked, known: dict[str, Any], needed: bool) -> None:
    assert needs_probe(asked, evidence(**known)) is needed
