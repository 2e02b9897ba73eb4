"""Reports of logged steps, on their way to the loggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from lightning_gradhist.logging.sinks import Sink

Send = Callable[[Callable[[Sink], None]], None]
"""Gives each logger's sink to a job."""


class StepReport(Protocol):
    """What there is to tell of a logged step."""

    def send(self, send: Send) -> None:
        """Has loggers write scalars and histograms."""

    def draw(self, send: Send) -> None:
        """Has loggers show figures."""


R = TypeVar("R", bound=StepReport)


class Reports(Generic[R]):
    """Has reports written, and some of them drawn, as figures cost far more than a count; in the end also the last."""

    def __init__(self, send: Send) -> None:
        self.last: R | None = None
        self._last_is_drawn = False
        self._send = send

    def log(self, report: R, drawn: bool) -> None:
        """Has a report written, and drawn now if told so."""
        report.send(self._send)
        if drawn:
            report.draw(self._send)
        self.last, self._last_is_drawn = report, drawn

    def finish(self) -> None:
        """Has the last report drawn."""
        if self.last is not None and not self._last_is_drawn:
            self.last.draw(self._send)
