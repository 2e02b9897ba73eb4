"""What a calibration decides, from what evidence, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from lightning_gradhist.adapt import WARMUP, AdaptedRatio, warmup_end
from lightning_gradhist.batch_scaling import WEIGHT_DECAY
from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.epsilon_search import EpsilonSearchProbe
from lightning_gradhist.callbacks.gradients import (
    batch_of_rank,
    clips_by_norm,
    effective_batch_size,
    is_a,
    is_sharded,
)
from lightning_gradhist.callbacks.greedy import GreedyProbe
from lightning_gradhist.callbacks.handoff import base_rate, keeps_own_rates
from lightning_gradhist.callbacks.probe import Probe, clip_factor, gradients_a_step, pool
from lightning_gradhist.callbacks.refusal import together
from lightning_gradhist.callbacks.scaling import decay_changes, scaled_changes
from lightning_gradhist.callbacks.session import run_probe
from lightning_gradhist.epsilon import HALF_PRECISION_EPSILON, EpsilonRange, choose_epsilon, epsilon_range
from lightning_gradhist.epsilon_search import SEARCH, EpsilonSearch, candidates
from lightning_gradhist.explore import AUTO, explore_choice, resolve_explore, variance_factor
from lightning_gradhist.greedy import GREEDY, GreedyRate
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.intervals import NoiseEstimate
from lightning_gradhist.noise import NoiseScale
from lightning_gradhist.ratio import RateRatio, choose_ratio
from lightning_gradhist.report.record import OptimizerRecord, RunRecord
from lightning_gradhist.report.result import CalibrationResult, GroupChange
from lightning_gradhist.surge import NOISE_LAWS

MIN_BATCHES = 4
# Optimizers whose step is divided by sqrt(v) + eps, by class, those of other packages too. In others eps is something
# else (Adadelta, Adafactor), or is added to something else (Adamax, AdaBelief).
_ADAM_LIKE = (
    *("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "AdamE", "ALTO"),
    *("FusedAdam", "DeepSpeedCPUAdam", "Adam8bit", "AdamW8bit", "Lamb", "LAMB", "FusedLAMB"),
)
_KEPT = RateRatio(1.0, 1.0, 1.0, "keep")
_HALF_STATE = ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop")  # torch's: state and arithmetic in the parameters' dtype


class Options(Protocol):
    """What the user of :class:`lightning_gradhist.OptimizerCalibration` asked for."""

    reference_batch_size: int | None
    epsilon: float | str
    learning_rate: str
    probe_batches: int
    apply: bool
    batch_size: int | None
    fallback: str
    confidence: float
    adapt: str | None
    scale_with_batch: Sequence[str] | None


class Decision:
    """One calibration: gathers the evidence, decides, and says why.

    Args:
        options: what the user asked for.
        trainer: at its first batch.
        module: at its first batch.
        record: of an earlier run, or None.
    """

    def __init__(self, options: Options, trainer: Trainer, module: LightningModule, record: RunRecord | None) -> None:
        self.options = options
        self.trainer = trainer
        self.module = module
        self.optimizer: Optimizer = trainer.optimizers[0]
        self.recorded: OptimizerRecord | None = record.optimizers[0] if record else None
        self.batch_size = effective_batch_size(trainer, options.batch_size)
        self.micro_batches = gradients_a_step(trainer)
        self.reasons: list[str] = []
        self.problems: list[str] = []
        self.search_space: EpsilonRange | None = None
        self.noise: NoiseScale | None = None
        self.greedy: GreedyRate | None = None
        self.search: EpsilonSearch | None = None
        self.adapted: AdaptedRatio | None = None
        """How the rate goes on from here, None where it stays."""

    def result(self) -> CalibrationResult:
        """Decides."""
        explore = self._explore_changes()
        if self._needs_probe():
            self._probe()
        if self.options.epsilon == SEARCH:
            self._search(explore)
        eps = self._epsilon_changes()
        ratio = self._greedy_ratio((*eps, *explore)) if self.options.learning_rate == GREEDY else self._ratio()
        rates = self._rate_changes(ratio)
        scaled = self._scaled_changes(ratio)
        groups = self.optimizer.param_groups
        noise, source = self._noise()
        return CalibrationResult(
            applied=self.options.apply,
            optimizer=type(self.optimizer).__name__,
            epsilon=_after((*eps, *scaled), "eps", groups[0].get("eps")),
            epsilon_range=self.search_space,
            learning_rate=_after(rates, "lr", base_rate(groups[0])),
            ratio=ratio.value,
            ratio_interval=(ratio.lower, ratio.upper),
            law=ratio.law,
            greedy=self.greedy,
            epsilon_search=self.search,
            noise_scale=noise,
            noise_source=source,
            effective_batch_size=self.batch_size,
            reference_batch_size=self._reference_batch_size(),
            changes=(*rates, *eps, *explore, *scaled),
            reasons=tuple(dict.fromkeys(self.reasons)),  # a second probe says the same again
            problems=tuple(dict.fromkeys(self.problems)),
            gradients=self.noise.first_half.count + self.noise.measurements if self.noise else 0,
        )

    # --- alpha and explore_beta ---------------------------------------------------------------------------------------

    def _explore_changes(self) -> list[GroupChange]:
        waiting = [i for i, group in enumerate(self.optimizer.param_groups) if group.get("explore_beta") == AUTO]
        if waiting and self.batch_size is None:
            self._unknown_batch_size("alpha and explore_beta stay on their choice for small batches")
            return []
        alpha, explore_beta = explore_choice(self.batch_size)
        groups = self.optimizer.param_groups
        changes = [GroupChange(index, _alpha_of(groups[index]), AUTO, alpha) for index in waiting]
        return changes + [GroupChange(index, "explore_beta", AUTO, explore_beta) for index in waiting]

    # --- the probe ----------------------------------------------------------------------------------------------------

    def _needs_probe(self) -> bool:
        wants_epsilon = self._seeks_epsilon() and self._has_epsilon()
        wants_noise = self.options.learning_rate in NOISE_LAWS and self.options.reference_batch_size is not None
        wants_noise |= self.options.adapt is not None
        return wants_epsilon or (wants_noise and self._is_adam_like() and self.batch_size is not None)

    def _probe(self) -> None:
        why_none = run_probe(self.trainer, self.module, self.options.probe_batches, MIN_BATCHES, self._measure)
        if why_none is not None:
            self.problems.append(
                f"no probe: {why_none}. What needs one is left as it is (epsilon='keep' asks for none)"
            )

    def _measure(self, planned: int, tick: Callable[[], Any]) -> None:
        probe = Probe(
            self.trainer, self.module, self.optimizer, batch_of_rank(self.trainer, self.options.batch_size), tick
        )
        samples = (self.batch_size or self.micro_batches) / self.micro_batches
        noise = together(self.trainer, "to hold gradients", lambda: NoiseScale(probe.parameters, samples))
        first = (planned + 1) // 2
        for gradient in probe.gradients(first):
            noise.update(gradient)
        pool(noise, self.trainer)
        if noise.first_half.count < 2:
            self.problems.append(
                f"the probe got {noise.first_half.count} finite gradients from {probe.batches} batches a rank: the loss or"
                " its gradient is not finite, or no parameter has a gradient; look at the first batches with"
                " Trainer(detect_anomaly=True)"
            )
            self.problems.extend(probe.left_out())
            return
        clipping = self._find_search_space(noise, probe)
        eps = self._epsilon_of(self.optimizer.param_groups[0]) / clipping
        together(self.trainer, "to hold gradients", lambda: noise.split(eps, self._batch_ratio()))
        for gradient in probe.gradients(planned - first):
            noise.update(gradient)
        pool(noise, self.trainer)
        self.noise = noise
        self._explain_numbers(probe.batches)
        self.problems.extend(probe.left_out())

    def _explain_numbers(self, batches: int) -> None:
        if batches < self.options.probe_batches:
            self.problems.append(
                f"probe_batches={self.options.probe_batches}, but the loader has {batches} full batches, which were used;"
                f" pass probe_batches={batches}"
            )

    def _find_search_space(self, noise: NoiseScale, probe: Probe) -> float:
        """Sets the search space of the gradients that reach the optimizer, and returns by how much they are clipped."""
        second_moment = noise.first_half.second_moment(self._batch_ratio())
        rms = {name: v.sqrt() for name, v in second_moment.items()}
        factor, limit = 1.0, self.trainer.gradient_clip_val
        if limit:
            if clips_by_norm(self.trainer):
                square = math.fsum(float(v.sum()) for v in second_moment.values())
                factor = clip_factor(probe.over_shards(square), limit)
                rms = {name: r * factor for name, r in rms.items()}
                self.reasons.append(f"gradients are clipped to a norm of {limit:g}: taken times {factor:.3g}")
            else:
                rms = {name: r.clamp(max=limit) for name, r in rms.items()}
        with self.module.device:
            histogram = MagnitudeHistogram(list(rms))
        histogram.update(rms)
        if is_sharded(self.trainer):
            histogram.sync()  # the other ranks have counted other coordinates
        try:
            self.search_space = epsilon_range(histogram.cpu())
        except ValueError as error:
            self.problems.append(f"no epsilon range: {error}")
        return factor

    def _batch_ratio(self) -> float:
        # Adaptor E changes the variance of what enters the second moment; mean and noise scale are the gradient's.
        group = self.optimizer.param_groups[0]
        if "explore_beta" not in group:
            return self.micro_batches
        alpha, explore_beta = group[_alpha_of(group)], group["explore_beta"]
        waiting = explore_beta == AUTO and self.batch_size is not None
        chosen = explore_choice(self.batch_size) if waiting else resolve_explore(alpha, explore_beta)
        return self.micro_batches / variance_factor(*chosen)

    # --- epsilon ------------------------------------------------------------------------------------------------------

    def _is_adam_like(self) -> bool:
        return is_adam_like(self.optimizer)

    def _has_epsilon(self) -> bool:
        groups = self.optimizer.param_groups
        return self._is_adam_like() and all(isinstance(group.get("eps"), (int, float)) for group in groups)

    def _seeks_epsilon(self) -> bool:
        return self.options.epsilon in ("auto", SEARCH)

    def _epsilon_of(self, group: dict[str, Any]) -> float:
        if not self._has_epsilon():
            return 0.0
        if self.search is not None:
            chosen = self.search.chosen
            return max(chosen.candidate.eps if chosen else group["eps"], self._epsilon_floor(group))
        if self._seeks_epsilon():
            chosen_by_auto = choose_epsilon(group["eps"], self.search_space) if self.search_space else group["eps"]
            return max(chosen_by_auto, self._epsilon_floor(group))
        return group["eps"] if self.options.epsilon == "keep" else float(self.options.epsilon)

    def _search(self, explore: Sequence[GroupChange]) -> None:
        """Tries other epsilons in short runs, or says why not; what is not found out is chosen as ``"auto"`` does."""
        if not self._has_epsilon() or self.search_space is None:
            return  # which is said already
        groups = self.optimizer.param_groups
        floor = max(self._epsilon_floor(group) for group in groups)
        start = [max(group["eps"], self._epsilon_floor(group)) for group in groups]
        tried = candidates(start[0], self.search_space, floor)
        why_none = self._why_no_search()
        if why_none is None and tried:
            raised = [
                GroupChange(i, "eps", group["eps"], eps)
                for i, (group, eps) in enumerate(zip(groups, start, strict=True))
            ]
            probe = EpsilonSearchProbe(self.trainer, self.module, (*explore, *raised), self.options.batch_size)
            probe.run(start[0], tried, self.options.confidence)
            self.problems.extend(probe.left_out)
            why_none = probe.why_none
            assumed = self._epsilon_of(groups[0])
            self.search = probe.found
            if self.noise is not None and self._epsilon_of(groups[0]) != assumed:
                self._probe()  # the noise scale depends on it
        if not tried:
            self.reasons.append("the search for epsilon found nothing to try: no other power of ten makes a difference")
        if why_none is not None:
            self.problems.append(f"no search for epsilon: {why_none}. It is chosen as by epsilon='auto' instead")
        self.reasons.extend(_why_searched(self.search) if self.search else ())

    def _why_no_search(self) -> str | None:
        owner = self._keeper_of_rates()
        if owner:
            return f"{owner} keeps base rates that cannot be scaled from outside"
        if is_a(self.optimizer, "RAdam"):
            return "RAdam's first steps are without epsilon, so that those of a short run cannot be made equally large"
        own = dict.fromkeys(f"{group['eps']:g}" for group in self.optimizer.param_groups)
        return (
            f"the groups have epsilons of their own ({', '.join(own)}), and it tries one for all"
            if len(own) > 1
            else None
        )

    def _epsilon_floor(self, group: dict[str, Any]) -> float:
        # torch's own steps in half precision, where a smaller epsilon becomes 0, unless it is fused.
        in_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
        steps_in_half = in_half and not group.get("fused") and is_a(self.optimizer, *_HALF_STATE)
        return HALF_PRECISION_EPSILON if steps_in_half else 0.0

    def _epsilon_changes(self) -> list[GroupChange]:
        if self.options.epsilon == "keep":
            return []
        if not self._has_epsilon():
            self.problems.append(
                f"{type(self.optimizer).__name__} is not known to have an epsilon of Adam's kind, so none is set; pass"
                " epsilon='keep'"
            )
            return []
        changes = []
        for index, group in enumerate(self.optimizer.param_groups):
            after = self._epsilon_of(group)
            if after != group["eps"]:
                changes.append(GroupChange(index, "eps", group["eps"], after))
            raised = self._epsilon_floor(group) > group["eps"] and after == self._epsilon_floor(group)
            if raised and self._seeks_epsilon():
                self.reasons.append(
                    f"eps {group['eps']:g} of group {index} is raised to {after:g}: {type(self.optimizer).__name__} steps"
                    " float16 parameters in float16, which holds nothing below 6e-8 but zero"
                )
            elif self._seeks_epsilon() and self.search is None and self.search_space is not None:
                self.reasons.append(_why_epsilon(self.search_space, index, group["eps"], after))
        return changes

    # --- learning rate ------------------------------------------------------------------------------------------------

    def _reference_batch_size(self) -> float | None:
        return self.recorded.batch_size if self.recorded else self.options.reference_batch_size

    def _ratio(self) -> RateRatio:
        law, reference = self.options.learning_rate, self._reference_batch_size()
        obstacle = self._rate_obstacle(law, reference)
        if law == "keep" or obstacle is not None or self.batch_size is None or reference is None:
            self.problems.extend([obstacle] if obstacle else [])
            return _KEPT
        noise, source = self._noise()
        ratio = choose_ratio(
            law, self.batch_size, reference, noise, from_record=source == "record", fallback=self.options.fallback
        )
        (self.problems if ratio.law != law else self.reasons).extend(ratio.reasons)
        return ratio if self.options.adapt is None else self._adapted_ratio(ratio, self.batch_size, reference)

    def _adapted_ratio(self, ratio: RateRatio, batch_size: float, reference: float) -> RateRatio:
        """Where a rate that follows the noise scale starts; the ratio over a recorded run is where a warm-up ends."""
        law, mode = self.options.learning_rate, self.options.adapt
        assert mode is not None
        recorded = None
        if self.recorded is not None and ratio.law == law:
            noise = self.noise.adam(self.options.confidence) if self.noise else None
            probed, recorded = choose_ratio(law, batch_size, reference, noise), ratio
            farther = abs(math.log(probed.value)) > abs(math.log(recorded.value))
            ratio = recorded if probed.law != law or (mode == WARMUP and farther) else probed
        end = warmup_end(batch_size, reference, recorded.value if recorded else None)
        self.adapted = AdaptedRatio(law, mode, batch_size, reference, ratio.value, end, ratio.value)
        self.reasons.append(
            f"adapt={mode!r}: the rate starts at {ratio.value:.4g} times the reference's and follows the noise scale"
            + (f", as far as {end:.4g} times" if mode == WARMUP else "")
        )
        return ratio

    def _rate_obstacle(self, law: str, reference: float | None) -> str | None:
        if law == "keep":
            return None
        if reference is None:
            return (
                f"learning_rate={law!r} needs a rate that is trusted, so the rate is kept; pass reference_batch_size=... or"
                " reference='.../calibration.json', or learning_rate='keep'"
            )
        if self.batch_size is None:
            self._unknown_batch_size("the learning rate is kept")
            return None
        if law in NOISE_LAWS and not self._is_adam_like():
            return (
                f"the {law} law is for optimizers like Adam, and {type(self.optimizer).__name__} is not known to be one, so"
                " the rate is kept; pass learning_rate='linear', 'sqrt' or 'keep'"
            )
        return self._scheduler_obstacle()

    def _scheduler_obstacle(self) -> str | None:
        owner = self._keeper_of_rates()
        if owner:
            return (
                f"{owner} keeps base rates that cannot be scaled from outside, so the rate is kept; set it where the"
                " scheduler is made, or pass learning_rate='keep'"
            )
        return None

    def _keeper_of_rates(self) -> str | None:
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        return next((type(scheduler).__name__ for scheduler in schedulers if keeps_own_rates(scheduler)), None)

    def _greedy_ratio(self, changes: Sequence[GroupChange]) -> RateRatio:
        obstacle = self._scheduler_obstacle()
        if obstacle is not None:
            self.problems.append(obstacle)
            return _KEPT
        probe = GreedyProbe(self.trainer, self.module, changes, self.options.batch_size)
        probe.run(self.options.probe_batches, self.options.confidence)
        self.problems.extend(probe.left_out)
        self.greedy = probe.rate
        if probe.rate is None:
            self.problems.append(
                f"no greedy learning rate: {probe.why_none}. The rate is kept (learning_rate='keep' asks for none)"
            )
            return _KEPT
        self.reasons.append(
            f"greedy learning rate by the loss along {probe.rate.steps} of the optimizer's own steps ({probe.gradients}"
            f" gradients and {probe.forwards} forward passes): the best for one step from these weights; a run is often best"
            " at another"
        )
        value, lower, upper = (rate / probe.base for rate in (probe.rate.value, probe.rate.lower, probe.rate.upper))
        return RateRatio(value, lower, upper, GREEDY)

    def _noise(self) -> tuple[NoiseEstimate | None, str | None]:
        if self.recorded is not None and self.options.learning_rate != "keep":
            return self.recorded.noise.get("adam"), "record"
        if self.noise is None or self.batch_size is None:
            return None, None
        return self.noise.adam(self.options.confidence), "probe"

    def _rate_factor(self) -> float:
        """That of the epsilon search; a greedy rate was found with the epsilon that was chosen, and needs none."""
        chosen = self.search.chosen if self.search else None
        return chosen.factor if chosen and self.greedy is None else 1.0

    def _rate_changes(self, ratio: RateRatio) -> list[GroupChange]:
        own = [base_rate(group) for group in self.optimizer.param_groups]
        trusted = self._trusted_rates(own, ratio.value) if ratio.law != "keep" else own
        times = ratio.value * self._rate_factor()
        return [
            GroupChange(index, "lr", before, rate * times)
            for index, (before, rate) in enumerate(zip(own, trusted, strict=True))
            if before > 0 and not math.isclose(rate * times, before, rel_tol=1e-12)
        ]

    def _trusted_rates(self, own: Sequence[float], ratio: float) -> Sequence[float]:
        if self.recorded is None:
            return own
        name, recorded = type(self.optimizer).__name__, self.recorded
        mine, theirs = (_rates(rates) for rates in (own, recorded.learning_rates))
        if recorded.name == name and len(recorded.learning_rates) == len(own):
            self.reasons.append(
                f"times {ratio:.4g} of the recorded rate {theirs}, which replaces the {mine} of the optimizer"
            )
            return recorded.learning_rates
        why = f"is of {recorded.name}" if recorded.name != name else "has other parameter groups"
        self.reasons.append(
            f"the record {why}, so only the ratio is used: {name}'s own rate {mine} is taken as right for"
            f" {recorded.batch_size:g} samples a step"
        )
        return own

    # --- what else goes with the batch size ---------------------------------------------------------------------------

    def _scaled_changes(self, ratio: RateRatio) -> list[GroupChange]:
        """Those, and the weight decay that goes with the learning rate of an epsilon that was searched for."""
        names, reference = self.options.scale_with_batch or (), self._reference_batch_size()
        factor = self._rate_factor()
        changes: list[GroupChange] = []
        if names and self.batch_size is None:
            self._unknown_batch_size("nothing is scaled with it")
            names = ()
        if names and self.batch_size is not None and reference is not None:
            batch_ratio = self.batch_size / reference
            changes, reasons = scaled_changes(
                self.optimizer, names, batch_ratio, ratio.value * factor, self._epsilon_floor
            )
            self.reasons.extend(reasons)
        return changes if WEIGHT_DECAY in names else [*changes, *decay_changes(self.optimizer, factor)]

    def _unknown_batch_size(self, consequence: str) -> None:
        self.problems.append(
            f"the batch size cannot be read from the training loader, or not under manual optimization, so {consequence};"
            " pass the samples of one micro-batch on one device (under manual optimization, of one step),"
            " OptimizerCalibration(batch_size=...)"
        )


def is_adam_like(optimizer: Optimizer) -> bool:
    """Whether an optimizer's step is divided by the root of an average of squares, plus its epsilon."""
    return is_a(optimizer, *_ADAM_LIKE)


