"""What a real Trainer and its other loggers have of a logger that is broken, hangs, or whose disk is full."""

from __future__ import annotations

import copy
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from support import Net, adamw, events, fit, loader

from lightning_gradhist import GradientHistogramMonitor
from lightning_gradhist.logging import sinks
from lightning_gradhist.logging.sinks import Sink, register_sink
from lightning_gradhist.logging.writer import LoggerQueues, Writer
from lightning_gradhist.noise.run_record import RunRecord


class Broken(DummyLogger):
    """A logger whose sink does what the test says."""

    def __init__(self, act: Any, background: bool = True) -> None:
        super().__init__()
        self.act, self.background = act, background
        self.calls = 0


class BrokenSink(Sink):
    def __init__(self, logger: Broken) -> None:
        self.logger, self.background = logger, logger.background

    def scalars(self, values: Any, step: int) -> None:
        self.logger.calls += 1
        self.logger.act()

    def figure(self, tag: str, figure: Any, step: int) -> None:
        self.scalars({}, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self.scalars({}, step)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_KINDS", list(sinks._KINDS))
    register_sink(Broken, BrokenSink)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name == "gradhist-writer":
            thread.join(30.0)
            assert not thread.is_alive()


def monitor() -> GradientHistogramMonitor:
    return GradientHistogramMonitor(every_n_steps=1, noise_scale=False)


def tensorboard(folder: Path) -> TensorBoardLogger:
    return TensorBoardLogger(folder, name="", version="")


def assert_whole(folder: Path, steps: int) -> None:
    """Everything of the first steps is there, and an event file that breaks off would not be read to its end."""
    found = events(folder)
    for tag in ("gradient_magnitude/all", "gradient_magnitude/head.weight"):
        assert [event.step for event in found.Histograms(tag)] == list(range(steps))
    for tag in ("gradient_norm/all", "gradient_norm/head.bias"):
        assert [event.step for event in found.Scalars(tag)] == list(range(steps))
    drawn = {step for step in (3, 15, 63) if step < steps}
    assert {image.step for image in found.Images("gradient_magnitude_by_layer")} >= drawn
    assert {text.step for text in found.Tensors("gradient_worst_layers/text_summary")} >= drawn


def said(caught: Any) -> list[str]:
    return [str(warning.message) for warning in caught if "GradientHistogramMonitor" in str(warning.message)]


def raise_error() -> None:
    raise ConnectionError("refused")


def fill_the_disk() -> None:
    with open("/dev/full", "w", encoding="utf-8") as file:
        file.write("x")


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(raise_error, "ConnectionError('refused')", id="raises"),
        pytest.param(fill_the_disk, "OSError(28, 'No space left on device')", id="disk full"),
    ],
)
def test_a_logger_that_raises(tmp_path: Path, act: Any, message: str, background: bool) -> None:
    broken = Broken(act, background)
    with pytest.warns(UserWarning, match="could not log") as caught:
        made = fit(tmp_path, monitor(), logger=[broken, tensorboard(tmp_path)], max_steps=4)
    assert made.global_step == 4
    assert broken.calls == 4 * 2 + 2  # it is tried again at each report
    assert said(caught) == [f"GradientHistogramMonitor could not log, training goes on: Broken: {message}"]
    assert_whole(tmp_path, 4)


def test_a_logger_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "patience", 3.0)  # enough for the other logger to keep up on a busy machine
    monkeypatch.setattr(LoggerQueues, "patience", 3.0)
    release = threading.Event()
    broken = Broken(lambda: release.wait(120))
    try:
        with pytest.warns(UserWarning, match="Broken") as caught:
            made = fit(tmp_path, monitor(), logger=[broken, tensorboard(tmp_path)], max_steps=8)
        assert not release.is_set() and made.global_step == 8 and broken.calls == 1
    finally:
        release.set()
    start = "GradientHistogramMonitor"
    assert said(caught) == [
        f"{start} leaves out what Broken has no time for, and does not wait for it any longer",
        f"{start} has waited for Broken at the end, in vain: its last reports may be missing",
        f"{start} has left out 19 reports that Broken had no time for",  # of 2 * 8 + 2 * 2; one hangs for ever
    ]
    assert_whole(tmp_path, 8)


