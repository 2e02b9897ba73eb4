"""What a checkpoint keeps of one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import Tensor

from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.record import OptimizerRecord
from lightning_gradhist.noise.series import METRICS

_MEASURED = ("batch_size", *(f"{kind}_{metric}" for metric in METRICS for kind in ("noise", "signal")))


@dataclass
class Progress:
    """The steps of one optimizer, and the noise measured at them.

    Attributes:
        steps: that it was to take.
        logged: steps that rank zero has logged.
        skipped: steps that the loss scaler skipped; a tensor where only the device knows.
        learning_rates: the highest base rate of each group so far: what a schedule rises to or falls from.
        batch_size: samples of the last step that was measured.
        noise: what was measured.
    """

    steps: int = 0
    logged: int = 0
    skipped: int | Tensor = 0
    learning_rates: list[float] = field(default_factory=list)
    batch_size: int = 0
    noise: NoiseRecord = field(default_factory=NoiseRecord)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Progress:
        """The inverse of :meth:`state_dict`; what is no such state raises."""
        samples = [dict(sample) for sample in state["samples"]]
        if not all({"step", *_MEASURED} <= sample.keys() for sample in samples):
            raise ValueError("a measurement of the noise is not whole")
        return cls(
            int(state["steps"]),
            int(state["logged"]),
            int(state["skipped"]),
            [float(rate) for rate in state["learning_rates"]],
            int(state["batch_size"]),
            NoiseRecord(samples),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "steps": self.steps,
            "logged": self.logged,
            "samples": [dict(sample) for sample in self.noise.samples],
            "learning_rates": list(self.learning_rates),
            "batch_size": self.batch_size,
            "skipped": int(self.skipped),
        }

    def measures(self, batch_size: int, rates: Sequence[float | None]) -> None:
        """Takes down what a record says of a step that is measured: samples and base rates, None where one is no number."""
        known = [rate for rate in rates if rate is not None]
        self.learning_rates = [max(pair) for pair in zip_longest(known, self.learning_rates, fillvalue=0.0)]
        self.batch_size = batch_size

    def record(self, name: str) -> OptimizerRecord:
        """The noise so far, of the optimizer of this class name."""
        noise = {metric: self.noise.estimate(metric) for metric in METRICS}
        return OptimizerRecord(name, self.learning_rates, self.batch_size, noise, list(self.noise.samples))
