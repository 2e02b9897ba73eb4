"""What stands in for loggers, so that nothing of a probe is written."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from lightning_gradhist.callbacks._lightning import DummyLogger
from lightning_gradhist.callbacks.strategies import is_a

_WRITERS = ("tensorboard", "tensorboardX", "wandb", "mlflow", "comet_ml", "neptune", "clearml", "aim", "litlogger")


class SilentLogger(DummyLogger):
    """Takes everything and writes nothing, in place of a logger whose directories it names."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._of = logger

    @property
    def save_dir(self) -> Any:
        """That of the logger."""
        return self._of.save_dir

    @property
    def log_dir(self) -> Any:
        """That of the logger, or None."""
        return getattr(self._of, "log_dir", None)


def is_logger(value: Any) -> bool:
    """Whether it is one of Lightning's loggers."""
    return is_a(value, "Logger") and hasattr(type(value), "log_metrics")


def is_writer(value: Any) -> bool:
    """Whether it is what a logger writes with: an experiment, a run, a ``SummaryWriter``."""
    return is_a(value, "SummaryWriter") or (type(value).__module__ or "").partition(".")[0] in _WRITERS


def experiment(logger: Any) -> Any:
    """What a logger writes with, or None."""
    with suppress(Exception):
        return logger.experiment
    return None


def silent_experiment() -> Any:
    """Takes every call and does nothing."""
    return DummyLogger().experiment
