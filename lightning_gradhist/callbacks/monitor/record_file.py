"""The record of a run, written while the run goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

from lightning_gradhist.callbacks._deepspeed import grouped_parameters
from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.known_optimizers import class_name
from lightning_gradhist.callbacks.monitor.checkpoint import Progress
from lightning_gradhist.callbacks.monitor.fit import Guard
from lightning_gradhist.callbacks.monitor.observer import WatchedOptimizer
from lightning_gradhist.callbacks.parameters import model_shapes
from lightning_gradhist.logging.writer import Writer
from lightning_gradhist.noise.run_record import FILE_NAME, RunRecord, is_url, path_in

TASK = f"write {FILE_NAME}"


class RecordFile:
    """``calibration.json`` of a run, made and written in a thread, as that takes long after many steps.

    Args:
        directory: where it goes, under the first name that is free when it is first written.
        run: that it is of, by which the same run goes on with it after an interruption.
        guard: that tells of what fails.
        model: names and shapes of the parameters that the run began with, as the next one does: others may come in mid-run,
            and pruning gives them other names.
    """

    def __init__(self, directory: str, run: str, guard: Guard, model: Mapping[str, list[int] | None]) -> None:
        self.path: str | None = None
        """Of the file, once it was written."""
        self._directory, self._run, self._guard, self._model = directory, run, guard, model
        self.saved = 0
        """Measurements that it has, or is about to have."""
        self._writer = Writer()
        self._errors: list[Exception] = []
        self._newest: Callable[[], None] | None = None
        self._is_pending = False

    def save(self, trainer: Trainer, optimizers: Sequence[WatchedOptimizer], progress: Sequence[Progress]) -> None:
        """Has the record as it is now written, where there is something in it."""
        self.saved = sum(len(one.noise) for one in progress)
        if self.saved:
            with self._guard.attempt(TASK):
                now = model_shapes(trainer)
                # Lazy ones have a shape by now. Those outside the module are in neither.
                shapes = {name: now.get(name, shape) for name, shape in self._model.items()}
                entries = []
                for one, copied in zip(optimizers, [each.snapshot() for each in progress], strict=True):
                    names = [name for name in one.parameters if name in shapes or name not in now]
                    copied.learning_rates = _rates_of(one, names, copied.learning_rates)
                    entries.append((copied, (class_name(one.optimizer), names)))
                self._newest = partial(self._write, shapes, trainer.global_step, entries)
                if not self._is_pending:  # else the one that waits takes this up, however slow the disk is
                    self._is_pending = True
                    self._writer.submit(self._write_newest)
        self._tell()

    def lacks(self, progress: Sequence[Progress]) -> bool:
        """Whether something was measured since it was last saved."""
        return self.saved != sum(len(one.noise) for one in progress)

    def close(self, timeout: float) -> None:
        """Waits until it is written, at most so many seconds."""
        if not self._writer.close(timeout):
            self._errors.append(TimeoutError(f"it took more than {timeout:g} seconds"))
        self._tell()

    def _write_newest(self) -> None:
        self._is_pending = False  # before it is read, so that none is left behind
        if self._newest is not None:
            self._newest()

    def _write(
        self,
        shapes: dict[str, list[int] | None],
        steps: int,
        progress: Sequence[tuple[Progress, tuple[str, list[str]]]],
    ) -> None:
        try:
            entries = [one.record(*known) for one, known in progress if len(one.noise)]  # others have not stepped yet
            record = RunRecord(shapes, steps, entries, self._run)
            if self.path is None:
                self.path = record.save_in(self._directory)
            else:
                record.save(self.path)
        except Exception as error:
            self._errors.append(error)  # of which the training thread tells

    def _tell(self) -> None:
        while self._errors:
            self._guard.warn(TASK, self._errors.pop(0))


def _rates_of(watched: WatchedOptimizer, names: Sequence[str], rates: list[float]) -> list[float]:
    """Those of groups that have one of these parameters: others came later, as with layers that did not exist."""
    if len(names) == len(watched.parameters):
        return rates
    own = {id(watched.parameters[name]) for name in names}
    groups = grouped_parameters(watched.optimizer)
    return [*compress(rates, [not own.isdisjoint(map(id, group)) for group in groups])]


def record_directory(trainer: Trainer) -> str:
    """Where the record of a run goes: into the directory of its logger, or into the root directory."""
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    directory = getattr(logger, "log_dir", None)
    if not directory and getattr(logger, "save_dir", None) and logger.version is not None:
        directory = path_in(path_in(str(logger.save_dir), str(logger.name)), str(logger.version))
    directory = str(directory or trainer.default_root_dir)
    return directory if is_url(directory) else os.path.abspath(directory)
