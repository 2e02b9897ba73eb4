"""Multiplying the learning rates of groups and of their schedulers."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from lightning_gradhist.callbacks.schedulers import is_rate, parts, steps_as, twin, unnoticed

_IS_RATE = re.compile(r"_?(\w+_)?(lrs?|learning_rates?|lr_(min|max|init|start|end|final))|eta_m(in|ax)")
"""Names under which groups, schedulers and optimizers keep absolute rates: ``lr``, ``base_lrs``, ``eta_min``, ``final_lr``."""

BASE = {"base_lrs", "_last_lr"}


def scale_rates(optimizer: Optimizer, schedulers: Sequence[Any], factors: Sequence[float | None]) -> None:
    """Multiplies all rates of groups and of their schedulers; a rate for all groups where their factors are the same."""
    filled = factor_of_each(factors)
    if all(factor == 1.0 for factor in filled):
        return
    scale_schedulers(schedulers, factors)
    multiplied: dict[int, float] = {}  # tensors, which groups may share
    for group, factor in zip(optimizer.param_groups, filled, strict=True):
        for key, rate in rates_in(group).items():
            if not isinstance(rate, Tensor) or not rate.is_floating_point():
                group[key] = rate * factor
            elif id(rate) not in multiplied:
                rate.detach().mul_(factor)  # in place: captured graphs and compiled steps hold this tensor
                multiplied[id(rate)] = factor
            elif multiplied[id(rate)] != factor:
                group[key] = rate * (factor / multiplied[id(rate)])


def scale_schedulers(schedulers: Iterable[Any], factors: Sequence[float | None]) -> None:
    """Multiplies the rates that schedulers hold, and those of their parts, but not those of groups."""
    for part in parts(schedulers):
        _scale_part(part, factors)


def scale_unsaved(schedulers: Iterable[Any], factors: Sequence[float | None]) -> None:
    """Scales the rates that schedulers have not loaded, and are as the user's code made them.

    Which these are, two copies show, of which one loads what the other saves with other rates.
    """
    for scheduler in schedulers:
        with suppress(Exception), unnoticed():  # what cannot be tried stays as it was loaded
            saving, loading = twin(scheduler), twin(scheduler)
            scale_schedulers([saving], [2.0] * len(factors))
            loading.load_state_dict(saving.state_dict())
            for part, loaded in list(zip(parts([scheduler]), parts([loading]), strict=True)):
                rates = _rates_of(part)
                _scale_part(part, factors, saved=[name for name in rates if vars(loaded)[name] != rates[name]])


def _scale_part(part: Any, factors: Sequence[float | None], saved: Collection[str] = ()) -> None:
    filled, common = factor_of_each(factors), _common(factors)
    for name, rates in _rates_of(part).items():
        if name in saved:
            continue
        if isinstance(rates, list) and len(rates) == len(filled):
            setattr(part, name, [rate * factor for rate, factor in zip(rates, filled, strict=True)])
        elif common is not None:
            setattr(part, name, [rate * common for rate in rates] if isinstance(rates, list) else rates * common)


def _rates_of(scheduler: Any) -> dict[str, Any]:
    own = rates_in(vars(scheduler))
    if has_functions(scheduler):  # which make shares, also of what has the name of a rate
        return {name: own[name] for name in BASE & own.keys()}
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        own["eps"] = scheduler.eps  # the smallest change of a rate that it makes
    return own


def has_functions(scheduler: Any) -> bool:
    """Whether it multiplies its base rates by what functions of the user's return, and nothing else."""
    return any(steps_as(scheduler, kind) for kind in (lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR))


def _common(factors: Sequence[float | None]) -> float | None:
    """The factor of all groups that have one, if it is the same."""
    known = [factor for factor in factors if factor is not None]
    return known[0] if known and math.isclose(min(known), max(known), rel_tol=1e-9) else None


def factor_of_each(factors: Sequence[float | None]) -> list[float]:
    """A group whose rate is 0 keeps it; what a scheduler raises it to goes with the others."""
    common = _common(factors)
    return [(common or 1.0) if factor is None else factor for factor in factors]


def rates_in(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The rates in a group, or in the attributes of a scheduler: numbers and lists of numbers."""
    return {
        name: value
        for name, value in attributes.items()
        if _IS_RATE.fullmatch(name) and all(map(is_rate, value if isinstance(value, list) else [value]))
    }
