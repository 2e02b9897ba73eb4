from __future__ import annotations

import logging
import time
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy import cos
from torch.optim import lr_scheduler as schedules

from lightning_gradhist import AdamE
from lightning_gradhist.callbacks.calibration.handoff import apply_changes
from lightning_gradhist.callbacks.calibration.scheduler_trial import stray_schedule
from lightning_gradhist.callbacks.schedulers import base_rates, stray_rate
from lightning_gradhist.logging.calibration_result import GroupChange

FACTORS = (2.0, 0.5)


def make(rates: tuple[float, float] = (0.1, 0.01), optimizer: Any = torch.optim.SGD) -> torch.optim.Optimizer:
    return optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": rate} for rate in rates], lr=0.1)


def changes(optimizer: torch.optim.Optimizer) -> list[GroupChange]:
    rates = [float(group.get("max_lr", group.get("initial_lr", group["lr"]))) for group in optimizer.param_groups]
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


def test_a_rate_in_a_tensor_of_integers_is_multiplied() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=torch.tensor(1))
    apply_changes(optimizer, [], [GroupChange(0, "lr", 1.0, 0.5)])
    assert float(optimizer.param_groups[0]["lr"]) == 0.5


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_a_rate_that_is_learned_is_multiplied() -> None:
    rate = torch.tensor(0.1, requires_grad=True)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=rate)
    apply_changes(optimizer, [], [GroupChange(0, "lr", 0.1, 0.3)])
    assert optimizer.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(0.3) and rate.requires_grad


def test_other_hyper_parameters_go_into_their_group_alone() -> None:
    optimizer = make(optimizer=AdamE)
    wanted = [("eps", 1, 1e-6, 1e-9), ("alpha", 0, "auto", -5.0), ("explore_beta", 0, "auto", 0.99)]
    apply_changes(optimizer, [], [GroupChange(group, name, before, after) for name, group, before, after in wanted])
    first, second = optimizer.param_groups
    assert (first["eps"], first["alpha"], first["explore_beta"], first["lr"]) == (1e-6, -5.0, 0.99, 0.1)
    assert (second["eps"], second["alpha"], second["explore_beta"], second["lr"]) == (1e-9, "auto", "auto", 0.01)


def of_group(step: int, group: Any) -> float:
    return 0.1 / group["lr"]


HELD: list[Any] = []


def of_held(step: int) -> float:
    return of_group(step, HELD[0])


class Factor:
    """A schedule as an object, which may hold what it likes."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __call__(self, step: int) -> float:
        return of_group(step, self.held) if isinstance(self.held, dict) else float(self.held(step))

    def at(self, step: int) -> float:
        return self(step)


class NamesGroups(torch.nn.Module):
    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.optimizer = optimizer

    def factor(self, step: int) -> float:
        return of_group(step, self.optimizer.param_groups[0])


READS = {
    "optimizer": lambda o: lambda step: of_group(step, o.param_groups[0]),
    "groups": lambda o: (lambda groups: lambda step: of_group(step, groups[0]))(o.param_groups),
    "group": lambda o: lambda step, group=o.param_groups[0]: of_group(step, group),
    "in a dictionary": lambda o: (lambda held: lambda step: of_group(step, held["o"].param_groups[0]))({"o": o}),
    "partial": lambda o: partial(of_group, group=o.param_groups[0]),
    "partial of partial": lambda o: partial(partial(of_group, group=o.param_groups[0])),
    "object": lambda o: Factor(o.param_groups[0]),
    "method": lambda o: Factor(o.param_groups[0]).at,
    "object in an object": lambda o: Factor(Factor(o.param_groups[0])),
    "function in a function": lambda o: (lambda inner: lambda step: inner(step))(lambda step: of_group(step, vars(o))),
    "method of a module": lambda o: NamesGroups(o).factor,
    "function of the file": lambda o: lambda step: of_held(step),
    "another scheduler": lambda o: (lambda other: lambda step: other.get_last_lr()[0] / 0.1)(SCHEDULERS["cosine"](o)),
}


@pytest.mark.parametrize("kind", [schedules.LambdaLR, schedules.MultiplicativeLR])
@pytest.mark.parametrize("held", READS)
def test_a_function_that_reads_the_rate_does_not_follow(kind: Any, held: str) -> None:
    optimizer = make()
    scheduler = kind(optimizer, lambda step: 1.0)
    scheduler.lr_lambdas = [READS[held](optimizer)] * 2
    HELD[:] = optimizer.param_groups
    assert "look at the optimizer" in str(stray_schedule(optimizer, [(scheduler, 8)], [2.0, 2.0]))


class Linear(schedules.LambdaLR):
    """As those of older transformers, with a function that is a method of its own."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, [self.lr_lambda, lambda step: self.lr_lambda(step)])

    def lr_lambda(self, step: int) -> float:
        return 1 / (1 + step)


