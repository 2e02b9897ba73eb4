"""Schedulers of the user's: their base rates, what their functions hold, and copies that are stepped to try them.

Whether they follow a factor is found in ``calibration/scheduler_trial.py``.
"""

from __future__ import annotations

import copy
import dis
import inspect
import math
import warnings
from collections.abc import Generator, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, redirect_stdout, suppress
from enum import Enum
from functools import partial
from io import StringIO
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from lightning_gradhist.callbacks._deepspeed import unwrapped
from lightning_gradhist.callbacks._lightning import Trainer, is_a, isolate_rng
from lightning_gradhist.callbacks.known_optimizers import innermost
from lightning_gradhist.callbacks.probe.silence import PACKAGES, without_log_records
from lightning_gradhist.explore import is_number

_ONE_BY_ONE = 2048
_FARTHEST, _FARTHEST_IN_STEPS = 10**8, 2 * 10**5  # of which the latter take half a second
_IN_STEPS = (lr_scheduler.MultiplicativeLR, lr_scheduler.SequentialLR, lr_scheduler.ChainedScheduler)
_ATOMS = (int, float, str, type(None), np.ufunc)
_UNCHANGEABLE = (BuiltinFunctionType, ModuleType, type, tuple, frozenset, Enum)
_REACHED = 1000  # things that a function holds, beyond which no more are looked at


