"""What a calibration decides from its evidence; nothing here knows a Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_gradhist.callbacks.batch_size import taken_as
from lightning_gradhist.callbacks.calibration import explain
from lightning_gradhist.callbacks.calibration.evidence import Evidence, Options, reference_of
from lightning_gradhist.callbacks.calibration.handoff import rate_factors
from lightning_gradhist.explore import AUTO, explore_choice
from lightning_gradhist.learning_rate import SHORT_RUN, SURGE, RateRatio, choose_ratio, share_of_equal_samples
from lightning_gradhist.logging.calibration_result import CalibrationResult, GroupChange
from lightning_gradhist.noise import NoiseEstimate
from lightning_gradhist.noise.run_record import RunLength

_KEPT = RateRatio(1.0, 1.0, 1.0, "keep")


@dataclass
class Decision:
    """One of the decisions: what is to be changed, why, and what could not be done."""

    changes: list[GroupChange] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def decide(options: Options, evidence: Evidence) -> CalibrationResult:
    """Decides on alpha and explore_beta, on epsilon and on the learning rate."""
    probe = evidence.probe
    clipping = [explain.clipped(*probe.clipping)] if probe.clipping else []
    explore, eps = choose_explore(evidence), decide_epsilon(options, evidence)
    ratio, rate = decide_rate(options, evidence)
    noise, source = known_noise(options, evidence)
    first = evidence.groups[0]
    return CalibrationResult(
        applied=options.apply,
        optimizer=evidence.optimizer,
        epsilon=_after(eps.changes, first.eps),
        epsilon_range=probe.search_space,
        learning_rate=_after(rate.changes, first.lr) if evidence.own_schedule is None else None,
        ratio=ratio.value,
        ratio_interval=(ratio.lower, ratio.upper),
        law=ratio.law,
        noise_scale=noise,
        noise_source=source,
        effective_batch_size=evidence.batch_size,
        reference_batch_size=reference_of(options, evidence.recorded),
        equal_samples_share=ratio.share,
        changes=(*rate.changes, *eps.changes, *explore.changes),
        reasons=(*probe.reasons, *clipping, *eps.reasons, *rate.reasons),
        problems=tuple(dict.fromkeys((*explore.problems, *probe.problems, *eps.problems, *rate.problems))),
        gradients=probe.gradients,
    )


def choose_explore(evidence: Evidence) -> Decision:
    """Adaptor E's two numbers, where they were left on ``"auto"``."""
    waiting = [(index, group.alpha) for index, group in enumerate(evidence.groups) if group.alpha is not None]
    if waiting and evidence.batch_size is None:
        consequence = "alpha and explore_beta stay on their choice for small batches"
        return Decision(problems=[explain.no_batch_size(evidence.why_no_batch_size, consequence)])
    alpha, explore_beta = explore_choice(evidence.batch_size)
    changes = [GroupChange(index, key, AUTO, alpha) for index, key in waiting]
    return Decision(changes + [GroupChange(index, "explore_beta", AUTO, explore_beta) for index, _ in waiting])


def decide_epsilon(options: Options, evidence: Evidence) -> Decision:
    """The epsilon of each group."""
    decision = Decision()
    if options.epsilon == "keep":
        return decision
    if not evidence.has_epsilon:
        by_default = options.epsilon == "auto" and options.learning_rate != "keep"  # which nobody may have asked for
        (decision.reasons if by_default else decision.problems).append(explain.no_epsilon(evidence.optimizer))
        return decision
    space = evidence.probe.search_space
    for index, group in enumerate(evidence.groups):
        before, after = group.eps, group.chosen_eps(options.epsilon, space)
        assert before is not None
        if after != before:
            decision.changes.append(GroupChange(index, "eps", before, after))
        if options.epsilon != "auto":
            continue
        if before < group.least_eps == after:
            decision.reasons.append(explain.epsilon_raised(evidence.optimizer, index, before, after))
        elif space is not None:
            decision.reasons.append(explain.epsilon_chosen(space, index, before, after))
    return decision