class Holds(torch.nn.Module):
    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.optimizer, self.steps = optimizer, 8

    def factor(self, step: int) -> float:
        return 1 - step / self.steps


CONFIGURATION = {"model": {"params": {"lr": 0.1, "steps": 8}}}


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(Linear, id="a method of the scheduler"),
        pytest.param(lambda o: schedules.LambdaLR(o, Holds(o).factor), id="a method of a module"),
        pytest.param(
            lambda o: (lambda held: schedules.LambdaLR(o, lambda s: s / held["model"]["params"]["steps"]))(
                CONFIGURATION
            ),
            id="a configuration with params",
        ),
    ],
)
def test_a_function_that_reads_other_things_follows(build: Any) -> None:
    optimizer = make()
    assert stray_schedule(optimizer, [(build(optimizer), 8)], [2.0, 2.0]) is None


def test_a_function_with_an_empty_cell_is_looked_at() -> None:
    optimizer = make()

    def schedule() -> Any:
        def factor(step: int) -> float:
            return 1.0 if step >= 0 else unset

        if not optimizer:
            unset = 0.0
        return factor

    assert stray_schedule(optimizer, [(schedules.LambdaLR(optimizer, schedule()), 8)], [2.0, 2.0]) is None


def test_the_smallest_change_of_a_plateau_follows() -> None:
    optimizer = make((1e-3, 1e-3))
    plateau = schedules.ReduceLROnPlateau(optimizer, factor=0.9, patience=0, eps=5e-5)
    apply_changes(optimizer, [plateau], [GroupChange(index, "lr", 1e-3, 1e-4) for index in range(2)])
    plateau.step(1.0)
    plateau.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([9e-5, 9e-5])


def test_the_schedulers_of_other_optimizers_are_left_alone() -> None:
    optimizer, other = make(), make()
    mine, theirs = SCHEDULERS["cosine"](optimizer), SCHEDULERS["cosine"](other)
    apply_changes(optimizer, [mine, theirs], changes(optimizer))
    assert theirs.base_lrs == [0.1, 0.01]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.01]


def test_base_rate_is_what_the_schedule_is_a_multiple_of() -> None:
    optimizer = make()
    scheduler = SCHEDULERS["linear warm-up"](optimizer)
    assert base_rates(optimizer, [scheduler]) == pytest.approx([0.1, 0.01])
    optimizer = make()
    scheduler = SCHEDULERS["one cycle"](optimizer)
    assert base_rates(optimizer, [scheduler]) == pytest.approx([0.1, 0.01])


class Calls(schedules.LambdaLR):
    """What is of torch but for its name."""


def test_functions_are_not_called_ahead_to_see_whether_a_scheduler_follows() -> None:
    calls: list[int] = []
    optimizer = make()
    scheduler = Calls(optimizer, lambda step: 0.9 ** len([calls.append(step), *calls]))
    before = len(calls)
    assert stray_schedule(optimizer, [(scheduler, 10)], [2.0, 2.0]) is None and len(calls) == before


def test_a_group_without_a_rate_has_no_number() -> None:
    optimizer = make()
    del optimizer.param_groups[0]["lr"]
    assert base_rates(optimizer, []) == [None, 0.01]


@pytest.mark.parametrize("rate", [True, "0.1", 0.1 + 0.1j, torch.tensor(0.1 + 0.1j), torch.ones(2), (0.1,)], ids=str)
def test_what_is_no_number_is_no_rate(rate: Any) -> None:
    optimizer = make()
    optimizer.param_groups[0]["lr"] = rate
    assert base_rates(optimizer, []) == [None, 0.01]


