"""What monitoring may fail at without stopping the training."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from lightning_gradhist.callbacks._lightning import rank_zero_warn

T = TypeVar("T")


class Guard:
    """Does what may fail: a full disk or a broken logger costs one warning a fit. No collectives in here."""

    def __init__(self) -> None:
        self._failed = False

    def done(self, job: Callable[[], object]) -> bool:
        """Whether it was done."""
        return self.made(lambda: (job(),)) is not None

    def made(self, make: Callable[[], T]) -> T | None:
        """What is made, or None."""
        try:
            return make()
        except Exception as error:
            self.warn(error)
            return None

    def warn(self, error: Exception) -> None:
        """Speaks of the first failure, and no more."""
        if not self._failed:
            rank_zero_warn(f"GradientHistogramMonitor could not log, training goes on: {error!r}")
        self._failed = True
