"""Writing hyper-parameters into an optimizer and its schedulers, once, and again into what is made anew."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks.calibration.rates import scale_rates, scale_schedulers, scale_unsaved
from lightning_gradhist.callbacks.calibration.scheduler_trial import stray_schedule
from lightning_gradhist.callbacks.schedulers import base_rates, is_rate, schedulers_of, stray_rate
from lightning_gradhist.logging.calibration_result import GroupChange

OPTIMIZER, SCHEDULERS = "optimizer_states", "lr_schedulers"
"""What a checkpoint brings back, by Lightning's names."""


def is_at(now: Any, value: float | str) -> bool:
    """Whether two values are the same but for rounding."""
    if isinstance(value, str) or not is_rate(now):
        return bool(now == value)
    return math.isclose(float(now), value, rel_tol=1e-6)


def take_up(
    optimizer: Optimizer,
    horizons: Sequence[tuple[Any, float]],
    changes: Sequence[GroupChange],
    restored: Collection[str],
) -> tuple[list[GroupChange], str | None]:
    """Makes changes again in what the user's code has made anew, of ``OPTIMIZER`` and ``SCHEDULERS`` what is not ``restored``.

    ``horizons`` are schedulers, and how many times each is stepped. What is returned is not in force then, and what would
    not follow a changed rate, see :func:`stray_schedule`.
    """
    schedulers = [scheduler for scheduler, _ in horizons]
    rates, is_back = base_rates(optimizer, schedulers), OPTIMIZER in restored
    there = [change for change in changes if change.group < len(rates)]
    due = [change for change in there if _holds(optimizer, rates, change, change.before)]
    if is_back:  # a rate may have fallen to what it was before
        due = [change for change in due if change.name != "lr"]
    followed = [change for change in (there if is_back else due) if change.name == "lr"]  # by schedulers
    factors, stray = rate_factors(rates, followed), None
    if followed and not {OPTIMIZER, SCHEDULERS} <= {*restored}:
        stray = stray_schedule(optimizer, horizons, factors)
    if stray is not None:
        due = [change for change in due if change.name != "lr"]
    elif followed:
        scale = scale_unsaved if SCHEDULERS in restored else scale_schedulers
        scale(schedulers_of(optimizer, schedulers), factors)
    _write(optimizer, due)
    scale_rates(optimizer, [], rate_factors(rates, due))
    rates = base_rates(optimizer, schedulers)

    def in_force(change: GroupChange) -> bool:
        if not is_back or change.name != "lr":
            return _holds(optimizer, rates, change, change.after)
        # A rate that a checkpoint brought back is the run's own, whatever it has become; but for the one of before.
        is_before = _holds(optimizer, rates, change, change.before)
        return not is_before or stray_rate(optimizer, schedulers, {change.group: change.after}) is None

    return [change for change in changes if change not in there or not in_force(change)], stray


def _holds(optimizer: Optimizer, rates: Sequence[float | None], change: GroupChange, value: float | str) -> bool:
    now = rates[change.group] if change.name == "lr" else optimizer.param_groups[change.group].get(change.name)
    return is_at(now, value)


def apply_changes(optimizer: Optimizer, schedulers: Iterable[Any], changes: Sequence[GroupChange]) -> None:
    """Writes changes into the groups; ``"lr"``, in terms of :func:`base_rates`, scales the whole schedule of its group."""
    factors = rate_factors(base_rates(optimizer, schedulers), changes)
    _write(optimizer, changes)
    scale_rates(optimizer, schedulers_of(optimizer, schedulers), factors)


def _write(optimizer: Optimizer, changes: Iterable[GroupChange]) -> None:
    for change in changes:
        if change.name != "lr":
            group = optimizer.param_groups[change.group]
            was = group.get(change.name)
            group[change.name] = was.new_tensor(change.after) if isinstance(was, Tensor) else change.after


def rate_factors(rates: Sequence[float | None], changes: Sequence[GroupChange]) -> list[float | None]:
    """What changes multiply the base rate of each group by; None where it is 0 or no number."""
    factors: list[float | None] = [1.0 if rate else None for rate in rates]
    for change in changes:
        if change.name == "lr":
            factors[change.group] = change.factor
    return factors


def set_defaults(optimizer: Optimizer, changes: Sequence[GroupChange]) -> None:
    """Has groups that are added later, as by ``BackboneFinetuning``, begin with what all groups were changed to."""
    for name in {change.name for change in changes}:
        mine = [change for change in changes if change.name == name]
        if len({change.after for change in mine}) == 1 and optimizer.defaults.get(name) in [c.before for c in mine]:
            optimizer.defaults[name] = mine[0].after