def test_a_number_of_numpy_is_a_rate() -> None:
    optimizer = make((np.float32(0.5), np.float64(0.25)))
    assert base_rates(optimizer, []) == [0.5, 0.25]
    apply_changes(optimizer, [], [GroupChange(0, "lr", 0.5, 1.0)])
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.25]


def test_what_a_scheduler_has_left_behind_is_no_base_rate() -> None:
    optimizer, other = make(), make()
    SCHEDULERS["linear warm-up"](optimizer), SCHEDULERS["one cycle"](optimizer)
    for group, rate in zip(optimizer.param_groups, (0.2, 0.02), strict=True):
        group["lr"] = rate
    plateau, of_other = schedules.ReduceLROnPlateau(optimizer), SCHEDULERS["cosine"](other)
    assert base_rates(optimizer, [plateau, of_other]) == [0.2, 0.02]
    optimizer.param_groups[0]["lr"] = None
    assert base_rates(optimizer, []) == [None, 0.02]


@pytest.mark.parametrize("factors", [(2.0, 2.0), (2.0, 0.5)], ids=["alike", "apart"])
def test_a_tensor_that_groups_share_is_multiplied_once(factors: tuple[float, float]) -> None:
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(2)]
    optimizer = torch.optim.Adam(parameters, lr=torch.tensor(0.1))
    scheduler = schedules.ExponentialLR(optimizer, 0.5)
    apply_changes(optimizer, [scheduler], [GroupChange(i, "lr", 0.1, 0.1 * factor) for i, factor in enumerate(factors)])
    for _ in range(3):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        expected = 0.1 * 0.5**scheduler.last_epoch
        assert rates == pytest.approx([factor * expected for factor in factors])
        optimizer.step()
        scheduler.step()


class WarmUp(schedules.LRScheduler):
    """A scheduler of somebody else's, with rates of its own under the usual names."""

    def __init__(self, optimizer: Any, warmup_start_lr: float = 1e-3, final_lr: float = 1e-3) -> None:
        self.warmup_start_lr, self.final_lr = warmup_start_lr, final_lr
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        share = min(self.last_epoch / 5000, 1.0)
        return [max(self.warmup_start_lr + share * (0.5 * base - self.warmup_start_lr), 0) for base in self.base_lrs]


class Floor(WarmUp):
    """One whose floor cannot be seen, and is reached late."""

    def get_lr(self) -> Any:
        return [max(base * 0.999**self.last_epoch, 1e-6) for base in self.base_lrs]


class Around(schedules.LRScheduler):
    """A warm-up around another scheduler, as GradualWarmupScheduler is."""

    def __init__(self, optimizer: Any) -> None:
        self.after = self.last = schedules.CosineAnnealingLR(optimizer, 10, eta_min=2e-3)
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [base * self.last_epoch / 4 for base in self.base_lrs]

    def step(self, epoch: Any = None) -> None:
        if self.last_epoch == 4:
            self.after.step()
            self._last_lr = self.after.get_last_lr()
        else:
            super().step()


class Share(schedules.LambdaLR):
    """Its function makes a share of the rate, whatever the name of what it is made of."""

    def __init__(self, optimizer: Any) -> None:
        self.min_lr = 0.1
        super().__init__(optimizer, self.share)

    def share(self, step: int) -> float:
        return max(self.min_lr, 1 - step / 10)


class Absolute(Share):
    """What it makes a share of is a rate, so that the lowest one stays."""

    def share(self, step: int) -> float:
        return max(self.min_lr * 0.1 / self.base_lrs[0], 1 - step / 10)


class Recursive(schedules.LRScheduler):
    """It makes a rate of the one before it, and keeps the lowest under a name of its own."""

    lowest = 1e-3

    def get_lr(self) -> Any:
        return [max(0.999 * group["lr"], self.lowest) for group in self.optimizer.param_groups]


OWN_RATES = {
    "share": Share,
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 5000, eta_min=2e-3),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 10, eta_min=2e-3),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.CosineAnnealingLR(o, 10, eta_min=2e-3)], [4]
    ),
    "one cycle": lambda o: schedules.OneCycleLR(o, [0.1, 0.01], total_steps=20),
    "cyclic": lambda o: schedules.CyclicLR(o, [0.01, 0.001], [0.1, 0.01], step_size_up=4),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=5e-3, anneal_epochs=5),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, min_lr=1e-3),
    "polynomial": lambda o: schedules.PolynomialLR(o, total_iters=10),
    "somebody else's": WarmUp,
    "around another": Around,
}


