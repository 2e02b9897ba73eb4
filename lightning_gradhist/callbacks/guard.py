"""What monitoring may fail at without stopping the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning_gradhist.callbacks._lightning import rank_zero_warn


class Guard:
    """Lets what may fail, fail: a full disk or a broken logger costs one warning a fit. No collectives within."""

    def __init__(self) -> None:
        self._has_warned = False

    @contextmanager
    def attempt(self, task: str) -> Iterator[None]:
        """Goes on after the block, whatever it raises.

        Args:
            task: what is attempted, for the warning: "count the gradients".
        """
        try:
            yield
        except Exception as error:
            self.warn(task, error)

    def warn(self, task: str, error: Exception) -> None:
        """Says what could not be done the first time, and no more."""
        if not self._has_warned:
            rank_zero_warn(f"GradientHistogramMonitor could not {task}, training goes on: {error!r}")
        self._has_warned = True
