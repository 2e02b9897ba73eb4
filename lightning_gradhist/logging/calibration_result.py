"""The result of a calibration, and how it reads. The file ``calibration.json`` is that of ``noise/run_record.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_gradhist.epsilon import EpsilonRange
from lightning_gradhist.noise.interval import Band, NoiseEstimate
from lightning_gradhist.plan import aligned
from lightning_gradhist.tradeoff import TradeoffRow, batch_size_tradeoff, critical_batch_size

_TRADEOFF = "what more GPUs would buy"
_TRADEOFF_HEADER = ("samples a step", "steps to the same loss", "samples to the same loss")


@dataclass(frozen=True)
class GroupChange:
    """One hyper-parameter of one parameter group, before and after.

    Attributes:
        group: index of the parameter group.
        name: key in the group: ``"lr"``, ``"eps"``, ``"alpha"`` (``"explore_alpha"``) or ``"explore_beta"``.
        before: value that the group had.
        after: value that was found.
    """

    group: int
    name: str
    before: float | str
    after: float

    @property
    def factor(self) -> float:
        """What a number was multiplied by."""
        return self.after / float(self.before)


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found, and what it made of it.

    Attributes:
        applied: whether the values were written into the optimizer.
        optimizer: class of the optimizer.
        epsilon: epsilon of the first parameter group; None for an optimizer without.
        epsilon_range: the search spaces, or None where it was not measured.
        learning_rate: base learning rate of the first parameter group; None where a scheduler may make others.
        ratio: that rate as a multiple of the reference's; of the optimizer's own where there is none.
        ratio_interval: the ratio at the two ends of the interval of the noise scale.
        law: name of the law that gave the ratio, after a refusal that of the fallback.
        noise_scale: ``B_adam`` in samples with its interval, or None.
        noise_source: ``"record"``, ``"probe"`` or None.
        effective_batch_size: samples of an optimizer step, or None if unknown.
        reference_batch_size: that of the run whose rate is carried over, or None.
        equal_samples_share: how near this run is to as many samples as that one, 1, from as many steps, 0; 1 where not known.
        changes: what differs from before, group by group.
        reasons: one sentence for each decision that a user may wonder about.
        problems: one sentence for each thing that could not be done, with the way out; they are also warned of.
        gradients: number of gradients that the probe used, over all ranks.
    """

    applied: bool
    optimizer: str
    epsilon: float | None = None
    epsilon_range: EpsilonRange | None = None
    learning_rate: float | None = None
    ratio: float = 1.0
    ratio_interval: tuple[float, float] = (1.0, 1.0)
    law: str = "keep"
    noise_scale: NoiseEstimate | None = None
    noise_source: str | None = None
    effective_batch_size: float | None = None
    reference_batch_size: float | None = None
    equal_samples_share: float = 1.0
    changes: tuple[GroupChange, ...] = ()
    reasons: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    gradients: int = 0

    def tradeoff(self) -> tuple[TradeoffRow, ...]:
        """The steps and the samples that the run would need at 1/8 to 64 times its batch size, relative to now.

        Empty where no noise scale of a recorded run, with a bounded interval, is there to tell.
        """
        if self._why_no_tradeoff() is not None or self.noise_scale is None or self.effective_batch_size is None:
            return ()
        return batch_size_tradeoff(critical_batch_size(self.noise_scale), self.effective_batch_size)

    def _why_no_tradeoff(self) -> str | None:
        if self.noise_scale is None or self.effective_batch_size is None:
            return "it takes a noise scale and the batch size"
        if self.noise_source != "record":
            return (
                "the noise scale of a probe at the start of a run is far too small for it; record a run with"
                " GradientHistogramMonitor"
            )
        if not self.noise_scale.bounded:
            return "the interval of the noise scale has no bound; record a longer run"
        return None

    def rows(self) -> list[tuple[str, str]]:
        """What was found, as names and values."""
        rows = [("optimizer", self.optimizer), ("samples a step", _number(self.effective_batch_size))]
        if self.reference_batch_size is not None:
            rows.append(("samples a step of the reference", _number(self.reference_batch_size)))
        if self.epsilon_range is not None:
            found = self.epsilon_range
            rows.append(("epsilon search space, pooled", f"{found.pooled_lower:g} to {found.pooled_upper:g}"))
            rows.append(("epsilon search space, authors'", f"{found.lower:g} to {found.upper:g}"))
        if self.noise_scale is not None:
            noise, why = self.noise_scale, self._why_no_tradeoff()
            known = math.isfinite(noise.value)
            value = f"{_number(noise.value)} samples" if known else "no signal out of the noise"
            upper = "or more" if math.isinf(noise.upper) else f"to {_number(noise.upper)}"
            interval = f"{noise.confidence:.0%}: {_number(noise.lower)} {upper}"
            rows.append((f"noise scale ({self.noise_source})", f"{value}, {interval}"))
            critical = critical_batch_size(noise)
            spread = f"{_number(critical.lower)} to {_number(critical.upper)}"
            whole = f"{_number(critical.value)} samples, {spread}"
            rows.append(("critical batch size", whole) if why is None else (_TRADEOFF, f"not known: {why}"))
        lower, upper = (f"{ratio:.3g}" for ratio in self.ratio_interval)
        spread = "" if lower == upper else f"; {lower} to {upper}"
        rows.append(("learning rate", f"times {self.ratio:.4g} ({self.law}{spread})"))
        return rows + (self._rows_of_changes() or [("changes", "none")])

    def _rows_of_changes(self) -> list[tuple[str, str]]:
        groups: dict[tuple[str, str], list[str]] = {}
        for change in self.changes:
            before = change.before if isinstance(change.before, str) else f"{change.before:.4g}"
            is_told = change.name != "lr" or self.learning_rate is not None
            told = f"{before} -> {change.after:.4g}" if is_told else f"times {change.factor:.4g}"
            groups.setdefault((change.name, told), []).append(str(change.group))
        return [(f"{name} (group {', '.join(members)})", change) for (name, change), members in groups.items()]

    def to_text(self) -> str:
        """The report as plain lines, for a console."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        title = "Calibration of the optimizer" + ("" if self.applied else " (apply=False: nothing was changed)")
        lines = [title, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        lines += [f"  - {sentence}" for sentence in (*self.problems, *self.reasons)]
        if self.tradeoff():
            lines.append(f"  {_TRADEOFF}, as multiples of now")
            lines += [f"    {line}" for line in aligned(self._tradeoff_table())]
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """The report in Markdown, for a logger."""
        title = "applied" if self.applied else "not applied (apply=False)"
        reasons = "\n".join(f"- {sentence}" for sentence in (*self.problems, *self.reasons))
        report = f"| calibration | {title} |\n|---|---|\n{_markdown(self.rows())}\n\n{reasons}\n"
        if self.tradeoff():
            header, *rows = self._tradeoff_table()
            table = _markdown([header, ("---", "---", "---"), *rows])
            report += f"\n**{_TRADEOFF}**, as multiples of now\n\n{table}\n"
        return report

    def scalars(self) -> dict[str, float]:
        """The numbers of the report by tag; what is not known or not finite is left out."""
        noise = self.noise_scale
        numbers = {
            "calibration/effective_batch_size": self.effective_batch_size,
            "calibration/epsilon": self.epsilon,
            "calibration/learning_rate": self.learning_rate,
            "calibration/learning_rate_ratio": self.ratio,
            "calibration/noise_scale": noise.value if noise else None,
            "calibration/noise_scale_lower": noise.lower if noise else None,
            "calibration/noise_scale_upper": noise.upper if noise else None,
        }
        return {tag: value for tag, value in numbers.items() if value is not None and math.isfinite(value)}

    def _tradeoff_table(self) -> list[Sequence[str]]:
        cells = [(_number(row.batch_size), _band(row.steps), _band(row.samples)) for row in self.tradeoff()]
        return [_TRADEOFF_HEADER, *cells]


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _band(band: Band) -> str:
    return f"{band.value:.3g}" + ("" if band.lower == band.upper else f" ({band.lower:.3g} to {band.upper:.3g})")