@pytest.mark.parametrize("rates", [(0.1, 0.01), (0.1, 0.0)], ids=["", "frozen"])
@pytest.mark.parametrize("build", [pytest.param(build, id=name) for name, build in OWN_RATES.items()])
def test_rates_of_a_scheduler_are_scaled_with_those_of_the_groups(build: Any, rates: tuple[float, float]) -> None:
    plain, scaled = make(rates), make(rates)
    plain_schedule, schedule = build(plain), build(scaled)
    own = base_rates(scaled, [schedule])
    assert stray_schedule(scaled, [(schedule, 1e4)], [3.0 if rate else None for rate in own]) is None
    apply_changes(scaled, [schedule], [GroupChange(i, "lr", rate, 3 * rate) for i, rate in enumerate(own) if rate])
    for step in range(18):
        for expected, group in zip(plain.param_groups, scaled.param_groups, strict=True):
            assert group["lr"] == pytest.approx(3 * expected["lr"], rel=1e-9), step
        for optimizer, one in ((plain, plain_schedule), (scaled, schedule)):
            optimizer.step()
            one.step(*([1.0] if isinstance(one, schedules.ReduceLROnPlateau) else []))


@pytest.mark.parametrize(
    ("build", "factors", "named"),
    [
        pytest.param(Floor, (2.0, 2.0), "Floor (_last_lr, base_lrs, final_lr, warmup_start_lr)", id="no name"),
        pytest.param(Absolute, (2.0, 2.0), "Absolute (_last_lr, base_lrs, lr_lambdas, min_lr)", id="a share of a rate"),
        pytest.param(Recursive, (2.0, 2.0), "Recursive (_last_lr, base_lrs)", id="a floor that comes late"),
        pytest.param(OWN_RATES["cosine"], FACTORS, "CosineAnnealingLR (_last_lr, base_lrs, eta_min)", id="two factors"),
        pytest.param(OWN_RATES["sequential"], FACTORS, "CosineAnnealingLR (_last_lr, base_lrs, eta_min)", id="inside"),
    ],
)
def test_a_scheduler_that_would_not_follow_is_named(build: Any, factors: Any, named: str) -> None:
    optimizer = make()
    scheduler = build(optimizer)
    assert stray_schedule(optimizer, [(scheduler, 100_000)], factors) == named
    assert stray_schedule(optimizer, [(SCHEDULERS["linear warm-up"](make()), 10)], factors) is None


def test_a_rate_that_a_scheduler_within_another_has_set_is_known() -> None:
    optimizer = make()
    scheduler = Around(optimizer)
    optimizer.step()
    for _ in range(6):
        scheduler.step()
    scheduler._last_lr = [1.0, 1.0]  # as GradualWarmupScheduler leaves its own
    assert stray_rate(optimizer, [scheduler], {0: 1.0, 1: 1.0}) is None
    optimizer.param_groups[1]["lr"] = 0.5
    assert stray_rate(optimizer, [scheduler], {0: 1.0, 1: 1.0}) == 1
    optimizer.param_groups.pop()
    scheduler.after._last_lr = scheduler._last_lr = 0.5  # of which nobody knows what it is
    assert stray_rate(optimizer, [scheduler], {0: 1.0, 1: 1.0}) is None and stray_rate(optimizer, [], {1: 1.0}) is None


class AdaBound(torch.optim.Optimizer):
    """The rates of Luolc's AdaBound, and its bounds on a step, of which the one is shown that it ends at."""

    def __init__(self, groups: Any, lr: float, final_lr: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr, "final_lr": final_lr})
        self.base_lrs = [group["lr"] for group in self.param_groups]

    def step(self, closure: Any = None) -> None:
        for group, base_lr in zip(self.param_groups, self.base_lrs, strict=True):
            group["bound"] = group["final_lr"] * group["lr"] / base_lr


