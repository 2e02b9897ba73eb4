"""Whether schedulers would follow when the base rates are multiplied: found by stepping copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from lightning_gradhist.callbacks.calibration.rates import BASE, factor_of_each, has_functions, rates_in, scale_rates
from lightning_gradhist.callbacks.schedulers import (
    codes,
    is_closed,
    methods,
    parts,
    reached,
    schedulers_of,
    steps_as,
    twin,
    unnoticed,
    walk,
)

_FOLLOW = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.CyclicLR,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
)
"""Not tried: they multiply what is scaled, or what they are made of is tried; some call functions of the user's."""


def stray_schedule(
    optimizer: Optimizer, horizons: Sequence[tuple[Any, float]], factors: Sequence[float | None]
) -> str | None:
    """Which optimizer or scheduler would not follow when the base rates are multiplied, and what it keeps; None if all do.

    An optimizer whose code uses rates beside those of its groups does not. Copies of each scheduler are stepped through the
    run, as they are and with all that is recognised multiplied: the ratio of their rates has to be the factor at every step.
    ``horizons`` are schedulers, and how many times each is stepped, and ``factors`` those of the groups; None at a rate of 0.
    """
    wrapped = [optimizer]
    for one in wrapped:  # which grows
        wrapped += [held for held in vars(one).values() if isinstance(held, Optimizer) and held not in wrapped]
        own = [
            name
            for name, rates in rates_in(vars(one)).items()
            if any(rates if isinstance(rates, list) else [rates]) and _uses(type(one), name)
        ]
        if own:
            return f"{type(one).__name__} ({', '.join(sorted(own))})"
    for scheduler, horizon in horizons:
        for part in parts(schedulers_of(optimizer, [scheduler])):
            if any(_looks_at(function, part) for function in getattr(part, "lr_lambdas", ())):
                return f"{type(part).__name__} (lr_lambdas, which look at the optimizer)"
            if not _follows(part, horizon, factors):
                groups = len(factors)  # as many numbers may be rates, whatever their name
                kept = {name for name, value in vars(part).items() if isinstance(value, list) and len(value) == groups}
                kept |= rates_in(vars(part)).keys()
                return type(part).__name__ + (f" ({', '.join(sorted(kept))})" if kept else "")
    return None


def _uses(kind: type, name: str) -> bool:
    """Whether a class's code names an attribute, but where it is made."""
    functions = [one for cls in kind.__mro__ for one in methods(cls)]
    return any(name in code.co_names for one in functions for code in codes(one.__code__))


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
    has_rates = has_functions(scheduler) and rates_in(vars(scheduler)).keys() - BASE
    if any(steps_as(scheduler, kind) for kind in _FOLLOW) and not has_rates:  # of which its functions may make anything
        return True
    expected = factor_of_each(factors)
    # of sums in which the largest rate is a term
    rounding = 1e-9 * max(float(group.get("initial_lr", group["lr"])) for group in scheduler.optimizer.param_groups)
    try:
        if not is_closed(scheduler):
            return False
        with unnoticed():
            plain, scaled = twin(scheduler), twin(scheduler)
            scale_rates(scaled.optimizer, [scaled], factors)
            return all(
                math.isclose(after, factor * rate, rel_tol=1e-6, abs_tol=rounding * factor)
                for (_, one), (_, other) in zip(walk(plain, horizon), walk(scaled, horizon), strict=True)
                for rate, after, factor in zip(one, other, expected, strict=True)
            )
    except Exception:  # whatever it is, it cannot be tried
        return False