def _alpha_of(group: dict[str, Any]) -> str:
    """Adaptor E's key in a group where the inner optimizer may have an alpha of its own, as RMSprop has."""
    return "explore_alpha" if "explore_alpha" in group else "alpha"


def _why_epsilon(search_space: EpsilonRange, index: int, before: float, after: float) -> str:
    share = _share(search_space.damped_share(before))
    if after == before:
        return f"eps {before:g} of group {index} is kept: it halves the step, or more, of {share} of the coordinates"
    return (
        f"eps {before:g} of group {index} would halve the step, or more, of {share} of the coordinates; lowered to"
        f" {after:g}, where it does so of {_share(search_space.damped_share(after))}"
    )


def _rates(rates: Sequence[float]) -> str:
    said = [f"{rate:.4g}" for rate in rates]
    return said[0] if len(set(said)) == 1 else ", ".join(said)


def _share(share: float) -> str:
    return "less than 0.1%" if share < 5e-4 else f"{share:.1%}"


def _why_searched(search: EpsilonSearch) -> list[str]:
    chosen, present = search.chosen, f"eps {search.present:g}"
    runs = f"{search.trajectories} short runs of {search.steps} steps for each"
    cost = f"{search.gradients} gradients and {search.forwards} forward passes"
    if chosen is not None:
        outcome = (
            f"{chosen.candidate.eps:g} at {chosen.factor:.4g} times the learning rate replaces {present}: its loss after"
            f" {search.steps} steps is lower by {-chosen.to_present.value:.3g} (by {-chosen.to_present.upper:.3g} at least,"
            f" with {search.confidence:.0%} confidence), and at no other rate that was tried is {present} as good"
        )
    else:
        by_rate = [trial for trial in search.trials if trial.to_present.upper < 0]
        outcome = f"{present} stays: none of the others is better with {search.confidence:.0%} confidence"
        if by_rate:
            names = ", ".join(f"{trial.candidate.eps:g}" for trial in by_rate)
            outcome = (
                f"{present} stays: {names} {'is' if len(by_rate) == 1 else 'are'} better after {search.steps} steps, but not"
                f" than {present} at {search.control:.3g} times the learning rate; what another rate buys is not epsilon's"
            )
    return [
        outcome,
        f"the search for epsilon took {cost}, {runs} at the optimizer's own rate; it knows of the first steps alone",
    ]


def _after(changes: Sequence[GroupChange], name: str, otherwise: Any) -> float | None:
    found = next((change.after for change in changes if change.group == 0 and change.name == name), otherwise)
    return float(found) if isinstance(found, (int, float)) else None
