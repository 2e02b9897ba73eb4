"""What a calibration knows before it decides: asked of the Trainer, the optimizer, a record and a probe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import starmap
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks._deepspeed import grouped_parameters, unwrapped
from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.batch_size import SampleCount, effective_batch_size, gradients_a_step
from lightning_gradhist.callbacks.calibration import explain
from lightning_gradhist.callbacks.calibration.scheduler_trial import stray_schedule
from lightning_gradhist.callbacks.gradients import clip_limits, hooks_not_called, rounding_unit
from lightning_gradhist.callbacks.known_optimizers import (
    centered,
    class_name,
    least_epsilon,
    own_clip_norm,
    rule_of,
    starts_with_signs,
)
from lightning_gradhist.callbacks.parameters import optimizer_parameters
from lightning_gradhist.callbacks.probe.first_step import first_step
from lightning_gradhist.callbacks.probe.outcome import agree, on_every_rank, why_failed
from lightning_gradhist.callbacks.probe.probe import Probe, clip_factor, pool
from lightning_gradhist.callbacks.probe.restore import Apart
from lightning_gradhist.callbacks.probe.run import run_probe
from lightning_gradhist.callbacks.run_length import horizons, later_accumulation, own_schedule, run_length
from lightning_gradhist.callbacks.schedulers import base_rates, is_rate
from lightning_gradhist.callbacks.strategies import averages_in_backward, least_over_ranks
from lightning_gradhist.epsilon import EpsilonRange, choose_epsilon, epsilon_range, without_rounding_noise
from lightning_gradhist.explore import AUTO, explore_choice, variance_factor
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.learning_rate import SURGE, Law, PlainLaw, plain_ratio
from lightning_gradhist.noise import NoiseEstimate, NoiseScale, OptimizerRecord
from lightning_gradhist.noise.run_record import RunLength

_TRIED = 4  # batches that the first step is tried on
MIN_BATCHES = 4
"""The fewest batches of a probe: two for a variance, two to measure against."""


class Options(Protocol):
    """What the user of :class:`lightning_gradhist.OptimizerCalibration` asked for."""

    reference_batch_size: int | None
    epsilon: float | Literal["auto", "keep"]
    learning_rate: Law
    probe_batches: int
    apply: bool
    fallback: PlainLaw


@dataclass(frozen=True)
class ParamGroup:
    """What a calibration asks of a parameter group."""

    lr: float | None  # the rate that its schedule is a multiple of; None where that is no number
    eps: float | None  # None where it is no number
    least_eps: float  # the smallest epsilon that it can hold
    alpha: str | None  # key of adaptor E's alpha; None where its two numbers are not to be chosen

    def chosen_eps(self, epsilon: float | str, search_space: EpsilonRange | None) -> float:
        """The epsilon that an option asks for, from a search space where there is one; 0 of a group without."""
        if self.eps is None:
            return 0.0
        if epsilon == "keep":
            return self.eps
        if epsilon != "auto":
            return float(epsilon)
        return max(choose_epsilon(self.eps, search_space) if search_space else self.eps, self.least_eps)


@dataclass
class ProbeFindings:
    """What a probe has found, as far as it came."""

    search_space: EpsilonRange | None = None
    noise: NoiseEstimate | None = None  # B_adam
    gradients: int = 0  # behind them, over all ranks
    clipping: tuple[float, float] | None = None  # norm that gradients are clipped to, and the factor that this makes
    critical: float | None = None  # multiple of the trusted rates, see Probe.critical_factor; None where not known
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evidence:
    """What a calibration is decided from."""

    optimizer: str  # its class
    adaptive: bool  # whether its step is divided by the root of an average of squares, plus its epsilon
    groups: Sequence[ParamGroup]
    batch_size: float | None  # samples of an optimizer step; None if unknown
    parameters: Sequence[str] = ()  # their names, in the order of the groups
    recorded: OptimizerRecord | None = None
    own_schedule: str | None = None  # the class of a scheduler that may make other rates than those of the groups
    stray: Callable[[Sequence[float | None]], str | None] = lambda factors: None  # see handoff.stray_schedule
    why_no_batch_size: str | None = None  # where this rank knows
    unconfirmed: float | None = None  # samples of a batch that were counted, and nobody says the same
    accumulation: int = 1  # micro-batches of a step on one rank
    later_accumulation: Mapping[int, int] = field(default_factory=dict)  # by epoch, where a callback changes it
    length: RunLength = field(default_factory=RunLength)
    probe: ProbeFindings = field(default_factory=ProbeFindings)

    @property
    def has_epsilon(self) -> bool:
        """Whether every group has an epsilon of Adam's kind."""
        return self.adaptive and all(group.eps is not None for group in self.groups)

    @property
    def own_rates(self) -> list[float]:
        """The rate of each group; 0 where it is no number."""
        return [group.lr or 0.0 for group in self.groups]

    @property
    def recorded_rates(self) -> Sequence[float] | None:
        """Those that the record has of the same groups of the same optimizer, or None."""
        if self.recorded is None or self.recorded.name != self.optimizer or self.own_schedule is not None:
            return None
        rates, own, known = self.recorded.learning_rates, self.own_rates, [*self.recorded.parameters]
        begins = known[: len(self.parameters)] == [*self.parameters]
        if begins and len(known) > len(self.parameters):
            rates = rates[: len(own)]  # without groups that came later, as by BackboneFinetuning
        alike = len(rates) == len(own) and not any(r == 0 < before for r, before in zip(rates, own, strict=True))
        in_order = begins or ({*self.parameters} <= {*known} and len({*rates}) == len({*own}) == 1)
        return rates if alike and (in_order or not known) else None


