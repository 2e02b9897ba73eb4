"""Turns of the benchmark of the capture: a training each, and what watching has added to it."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from capture_variants import NONE, RUN, Task, Training, Variant, made
from lightning.pytorch.loggers import TensorBoardLogger

LEFT_OUT_STEPS = 3
WHOLE_STEPS = 6  # timed steps of a turn with whole batches
SMALL_BATCH = 1


class Clock(L.Callback):
    """What the steps take, on the clock and of the processor or the device, without waiting for the latter."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clock: list[float] = []
        self.work: list[Any] = []
        self.end = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Take the times."""
        self.clock.append(perf_counter())
        if self.device.type == "cuda":
            self.work.append(torch.cuda.Event(enable_timing=True))
            self.work[-1].record()
        else:
            self.work.append(process_time())

    def on_train_batch_end(self, *_: Any) -> None:
        """Take the time of the last one."""
        self.end = perf_counter()

    def seconds(self) -> list[float]:
        """Of the processor or the device, of each step but the last."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [begin.elapsed_time(end) / 1e3 for begin, end in zip(self.work, self.work[1:], strict=False)]
        return np.diff(self.work).tolist()


class Memory(L.Callback):
    """Resident memory of this process after each step, as Linux tells it."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Ask the system."""
        self.bytes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))


def trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A Trainer with a TensorBoard logger that shows nothing and keeps no checkpoints."""
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    logger = TensorBoardLogger(folder, name="", version="")
    return L.Trainer(callbacks=callbacks, logger=logger, **{"accelerator": "cpu", "devices": 1, **quiet, **options})


def fit(
    task: Task,
    callbacks: list[L.Callback],
    steps: int,
    folder: Path,
    device: torch.device,
    batch_size: int | None = None,
) -> Training:
    """Train for a number of steps in one epoch."""
    module, loader = made(task, steps, batch_size)
    made_for = trainer(folder, callbacks, accelerator="gpu" if device.type == "cuda" else "cpu", max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's on the number of workers, and the peers' on torch
        made_for.fit(module, loader)
    return module


class Turn(NamedTuple):
    """What the steps of one training have taken: seconds of the processor or the device, and on the clock."""

    seconds: list[float]
    clock_seconds: list[float]
    end_seconds: float


def take_turn(task: Task, variant: Variant, device: torch.device, steps: int, batch_size: int | None = None) -> Turn:
    """Train once, on whole batches if nothing else is said."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        fit(task, [clock, *variant.callbacks(task)], steps + 1, Path(folder), device, batch_size)
        returned = perf_counter()
    gc.collect()
    return Turn(clock.seconds(), np.diff(clock.clock).tolist(), returned - clock.end)


class Round(NamedTuple):
    """A turn of each variant, and one of none on whole batches."""

    whole: Turn
    turns: dict[str, Turn]

    def added(self, variant: Variant, times: str = "seconds") -> Added:
        """What a variant has added to a step, by the times of a turn that are named."""
        plain = self.whole if variant.depends_on_batch else self.turns[NONE]
        return added(variant, getattr(self.turns[variant.name], times), getattr(plain, times))


def take_rounds(task: Task, some: Sequence[Variant], rounds: int, device: torch.device) -> list[Round]:
    """All variants in each round, those that depend on the batch, and take long, in the first one only."""
    few, small = LEFT_OUT_STEPS + WHOLE_STEPS, None if device.type == "cuda" else SMALL_BATCH
    none = next(variant for variant in some if variant.name == NONE)

    def turn(variant: Variant) -> Turn:
        if variant.depends_on_batch:
            return take_turn(task, variant, device, few)
        return take_turn(task, variant, device, task.steps, small)

    done = []
    for index in range(rounds):
        first = index % len(some)
        order = [v for v in [*some[first:], *some[:first]] if index == 0 or not v.depends_on_batch]
        done.append(Round(take_turn(task, none, device, few), {v.name: turn(v) for v in order}))
        print(f"  round {index + 1} of {rounds}", flush=True)
    return done


class Added(NamedTuple):
    """Seconds beyond a training without a callback."""

    logged: float  # a logged step; any step of what logs none
    drawn: float  # a heatmap; 0 where none is drawn
    step: float  # a step, over the first 10,000 of a run


def added(variant: Variant, seconds: Sequence[float], plain: Sequence[float]) -> Added:
    """Compare the steps of a variant with those of none."""
    beyond = np.array(seconds) - statistics.fmean(plain[LEFT_OUT_STEPS:])
    if not variant.draws:
        each = float(beyond[len(beyond) // 2 :].mean())  # where the report of the first step is written
        return Added(each, 0.0, each)
    every = variant.every_n_steps_in_turn
    # the first and the second half of the steps from the last heatmap but one to the last
    power = (len(seconds) // every + 1).bit_length() - 1
    first, last = (every * (2**k - 1) for k in (power - 1, power))
    middle = first + every * 2 ** (power - 2)
    logged = every * float(beyond[middle:last].mean())
    drawn = float(beyond[first:middle].sum()) - (middle - first) / every * logged
    reports = RUN // variant.every_n_steps
    return Added(logged, drawn, (reports * logged + reports.bit_length() * drawn) / RUN)
