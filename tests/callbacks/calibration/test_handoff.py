from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from lightning_gradhist import AdamE
from lightning_gradhist.callbacks.calibration.handoff import apply_changes, base_rate
from lightning_gradhist.logging.report import GroupChange

FACTORS = (2.0, 0.5)


def make(rates: tuple[float, float] = (0.1, 0.01), optimizer: Any = torch.optim.SGD) -> torch.optim.Optimizer:
    return optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates], lr=0.1)


def changes(optimizer: torch.optim.Optimizer) -> list[GroupChange]:
    rates = [base_rate(group) for group in optimizer.param_groups]
    return [
        GroupChange(i, "lr", rate, rate * factor) for i, (rate, factor) in enumerate(zip(rates, FACTORS, strict=True))
    ]


SCHEDULERS = {
    "step": lambda o: schedules.StepLR(o, 3, gamma=0.5),
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 10),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.9),
    "linear warm-up": lambda o: schedules.LinearLR(o, start_factor=0.01, total_iters=5),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 4),
    "one cycle": lambda o: schedules.OneCycleLR(o, [0.1, 0.01], total_steps=20),
    "cyclic": lambda o: schedules.CyclicLR(o, [0.01, 0.001], [0.1, 0.01], step_size_up=4),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 10)], [4]
    ),
    "chained": lambda o: schedules.ChainedScheduler(
        [schedules.ConstantLR(o, 0.5, total_iters=3), schedules.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in SCHEDULERS.items()])
def test_the_whole_schedule_of_a_group_is_scaled(build: Any) -> None:
    plain, scaled = make(), make()
    plain_schedule, schedule = build(plain), build(scaled)
    apply_changes(scaled, [schedule], changes(scaled))
    for step in range(16):
        for factor, expected, group in zip(FACTORS, plain.param_groups, scaled.param_groups, strict=True):
            assert group["lr"] == pytest.approx(factor * expected["lr"], rel=1e-9), step
        expected_last = [f * rate for f, rate in zip(FACTORS, plain_schedule.get_last_lr(), strict=True)]
        assert schedule.get_last_lr() == pytest.approx(expected_last, rel=1e-9)
        for optimizer, scheduler in ((plain, plain_schedule), (scaled, schedule)):
            optimizer.step()
            scheduler.step()


def test_plateau_goes_on_from_the_new_rate() -> None:
    optimizer = make()
    scheduler = schedules.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    apply_changes(optimizer, [scheduler], changes(optimizer))
    for metric in (1.0, 2.0):
        scheduler.step(metric)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.0005])


def test_a_schedule_that_was_scaled_survives_a_checkpoint() -> None:
    optimizer = make()
    scheduler = SCHEDULERS["sequential"](optimizer)
    apply_changes(optimizer, [scheduler], changes(optimizer))
    saved = optimizer.state_dict(), scheduler.state_dict()
    again = make()
    loaded = SCHEDULERS["sequential"](again)
    again.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for _ in range(8):
        assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in optimizer.param_groups]
        for one, schedule in ((again, loaded), (optimizer, scheduler)):
            one.step()
            schedule.step()


def test_a_rate_in_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(0.1)
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))], lr=rate)
    held = optimizer.param_groups[0]["lr"]
    apply_changes(optimizer, [], [GroupChange(0, "lr", 0.1, 0.3)])
    assert optimizer.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(0.3)


def test_other_hyper_parameters_go_into_their_group_alone() -> None:
    optimizer = make(optimizer=AdamE)
    wanted = [("eps", 1, 1e-6, 1e-9), ("alpha", 0, "auto", -5.0), ("explore_beta", 0, "auto", 0.99)]
    apply_changes(optimizer, [], [GroupChange(group, name, before, after) for name, group, before, after in wanted])
    first, second = optimizer.param_groups
    assert (first["eps"], first["alpha"], first["explore_beta"], first["lr"]) == (1e-6, -5.0, 0.99, 0.1)
    assert (second["eps"], second["alpha"], second["explore_beta"], second["lr"]) == (1e-9, "auto", "auto", 0.01)


def test_the_schedulers_of_other_optimizers_are_left_alone() -> None:
    optimizer, other = make(), make()
    mine, theirs = SCHEDULERS["cosine"](optimizer), SCHEDULERS["cosine"](other)
    apply_changes(optimizer, [mine, theirs], changes(optimizer))
    assert theirs.base_lrs == [0.1, 0.01]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.01]


def test_base_rate_is_what_the_schedule_is_a_multiple_of() -> None:
    optimizer = make()
    SCHEDULERS["linear warm-up"](optimizer)
    assert [base_rate(group) for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])
    optimizer = make()
    SCHEDULERS["one cycle"](optimizer)
    assert [base_rate(group) for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])