def gather(
    options: Options,
    trainer: Trainer,
    module: LightningModule,
    samples: SampleCount,
    recorded: OptimizerRecord | None,
) -> Evidence:
    """Gathers all there is, with a probe where one is needed; to be called on every rank, when the first batch is counted."""
    optimizer: Optimizer = unwrapped(trainer.optimizers[0])
    adaptive, schedules = rule_of(optimizer).adaptive, horizons(trainer)
    rates = base_rates(optimizer, [scheduler for scheduler, _ in schedules])
    evidence = Evidence(
        optimizer=class_name(optimizer),
        adaptive=adaptive,
        groups=[
            ParamGroup(
                lr=rate,
                eps=float(group["eps"]) if adaptive and is_rate(group.get("eps")) else None,
                least_eps=least_epsilon(optimizer, group),
                alpha=_alpha_key(group) if group.get("explore_beta") == AUTO else None,
            )
            for group, rate in zip(optimizer.param_groups, rates, strict=True)
        ],
        batch_size=effective_batch_size(trainer, samples),
        parameters=[*optimizer_parameters(module, trainer.optimizers[0])],
        recorded=recorded,
        own_schedule=own_schedule(trainer, optimizer),
        stray=partial(stray_schedule, optimizer, schedules),
        length=run_length(trainer, optimizer),
        why_no_batch_size=samples.problem,
        unconfirmed=samples.unconfirmed,
        accumulation=trainer.accumulate_grad_batches,
        later_accumulation=later_accumulation(trainer),
    )
    if needs_probe(options, evidence):
        measurement = _Measurement(options, trainer, evidence, samples)
        why_none = run_probe(trainer, module, options.probe_batches, MIN_BATCHES, measurement.measure)
        if why_none is not None:
            evidence.probe.problems.append(explain.no_probe(why_none))
        evidence = replace(evidence, batch_size=measurement.batch_size, why_no_batch_size=samples.problem)
    return evidence


def needs_probe(options: Options, evidence: Evidence) -> bool:
    """Whether anything that is asked for cannot be decided without a probe."""
    wants_epsilon = options.epsilon == "auto" and evidence.has_epsilon
    wants_noise = options.learning_rate == SURGE and options.reference_batch_size is not None
    return wants_epsilon or (wants_noise and evidence.adaptive and evidence.batch_size is not None)


def reference_of(options: Options, recorded: OptimizerRecord | None) -> float | None:
    """Samples of an optimizer step of the run whose rate is trusted, or None."""
    return recorded.batch_size if recorded else options.reference_batch_size


