"""Writing hyper-parameters into an optimizer and its schedulers, and nothing else of them."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lightning_gradhist.callbacks._lightning import isolate_rng
from lightning_gradhist.callbacks.optimizers import innermost
from lightning_gradhist.logging.calibration_report import GroupChange

_IS_RATE = re.compile(r"_?(\w+_)?(lrs?|lr_m(in|ax))|eta_m(in|ax)")
"""Names under which groups and schedulers keep absolute rates: ``lr``, ``base_lrs``, ``eta_min``, ``warmup_start_lr``."""
_FOLLOW = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.CyclicLR,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
)
"""Not tried: they multiply what is scaled, or what they are made of is tried; some call functions of the user's."""
_ONE_BY_ONE = 2048


def base_rates(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[float | None]:
    """The learning rate of each group that its schedule is a multiple of: OneCycleLR's maximum, the initial or the only.

    What a scheduler has left in a group that is no longer in use counts for nothing. None where it is no number.
    """
    used = list(_parts(_of(optimizer, schedulers)))
    one_cycle = any(isinstance(scheduler, lr_scheduler.OneCycleLR) for scheduler in used)
    scheduled = any(hasattr(scheduler, "base_lrs") for scheduler in used)
    key = "max_lr" if one_cycle else "initial_lr" if scheduled else "lr"
    rates = [group.get(key, group["lr"]) for group in optimizer.param_groups]
    return [float(rate) if _is_number(rate) else None for rate in rates]


def holds_before(optimizer: Optimizer, schedulers: Iterable[Any], change: GroupChange) -> bool:
    """Whether a change is still to be made."""
    if change.group >= len(optimizer.param_groups):
        return False
    if change.name == "lr":
        return base_rates(optimizer, schedulers)[change.group] == change.before
    return bool(optimizer.param_groups[change.group].get(change.name) == change.before)


def apply_changes(optimizer: Optimizer, schedulers: Iterable[Any], changes: Sequence[GroupChange]) -> None:
    """Writes changes into the groups; ``"lr"``, in terms of :func:`base_rates`, scales the whole schedule of its group."""
    factors = rate_factors(base_rates(optimizer, schedulers), changes)
    for change in changes:
        if change.name != "lr":
            optimizer.param_groups[change.group][change.name] = change.after
    _scale(optimizer, _of(optimizer, schedulers), factors)


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
        values = {(change.before, change.after) for change in changes if change.name == name}
        before, after = values.pop()
        if not values and optimizer.defaults.get(name) == before:
            optimizer.defaults[name] = after


def stray_schedule(
    optimizer: Optimizer, horizons: Sequence[tuple[Any, float]], factors: Sequence[float | None]
) -> str | None:
    """Which scheduler would not follow when the base rates are multiplied, and what it keeps; None if all do.

    Copies of each are stepped through the run, as they are and with all that is recognised multiplied: the ratio of
    their rates has to be the factor at every step.

    Args:
        optimizer: whose rates are to be multiplied.
        horizons: schedulers, and how many times each is stepped.
        factors: of each group; None where its rate is 0.
    """
    for scheduler, horizon in horizons:
        for part in _parts(_of(optimizer, [scheduler])):
            if type(part) not in _FOLLOW and not _follows(part, horizon, factors):
                groups = len(factors)  # as many numbers may be rates, whatever their name
                kept = [name for name, value in vars(part).items() if isinstance(value, list) and len(value) == groups]
                return f"{type(part).__name__} ({', '.join(sorted({*kept, *_rates(vars(part))}))})"
    return None


def _follows(scheduler: Any, horizon: float, factors: Sequence[float | None]) -> bool:
    expected = _filled(factors)
    # of sums in which the largest rate is a term
    rounding = 1e-9 * max(float(group.get("initial_lr", group["lr"])) for group in scheduler.optimizer.param_groups)
    try:
        with warnings.catch_warnings(), isolate_rng():
            warnings.simplefilter("ignore")  # of steps of the scheduler without steps of the optimizer
            plain, scaled = _twin(scheduler), _twin(scheduler)
            _scale(scaled.optimizer, [scaled], factors)
            return all(
                math.isclose(after, factor * rate, rel_tol=1e-6, abs_tol=rounding * factor)
                for one, other in zip(_walk(plain, horizon), _walk(scaled, horizon), strict=True)
                for rate, after, factor in zip(one, other, expected, strict=True)
            )
    except Exception:  # whatever it is, it cannot be tried
        return False


def _twin(scheduler: Any) -> Any:
    """A copy of a scheduler, with groups of its own that have no parameters."""
    optimizer = Optimizer.__new__(Optimizer)
    optimizer.__dict__.update(defaults={}, state={}, _opt_called=True)
    optimizer.param_groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} | {"params": []}
        for group in scheduler.optimizer.param_groups
    ]
    return copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})


