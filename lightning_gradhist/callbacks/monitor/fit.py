"""What the observers of all optimizers share while a fit goes on, and what may fail without ending it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer, rank_zero_warn
from lightning_gradhist.callbacks.batch_size import SampleCount
from lightning_gradhist.callbacks.rank_sum import RankSum
from lightning_gradhist.callbacks.schedulers import schedulers_in
from lightning_gradhist.callbacks.strategies import Replicas, least_over_ranks
from lightning_gradhist.logging.noise_report import noise_margins
from lightning_gradhist.logging.sinks import Sink
from lightning_gradhist.logging.writer import LoggerQueues


class Guard:
    """Lets what may fail, fail: a full disk or a broken logger costs one warning a fit and task. No collectives within."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    @contextmanager
    def attempt(self, task: str) -> Iterator[None]:
        """Goes on after the block, whatever it raises; the warning names the task, as "count the gradients"."""
        try:
            yield
        except Exception as error:
            self.warn(task, error)

    def warn(self, task: str, error: Exception) -> None:
        """Says the first time that a task could not be done, and no more."""
        if task not in self._told:
            rank_zero_warn(f"GradientHistogramMonitor could not {task}, training goes on: {error!r}")
        self._told.add(task)


@dataclass
class Fit:
    """What the observers of all optimizers share, from the start of training to its end."""

    trainer: Trainer
    module: LightningModule
    replicas: Replicas
    guard: Guard
    sums: RankSum
    samples: SampleCount
    schedulers: list[Any]  # that the run began with
    warned: set[str] = field(default_factory=set)
    shows_margins: bool = False
    _loggers: LoggerQueues | None = None

    @classmethod
    def start(cls, trainer: Trainer, module: LightningModule, replicas: Replicas, samples: SampleCount) -> Fit | None:
        """A fit, None where a rank has no memory for it; to be called on every rank."""
        guard, sums = Guard(), None
        with guard.attempt("take memory"):
            sums = RankSum(replicas, module.device)
        everywhere = least_over_ranks(float(sums is not None), trainer) > 0
        if not everywhere or sums is None:
            return None
        return cls(trainer, module, replicas, guard, sums, samples, schedulers_in(trainer))

    def send(self, job: Callable[[Sink], None]) -> None:
        """Has the sink of each logger given to a job."""
        if self._loggers is None:
            warn = lambda problem: rank_zero_warn(f"GradientHistogramMonitor {problem}")  # noqa: E731
            self._loggers = LoggerQueues(self.trainer.loggers, warn)
        self._loggers.send(job)

    def warn_once(self, kind: str, message: str) -> None:
        """Warns, but for what it has warned of before."""
        if kind not in self.warned:
            rank_zero_warn(f"GradientHistogramMonitor {message}")
        self.warned.add(kind)

    def show_margins(self) -> None:
        """Has the noise scale of every optimizer shown with its interval, where a logger has charts of that kind."""
        number = len(self.trainer.optimizers)
        charts = noise_margins([f"_{index}" for index in range(number)] if number > 1 else [""])
        if not self.shows_margins:
            self.send(lambda sink: sink.margins("noise scale", charts))
        self.shows_margins = True

    def close(self, timeout: float) -> None:
        """Waits for what is still to be logged, at most so many seconds."""
        if self._loggers is not None:
            loggers, self._loggers = self._loggers, None
            with self.guard.attempt("log"):
                loggers.close(timeout)
