"""The record of a run, written while the run goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.guard import Guard
from lightning_gradhist.callbacks.monitor.progress import Progress
from lightning_gradhist.callbacks.parameters import model_shapes
from lightning_gradhist.logging.writer import LoggerQueues, Writer
from lightning_gradhist.noise.record import FILE_NAME, RunRecord

_TASK = f"write {FILE_NAME}"


class RecordFile:
    """``calibration.json`` of a run, made and written in a thread, as that takes long after many steps.

    Args:
        directory: that it goes to.
        guard: which tells of failures.
    """

    def __init__(self, directory: Path, guard: Guard) -> None:
        self._path = directory / FILE_NAME
        self._guard = guard
        self._saved = 0  # measurements that it has, or is about to have
        self._writer = Writer()
        self._errors: list[Exception] = []

    def save(
        self, module: LightningModule, steps: int, optimizers: Sequence[Optimizer], progress: Sequence[Progress]
    ) -> None:
        """Has the record as it is now written, where there is something in it."""
        self._saved = sum(len(one.noise) for one in progress)
        if self._saved:
            with self._guard.attempt(_TASK):
                copies = [one.state_dict() for one in progress]  # which training does not change
                names = [type(optimizer).__name__ for optimizer in optimizers]
                self._writer.submit(partial(self._write, model_shapes(module), steps, names, copies))
        self._tell()

    def lacks(self, progress: Sequence[Progress]) -> bool:
        """Whether something was measured since it was last saved."""
        return self._saved != sum(len(one.noise) for one in progress)

    def close(self) -> None:
        """Waits until it is written."""
        if not self._writer.close(LoggerQueues.patience):
            self._errors.append(TimeoutError(f"it took more than {LoggerQueues.patience:g} seconds"))
        self._tell()

    def _write(
        self, shapes: dict[str, list[int]], steps: int, names: Sequence[str], states: Sequence[Mapping[str, Any]]
    ) -> None:
        try:
            entries = [Progress.from_state_dict(state).record(name) for state, name in zip(states, names, strict=True)]
            RunRecord(shapes, steps, entries).save(self._path)
        except Exception as error:
            self._errors.append(error)  # of which the training thread tells

    def _tell(self) -> None:
        while self._errors:
            self._guard.warn(_TASK, self._errors.pop(0))


def run_directory(trainer: Trainer) -> str:
    """The directory of a run, of its own where the logger has none."""
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    if getattr(logger, "log_dir", None):
        return str(logger.log_dir)
    path = Path(getattr(logger, "save_dir", None) or trainer.default_root_dir)
    return str(path if logger is None else path / str(logger.name) / str(logger.version))
