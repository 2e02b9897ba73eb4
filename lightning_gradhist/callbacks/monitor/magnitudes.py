"""Counts the magnitudes of the gradients, before or after clipping as ``when`` says, and reports them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lightning_gradhist.callbacks._deepspeed import is_deepspeed
from lightning_gradhist.callbacks._lightning import MisconfigurationException, Trainer
from lightning_gradhist.callbacks.gradients import LocalGradients, clip_limits, squared_norm
from lightning_gradhist.callbacks.monitor.checkpoint import Progress
from lightning_gradhist.callbacks.monitor.observer import Step, StepObserver, WatchedOptimizer
from lightning_gradhist.callbacks.strategies import is_cut_up
from lightning_gradhist.histogram import COLUMNS, MagnitudeHistogram
from lightning_gradhist.logging.magnitude_report import magnitude_report, worst_layers
from lightning_gradhist.logging.writer import NOT_ALIKE, NOT_COUNTED, HostHistogram, Lazy, Send, send_heatmap

When = Literal["before_clip", "after_clip", "local"]
_HALF_BIN = 1 / 15  # what a norm of one value may be off, as it is made of bins; that of many values is less
_PREFIXES = {"before_clip": "gradient", "after_clip": "gradient_clipped", "local": "gradient_local"}


def check_when(when: When, trainer: Trainer) -> None:
    """Refuses to count local gradients where no rank has any, and clipped ones where nobody sees them."""
    if when == "after_clip" and is_deepspeed(trainer):
        raise MisconfigurationException(
            "when='after_clip' counts what clipping leaves, and DeepSpeed clips within its own step, where nobody sees the"
            " gradients; use when='before_clip', which also logs gradient_clip_factor"
        )
    if when == "local" and is_cut_up(trainer):
        raise MisconfigurationException(
            "when='local' counts what each rank computed before averaging, which a sharded strategy does not leave"
            " in any parameter; use when='before_clip', or strategy='ddp'"
        )


class GradientReport:
    """The gradients of a logged step, by the histogram of their magnitudes, which must not be changed afterwards.

    All names have the prefix, those of what is over all rows the suffix. The gradients are then clipped to ``clip_norm``; it
    is None where they are not, or not all of them are counted.
    """

    def __init__(
        self, histogram: MagnitudeHistogram, step: int, prefix: str, suffix: str, clip_norm: float | None
    ) -> None:
        self._histogram = HostHistogram(histogram)
        self._step, self._prefix, self._suffix, self._clip_norm = step, prefix, suffix, clip_norm

    def send(self, send: Send) -> None:
        """Has loggers write the scalars and histograms."""
        report = Lazy(lambda: magnitude_report(self._histogram(), self._prefix, f"all{self._suffix}"))
        send(lambda sink: sink.scalars({**report().scalars, **self._clip_factor(report().scalars)}, self._step))
        send(lambda sink: sink.histograms(report().histograms, self._step))

    def _clip_factor(self, scalars: Mapping[str, float]) -> dict[str, float]:
        norm = scalars.get(f"{self._prefix}_norm/all{self._suffix}", math.nan)
        if self._clip_norm is None or not norm > 0:
            return {}
        margin = 1 + _HALF_BIN / math.sqrt(float(self._histogram().counts.sum()))
        factor = self._clip_norm / norm if norm > self._clip_norm * margin else 1.0
        return {f"{self._prefix}_clip_factor{self._suffix}": factor}

    def draw(self, send: Send) -> None:
        """Has loggers show the worst layers and the heatmap."""
        worst, heatmap = (f"{self._prefix}_{kind}{self._suffix}" for kind in ("worst_layers", "magnitude_by_layer"))
        send(lambda sink: sink.text(worst, worst_layers(self._histogram()), self._step))
        title = f"gradient magnitudes by layer, step {self._step}"
        send_heatmap(send, heatmap, self._step, title, self._histogram)


class MagnitudeMonitor(StepObserver):
    """Counts the gradients of the steps that are due, and logs those that are taken.

    ``on_double`` is called after the 1st, 2nd, 4th, 8th, ... logged step; figures are drawn at the 4th, 16th, 64th, ...
    """

    def __init__(
        self, watched: WatchedOptimizer, progress: Progress, when: When, on_double: Callable[[], None]
    ) -> None:
        self._watched, self._fit, self._progress = watched, watched.fit, progress
        self._when, self._on_double = when, on_double
        self._local: LocalGradients | None = None
        self._undrawn: GradientReport | None = None  # the last, for the end

    def prepare(self, due: bool) -> None:
        """Has gradients copied before ranks average them."""
        self.close()
        if due and self._when == "local":
            self._local = LocalGradients(self._watched.parameters)

    def before_backward(self) -> None:
        """Copies what has been unfrozen since, too."""
        if self._local is not None:
            self._local.extend(self._watched.parameters)

    def wants_gradients(self, due: bool) -> bool:
        """Whether they are counted before clipping."""
        return due and self._when == "before_clip"

    def before_step(self, step: Step) -> None:
        """Counts, but for what is counted after clipping."""
        if not step.due or self._when == "after_clip":
            return
        gradients, parts = step.gradients, step.parts
        if self._local is not None:
            gradients, parts = {}, None  # they are not the same on all ranks
            with self._fit.guard.attempt("copy the gradients before ranks average them"):
                parts = _not_thrown_away(self._local.take(self._fit.trainer), self._watched.parameters)
        step.histogram = self._count(gradients, parts)

    def at_update(self, step: Step) -> None:
        """Counts what is counted after clipping, and logs."""
        if self._when == "after_clip":
            step.histogram = self._count(*self._watched.gradients())
        if step.histogram is None or step.skipped or not self._fit.trainer.is_global_zero:
            return
        with self._fit.guard.attempt("log"):
            prefix, suffix = _PREFIXES[self._when], self._watched.suffix
            self._undrawn = GradientReport(step.histogram, step.number, prefix, suffix, self._clip_norm())
            self._progress.logged += 1
            doublings = math.log2(self._progress.logged)
            step.drawn = doublings > 0 and doublings % 2 == 0
            self._undrawn.send(self._fit.send)
            if step.drawn:
                self._draw()
            if doublings.is_integer():
                self._on_double()

    def _clip_norm(self) -> float | None:
        """The norm that the Trainer clips to, where this is before it and all gradients are counted."""
        if self._when != "before_clip" or not self._fit.module.automatic_optimization:
            return None
        counts_all = self._watched.find_rows().keys() >= self._watched.parameters.keys()
        return clip_limits(self._fit.trainer)[0] if counts_all else None

    def finish(self) -> None:
        """Draws the last report."""
        with self._fit.guard.attempt("log"):
            self._draw()

    def close(self) -> None:
        """Copies nothing any more."""
        if self._local is not None:
            self._local.close()
        self._local = None

    def _draw(self) -> None:
        if self._undrawn is not None:
            self._undrawn.draw(self._fit.send)
        self._undrawn = None

    def _count(
        self, gradients: Mapping[str, Tensor] | None, parts: Mapping[str, Tensor] | None
    ) -> MagnitudeHistogram | None:
        """The histogram of all ranks' parts of the gradients, None where this rank could not count its own."""
        rows, table, fit = self._watched.find_rows(), None, self._fit
        names = list(dict.fromkeys(rows.values()))
        size = len(names) * COLUMNS
        if gradients is not None and parts is not None:
            with fit.guard.attempt("count the gradients"):
                counts = torch.zeros(size + 2, dtype=torch.int64, device=fit.module.device)
                histogram = MagnitudeHistogram.from_table(names, counts[:size].view(len(names), COLUMNS))
                histogram.update({name: part for name, part in parts.items() if name in rows and part.numel()}, rows)
                fit.sums.check(counts, self._watched.replicated(gradients))
                table = counts
        fit.sums.add_up(table, size + 2, NOT_COUNTED)
        if table is None:
            return None
        with fit.guard.attempt("count the gradients"):
            fit.sums.mark_unlike(table, NOT_ALIKE)
        return histogram


def _not_thrown_away(copies: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of gradients without those that ``zero_grad`` has taken away since; zeros where it has left zeros."""
    found: dict[str, Tensor] = {}
    for name, copied in copies.items():
        gradient = parameters[name].grad
        if gradient is not None:
            found[name] = copied.masked_fill(squared_norm([gradient]).to(copied.device) == 0, 0)
    return found
