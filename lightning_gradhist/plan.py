"""What the record of one run says of other batch sizes: the learning rate, and the steps and samples to the same loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_gradhist.explore import is_number
from lightning_gradhist.learning_rate import SURGE, RateRatio, choose_ratio
from lightning_gradhist.noise.interval import Band, NoiseEstimate
from lightning_gradhist.noise.run_record import OptimizerRecord, RunRecord, finite
from lightning_gradhist.tradeoff import batch_size_tradeoff, critical_batch_size

_HEADER = ("samples a step", "learning rate", "times", "steps to the same loss", "samples to the same loss")


@dataclass(frozen=True)
class PlanRow:
    """What a run at one batch size needs.

    Attributes:
        batch_size: samples of an optimizer step.
        learning_rates: of each parameter group.
        ratio: those rates as a multiple of the recorded ones, with its band, the law and its reasons.
        steps: optimizer steps to the loss that the recorded run ends with; None where the noise scale has no bound.
        samples: likewise.
    """

    batch_size: float
    learning_rates: tuple[float, ...]
    ratio: RateRatio
    steps: Band | None
    samples: Band | None

    @property
    def is_refused(self) -> bool:
        """Whether the record does not support a rate at this batch size, so that the recorded one stands here."""
        return self.ratio.law != SURGE


@dataclass(frozen=True)
class Plan:
    """What the record of a run says of other batch sizes, for one optimizer.

    Attributes:
        optimizer: class of the optimizer.
        learning_rates: of each parameter group of the recorded run.
        batch_size: samples of an optimizer step of the recorded run.
        steps: optimizer steps of the run at that batch size.
        noise: ``B_adam`` over the recorded run, in samples; None where it has none.
        critical: batch size at which half of the samples are spent on noise; None where the noise scale has no bound.
        rows: one a batch size.
    """

    optimizer: str
    learning_rates: tuple[float, ...]
    batch_size: float
    steps: int
    noise: NoiseEstimate | None
    critical: NoiseEstimate | None
    rows: tuple[PlanRow, ...]

    def to_json(self) -> dict[str, Any]:
        """The plan as what JSON can hold; an infinite number is None."""
        content: dict[str, Any] = finite(asdict(self))
        return content

    def to_text(self) -> str:
        """The plan as plain lines, for a console."""
        title = (
            f"{self.optimizer}, recorded at {self.batch_size:,g} samples a step; a run of {self.steps:,} steps there"
        )
        facts = []
        if self.noise is not None:
            facts.append(f"  noise scale {_estimate(self.noise)} ({self.noise.measurements} measurements)")
        if self.critical is not None:
            facts.append(f"  critical batch size {_estimate(self.critical)}: beyond it more samples save few steps")
        lines = aligned([_HEADER, *(_cells(row) for row in self.rows)])
        said = (
            f"{row.batch_size:,g} samples: {reason}" if row.is_refused else reason
            for row in self.rows
            for reason in row.ratio.reasons
        )
        reasons = [f"  - {reason}" for reason in dict.fromkeys(said)]
        if self.critical is None:
            reasons.append("  - steps and samples are not known: the noise scale has no bound; record a longer run")
        return "\n".join([title, *facts, "", *lines, "", *reasons])


def plan(record: RunRecord, batch_sizes: Sequence[float], steps: int | None = None) -> tuple[Plan, ...]:
    """What a recorded run says of other batch sizes, a plan for each of its optimizers; nothing is trained.

    Learning rates are the recorded ones times :func:`lightning_gradhist.learning_rate.choose_ratio`, as
    ``OptimizerCalibration(reference=...)`` sets them for a run of as many samples. Steps and samples are
    :func:`batch_size_tradeoff` of the critical batch size, with the bands of its interval, typically a factor of 1.3 to 3.5.

    Args:
        record: of a run, ``RunRecord.load("lightning_logs/version_3/calibration.json")``.
        batch_sizes: samples of an optimizer step, one at least, positive.
        steps: optimizer steps of the run at the recorded batch size, positive; those of the record by default.

    Raises:
        ValueError: for a number that is not positive, for no batch size, and for a record of no steps without ``steps``.

    Example:
        >>> noise = NoiseEstimate(value=1000.0, lower=800.0, upper=1300.0, confidence=0.95, measurements=200)
        >>> entry = OptimizerRecord("AdamW", [1e-3], batch_size=64, noise={"adam": noise}, samples=[])
        >>> (found,) = plan(RunRecord(model={}, steps=10_000, optimizers=[entry]), [256])
        >>> round(found.rows[0].learning_rates[0], 5), round(found.rows[0].steps.value)
        (0.00169, 5109)
    """
    if not batch_sizes:
        raise ValueError("batch_sizes must have one at least, got none")
    if steps is None and not record.steps:
        raise ValueError("the record is of a run without a step; give steps (--steps), the length of one")
    lengths = [] if steps is None else [("steps", steps)]
    for name, number in lengths + [("batch_sizes", size) for size in batch_sizes]:
        if not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{name} must be positive, got {number!r}")
    return tuple(_plan(entry, batch_sizes, steps or entry.length.made or record.steps) for entry in record.optimizers)


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for a console, its columns flush right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _plan(entry: OptimizerRecord, batch_sizes: Sequence[float], steps: int) -> Plan:
    noise = entry.noise.get("adam")
    critical = critical_batch_size(noise) if noise is not None and noise.bounded else None
    rows = tuple(_row(entry, noise, critical, batch_size, steps) for batch_size in batch_sizes)
    return Plan(entry.name, tuple(entry.learning_rates), entry.batch_size, steps, noise, critical, rows)


def _row(
    entry: OptimizerRecord, noise: NoiseEstimate | None, critical: NoiseEstimate | None, batch_size: float, steps: int
) -> PlanRow:
    ratio = choose_ratio(SURGE, batch_size, entry.batch_size, noise, from_record=True)
    rates = tuple(rate * ratio.value for rate in entry.learning_rates)
    if critical is None:
        return PlanRow(batch_size, rates, ratio, None, None)
    (needs,) = batch_size_tradeoff(critical, entry.batch_size, [batch_size / entry.batch_size])
    return PlanRow(batch_size, rates, ratio, needs.steps.times(steps), needs.samples.times(steps * entry.batch_size))


def _cells(row: PlanRow) -> tuple[str, ...]:
    rates = ", ".join(f"{rate:.3g}" for rate in dict.fromkeys(row.learning_rates)) or "not known"
    times = "refused" if row.is_refused else _band(row.ratio)
    return (f"{row.batch_size:,g}", rates, times, _band(row.steps), _band(row.samples))


def _band(band: Band | None) -> str:
    if band is None:
        return "not known"
    value, lower, upper = map(_number, (band.value, band.lower, band.upper))
    return value if lower == upper else f"{value} ({lower} to {upper})"


def _estimate(noise: NoiseEstimate) -> str:
    upper = f"to {_number(noise.upper)}" if math.isfinite(noise.upper) else "or more"
    return f"{_number(noise.value)} samples, {noise.confidence:.0%}: {_number(noise.lower)} {upper}"


def _number(value: float) -> str:
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"
