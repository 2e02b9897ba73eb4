"""What a checkpoint keeps of one optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from torch import Tensor

from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.noise_record import METRICS
from lightning_gradhist.noise.run_record import OptimizerRecord, RunLength

_MEASURED = ("batch_size", *(f"{kind}_{metric}" for metric in METRICS for kind in ("noise", "signal")))


def likeness(key: str, other: str) -> int:
    """How many arguments are the same in two monitors' keys of a checkpoint, less those that differ."""
    mine = key.rstrip("]").partition("[")[2].split(",")
    return sum((part in other) - (part not in other and part.partition("=")[0] + "=" in other) for part in mine)


@dataclass
class Progress:
    """The steps of one optimizer, and the noise measured at them.

    Attributes:
        steps: that it was to take.
        logged: steps that rank zero has logged.
        skipped: steps that the loss scaler skipped; a tensor where only the device knows.
        learning_rates: the highest base rate of each group so far: what the schedule rises to or falls from.
        batch_size: samples of a step, of which a checkpoint told.
        noise: what was measured.
        length: of the run, as it was planned.
        repeats: pairs of steps of this fit that have the same samples; not in a checkpoint.
        tells_rates: whether the base rates of this fit are those that it trains with; not in a checkpoint.
        logged_before: steps that were logged before this fit.
    """

    steps: int = 0
    logged: int = 0
    skipped: int | Tensor = 0
    learning_rates: list[float] = field(default_factory=list)
    batch_size: float = 0
    noise: NoiseRecord = field(default_factory=NoiseRecord)
    length: RunLength = field(default_factory=RunLength)
    repeats: int = 0
    tells_rates: bool = True
    logged_before: int = 0

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
            float(state["batch_size"]),
            NoiseRecord(samples),
            RunLength.read(state.get("length", {})),
            logged_before=int(state["logged"]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {
            "steps": self.steps,
            "logged": self.logged,
            "samples": [dict(sample) for sample in self.noise.samples],  # before the batch size, which they tell
            "learning_rates": list(self.learning_rates),
            "batch_size": self.last_batch_size,
            "skipped": int(self.skipped),
            **({"length": asdict(self.length)} if self.length != RunLength() else {}),
        }

    def snapshot(self) -> Progress:
        """A copy that training does not change, made without waiting for a device."""
        return replace(self, noise=self.noise.snapshot(), learning_rates=list(self.learning_rates))

    @property
    def last_batch_size(self) -> float:
        """Samples that a step has as a rule, by the last measurement."""
        return self.noise.batch_size or self.batch_size

    def measures(self, rates: Sequence[float | None]) -> None:
        """Takes down the base rates of a step that is measured; of all groups, or of none where one is no number."""
        known = [rate for rate in rates if rate is not None]
        if self.tells_rates and len(known) == len(rates):
            self.learning_rates = [max(pair) for pair in zip_longest(known, self.learning_rates, fillvalue=0.0)]

    def forget_rates(self) -> None:
        """Tells neither rates nor their schedule: others than those that are known have made them."""
        self.tells_rates, self.learning_rates, self.length = False, [], RunLength(self.length.planned)

    def record(self, name: str, parameters: Sequence[str]) -> OptimizerRecord:
        """The noise so far, of the optimizer of this class name and of these parameters."""
        noise = {metric: self.noise.estimate(metric) for metric in METRICS}
        samples = list(self.noise.samples)
        rates, size = self.learning_rates, self.last_batch_size
        length = replace(self.length, made=self.steps)
        return OptimizerRecord(name, rates, size, noise, samples, list(parameters), length)