class _Measurement:
    """The two halves of a probe: the search space of epsilon, then the noise scale in the metric that it gives."""

    def __init__(self, options: Options, trainer: Trainer, evidence: Evidence, samples: SampleCount) -> None:
        self._options, self._trainer, self._evidence = options, trainer, evidence
        self._found, self._samples = evidence.probe, samples
        self.batch_size = evidence.batch_size  # of a step, as far as the batches of the probe tell
        self._micro_batches = gradients_a_step(trainer)
        self._centered: set[str] = set()
        self._reference = reference_of(options, evidence.recorded)

    def measure(self, apart: Apart, planned: int, tick: Callable[[], Any]) -> None:
        """Reads up to ``planned`` batches on each rank."""
        asked = self._options.learning_rate != "keep" and self._reference is not None
        probe = Probe(apart, partial(self._samples.count, self._trainer), tick, _TRIED if asked else 0)
        measured = self._measure_noise(probe, planned)
        if asked and measured is not None:
            self._found.critical = self._critical_factor(probe, *measured)

    def _measure_noise(self, probe: Probe, planned: int) -> tuple[Mapping[str, Tensor], float] | None:
        """Epsilon and noise scale; what is kept of them is the mean gradient, and by how much gradients are clipped."""
        trainer, optimizer = self._trainer, self._trainer.optimizers[0]
        samples = (self._evidence.batch_size or self._micro_batches) / self._micro_batches
        self._centered = centered(optimizer, optimizer_parameters(trainer.lightning_module, optimizer))

        def begin() -> NoiseScale:
            noise = NoiseScale(probe.parameters, samples)
            if trainer.world_size > 1:  # as much as to add them up takes, while none waits for the others there
                [torch.empty_like(mean) for mean in noise.first_half.mean.values() for _ in range(3)]
            return noise

        noise = on_every_rank(trainer, "to hold gradients", begin)

        def read(batches: int) -> None:
            reason = None
            for gradient in probe.gradients(batches):
                try:
                    noise.update(gradient, probe.samples)
                except Exception as error:  # the other ranks are told when all have read their batches
                    reason = why_failed("to hold gradients", error)
            agree(trainer, reason)
            pool(noise, trainer)

        read((planned + 1) // 2)
        if noise.first_half.count < 2:
            too_few = explain.no_probe(f"it needs {MIN_BATCHES} batches, and an epoch has {probe.batches}")
            none = explain.no_gradients(noise.first_half.count, probe.batches)
            self._found.problems.append(too_few if probe.batches < MIN_BATCHES else none)
            self._found.problems.extend(probe.left_out())
            return None
        self._note_batch_size(noise)
        batch_ratio = self._batch_ratio(optimizer.param_groups[0])
        clipping = self._find_search_space(noise, probe, batch_ratio)
        eps = self._chosen_eps(self._evidence.groups[0]) / clipping
        on_every_rank(trainer, "to hold gradients", lambda: noise.split(eps, batch_ratio, self._centered))
        read(planned // 2)
        self._found.noise = noise.adam() if self.batch_size is not None else None
        self._found.gradients = noise.first_half.count + noise.measurements
        if probe.batches < self._options.probe_batches:
            self._found.reasons.append(explain.few_batches(probe.batches))
        self._found.problems.extend(probe.left_out())
        return noise.first_half.mean, clipping

    def _chosen_eps(self, group: ParamGroup) -> float:
        return group.chosen_eps(self._options.epsilon, self._found.search_space)

    def _note_batch_size(self, noise: NoiseScale) -> None:
        """Where batches vary, on any rank, the average over the first half of the probe is what a step has."""
        known = 0.0 if self._samples.problem is not None else 1.0 if self._samples.varies else 2.0
        known = least_over_ranks(known, self._trainer)
        if known == 0:
            self.batch_size = None
        elif known == 1 and self.batch_size is not None:
            mean = noise.batch_size * noise.first_half.weight / noise.first_half.count
            self.batch_size = mean * self._micro_batches
            self._found.reasons.append(explain.batches_vary(self.batch_size))

    def _find_search_space(self, noise: NoiseScale, probe: Probe, batch_ratio: float) -> float:
        """Sets the search space of the gradients that reach the optimizer, and returns by how much they are clipped."""
        to_norm, to_value = clip_limits(self._trainer)
        self._found.reasons.extend(starmap(explain.hook_not_called, hooks_not_called(self._trainer)))
        factor, norms = 1.0, [to_norm, own_clip_norm(self._trainer.optimizers[0])]
        if any(norms):
            square = on_every_rank(self._trainer, "to hold gradients", lambda: self._square(noise, batch_ratio))
            norm = min(filter(None, norms))
            factor = clip_factor(probe.over_shards(square), norm)
            self._found.clipping = (norm, factor)

        def count() -> MagnitudeHistogram:
            moments = noise.first_half.second_moment(batch_ratio, self._centered)
            histogram = MagnitudeHistogram(list(moments), self._trainer.lightning_module.device)
            histogram.update({name: v.sqrt().clamp(max=to_value or math.inf) * factor for name, v in moments.items()})
            return histogram

        histogram = on_every_rank(self._trainer, "to hold gradients", count)
        if averages_in_backward(self._trainer):
            histogram.all_reduce()  # the other ranks have counted other coordinates
        try:
            space = epsilon_range(histogram.to("cpu"))
            # The search space is the paper's; an epsilon is chosen for what is more than rounding noise.
            known = without_rounding_noise(space.histogram, rounding_unit(self._trainer))
            self._found.search_space = replace(space, histogram=known)
        except ValueError as error:
            self._found.problems.append(f"no epsilon range: {error}")
        return factor

    def _square(self, noise: NoiseScale, batch_ratio: float) -> float:
        return math.fsum(float(v.sum()) for v in noise.first_half.second_moment(batch_ratio).values())

    def _critical_factor(self, probe: Probe, means: Mapping[str, Tensor], clipping: float) -> float | None:
        """By how much Adam's first step may be multiplied, with the trusted rates; None where it is another or not known."""
        evidence, optimizer, own = self._evidence, self._trainer.optimizers[0], self._evidence.own_rates
        stepped_with = zip(optimizer.param_groups, own, strict=True)
        shares = [float(group["lr"]) / rate if rate else 0.0 for group, rate in stepped_with]
        if not any(shares) or not starts_with_signs(optimizer):
            return None
        largest = least_over_ranks(self._largest_ratio(), self._trainer)
        if not largest:
            return None
        named = optimizer_parameters(self._trainer.lightning_module, optimizer)
        rates, parameters = evidence.recorded_rates or own, grouped_parameters(optimizer)
        known = {
            id(parameter): (rate * share, self._chosen_eps(group) / clipping)
            for rate, share, group, stepped in zip(rates, shares, evidence.groups, parameters, strict=True)
            for parameter in stepped
        }

        def step() -> dict[str, Tensor]:
            return {name: first_step(mean, *known[id(named[name])]) for name, mean in means.items()}

        return probe.critical_factor(step, largest)

    def _largest_ratio(self) -> float:
        """The largest ratio that may be decided on; 0 where this rank does not know its batch size."""
        options, reference = self._options, self._reference
        if self.batch_size is None or reference is None:
            return 0.0
        laws = ("sqrt", options.fallback) if options.learning_rate == SURGE else (options.learning_rate,)
        return max(1.0, *(plain_ratio(law, self.batch_size, reference) for law in laws))

    def _batch_ratio(self, group: dict[str, Any]) -> float:
        # Adaptor E changes the variance of what enters the second moment; mean and noise scale are the gradient's.
        if "explore_beta" not in group:
            return self._micro_batches
        numbers = group[_alpha_key(group)], group["explore_beta"]
        chosen = explore_choice(self._evidence.batch_size) if AUTO in numbers else numbers
        return self._micro_batches / variance_factor(*chosen)


def _alpha_key(group: dict[str, Any]) -> str:
    """Adaptor E's key in a group where the inner optimizer may have an alpha of its own, as RMSprop has."""
    return "explore_alpha" if "explore_alpha" in group else "alpha"
