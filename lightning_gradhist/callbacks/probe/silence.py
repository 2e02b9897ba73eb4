"""What stands in for loggers, and log records that go nowhere, so that nothing of a probe is written."""

from __future__ import annotations

import functools
import logging
import os
import sys
import sysconfig
import threading
import types
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lightning_gradhist.callbacks._lightning import DummyLogger, is_a

PACKAGES = ("tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml", "neptune", "clearml", "aim", "litlogger")
_WRITERS = ("FileWriter", "Run", "BaseExperiment", "CometExperiment", "Experiment", "MlflowClient", "Task", "Logger")
_INSTALLED = tuple(
    str(Path(folder).resolve()) + os.sep
    for folder in (sysconfig.get_path("stdlib"), Path(torch.__file__).parents[1], Path(__file__).parents[2])
)
_OF_PACKAGES = {"site-packages", "dist-packages"}  # of which there may be several, as in a venv upon another


class SilentRun:
    """Stands in for a run, an experiment or a function that writes: takes everything, at any depth, and gives nothing."""

    def __getattr__(self, name: str) -> SilentRun:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> SilentRun:
        return self

    def _take(self, *args: Any, **kwargs: Any) -> None: ...

    __call__ = __setitem__ = __setattr__ = _take


class SilentLogger(DummyLogger):
    """Takes everything and writes nothing, in place of a logger whose directories it names."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._of = logger

    @property
    def experiment(self) -> Any:
        """One that writes nothing."""
        return SilentRun()

    @property
    def save_dir(self) -> Any:
        """That of the logger."""
        return self._of.save_dir

    @property
    def log_dir(self) -> Any:
        """That of the logger, or None."""
        return getattr(self._of, "log_dir", None)


def writes(name: str, value: Any) -> bool:
    """Whether one of the packages writes to its run by what it has under this name, as by ``wandb.log``."""
    return (name.startswith("log") and not isinstance(value, types.ModuleType)) or is_writer(value)


def is_writer(value: Any) -> bool:
    """Whether it is what a logger writes with: an experiment, a run, a ``SummaryWriter``."""
    return is_a(value, "SummaryWriter") or (is_of(value, PACKAGES) and is_a(value, *_WRITERS))


def is_of(value: Any, packages: Iterable[str]) -> bool:
    """Whether a function, or the class of another object, is defined in one of the packages."""
    module = getattr(value if isinstance(value, types.FunctionType) else type(value), "__module__", None) or ""
    return any(module == package or module.startswith(package + ".") for package in packages)


@functools.cache
def is_own_code(package: str, file: str | None) -> bool:
    """Whether the code of a package, or in a file, is of no installed package."""
    if package in sys.stdlib_module_names and package != "__main__":
        return False
    if file is None:
        return True
    path = Path(file).resolve()
    return not (str(path).startswith(_INSTALLED) or _OF_PACKAGES.intersection(path.parts) or _is_pips(path))


def _is_pips(path: Path) -> bool:
    """Whether pip has put a file there, into a folder of one's own choice, next to one's own code perhaps."""
    return any(path.relative_to(folder).as_posix() in _recorded_by_pip(folder) for folder in path.parents)


@functools.cache
def _recorded_by_pip(folder: Path) -> set[str]:
    """The files that pip says it has put below a folder."""
    found: set[str] = set()
    with suppress(OSError):
        for record in folder.glob("*.dist-info/RECORD"):
            found.update(line.partition(",")[0] for line in record.read_text("utf-8", "replace").splitlines())
    return found


@contextmanager
def without_log_records() -> Generator[None, None, None]:
    """Within it, what this thread logs goes nowhere: training logs it again.

    But for warnings of installed packages, which may remember that they have warned.
    """
    handle, own = logging.Logger.handle, threading.get_ident()

    def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
        comes_again = record.levelno < logging.WARNING or is_own_code("", record.pathname or None)
        if threading.get_ident() != own or not comes_again:
            handle(logger, record)

    logging.Logger.handle = handled  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        logging.Logger.handle = handle  # type: ignore[method-assign]
