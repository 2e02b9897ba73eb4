"""The record of a run, written while the run goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import LightningModule
from lightning_gradhist.callbacks.guard import Guard
from lightning_gradhist.callbacks.monitor.watched import Watched
from lightning_gradhist.callbacks.parameters import model_shapes
from lightning_gradhist.logging.writer import Outlets, Writer
from lightning_gradhist.noise.record import FILE_NAME, RunRecord


class RecordFile:
    """``calibration.json`` of a run, made and written in a thread, as that takes long after many steps.

    Args:
        directory: that it goes to.
        guard: which tells of failures.

    Attributes:
        saved: number of measurements of noise that it has, or is about to have.
    """

    def __init__(self, directory: Path, guard: Guard) -> None:
        self._path = directory / FILE_NAME
        self._guard = guard
        self.saved = 0
        self._writer = Writer()
        self._unsaid: list[Exception] = []

    def save(
        self, module: LightningModule, steps: int, optimizers: Sequence[Optimizer], all_watched: Sequence[Watched]
    ) -> None:
        """Has the record as it is now written, where there is something in it."""
        measured = sum(len(watched.noise) for watched in all_watched)
        if measured:
            self.saved = measured
            self._guard.done(lambda: self._submit(module, steps, optimizers, all_watched))
        self._tell()

    def close(self) -> None:
        """Waits until it is written."""
        if not self._writer.close(Outlets.patience):
            self._unsaid.append(TimeoutError(f"{FILE_NAME} was not written within {Outlets.patience:g} seconds"))
        self._tell()

    def _submit(
        self, module: LightningModule, steps: int, optimizers: Sequence[Optimizer], all_watched: Sequence[Watched]
    ) -> None:
        shapes = model_shapes(module)
        copies = [Watched(**watched.state_dict()) for watched in all_watched]  # which training does not change
        names = [type(optimizer).__name__ for optimizer in optimizers]

        def save() -> None:
            entries = [watched.record(name) for watched, name in zip(copies, names, strict=True)]
            RunRecord(shapes, steps, entries).save(self._path)

        self._writer.submit(lambda: self._unsaid.extend(_raised(save)))

    def _tell(self) -> None:
        while self._unsaid:
            self._guard.warn(self._unsaid.pop(0))


def _raised(job: Callable[[], None]) -> list[Exception]:
    try:
        job()
    except Exception as error:
        return [error]
    return []