def base_rates(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[float | None]:
    """The learning rate of each group that its schedule is a multiple of: OneCycleLR's maximum, the initial or the only.

    What a scheduler has left in a group that is no longer in use counts for nothing. None where it is no number.
    """
    used = parts(schedulers_of(optimizer, schedulers))
    one_cycle = any(isinstance(scheduler, lr_scheduler.OneCycleLR) for scheduler in used)
    scheduled = any(hasattr(scheduler, "base_lrs") for scheduler in used)
    key = "max_lr" if one_cycle else "initial_lr" if scheduled else "lr"
    rates = [group.get(key, group.get("lr")) for group in optimizer.param_groups]
    return [float(rate) if is_rate(rate) else None for rate in rates]


def is_rate(value: Any) -> TypeGuard[float | Tensor]:
    """Whether a value is a number, or a tensor of one."""
    return is_number(value) or (isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex())


def stray_rate(optimizer: Optimizer, schedulers: Iterable[Any], written: Mapping[int, float]) -> int | None:
    """The first group whose rate is neither the one that was written nor that of a scheduler; None if there is none.

    Rates on another device are not looked at, since that would wait for it, nor are schedulers that do not tell theirs.
    """
    told: list[Any] = []
    for scheduler in schedulers_of(optimizer, schedulers):
        own = [getattr(part, "_last_lr", None) for part in parts([scheduler])]
        own = [rates for rates in own if isinstance(rates, (list, tuple)) and rates]
        if not own:
            return None
        told += own
    for index, rate in written.items():
        now = optimizer.param_groups[index].get("lr") if index < len(optimizer.param_groups) else None
        if not is_rate(now) or (isinstance(now, Tensor) and now.device.type != "cpu"):
            continue
        known = [rate, *(float(rates[index]) for rates in told if index < len(rates))]
        if not any(math.isclose(float(now), one, rel_tol=1e-6) for one in known):
            return index
    return None


def is_closed(scheduler: Any) -> bool:
    """Whether a copy of a scheduler can be stepped without a trace, as far as the code shows.

    Copies share the functions that it holds, and what the methods of its class use.
    """
    held = [one for value in vars(scheduler).values() for one in (value if isinstance(value, list) else [value])]
    held = [one for one in held if not isinstance(one, nn.Module) and getattr(one, "__self__", None) is not scheduler]
    own = [kind for kind in type(scheduler).__mro__ if not kind.__module__.startswith("torch.")]
    return all(map(is_pure, held)) and all(is_pure(one, is_method=True) for kind in own for one in methods(kind))


def methods(kind: type) -> list[FunctionType]:
    """The functions of a class itself, but for the one that makes its objects."""
    members = [inspect.unwrap(one) for name, one in vars(kind).items() if callable(one) and name != "__init__"]
    return [one for one in members if isinstance(one, FunctionType)]


def is_pure(function: Any, is_method: bool = False) -> bool:
    """Whether a function of a schedule leaves nothing behind when it is called; also of a number, and of None.

    A method may change what it is bound to, and so anything, where it reaches nothing else that can be changed.
    """
    found = reached(function)
    functions = [one for one in found if isinstance(one, FunctionType)]
    named = {name for one in functions for code in codes(one.__code__) for name in code.co_names}
    others = [one for one in found if not isinstance(one, FunctionType)]
    is_bound = is_method and all(isinstance(one, _UNCHANGEABLE) for one in others)
    return not any(_writes(one, is_bound) for one in functions) and all(_is_only_read(one, named) for one in others)


def _is_only_read(value: Any, named: Set[str]) -> bool:
    """Whether functions that name these attributes have no way of changing a value."""
    if isinstance(value, BuiltinFunctionType):
        return isinstance(value.__self__, (ModuleType, type(None)))  # else a method
    if isinstance(value, ModuleType):
        return value.__name__.partition(".")[0] not in PACKAGES
    if isinstance(value, (*_ATOMS, type, partial)):
        return True
    has_a_state = callable(value) or isinstance(value, Iterator)
    return not has_a_state and not any(callable(getattr(type(value), name, None)) for name in named)


def _writes(function: FunctionType, is_bound: bool) -> bool:
    """Whether a function changes what is not its own, as a counter of its calls."""
    of_others = {"STORE_GLOBAL"} if is_bound else {"STORE_GLOBAL", "STORE_ATTR", "STORE_SUBSCR"}
    return any(
        at.opname in of_others or (at.opname == "STORE_DEREF" and at.argval in function.__code__.co_freevars)
        for code in codes(function.__code__)
        for at in dis.get_instructions(code)
    )


def codes(code: CodeType) -> Iterator[CodeType]:
    """The code of a function, and of those that are made in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def reached(function: Any) -> list[Any]:
    """A function, and what it holds, that holds, and so on: closures, globals, defaults, attributes, what is bound to it."""
    found = [function]
    for one in found:  # which grows
        if len(found) < _REACHED:
            found += islice((held for held in _held(one) if not isinstance(held, _ATOMS)), _REACHED)
    return found


def _held(value: Any) -> Iterator[Any]:
    if isinstance(value, partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, (list, tuple, dict)):
        yield from value.values() if isinstance(value, dict) else value
    elif isinstance(value, FunctionType):
        yield from (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values())
        names = {name for code in codes(value.__code__) for name in code.co_names}
        yield from (value.__globals__[name] for name in names if name in value.__globals__)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # not filled, or not any more
                yield cell.cell_contents
    elif callable(value) and not isinstance(value, (BuiltinFunctionType, type)):
        # a method, or an object that is called
        owner = value.__self__ if isinstance(value, MethodType) else value
        yield value.__func__ if isinstance(value, MethodType) else type(value).__call__
        if not isinstance(owner, (nn.Module, lr_scheduler.LRScheduler, type)):  # which lead to the optimizer anyway
            yield from getattr(owner, "__dict__", {}).values()


def scheduled_accumulation(trainer: Trainer) -> dict[int, int]:
    """Micro-batches of a step from these epochs on, where a callback sets them."""
    schedules = [c.scheduling for c in getattr(trainer, "callbacks", ()) if is_a(c, "GradientAccumulationScheduler")]
    return {epoch: factor for schedule in schedules for epoch, factor in schedule.items()}


def schedulers_in(trainer: Trainer) -> list[Any]:
    """All schedulers that there are now."""
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def schedulers_of(optimizer: Optimizer, schedulers: Iterable[Any]) -> list[Any]:
    """Those that schedule an optimizer, or the one that it wraps."""
    own = (optimizer, unwrapped(optimizer), innermost(optimizer))
    return [s for s in schedulers if any(getattr(s, "optimizer", None) is one for one in own)]


def parts(schedulers: Iterable[Any]) -> list[Any]:
    """Schedulers, and those of the same optimizer that they hold, as SequentialLR and a warm-up around another one do."""
    found = list(schedulers)
    for scheduler in found:  # which grows
        for value in list(getattr(scheduler, "__dict__", {}).values()):
            for one in value if isinstance(value, (list, tuple)) else [value]:
                is_one = isinstance(one, lr_scheduler.LRScheduler) and one not in found
                if is_one and getattr(one, "optimizer", None) is scheduler.optimizer:
                    found.append(one)
    return found


@contextmanager
def unnoticed() -> Generator[None, None, None]:
    """Within it a copy of a scheduler is tried: without warnings, prints, logs, and numbers drawn from global generators."""
    with warnings.catch_warnings(), isolate_rng(), redirect_stdout(StringIO()), without_log_records():
        warnings.simplefilter("ignore")  # of steps of the scheduler without steps of the optimizer
        yield


def twin(scheduler: Any) -> Any:
    """A copy of a scheduler, with groups of its own that have no parameters."""
    optimizer = Optimizer.__new__(Optimizer)
    optimizer.__dict__.update(defaults={}, state={}, _opt_called=True)
    optimizer.param_groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"} | {"params": []}
        for group in scheduler.optimizer.param_groups
    ]
    made = copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})
    if vars(made).keys() != vars(scheduler).keys():
        raise TypeError("a copy of it lacks what it has")
    return made


def walk(scheduler: Any, horizon: float) -> Iterator[tuple[int, list[float]]]:
    """Numbers of steps and the rates of the groups after them: of each of the first, then of ever more.

    To those a scheduler of torch's jumps, where it can. Others make each step: they may make a rate of the one before it.
    """
    ways = [getattr(type(scheduler), name, None) for name in ("get_lr", "step")]
    are_torchs = all(getattr(way, "__module__", None) == lr_scheduler.__name__ for way in ways)
    jumps = are_torchs and not isinstance(scheduler, _IN_STEPS)
    step, last = 0, int(min(horizon, _FARTHEST if jumps else _FARTHEST_IN_STEPS))
    while step < last:
        due = step + 1 if step < _ONE_BY_ONE else min(math.ceil(step * 1.1), last)
        try:
            if jumps and due > _ONE_BY_ONE:
                scheduler.step(due)
            else:
                for _ in range(due - step):
                    scheduler.step()
        except ValueError:  # as of OneCycleLR, which is at its end
            if step == 0:
                raise
            return
        yield due, [float(group["lr"]) for group in scheduler.optimizer.param_groups]
        step = due


def steps_as(scheduler: Any, kind: type) -> bool:
    """Whether it is of a class, and leaves its ways of making rates as they are."""
    own = type(scheduler)
    return isinstance(scheduler, kind) and all(
        getattr(own, name, None) is getattr(kind, name, None) for name in ("get_lr", "step")
    )