class Ranger21(torch.optim.Optimizer):
    """It sets the rate of its groups at each step."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self.min_lr, self.starting_lr, self.use_lr = 0.0, lr, True

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["lr"] = self.starting_lr if self.use_lr else self.min_lr


class Remembers(torch.optim.AdamW):
    """It keeps the rate that it was made with, and steps without it."""

    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, lr)
        self.lr = lr


class Lookahead(torch.optim.Optimizer):
    def __init__(self, groups: Any, lr: float) -> None:
        self.optimizer = Ranger21(groups, lr)
        self.param_groups, self.defaults, self.state = self.optimizer.param_groups, self.optimizer.defaults, {}


class Apollo(torch.optim.Optimizer):
    def __init__(self, groups: Any, lr: float) -> None:
        super().__init__(groups, {"lr": lr, "base_lr": lr, "init_lr": lr / 1000, "lr_scale": 0.5})


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        pytest.param(AdaBound, "AdaBound (base_lrs)", id="AdaBound"),
        pytest.param(Ranger21, "Ranger21 (starting_lr)", id="Ranger21"),
        pytest.param(Lookahead, "Ranger21 (starting_lr)", id="a wrapper"),
        pytest.param(Apollo, None, id="rates in groups"),
        pytest.param(torch.optim.AdamW, None, id="AdamW"),
        pytest.param(Remembers, None, id="a rate that no step uses"),
    ],
)
def test_an_optimizer_with_rates_of_its_own_is_named(kind: Any, named: str | None) -> None:
    optimizer = make(optimizer=kind)
    assert stray_schedule(optimizer, [], FACTORS) == named


def test_rates_of_every_name_in_groups_are_scaled() -> None:
    optimizer = make(optimizer=Apollo)
    apply_changes(optimizer, [], changes(optimizer))
    for group, lr, factor in zip(optimizer.param_groups, (0.1, 0.01), FACTORS, strict=True):
        rates = {key: group[key] for key in ("lr", "base_lr", "init_lr", "lr_scale")}
        expected = {"lr": lr * factor, "base_lr": 0.1 * factor, "init_lr": 1e-4 * factor, "lr_scale": 0.5}
        assert rates == pytest.approx(expected)


def test_a_scheduler_that_cannot_be_stepped_alone_is_named() -> None:
    class ByHand:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.lr_min, self.warmup_lr_init = optimizer, 1e-5, 1e-6

        def step(self, epoch: int, metric: Any = None) -> None:
            raise AssertionError("not on a copy, and not on this")

    optimizer = make()
    by_hand = ByHand(optimizer)
    assert stray_schedule(optimizer, [(by_hand, 10)], (2.0, 2.0)) == "ByHand (lr_min, warmup_lr_init)"
    del by_hand.lr_min, by_hand.warmup_lr_init
    assert stray_schedule(optimizer, [(by_hand, 10)], (2.0, 2.0)) == "ByHand"


class Copied(Floor):
    """Its copies lack its floor, and have that of the class."""

    floor = 0.0

    def __init__(self, optimizer: Any) -> None:
        self.floor = 1e-3
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [max(base * 0.9**self.last_epoch, self.floor) for base in self.base_lrs]

    def __getstate__(self) -> Any:
        return {name: value for name, value in vars(self).items() if name != "floor"}


def test_a_scheduler_whose_copies_are_others_is_named() -> None:
    optimizer = make()
    assert stray_schedule(optimizer, [(Copied(optimizer), 10)], (2.0, 2.0)).startswith("Copied (")


CALLS: list[Any] = []
RUNS = ModuleType("wandb")
RUNS.log = CALLS.append  # type: ignore[attr-defined]
LOG = logging.getLogger(__name__)
COUNTS = {"steps": 0}
COUNT = 0


class Quiet(schedules.LRScheduler):
    def __init__(self, optimizer: Any, on_step: Any = None) -> None:
        self.on_step = on_step
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [base * 0.9**self.last_epoch for base in self.base_lrs]


class CallsBack(Quiet):
    def step(self, epoch: Any = None) -> None:
        super().step(epoch)
        if self.on_step:
            self.on_step()


class Appends(Quiet):
    def step(self, epoch: Any = None) -> None:
        CALLS.append(1)
        super().step(epoch)


class CountsIn(Quiet):
    def step(self, epoch: Any = None) -> None:
        COUNTS["steps"] += 1
        super().step(epoch)


class WritesRuns(Quiet):
    def step(self, epoch: Any = None) -> None:
        RUNS.log({"step": self.last_epoch})
        super().step(epoch)


class CountsUp(Quiet):
    def step(self, epoch: Any = None) -> None:
        global COUNT
        COUNT += 1
        super().step(epoch)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(lambda o: CallsBack(o, lambda: CALLS.append(1)), id="a function"),
        pytest.param(lambda o: CallsBack(o, COUNTS.copy().clear), id="a method"),
        pytest.param(Appends, id="a list of the file"),
        pytest.param(CountsIn, id="a dictionary of the file"),
        pytest.param(CountsUp, id="a number of the file"),
        pytest.param(WritesRuns, id="a package that writes runs"),
    ],
)
def test_a_scheduler_that_may_leave_a_trace_is_not_tried(build: Any) -> None:
    optimizer = make()
    scheduler = build(optimizer)
    before = repr((CALLS, COUNTS, COUNT))
    assert str(stray_schedule(optimizer, [(scheduler, 8)], (2.0, 2.0))).startswith(type(scheduler).__name__)
    assert repr((CALLS, COUNTS, COUNT)) == before


def set_rates(optimizer: Any, rates: Any) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


class SetsGroups(Quiet):
    def step(self, epoch: Any = None) -> None:
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        set_rates(self.optimizer, self.get_lr())


class HoldsModule(Quiet):
    def __init__(self, optimizer: Any) -> None:
        self.module = Holds(optimizer)
        super().__init__(optimizer)


DROPS = (2, 4)


class Milestones(schedules.LRScheduler):
    """Its arguments and the file's have tuples, and it tells that it was made."""

    def __init__(self, optimizer: Any, drops: Any = DROPS) -> None:
        LOG.info("made")
        self.drops, self.dropped = drops, 0
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        self.dropped = sum(self.last_epoch >= drop for drop in self.drops or DROPS)
        return [base * 0.1**self.dropped for base in self.base_lrs]


