"""The sentences of a calibration: what was decided and why, and what could not be done, with the way out.

Those of the law itself stand in ``learning_rate.py``.
"""
# ruff: noqa: D103 - each says what it is about

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradhist.callbacks.probe.first_step import FINENESS
from lightning_gradhist.callbacks.schedulers import is_rate
from lightning_gradhist.epsilon import EpsilonRange
from lightning_gradhist.learning_rate import SHORT_RUN
from lightning_gradhist.logging.calibration_result import GroupChange
from lightning_gradhist.noise.run_record import RunLength

FAR = 100
"""Times by which no two rates of one model differ but by mistake."""


def no_batch_size(why: str | None, consequence: str) -> str:
    return (
        f"{why or 'the batch size is not known on another rank'}, so {consequence}; pass the samples of one micro-batch on"
        " one device (under manual optimization, of one step), OptimizerCalibration(batch_size=...)"
    )


def no_probe(why: str) -> str:
    return f"no probe: {why}. What needs one is left as it is (epsilon='keep' asks for none)"


def no_gradients(found: int, batches: int) -> str:
    read = _count(batches, "batch", "batches")
    return f"no probe: of {read} a rank, {found} gave a gradient, and two are needed"


def few_batches(found: int) -> str:
    return f"the probe used all {_count(found, 'batch', 'batches')} of an epoch"


def batches_vary(mean: float) -> str:
    return f"batches vary in size; a step is taken as {mean:.4g} samples, the average over the probe"


def accumulation_changes(now: int, later: Mapping[int, int]) -> str:
    changes = ", ".join(f"{factor} from epoch {epoch} on" for epoch, factor in sorted(later.items()))
    return (
        f"accumulation changes during the run, from {_count(now, 'micro-batch', 'micro-batches')} a step to {changes}; the"
        f" learning rate is for {now}, and stays as it is"
    )


def clipped(limit: float, factor: float) -> str:
    return f"gradients are clipped to a norm of {limit:g}: taken times {factor:.3g}"


def hook_not_called(hook: str, owner: str) -> str:
    return f"the probe does not call {hook} of {owner}: epsilon and noise scale are for gradients without it"


def no_epsilon(optimizer: str) -> str:
    return f"{optimizer} is not known to have an epsilon of Adam's kind, so none is set; pass epsilon='keep'"


def epsilon_raised(optimizer: str, group: int, before: float, after: float) -> str:
    return (
        f"eps {before:g} of group {group} is raised to {after:g}: {optimizer} steps float16 parameters in float16, which"
        " holds nothing below 6e-8 but zero"
    )


def epsilon_chosen(search_space: EpsilonRange, group: int, before: float, after: float) -> str:
    share = _share(search_space.damped_share(before))
    if after == before:
        return f"eps {before:g} of group {group} is kept: it halves the step, or more, of {share} of the coordinates"
    return (
        f"eps {before:g} of group {group} would halve the step, or more, of {share} of the coordinates; lowered to"
        f" {after:g}, where it does so of {_share(search_space.damped_share(after))}"
    )


def no_reference(law: str) -> str:
    return (
        f"learning rate kept: no reference given, and learning_rate={law!r} needs a rate that is trusted; pass"
        " reference_batch_size=... or reference='.../calibration.json'"
    )


def not_adaptive(law: str, optimizer: str) -> str:
    return (
        f"the {law} law is for optimizers like Adam, and {optimizer} is not known to be one, so the rate is kept; pass"
        " learning_rate='linear', 'sqrt' or 'keep'"
    )


def no_rate(optimizer: str) -> str:
    return (
        f"{optimizer} has a group whose lr is no number, as where an optimizer makes its own, so the rate is kept; pass"
        " learning_rate='keep'"
    )


def all_rates_zero() -> str:
    return (
        "every rate is 0 when training begins, and nothing can be multiplied, so the rate is kept; give the optimizer its lr,"
        " and return a scheduler of torch's that multiplies it (LinearLR, LambdaLR) from configure_optimizers, or pass"
        " learning_rate='keep'"
    )


def stray_schedule(which: str) -> str:
    return (
        f"{which} would not follow a changed rate at every step, as far as can be seen, so the rate is kept; set its rates"
        " where it is made, or pass learning_rate='keep'"
    )


