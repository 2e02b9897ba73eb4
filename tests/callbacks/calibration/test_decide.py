"""Decisions from evidence alone: no Trainer, no module, no optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_gradhist.callbacks.calibration.decide import decide
from lightning_gradhist.callbacks.calibration.evidence import Evidence, ParamGroup, ProbeFindings, needs_probe
from lightning_gradhist.epsilon import epsilon_range
from lightning_gradhist.logging.calibration_report import GroupChange
from lightning_gradhist.noise import NoiseEstimate, OptimizerRecord


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
    assert [problem.split(",")[0] for problem in result.problems] == [
        "SGD is not known to have an epsilon of Adam's kind",
        "the surge law is for optimizers like Adam",
    ]


def test_a_record_brings_rate_and_noise() -> None:
    result = decide(Asked(), evidence(recorded=recorded(), probe=ProbeFindings(SPACE)))
    expected = math.sqrt(4) * (1000 + 256) / (1000 + 1024)
    assert result.ratio == pytest.approx(expected) and result.noise_source == "record"
    (change,) = result.changes
    assert (change.name, change.before) == ("lr", 1e-3) and change.after == pytest.approx(4e-3 * expected)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        pytest.param(recorded("Adam"), "is of Adam", id="class"),
        pytest.param(recorded(rates=(1.0, 2.0)), "has other parameter groups", id="groups"),
    ],
)
def test_a_record_of_something_else_brings_the_ratio_alone(record: OptimizerRecord, why: str) -> None:
    result = decide(Asked(epsilon="keep"), evidence(recorded=record))
    assert result.learning_rate == pytest.approx(1e-3 * result.ratio) and why in " ".join(result.reasons)


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
