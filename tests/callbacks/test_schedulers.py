"""How long a run is to be and how its rate will go: asked before the first step, and against the rates that come."""

from __future__ import annotations

import itertools
import math
from functools import partial
from math import cos, pi
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from support import Net, fit, loader
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradhist.callbacks.run_length import run_length
from lightning_gradhist.callbacks.schedulers import is_pure
from lightning_gradhist.noise.run_record import RunLength


class Watch(L.Callback):
    """Asks at the start of training, and takes down the rate of every step."""

    def __init__(self) -> None:
        self.length = RunLength()
        self.rates: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.length = run_length(trainer, trainer.optimizers[0])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def watched(folder: Any, scheduler: Any = None, **options: Any) -> Watch:
    watch = Watch()
    fit(folder, watch, module=Net(scheduler=scheduler), **options)
    return watch


def ramp(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / steps)


def warm_up_and_cosine(optimizer: Any) -> Any:
    parts = [schedules.LinearLR(optimizer, 0.1, total_iters=4), schedules.CosineAnnealingLR(optimizer, 12)]
    return schedules.SequentialLR(optimizer, parts, milestones=[4])


@pytest.mark.parametrize(
    ("scheduler", "warm_up"),
    [
        pytest.param(None, 0, id="none"),
        pytest.param(lambda o: schedules.CosineAnnealingLR(o, 16), 0, id="cosine"),
        pytest.param(lambda o: schedules.LinearLR(o, 0.25, total_iters=6), 6, id="warm-up"),
        pytest.param(lambda o: schedules.OneCycleLR(o, 0.1, total_steps=16, pct_start=0.25), 3, id="one cycle"),
        pytest.param(lambda o: schedules.LambdaLR(o, partial(ramp, steps=8)), 7, id="function"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda step: ramp(step, 8) * math.exp(0)), 7, id="of the file"),
        pytest.param(warm_up_and_cosine, 4, id="sequence"),
    ],
)
def test_what_is_told_is_what_comes(tmp_path, scheduler: Any, warm_up: int) -> None:
    watch = watched(tmp_path, scheduler)  # 16 steps, so that each is an end of a part
    assert watch.length.planned == len(watch.rates) == 16 and watch.length.warm_up == warm_up
    assert watch.length.schedule[:16] == pytest.approx([rate / max(watch.rates) for rate in watch.rates])
    assert max(watch.length.schedule) == 1 and not watch.length.rises


@pytest.mark.parametrize("total", [16, 1000])
def test_a_warm_up_that_does_not_end_within_the_run_is_known(tmp_path, total: int) -> None:
    watch = watched(tmp_path, lambda o: schedules.LinearLR(o, 0.01, total_iters=total))
    assert watch.length.rises and watch.length.warm_up == 16


class Own(schedules.LRScheduler):
    def get_lr(self) -> Any:
        return [0.1 for _ in self.base_lrs]


def counted(optimizer: Any) -> Any:
    count = itertools.count(1)
    return schedules.LambdaLR(optimizer, lambda step: next(count))


def counting(optimizer: Any) -> Any:
    count = 0

    def calls(step: int) -> float:
        nonlocal count
        count += 1
        return count

    return schedules.LambdaLR(optimizer, calls)


def remembering(optimizer: Any) -> Any:
    def calls(step: int, seen: Any = []) -> float:  # noqa: B006
        seen.append(step)
        return len(seen)

    return schedules.LambdaLR(optimizer, calls)


def noting(optimizer: Any) -> Any:
    def calls(step: int) -> float:
        calls.count += 1
        return calls.count

    calls.count = 0
    return schedules.LambdaLR(optimizer, calls)


def scaling(optimizer: Any) -> Any:
    count = itertools.count(1)
    options = {"step_size_up": 1, "step_size_down": 10**9, "cycle_momentum": False}
    return schedules.CyclicLR(optimizer, 0, 1e-2, scale_fn=lambda x: next(count), scale_mode="iterations", **options)


CALLS: list[int] = []


def appending(optimizer: Any) -> Any:
    def calls(step: int) -> int:
        CALLS.append(step)
        return len(CALLS)

    CALLS.clear()
    return schedules.LambdaLR(optimizer, lambda step: calls(step))


def within(optimizer: Any) -> Any:
    count = 0

    def calls(step: int) -> float:
        def up() -> int:
            nonlocal count
            count += 1
            return count

        return up()

    return schedules.LambdaLR(optimizer, calls)


STATEFUL = [counted, counting, remembering, noting, scaling, appending, within]
TABLE, ARGUMENTS, CONFIG = [0.5, 1.0], {"warm": 4}, SimpleNamespace(warm=4)