class Cosine(schedules.LRScheduler):
    def get_lr(self) -> Any:
        return [base * (1 + cos(0.1 * self.last_epoch)) for base in self.base_lrs]


@pytest.mark.parametrize("build", [CallsBack, SetsGroups, HoldsModule, Milestones, Cosine])
def test_a_scheduler_that_changes_its_own_things_alone_is_tried(build: Any) -> None:
    optimizer = make()
    assert stray_schedule(optimizer, [(build(optimizer), 8)], (2.0, 2.0)) is None


def test_schedulers_are_tried_without_a_trace() -> None:
    optimizer = make()
    calls: list[int] = []
    one = schedules.LambdaLR(optimizer, lambda step: 1.0 / (1 + len(calls)) if calls.append(step) is None else 0)
    other = OWN_RATES["cosine"](optimizer)
    seen = list(calls)
    before = repr((optimizer.param_groups, vars(one) | {"optimizer": 0}, vars(other) | {"optimizer": 0}))
    random = torch.get_rng_state()
    assert stray_schedule(optimizer, [(one, 1e5), (other, 1e5)], (2.0, 2.0)) is None
    assert calls == seen and torch.equal(torch.get_rng_state(), random)
    assert repr((optimizer.param_groups, vars(one) | {"optimizer": 0}, vars(other) | {"optimizer": 0})) == before


def test_a_scheduler_that_prints_and_logs_is_tried_in_silence(capsys, caplog) -> None:
    class Prints(schedules.LRScheduler):
        def get_lr(self) -> Any:
            print("now at", self.last_epoch)
            logging.warning("now at %d", self.last_epoch)
            return self.base_lrs

    optimizer = make()
    scheduler = Prints(optimizer)
    capsys.readouterr(), caplog.clear()
    assert stray_schedule(optimizer, [(scheduler, 8)], (2.0, 2.0)) is None
    assert not capsys.readouterr().out and not caplog.records


def test_a_million_steps_are_tried_in_a_moment() -> None:
    optimizer = make()
    start = time.perf_counter()
    assert stray_schedule(optimizer, [(OWN_RATES["cosine"](optimizer), 1e6)], (2.0, 2.0)) is None
    assert time.perf_counter() - start < 2