def not_in_force(change: GroupChange, groups: Sequence[Mapping[str, Any]], ratio: float | None) -> str:
    if change.group >= len(groups):
        return f"parameter group {change.group}, of which {change.name} was set to {change.after:.4g}, is not there"
    now = groups[change.group].get(change.name)
    told = f"{change.name} of parameter group {change.group} is {f'{float(now):.4g}' if is_rate(now) else repr(now)}"
    is_recorded = change.name == "lr" and ratio is not None and not math.isclose(change.factor, ratio, rel_tol=1e-6)
    if isinstance(change.before, str) or not change.before or is_recorded:
        return f"{told}, and {change.after:.4g} where it is calibrated"
    return f"{told}; calibrated, {change.before:.4g} becomes {change.after:.4g}, so multiply it by {change.factor:.4g}"


def equal_samples_assumed(recorded: bool, knows_steps: bool) -> str:
    if not recorded:
        why = "reference_batch_size alone tells no length; the record of a run does, reference='.../calibration.json'"
    elif knows_steps:
        why = "the record does not tell the length of its run"
    else:
        why = "the length of this run is not known; Trainer(max_steps=...) tells it"
    return f"this run is taken to see as many samples as that of the reference: {why}"


def lengths(steps: int, recorded: RunLength, share: float) -> str:
    told = f"this run is to make {_steps(steps)}, and the recorded one was to make {recorded.planned:,}"
    if recorded.made is not None and recorded.planned is not None and recorded.made < recorded.planned:
        told += f" and made {recorded.made:,} (what was planned counts, as by Trainer(max_steps=...))"
    if round(share, 2) == 1:
        return f"{told}: as at equal samples, the surge law"
    within = "kept between 1 and the fourth root of the ratio of batch sizes"
    if round(share, 2) == 0:
        return f"{told}: as at equal steps, the ratio of the surge law is {within}"
    return f"{told}: {share:.0%} equal samples, the surge law, and the rest equal steps, its ratio {within}"


def short_run(which: str, steps: int) -> str:
    return (
        f"{which} has {_steps(steps)}: below some {SHORT_RUN} the best rates follow no law that is known. On four small workloads"
        " a rate that was carried to or from such a run lost 4% on average, and 45% at worst"
    )


def never_at_its_peak(which: str, steps: int) -> str:
    return (
        f"the warm-up of {which} does not end within its {_steps(steps)}, so the rate that is set is not reached before;"
        " no run behind the law was like that"
    )


def first_step(ratio: float, critical: float, taken: float, knows_reference: bool) -> str:
    if taken == critical:
        limit = ""
    elif knows_reference:
        limit = ", with which it is as long as that of the reference"
    else:
        limit = ", and no lower, as it is not known how the run that is trusted began"
    return (
        f"the law gives times {ratio:.3g}, but {_tried(critical)}. The rate is taken times {taken:.3g}{limit}. A longer"
        " warm-up allows more"
    )


def first_step_by_plain_law(law: str, ratio: float, critical: float) -> str:
    return (
        f"the {law} law gives times {ratio:.3g}, but {_tried(critical)}; make the warm-up longer, or choose another law"
    )


def _tried(critical: float) -> str:
    if not critical:
        return "the first step raises the loss, however short the probe has made it"
    more = f"times {critical * FINENESS:.3g} it raises the loss"
    return f"the probe has tried the first step: {more}, times {critical:.3g} it does not"


def recorded_rate(ratio: float, recorded: Sequence[float], own: Sequence[float]) -> str:
    return (
        f"times {ratio:.4g} of the recorded rate {_rates(recorded)}, which replaces the {_rates(own)} of the optimizer"
    )


def own_schedule(which: str, ratio: float) -> str:
    return (
        f"{which} makes the rates, and they need not be shares of the optimizer's lr, so only the ratio is used: each of them"
        f" times {ratio:.4g}"
    )


def recorded_rate_is_far(recorded: float, own: float) -> str:
    return (
        f"the recorded rate {recorded:.4g} and the {own:.4g} of the optimizer are more than {FAR} times apart, and the record's"
        " is used, as told; where the two runs have other schedules, as one whose function multiplies a rate of 1, pass"
        " learning_rate='keep', or record a run like this one"
    )


def ratio_only(why: str, optimizer: str, own: Sequence[float], batch_size: float) -> str:
    return (
        f"the record {why}, so only the ratio is used: {optimizer}'s own rate {_rates(own)} is taken as right for"
        f" {batch_size:g} samples a step"
    )


def _steps(number: int) -> str:
    return _count(number, "step", "steps")


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _rates(rates: Sequence[float]) -> str:
    said = [f"{rate:.4g}" for rate in rates]
    return said[0] if len(set(said)) == 1 else ", ".join(said)


def _share(share: float) -> str:
    return "less than 0.1%" if share < 5e-4 else f"{share:.1%}"
