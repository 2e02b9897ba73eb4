"""Reporting off the training thread, and never in its way."""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging import figures
from lightning_gradhist.logging.sinks import Sink, sink_of
from lightning_gradhist.tensors import HostTensor

T = TypeVar("T")
Send = Callable[[Callable[[Sink], None]], None]
"""Gives each logger's sink to a job."""

NOT_COUNTED = -(2**48)  # all over the table of a rank that could not count: below zero also with 10,000 ranks added
NOT_ALIKE = -1  # all over a table of gradients that are not the same on all ranks


class Lazy(Generic[T]):
    """A value that is made once, by whoever asks for it first, in whichever thread."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._value = functools.cache(make)
        self._lock = threading.Lock()

    def __call__(self) -> T:
        """The value."""
        with self._lock:
            return self._value()


class HostHistogram:
    """A histogram on the host; called, it gives the histogram, as :class:`HostTensor` does a tensor.

    It raises RuntimeError instead where counts are :data:`NOT_COUNTED` or :data:`NOT_ALIKE`, which nobody knows before.
    """

    def __init__(self, histogram: MagnitudeHistogram) -> None:
        self._table = HostTensor(histogram.table)
        self._names = histogram.names

    def __call__(self) -> MagnitudeHistogram:
        """The histogram on the host."""
        table = self._table()
        first = int(table[0, 0]) if table.numel() else 0
        if first == NOT_ALIKE:
            raise RuntimeError(
                "the gradients that the optimizer uses differ from rank to rank, as with a communication hook that does not"
                " average them, so that the step is left out; when='local' counts those of all ranks"
            )
        if first < 0:
            raise RuntimeError("a rank could not count its part of the gradients, so that the step is left out")
        return MagnitudeHistogram.from_table(self._names, table)


class Writer:
    """Runs jobs one after another in a daemon thread, which starts with the first.

    :attr:`room` jobs may wait. Where there is none, :meth:`submit` waits for it, :attr:`patience` seconds at most; then the
    job is dropped, and as long as there is none, later jobs are dropped without waiting.
    """

    room = 8
    patience = 10.0

    def __init__(self) -> None:
        self.dropped = 0
        self._full = self._closed = False
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(self.room)
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], None]) -> None:
        """Has a job run after those before it. It must not raise."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="gradhist-writer", daemon=True)
            self._thread.start()
        try:
            self._jobs.put(job, timeout=0 if self._full else self.patience)
            self._full = False
        except queue.Full:
            self._full = True
            self.dropped += 1

    def drain(self, timeout: float) -> bool:
        """Waits until all jobs have run, at most ``timeout`` seconds, and says whether they have."""
        with self._jobs.all_tasks_done:  # as Queue.join(), which has no timeout
            return self._jobs.all_tasks_done.wait_for(lambda: not self._jobs.unfinished_tasks, timeout)

    def close(self, timeout: float) -> bool:
        """Drains, and ends the thread; jobs that have not begun in time are dropped. Says whether all jobs have run."""
        finished = self.drain(timeout)
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
                self.dropped += 1
        self._jobs.put(None)  # wakes the thread, which finds that it is closed
        return finished

    def _run(self) -> None:
        while not self._closed:
            job = self._jobs.get()
            if job is not None:
                job()
            self._jobs.task_done()


def send_heatmap(
    send: Send,
    tag: str,
    step: int,
    title: str,
    histogram: Callable[[], MagnitudeHistogram],
    eps: Mapping[str, float] | None = None,
) -> None:
    """Has loggers that show figures show a heatmap, where matplotlib is installed and there is something to draw.

    ``histogram`` and the figure are made in the loggers' threads.
    """
    figure = Lazy(lambda: figures.magnitude_heatmap(histogram(), title, eps))

    def show(sink: Sink) -> None:
        if figures.available() and sink.shows_figures and histogram().counts.any():
            sink.figure(tag, figure(), step)

    send(show)


class LoggerQueues:
    """The loggers of a Trainer together, or ``SummaryWriter``: each gets what is reported, whatever happens to the others.

    What a logger raises is warned of once, in the thread that calls the methods; it is tried again with the next report.
    ``warn`` is given a sentence, to be preceded by the name of the reporter.
    """

    patience = 30.0  # seconds that close waits for all loggers together, if nothing else is said

    def __init__(self, loggers: Iterable[Any], warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._queues = [_LoggerQueue(logger) for logger in loggers]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # threads and open files stay in their process: a copy is None, to be made anew

    def send(self, job: Callable[[Sink], None]) -> None:
        """Has the sink of each logger given to a job."""
        for each in self._queues:
            each.send(job)
        self._tell()

    def close(self, timeout: float | None = None) -> None:
        """Waits until all jobs have run, and drops those that have not begun in time."""
        end = time.monotonic() + (self.patience if timeout is None else timeout)
        for each in self._queues:
            each.close(max(0.0, end - time.monotonic()))
        self._tell()

    def _tell(self) -> None:
        for each in self._queues:
            while each.problems:
                self._warn(each.problems.pop(0))


class _LoggerQueue:
    """A logger's sink, and what there is to warn of.

    One that may run in the background has a :class:`Writer` of its own: if it hangs, it holds up nobody else.
    """

    def __init__(self, logger: Any) -> None:
        self.problems: list[str] = []
        self._name = type(logger).__name__
        self._has_failed = self._is_behind = False
        self._sink: Sink | None = None
        with self._attempt():
            self._sink = sink_of(logger)
        self._writer = Writer() if self._sink is not None and self._sink.background else None

    def send(self, job: Callable[[Sink], None]) -> None:
        if self._writer is None:
            self._run(job)
            return
        self._writer.submit(lambda: self._run(job))
        if self._writer.dropped and not self._is_behind:
            self._is_behind = True
            self.problems.append(f"leaves out what {self._name} has no time for, and does not wait for it any longer")

    def close(self, timeout: float) -> None:
        if self._writer is None:
            return
        if not self._writer.close(timeout):
            self.problems.append(f"has waited for {self._name} at the end, in vain: its last reports may be missing")
        if self._writer.dropped:
            self.problems.append(f"has left out {self._writer.dropped} reports that {self._name} had no time for")

    def _run(self, job: Callable[[Sink], None]) -> None:
        if self._sink is not None:
            with self._attempt():
                job(self._sink)

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                self.problems.append(f"could not log, training goes on: {self._name}: {error!r}")
            self._has_failed = True
