"""Writing hyper-parameters into an optimizer and its schedulers, and nothing else of them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lightning_gradhist.callbacks.schedules import (
    base_rates,
    is_pure,
    is_rate,
    parts,
    reached,
    schedulers_of,
    twin,
    unnoticed,
    walk,
)
from lightning_gradhist.logging.calibration_report import GroupChange

_IS_RATE = re.compile(r"_?(\w+_)?(lrs?|learning_rates?|lr_(min|max|init|start|end|final))|eta_m(in|ax)")
"""Names under which groups, schedulers and optimizers keep absolute rates: ``lr``, ``base_lrs``, ``eta_min``, ``final_lr``."""
_FOLLOW = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.CyclicLR,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
)
"""Not tried: they multiply what is scaled, or what they are made of is tried; some call functions of the user's."""


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
    """Makes changes again in what the user's code has made anew.

    Args:
        optimizer: as it is now.
        horizons: schedulers, and how many times each is stepped.
        changes: of a run that goes on.
        restored: which of ``OPTIMIZER`` and ``SCHEDULERS`` a checkpoint has brought back; the others are new.

    Returns:
        What is not in force then, and what would not follow a changed rate, see :func:`stray_schedule`.
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
        scale = _scale_unsaved if SCHEDULERS in restored else _scale_parts
        scale(schedulers_of(optimizer, schedulers), factors)
    _write(optimizer, due)
    _scale(optimizer, [], rate_factors(rates, due))
    rates = base_rates(optimizer, schedulers)

    def in_force(change: GroupChange) -> bool:
        told = (
            is_back and change.name == "lr" and stray_rate(optimizer, schedulers, {change.group: change.after}) is None
        )
        return told or _holds(optimizer, rates, change, change.after)

    return [change for change in changes if change not in there or not in_force(change)], stray


def _holds(optimizer: Optimizer, rates: Sequence[float | None], change: GroupChange, value: float | str) -> bool:
    now = rates[change.group] if change.name == "lr" else optimizer.param_groups[change.group].get(change.name)
    return is_at(now, value)


def apply_changes(optimizer: Optimizer, schedulers: Iterable[Any], changes: Sequence[GroupChange]) -> None:
    """Writes changes into the groups; ``"lr"``, in terms of :func:`base_rates`, scales the whole schedule of its group."""
    factors = rate_factors(base_rates(optimizer, schedulers), changes)
    _write(optimizer, changes)
    _scale(optimizer, schedulers_of(optimizer, schedulers), factors)


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
            factors[change.group] = change.after / float(change.before)
    return factors


def set_defaults(optimizer: Optimizer, changes: Sequence[GroupChange]) -> None:
    """Has groups that are added later, as by ``BackboneFinetuning``, begin with what all groups were changed to."""
    for name in {change.name for change in changes}:
        mine = [change for change in changes if change.name == name]
        if len({change.after for change in mine}) == 1 and optimizer.defaults.get(name) in [c.before for c in mine]:
            optimizer.defaults[name] = mine[0].after


def stray_rate(optimizer: Optimizer, schedulers: Iterable[Any], written: Mapping[int, float]) -> int | None:
    """The first group whose rate is neither the one that was written nor that of a scheduler; None if there is none.

    Rates on another device are not looked at, since that would wait for it, nor are schedulers that do not tell theirs.
    """
    told: list[Any] = [getattr(scheduler, "_last_lr", None) for scheduler in schedulers_of(optimizer, schedulers)]
    if not all(told):
        return None
    for index, rate in written.items():
        now = optimizer.param_groups[index]["lr"]
        if isinstance(now, Tensor) and now.device.type != "cpu":
            continue
        known = [rate, *(float(rates[index]) for rates in told if index < len(rates))]
        if not any(math.isclose(float(now), one, rel_tol=1e-6) for one in known):
            return index
    return None


def stray_schedule(
    optimizer: Optimizer, horizons: Sequence[tuple[Any, float]], factors: Sequence[float | None]
) -> str | None:
    """Which optimizer or scheduler would not follow when the base rates are multiplied, and what it keeps; None if all do.

    An optimizer with rates beside those of its groups does not. Copies of each scheduler are stepped through the run, as
    they are and with all that is recognised multiplied: the ratio of their rates has to be the factor at every step.

    Args:
        optimizer: whose rates are to be multiplied.
        horizons: schedulers, and how many times each is stepped.
        factors: of each group; None where its rate is 0.
    """
    wrapped = [optimizer]
    for one in wrapped:  # which grows
        wrapped += [held for held in vars(one).values() if isinstance(held, Optimizer) and held not in wrapped]
        own = [name for name, rates in _rates(vars(one)).items() if any(rates if isinstance(rates, list) else [rates])]
        if own:
            return f"{type(one).__name__} ({', '.join(sorted(own))})"
    for scheduler, horizon in horizons:
        for part in parts(schedulers_of(optimizer, [scheduler])):
            if any(_looks_at(function, part) for function in getattr(part, "lr_lambdas", ())):
                return f"{type(part).__name__} (lr_lambdas, which look at the optimizer)"
            if not _follows(part, horizon, factors):
                groups = len(factors)  # as many numbers may be rates, whatever their name
                kept = {name for name, value in vars(part).items() if isinstance(value, list) and len(value) == groups}
                kept |= _rates(vars(part)).keys()
                return type(part).__name__ + (f" ({', '.join(sorted(kept))})" if kept else "")
    return None


def _looks_at(function: Any, scheduler: Any) -> bool:
    """Whether a function of a schedule holds or names what has absolute rates, and may take the new one away again.

    That is an optimizer, its groups, or another scheduler.
    """
    groups = scheduler.optimizer.param_groups
    rates = {id(one) for one in (groups, *groups)}
    return any(
        (isinstance(one, (Optimizer, lr_scheduler.LRScheduler)) and one is not scheduler)
        or id(one) in rates
        or (isinstance(one, FunctionType) and "param_groups" in one.__code__.co_names)
        for one in reached(function)
    )


def _follows(scheduler: Any, horizon: float, factors: Sequence[float | None]) -> bool:
    if any(_steps_as(scheduler, kind) for kind in _FOLLOW):
        return True
    if not all(map(is_pure, getattr(scheduler, "lr_lambdas", ()))):
        return False
    expected = _filled(factors)
    # of sums in which the largest rate is a term
    rounding = 1e-9 * max(float(group.get("initial_lr", group["lr"])) for group in scheduler.optimizer.param_groups)
    try:
        with unnoticed():
            plain, scaled = twin(scheduler), twin(scheduler)
            _scale(scaled.optimizer, [scaled], factors)
            return all(
                math.isclose(after, factor * rate, rel_tol=1e-6, abs_tol=rounding * factor)
                for (_, one), (_, other) in zip(walk(plain, horizon), walk(scaled, horizon), strict=True)
                for rate, after, factor in zip(one, other, expected, strict=True)
            )
    except Exception:  # whatever it is, it cannot be tried
        return False


def _steps_as(scheduler: Any, kind: type) -> bool:
    """Whether it is of a class, and leaves its ways of making rates as they are."""
    own = type(scheduler)
    return isinstance(scheduler, kind) and all(
        getattr(own, name, None) is getattr(kind, name, None) for name in ("get_lr", "step")
    )


def _scale(optimizer: Optimizer, schedulers: Sequence[Any], factors: Sequence[float | None]) -> None:
    """Multiplies all rates of groups and of their schedulers; a rate for all groups where their factors are the same."""
    filled = _filled(factors)
    if all(factor == 1.0 for factor in filled):
        return
    _scale_parts(schedulers, factors)
    multiplied: dict[int, float] = {}  # tensors, which groups may share
    for group, factor in zip(optimizer.param_groups, filled, strict=True):
        for key, rate in _rates(group).items():
            if not isinstance(rate, Tensor) or not rate.is_floating_point():
                group[key] = rate * factor
            elif id(rate) not in multiplied:
                rate.detach().mul_(factor)  # in place: captured graphs and compiled steps hold this tensor
                multiplied[id(rate)] = factor
            elif multiplied[id(rate)] != factor:
                group[key] = rate * (factor / multiplied[id(rate)])


def _scale_parts(schedulers: Iterable[Any], factors: Sequence[float | None]) -> None:
    for part in parts(schedulers):
        _scale_part(part, factors)


def _scale_unsaved(schedulers: Iterable[Any], factors: Sequence[float | None]) -> None:
    """Scales the rates that schedulers have not loaded, and are as the user's code made them.

    Which these are, two copies show, of which one loads what the other saves with other rates.
    """
    for scheduler in schedulers:
        with suppress(Exception), unnoticed():  # what cannot be tried stays as it was loaded
            saving, loading = twin(scheduler), twin(scheduler)
            _scale_parts([saving], [2.0] * len(factors))
            loading.load_state_dict(saving.state_dict())
            for part, loaded in list(zip(parts([scheduler]), parts([loading]), strict=True)):
                rates = _rates_of(part)
                _scale_part(part, factors, saved=[name for name in rates if vars(loaded)[name] != rates[name]])


def _scale_part(part: Any, factors: Sequence[float | None], saved: Collection[str] = ()) -> None:
    filled, common = _filled(factors), _common(factors)
    for name, rates in _rates_of(part).items():
        if name in saved:
            continue
        if isinstance(rates, list) and len(rates) == len(filled):
            setattr(part, name, [rate * factor for rate, factor in zip(rates, filled, strict=True)])
        elif common is not None:
            setattr(part, name, [rate * common for rate in rates] if isinstance(rates, list) else rates * common)


def _rates_of(scheduler: Any) -> dict[str, Any]:
    own = _rates(vars(scheduler))
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        own["eps"] = scheduler.eps  # the smallest change of a rate that it makes
    return own


def _common(factors: Sequence[float | None]) -> float | None:
    """The factor of all groups that have one, if it is the same."""
    known = [factor for factor in factors if factor is not None]
    return known[0] if known and math.isclose(min(known), max(known), rel_tol=1e-9) else None


def _filled(factors: Sequence[float | None]) -> list[float]:
    """A group whose rate is 0 keeps it; what a scheduler raises it to goes with the others."""
    common = _common(factors)
    return [(common or 1.0) if factor is None else factor for factor in factors]


def _rates(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The rates in a group, or in the attributes of a scheduler: numbers and lists of numbers."""
    return {
        name: value
        for name, value in attributes.items()
        if _IS_RATE.fullmatch(name) and all(map(is_rate, value if isinstance(value, list) else [value]))
    }
