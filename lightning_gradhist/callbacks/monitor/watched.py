"""What the monitor keeps of one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.callbacks.gradients import LocalGradients
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging.writer import HostCopy
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.record import OptimizerRecord
from lightning_gradhist.noise.series import METRICS
from lightning_gradhist.noise.step import measure_pair
from lightning_gradhist.tensors import copies


@dataclass
class Step:
    """A step from ``on_before_optimizer_step`` until the optimizer takes it, if it does."""

    number: int
    """The trainer's ``global_step``."""
    due: bool
    """Whether it is to be logged."""
    histogram: MagnitudeHistogram | None = None


@dataclass
class Held:
    """This rank's part of the first gradient of a pair."""

    step: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor] | None

    def measure(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of noise and signal, as :func:`measure_pair` gives them."""
        if not self.gradients:  # others have all there is
            return torch.zeros(4, dtype=torch.float64)
        return measure_pair(self.gradients, gradients, self.weights)


class Watched:
    """The steps of one optimizer, those that were logged or skipped, and its noise."""

    def __init__(
        self,
        steps: int = 0,
        logged: int = 0,
        samples: list[dict[str, Any]] | None = None,
        learning_rates: list[float] | None = None,
        batch_size: int = 0,
        skipped: int = 0,
    ) -> None:
        self.steps = steps
        self.logged = logged
        self.skipped: int | Tensor = skipped
        """Steps that the loss scaler skipped; a tensor where only the device knows."""
        self.noise = NoiseRecord(samples or [])
        self.learning_rates = learning_rates or []
        """The highest base rate of each group so far: what a schedule, or a warm-up by hand, rises to or falls from."""
        self.batch_size = batch_size
        self.last_step = -1
        self.last_logged: tuple[HostCopy, int] | None = None
        self.begun: Step | None = None
        self.local: LocalGradients | None = None
        self.part: LocalGradients | None = None
        """Of the coming step's first micro-batch on this rank."""
        self.in_pair = False
        """Whether the step before was the first of a pair; the same on all ranks."""
        self.first: Held | None = None
        """None where this rank cannot measure it."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which the constructor takes."""
        return {
            "steps": self.steps,
            "logged": self.logged,
            "samples": [dict(sample) for sample in self.noise.samples],
            "learning_rates": list(self.learning_rates),
            "batch_size": self.batch_size,
            "skipped": int(self.skipped),
        }

    def release(self) -> None:
        """Lets go of what belongs to the model."""
        self.drop_pair()
        self.drop_copies()
        self.last_logged = self.begun = None

    def drop_copies(self) -> None:
        """Copies nothing of the coming step."""
        for awaited in (self.local, self.part):
            if awaited is not None:
                awaited.remove()
        self.local = self.part = None

    def drop_pair(self) -> None:
        """Measures nothing of the step before."""
        self.in_pair, self.first = False, None

    def hold(
        self,
        batch_size: int,
        rates: Sequence[float | None],
        gradients: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        """Keeps this step's gradient for the next one, with the metric of before, which depends on neither."""
        self.note(batch_size, rates)
        held = copies({name: g for name, g in gradients.items() if g.numel()})
        self.first = Held(self.steps, held, None if weights is None else dict(weights))

    def note(self, batch_size: int, rates: Sequence[float | None]) -> None:
        """Takes down what a record says of the steps that were measured."""
        known = [rate for rate in rates if rate is not None]  # an optimizer may make its own
        self.learning_rates = [max(pair) for pair in zip_longest(known, self.learning_rates, fillvalue=0.0)]
        self.batch_size = batch_size

    def record(self, name: str) -> OptimizerRecord:
        """The noise so far, of the optimizer of this class name."""
        noise = {metric: self.noise.estimate(metric) for metric in METRICS}
        return OptimizerRecord(name, self.learning_rates, self.batch_size, noise, list(self.noise.samples))