@pytest.mark.parametrize(
    "function",
    [
        lambda step: 0.5 * (1 + cos(pi * step / 100)),
        lambda step: TABLE[min(step, 1)],
        lambda step: min(1.0, step / ARGUMENTS["warm"]),
        lambda step: min(1.0, step / CONFIG.warm),
        lambda step: next(value for value in TABLE if value > 0.1),
        partial(ramp, steps=8),
    ],
)
def test_functions_that_only_read_are_tried(function: Any) -> None:
    assert is_pure(function)


@pytest.mark.parametrize("scheduler", [pytest.param(one, id=one.__name__) for one in STATEFUL])
def test_what_a_copy_could_leave_a_trace_in_is_not_tried(tmp_path, scheduler: Any) -> None:
    watch = watched(tmp_path, scheduler)
    assert watch.length == RunLength(16)
    assert watch.rates[-1] == pytest.approx(1e-2 * 16, rel=1e-6)


def test_a_scheduler_of_the_users_that_leaves_no_trace_is_tried(tmp_path) -> None:
    watch = watched(tmp_path, Own)
    assert (watch.length.planned, watch.length.warm_up, set(watch.length.schedule)) == (16, 0, {1.0})
    assert watch.rates[-1] == pytest.approx(0.1, rel=1e-6)


def calling_itself(optimizer: Any) -> Any:
    def half(step: int) -> float:
        return half(8) if step > 8 else 1 - step / 16

    return schedules.LambdaLR(optimizer, half)


def with_an_empty_cell(optimizer: Any) -> Any:
    def half(step: int) -> float:
        return max(0.5, 1 - step / 16) if step >= 0 else unset

    if not optimizer:
        unset = 0.0
    return schedules.LambdaLR(optimizer, half)


@pytest.mark.parametrize("scheduler", [calling_itself, with_an_empty_cell])
def test_functions_that_are_hard_to_look_into_end_nothing(tmp_path, scheduler: Any) -> None:
    assert watched(tmp_path, scheduler).length.schedule[::4] == [1.0, 0.75, 0.5, 0.5, 0.5]


class Endless(IterableDataset):
    def __iter__(self) -> Any:
        return iter(loader(8).dataset)


@pytest.mark.parametrize(
    ("options", "planned", "shape"),
    [
        pytest.param({"max_epochs": 4}, 64, [1, 0.5, 0.25, 0.125, 0.0625], id="epochs"),
        pytest.param({"max_epochs": -1, "max_steps": 64}, 64, [1, 0.5, 0.25, 0.125, 0.0625], id="steps"),
        pytest.param({"max_epochs": 100, "max_steps": 32}, 32, [1, 1, 0.5, 0.5, 0.25], id="fewer steps than epochs"),
        pytest.param({"max_epochs": -1, "max_steps": 24}, 24, [1, 1, 1, 0.5, 0.5], id="half an epoch"),
        pytest.param({"data": DataLoader(Endless(), 8), "max_steps": 2}, 2, [], id="an endless epoch"),
    ],
)
def test_epochs_are_steps_of_the_scheduler(tmp_path, options: Any, planned: int, shape: list[float]) -> None:
    class ByEpoch(Net):
        def configure_optimizers(self) -> Any:
            optimizer = self.make_optimizer(self.parameters())
            return [optimizer], [{"scheduler": schedules.StepLR(optimizer, 1, 0.5), "interval": "epoch"}]

    watch = Watch()
    fit(tmp_path, watch, module=ByEpoch(), **options)
    assert watch.length.planned == planned and watch.length.schedule[::4] == shape


@pytest.mark.parametrize(
    ("options", "planned"),
    [
        pytest.param({"max_steps": 5}, 5, id="max_steps"),
        pytest.param({"max_epochs": 3}, 48, id="epochs"),
        pytest.param({"accumulate_grad_batches": 3, "max_epochs": 2}, 12, id="accumulation"),
        pytest.param({"data": loader(8, drop_last=True), "limit_train_batches": 4}, 4, id="limit"),
        pytest.param({"max_epochs": -1, "max_steps": 7}, 7, id="no epochs"),
    ],
)
def test_planned_steps_are_those_that_are_made(tmp_path, options: dict[str, Any], planned: int) -> None:
    watch = Watch()
    made = fit(tmp_path, watch, **options)
    assert watch.length.planned == planned == made.global_step


def test_steps_that_nobody_knows(tmp_path) -> None:
    watch = Watch()
    fit(tmp_path / "1", watch, data=DataLoader(Endless(), 8))
    assert watch.length == RunLength()
    fit(tmp_path / "2", watch, GradientAccumulationScheduler({0: 1, 1: 2}), max_epochs=2)
    assert watch.length == RunLength()