def _walk(scheduler: Any, horizon: float) -> Iterator[list[float]]:
    """The rates of the groups after each of the first steps, and then after ever more of them, where it can jump."""
    for step in range(int(min(horizon, _ONE_BY_ONE))):
        try:
            scheduler.step()
        except ValueError:  # as of OneCycleLR, which is at its end
            if step == 0:
                raise
            return
        yield [float(group["lr"]) for group in scheduler.optimizer.param_groups]
    step = _ONE_BY_ONE
    while step < min(horizon, 10**8):
        step = min(math.ceil(step * 1.1), int(min(horizon, 10**8)))
        try:
            scheduler.step(step)
        except Exception:  # it cannot jump
            return
        yield [float(group["lr"]) for group in scheduler.optimizer.param_groups]


def _scale(optimizer: Optimizer, schedulers: Sequence[Any], factors: Sequence[float | None]) -> None:
    """Multiplies all rates of groups and of their schedulers; a rate for all groups where their factors are the same."""
    filled, common = _filled(factors), _common(factors)
    if all(factor == 1.0 for factor in filled):
        return
    for part in _parts(schedulers):
        for name, rates in _rates(vars(part)).items():
            if isinstance(rates, list) and len(rates) == len(filled):
                setattr(part, name, [rate * factor for rate, factor in zip(rates, filled, strict=True)])
            elif common is not None:
                setattr(part, name, [rate * common for rate in rates] if isinstance(rates, list) else rates * common)
    multiplied: dict[int, float] = {}  # tensors, which groups may share
    for group, factor in zip(optimizer.param_groups, filled, strict=True):
        for key, rate in _rates(group).items():
            if not isinstance(rate, Tensor):
                group[key] = rate * factor
            elif id(rate) not in multiplied:
                rate.mul_(factor)  # in place: captured graphs and compiled steps hold this tensor
                multiplied[id(rate)] = factor
            elif multiplied[id(rate)] != factor:
                group[key] = rate * (factor / multiplied[id(rate)])


def _common(factors: Sequence[float | None]) -> float | None:
    """The factor of all groups that have one, if it is the same."""
    known = [factor for factor in factors if factor is not None]
    return known[0] if known and math.isclose(min(known), max(known), rel_tol=1e-9) else None


def _filled(factors: Sequence[float | None]) -> list[float]:
    """A group whose rate is 0 keeps it; what a scheduler raises it to goes with the others."""
    common = _common(factors)
    return [(common or 1.0) if factor is None else factor for factor in factors]


def _of(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[Any]:
    own = (optimizer, innermost(optimizer))
    return [s for s in schedulers if any(getattr(s, "optimizer", None) is one for one in own)]


def _parts(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, and what SequentialLR and ChainedScheduler are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _parts(getattr(scheduler, "_schedulers", ()))


def _rates(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The rates in a group, or in the attributes of a scheduler: numbers and lists of numbers."""
    return {
        name: value
        for name, value in attributes.items()
        if _IS_RATE.fullmatch(name) and all(map(_is_number, value if isinstance(value, list) else [value]))
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (float, int, Tensor)) and not isinstance(value, bool)
