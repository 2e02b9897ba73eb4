"""The thread that writes, and what becomes of what it is given."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from typing import Any

import pytest
import torch

from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging.sinks import Sink
from lightning_gradhist.logging.writer import HostHistogram, Lazy, LoggerQueues, Writer


def test_once_is_made_once_for_all_threads() -> None:
    made: list[float] = []

    def make() -> float:
        time.sleep(0.05)
        made.append(time.monotonic())
        return made[-1]

    value, found = Lazy(make), []
    threads = [threading.Thread(target=lambda: found.append(value())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and found == made * 8


def test_jobs_run_in_order_off_the_thread_that_submits_them() -> None:
    writer, seen = Writer(), []
    for number in range(50):  # more than there is room for: the submitting thread is slowed down
        writer.submit(lambda number=number: (time.sleep(0.001), seen.append((number, threading.get_ident()))))  # type: ignore[misc]
    assert writer.close(30.0) and writer.dropped == 0
    assert [number for number, _ in seen] == list(range(50))
    (thread,) = {ident for _, ident in seen}
    assert thread != threading.get_ident()


def test_draining_leaves_the_writer_open() -> None:
    writer, seen = Writer(), []
    assert writer.drain(0.0)  # nothing was submitted, and no thread was started
    writer.submit(lambda: seen.append(1))
    assert writer.drain(30.0) and seen == [1]
    writer.submit(lambda: seen.append(2))
    assert writer.close(30.0) and seen == [1, 2]


def test_the_thread_ends() -> None:
    writer = Writer()
    writer.submit(lambda: None)
    thread = writer._thread
    assert thread is not None and writer.close(30.0)
    thread.join(30.0)
    assert not thread.is_alive()


def test_what_finds_no_room_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Writer, "room", 2)
    monkeypatch.setattr(Writer, "patience", 0.2)
    writer, begun, release, seen = Writer(), threading.Event(), threading.Event(), []
    writer.submit(lambda: (begun.set(), release.wait(60)))  # type: ignore[func-returns-value]
    assert begun.wait(30)
    start = time.monotonic()
    for number in range(102):
        writer.submit(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert 0.2 <= time.monotonic() - start < 10  # the patience was spent once, not a hundred times
    assert writer.dropped == 100
    assert not writer.drain(0.05)
    release.set()
    assert writer.drain(30.0) and seen == [0, 1]
    writer.submit(lambda: seen.append(2))  # there is room again
    assert writer.close(30.0) and seen == [0, 1, 2] and writer.dropped == 100


def test_closing_does_not_wait_for_ever_and_drops_what_has_not_begun() -> None:
    writer, begun, release, seen = Writer(), threading.Event(), threading.Event(), []
    writer.submit(lambda: (begun.set(), release.wait(60), seen.append(0)))  # type: ignore[func-returns-value]
    assert begun.wait(30)
    for number in (1, 2, 3):
        writer.submit(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert not writer.close(0.05) and writer.dropped == 3
    release.set()
    assert writer._thread is not None
    writer._thread.join(30.0)
    assert seen == [0]  # what had begun could not be stopped


# --- queues ---------------------------------------------------------------------------------------------------------


class Lines(list):  # type: ignore[type-arg]
    """A logger."""

    add_histogram_raw = None  # taken for a SummaryWriter, so that its sink runs in the background

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        if tag == "bad":
            raise OSError(28, "No space left on device")
        self.append((tag, value, step, threading.current_thread().name))


class Plain(list):  # type: ignore[type-arg]
    """A logger that is not known."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "bad" in metrics:
            raise ZeroDivisionError
        self.extend((tag, value, step, threading.current_thread().name) for tag, value in metrics.items())


def test_one_that_raises_costs_one_warning_and_nobody_else_anything() -> None:
    said: list[str] = []
    loggers: list[Any] = [Lines(), Plain(), Lines()]
    queues = LoggerQueues(loggers, said.append)
    for step in range(5):
        queues.send(lambda sink, step=step: sink.scalars({"bad": 0.0} if step in (1, 2) else {"good": 0.5}, step))  # type: ignore[misc]
    queues.close()
    for logger in loggers:
        assert [entry[:3] for entry in logger] == [("good", 0.5, step) for step in (0, 3, 4)]
    assert {entry[3] for entry in loggers[0]} == {"gradhist-writer"}
    assert {entry[3] for entry in loggers[1]} == {threading.current_thread().name}
    failed = "could not log, training goes on"
    assert sorted(said) == [
        f"{failed}: Lines: OSError(28, 'No space left on device')",
        f"{failed}: Lines: OSError(28, 'No space left on device')",
        f"{failed}: Plain: ZeroDivisionError()",
    ]


def test_a_logger_that_cannot_be_opened_is_left_out() -> None:
    class Shut:
        @property
        def experiment(self) -> Any:
            raise ConnectionError("no server")

    said: list[str] = []
    other = Plain()
    queues = LoggerQueues([Shut(), other], said.append)
    queues.send(lambda sink: sink.scalars({"good": 1.0}, 0))
    queues.close()
    assert said == ["could not log, training goes on: Shut: ConnectionError('no server')"] and len(other) == 1


def test_a_copy_of_queues_is_none() -> None:
    queues = LoggerQueues([Lines()], print)
    queues.send(lambda sink: sink.scalars({"good": 1.0}, 0))
    assert pickle.loads(pickle.dumps(queues)) is None and copy.deepcopy({"a": queues}) == {"a": None}
    queues.close()


def test_no_logger_needs_no_thread() -> None:
    before = threading.active_count()
    queues = LoggerQueues([], print)
    jobs: list[Sink] = []
    queues.send(jobs.append)
    assert threading.active_count() == before and jobs == []
    queues.close()


def test_a_copy_on_the_host_can_be_copied() -> None:
    histogram = MagnitudeHistogram(["w"])
    histogram.update({"w": torch.ones(3)})
    there = pickle.loads(pickle.dumps(HostHistogram(histogram)))()
    assert torch.equal(there.table, histogram.table) and there.names == ["w"]