def decide_rate(options: Options, evidence: Evidence) -> tuple[RateRatio, Decision]:
    """The ratio of learning rates, and the learning rate of each group."""
    decision = Decision()
    reference, batch_size = reference_of(options, evidence.recorded), evidence.batch_size
    obstacle = _rate_obstacle(options, evidence)
    if obstacle is not None:
        by_default = options.learning_rate == SURGE and reference is None  # which nobody asked for
        (decision.reasons if by_default else decision.problems).append(obstacle)
    if options.learning_rate == "keep" or obstacle is not None or batch_size is None or reference is None:
        return _KEPT, decision
    noise, source = known_noise(options, evidence)
    law, from_record = options.learning_rate, source == "record"
    share, why = _equal_samples(evidence, batch_size, reference)
    ratio = choose_ratio(
        law, batch_size, reference, noise, from_record=from_record, fallback=options.fallback, share=share
    )
    (decision.problems if ratio.law != law else decision.reasons).extend(ratio.reasons)
    decision.reasons.extend([why] if ratio.law == SURGE and batch_size != reference else [])
    decision.reasons.extend(_of_short_runs(evidence))
    if evidence.unconfirmed is not None:
        decision.reasons.append(taken_as(evidence.unconfirmed, "OptimizerCalibration"))
    if evidence.later_accumulation:
        decision.problems.append(explain.accumulation_changes(evidence.accumulation, evidence.later_accumulation))
    bounded, told = _within_first_step(ratio, evidence)
    if law == SURGE:
        ratio = bounded
        decision.reasons.extend([told] if told else [])
    elif evidence.probe.critical is not None and told:  # a law of the user's own choice is used as it is
        decision.problems.append(explain.first_step_by_plain_law(law, ratio.value, evidence.probe.critical))
    own = evidence.own_rates
    trusted, reason = _trusted_rates(evidence, own, ratio) if ratio.law != "keep" else (own, None)
    changes = [
        GroupChange(index, "lr", before, rate * ratio.value)
        for index, (before, rate) in enumerate(zip(own, trusted, strict=True))
        if before > 0 and not math.isclose(rate * ratio.value, before, rel_tol=1e-12)
    ]
    stray = evidence.stray(rate_factors(own, changes)) if changes else None
    if stray is not None:
        decision.problems.append(explain.stray_schedule(stray))
        return _KEPT, decision
    decision.reasons.extend([reason] if reason else [])
    apart = ((rate, before) for rate, before in zip(trusted, own, strict=True) if rate and before)
    far = [pair for pair in apart if max(pair) > explain.FAR * min(pair)]
    decision.problems.extend([explain.recorded_rate_is_far(*far[0])] if far else [])
    decision.changes.extend(changes)
    return ratio, decision


def _equal_samples(evidence: Evidence, batch_size: float, reference: float) -> tuple[float, str]:
    """How near this run is to as many samples as the recorded one, and a sentence on it."""
    steps, recorded = evidence.length.planned, evidence.recorded
    if not steps or recorded is None or not recorded.length.planned:
        return 1.0, explain.equal_samples_assumed(recorded is not None, bool(steps))
    share = share_of_equal_samples(batch_size, reference, steps, recorded.length.planned)
    return share, explain.lengths(steps, recorded.length, share)


def _of_short_runs(evidence: Evidence) -> list[str]:
    """What to know where this run or the recorded one is short."""
    recorded = evidence.recorded.length if evidence.recorded else RunLength()
    runs = (("this run", evidence.length), ("the recorded run", recorded))
    short = [explain.short_run(name, run.planned) for name, run in runs if run.planned and run.planned < SHORT_RUN]
    return short + [explain.never_at_its_peak(name, run.planned) for name, run in runs if run.planned and run.rises]


def known_noise(options: Options, evidence: Evidence) -> tuple[NoiseEstimate | None, str | None]:
    """``B_adam`` and where it is from, ``"record"`` or ``"probe"``; None where there is none."""
    if evidence.recorded is not None and options.learning_rate != "keep":
        return evidence.recorded.noise.get("adam"), "record"
    return evidence.probe.noise, "probe" if evidence.probe.noise is not None else None


def _rate_obstacle(options: Options, evidence: Evidence) -> str | None:
    """What keeps a rate from being carried over, or None."""
    law = options.learning_rate
    if law == "keep":
        return None
    if reference_of(options, evidence.recorded) is None:
        return explain.no_reference(law)
    if evidence.batch_size is None:
        return explain.no_batch_size(evidence.why_no_batch_size, "the learning rate is kept")
    if law == SURGE and not evidence.adaptive:
        return explain.not_adaptive(law, evidence.optimizer)
    if any(group.lr is None for group in evidence.groups):
        return explain.no_rate(evidence.optimizer)
    return None if any(evidence.own_rates) else explain.all_rates_zero()


def _within_first_step(ratio: RateRatio, evidence: Evidence) -> tuple[RateRatio, str | None]:
    """A ratio with which the first step does not raise the loss, and a sentence where it is another.

    It need not be shorter than the first step of the reference, which got along with it.
    """
    critical, recorded, share = evidence.probe.critical, evidence.recorded, evidence.length.first_share
    if critical is None or ratio.law == "keep":
        return ratio, None
    before = recorded.length.first_share if recorded is not None and evidence.recorded_rates is not None else None
    most = max(critical, before / share if before and share else 1.0)
    if most >= ratio.value:
        return ratio, None
    bounded = replace(ratio, value=most, lower=min(ratio.lower, most), upper=min(ratio.upper, most))
    return bounded, explain.first_step(ratio.value, critical, most, bool(before and share))


def _trusted_rates(evidence: Evidence, own: Sequence[float], ratio: RateRatio) -> tuple[Sequence[float], str | None]:
    """The rates that are trusted at the reference, and a sentence on where they are from."""
    recorded, rates = evidence.recorded, evidence.recorded_rates
    if evidence.own_schedule is not None:
        return own, explain.own_schedule(evidence.own_schedule, ratio.value)
    if recorded is None:
        return own, None
    if rates is not None:
        return rates, explain.recorded_rate(ratio.value, rates, own)
    why = f"is of {recorded.name}" if recorded.name != evidence.optimizer else "has other parameter groups"
    why = why if recorded.learning_rates else "tells no learning rate"
    return own, explain.ratio_only(why, evidence.optimizer, own, recorded.batch_size)


def _after(changes: Sequence[GroupChange], otherwise: Any) -> float | None:
    """The value of the first group after changes of one hyper-parameter."""
    found = next((change.after for change in changes if change.group == 0), otherwise)
    return None if found is None else float(found)