def test_a_logger_and_a_record_that_hang_are_waited_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "patience", 0.1)
    monkeypatch.setattr(LoggerQueues, "patience", 4.0)
    release, ends = threading.Event(), []
    monkeypatch.setattr(RunRecord, "save", lambda *_: release.wait(120))
    started = L.Callback()
    started.on_train_end = lambda *_: ends.append(time.monotonic())  # type: ignore[method-assign]
    try:
        with pytest.warns(UserWarning, match="GradientHistogramMonitor") as caught:
            fit(tmp_path, started, GradientHistogramMonitor(1), logger=Broken(lambda: release.wait(120)), max_steps=8)
        assert time.monotonic() - ends[0] < 7  # not 8, one after the other
        assert any("took more than 4 seconds" in sentence for sentence in said(caught))
    finally:
        release.set()


def test_a_logger_that_is_slow_for_a_moment_gets_everything(tmp_path: Path) -> None:
    pause = threading.Event()
    slow = Broken(lambda: pause.wait(0.0 if slow.calls > 1 else 2.0))
    fit(tmp_path, monitor(), logger=[slow, tensorboard(tmp_path)], max_steps=8)
    assert slow.calls == 2 * 8 + 2 * 2
    assert_whole(tmp_path, 8)


def test_two_event_files_at_once(tmp_path: Path) -> None:
    fit(tmp_path, monitor(), logger=[tensorboard(tmp_path / "a"), tensorboard(tmp_path / "b")], max_steps=4)
    assert_whole(tmp_path / "a", 4)
    assert_whole(tmp_path / "b", 4)


def test_no_logger(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="has no logger"):
        made = fit(tmp_path, monitor(), logger=False, max_steps=4)
    assert made.global_step == 4


def test_gradients_that_are_not_finite(tmp_path: Path) -> None:
    class NotFinite(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (torch.nan if batch_idx % 2 else torch.inf)

    fit(tmp_path, monitor(), module=NotFinite, max_steps=4)
    found = events(tmp_path)
    shares = [event.value for event in found.Scalars("gradient_nonfinite_share/head.weight")]
    assert len(shares) == 4 and shares[1:] == [1.0, 1.0, 1.0]
    assert len(found.Scalars("gradient_median/all")) == 4
    text = [event.tensor_proto.string_val[0].decode() for event in found.Tensors("gradient_worst_layers/text_summary")]
    assert "100.00%" in text[-1]


class Interrupt(L.Callback):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            raise self.error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        pytest.param(ZeroDivisionError("boom"), ZeroDivisionError, id="exception"),
        pytest.param(KeyboardInterrupt(), SystemExit, id="KeyboardInterrupt"),
    ],
)
def test_an_interrupted_run_has_written_what_it_logged(tmp_path: Path, error: BaseException, seen: Any) -> None:
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(seen):
            fit(tmp_path, monitor(), Interrupt(error))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert_whole(tmp_path, 5)


class CopyInMidRun(L.Callback):
    def __init__(self, monitor: GradientHistogramMonitor) -> None:
        self.monitor = monitor
        self.copies: list[GradientHistogramMonitor] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 3:
            self.copies = [copy.deepcopy(self.monitor), pickle.loads(pickle.dumps(self.monitor))]
            assert [other.state_dict() for other in self.copies] == [self.monitor.state_dict()] * 2


def test_a_monitor_can_be_copied_and_pickled_while_it_writes(tmp_path: Path) -> None:
    original = GradientHistogramMonitor(every_n_steps=1)
    copying = CopyInMidRun(original)
    fit(tmp_path / "a", original, copying, max_steps=6)
    assert_whole(tmp_path / "a", 6)
    assert len(copying.copies) == 2
    for index, other in enumerate(copying.copies):
        fit(tmp_path / str(index), other, module=Net(adamw), data=loader(), max_steps=3)
        assert_whole(tmp_path / str(index), 3)


def test_fit_twice_with_other_loggers(tmp_path: Path) -> None:
    one = monitor()
    for name in ("a", "b"):
        fit(tmp_path / name, one, max_steps=3)
        assert_whole(tmp_path / name, 3)
