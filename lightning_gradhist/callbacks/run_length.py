"""How long a run is to be, and how its learning rate will go: asked of the Trainer, and of copies of its schedulers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn
from torch.optim import Optimizer, lr_scheduler

from lightning_gradhist.callbacks._lightning import MisconfigurationException, Trainer
from lightning_gradhist.callbacks.schedulers import (
    base_rates,
    is_closed,
    parts,
    scheduled_accumulation,
    schedulers_in,
    schedulers_of,
    twin,
    unnoticed,
    walk,
)
from lightning_gradhist.noise.run_record import RunLength

_PARTS = 16  # of a run, at whose ends the shape of a schedule is taken down


def planned_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run; None where nobody knows, as of an endless loader or under manual optimization."""
    if not trainer.lightning_module.automatic_optimization or later_accumulation(trainer):
        return None
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # of a loader of the user's; where nobody can tell, nobody needs to know
        return None
    return int(steps) if 0 < steps < math.inf else None


def run_length(trainer: Trainer, optimizer: Optimizer, before: RunLength | None = None) -> RunLength:
    """The planned steps, warm-up and shape of the schedule, as far as they are known.

    The latter two are known only before the run; where it goes on, they are taken from what was known ``before``.
    """
    planned = planned_steps(trainer)
    if trainer.global_step > 0:
        return replace(before or RunLength(), planned=planned)
    rates = _planned_rates(trainer, optimizer) if planned else {}
    peak = max(rates.values(), default=0.0)
    if planned is None or not peak > 0:
        return RunLength(planned)
    first = next(at for at, rate in rates.items() if rate >= (1 - 1e-9) * peak)
    known = [max(at for at in rates if at <= part / _PARTS) for part in range(_PARTS + 1)]
    return RunLength(planned, warm_up=round(first * planned), schedule=[rates[at] / peak for at in known])


def own_schedule(trainer: Trainer, optimizer: Optimizer) -> str | None:
    """The class of a scheduler whose highest rate may be another than the base rate; None if there is none.

    Of torch's it is known, but for CyclicLR, which has two base rates. Others are tried, and LambdaLR, whose function may go
    up to another number than 1. Where that cannot be tried, it is trusted to be a share, as functions are meant to be.
    """
    there = schedulers_in(trainer)
    own = [one for one in parts(schedulers_of(optimizer, there)) if not _has_shares(one)]
    if not own or any(isinstance(one, lr_scheduler.CyclicLR) for one in own):
        return type(own[0]).__name__ if own else None
    are_functions = all(isinstance(one, lr_scheduler.LambdaLR) for one in own)
    rates = _planned_rates(trainer, optimizer) if trainer.global_step == 0 else {}  # a copy would go on from there
    if not rates:
        return None if are_functions else type(own[0]).__name__
    highest = max(rates, key=lambda at: rates[at])  # the first of them
    base = max((rate or 0.0 for rate in base_rates(optimizer, there)), default=0.0)
    is_share = math.isclose(rates[highest], base, rel_tol=0.1)  # a late peak may lie between two that are looked at
    # A warm-up that is longer than the run, but for one on a rate of 1, as Noam's.
    is_cut_short = are_functions and 0 < highest == max(rates) and 0.01 * base <= rates[highest] <= base
    return None if is_share or is_cut_short else type(own[0]).__name__


def _planned_rates(trainer: Trainer, optimizer: Optimizer) -> dict[float, float]:
    """The highest rate of a group by the share of the run that is over; empty where it is not known."""
    mine = [(scheduler, times) for scheduler, times in horizons(trainer) if schedulers_of(optimizer, [scheduler])]
    if not mine:
        return {0.0: 1.0}
    ((scheduler, times), *others) = mine
    if others or not 1 <= times < math.inf:
        return {}
    try:
        if not all(map(_can_be_tried, parts([scheduler]))):
            return {}
        with unnoticed():
            tried = twin(scheduler)
            rates = {0.0: max(float(group["lr"]) for group in tried.optimizer.param_groups)}
            rates |= {step / times: max(of_groups) for step, of_groups in walk(tried, times)}
    except Exception:  # whatever it is, it cannot be tried
        return {}
    return rates if max(rates) * times >= int(times) - 1 else {}  # OneCycleLR ends a step before the run


def _can_be_tried(part: Any) -> bool:
    """Whether copies of a scheduler can be stepped without a trace: of torch's kind, without functions that have a state."""
    is_plateau = isinstance(part, lr_scheduler.ReduceLROnPlateau)
    holds_modules = any(isinstance(value, nn.Module) for value in vars(part).values())  # which would be copied
    return isinstance(part, lr_scheduler.LRScheduler) and not is_plateau and not holds_modules and is_closed(part)


def _has_shares(scheduler: Any) -> bool:
    """Whether it is known to make its rates as shares of the base rates."""
    is_of_torch = type(scheduler).__module__ == lr_scheduler.__name__
    return is_of_torch and not isinstance(scheduler, (lr_scheduler.LambdaLR, lr_scheduler.CyclicLR))


def later_accumulation(trainer: Trainer) -> dict[int, int]:
    """Those of them that change later in the run."""
    factors = scheduled_accumulation(trainer)
    last = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    later = {epoch: factor for epoch, factor in factors.items() if trainer.current_epoch < epoch < last}
    return later if set(later.values()) - {trainer.accumulate_grad_batches} else {}


def horizons(trainer: Trainer) -> list[tuple[Any, float]]:
    """The schedulers, and how many times each is stepped; infinite where that is not known."""
    configs, epochs = trainer.lr_scheduler_configs, math.inf
    try:
        steps = trainer.estimated_stepping_batches if configs else 0
        batches = trainer.num_training_batches if configs else math.inf  # known by now; an endless epoch has no end
        if math.isfinite(batches):
            epochs = max(1.0, steps / max(1, math.ceil(batches / trainer.accumulate_grad_batches)))
    except MisconfigurationException:  # with accumulation that changes
        steps = math.inf
        epochs = trainer.max_epochs if trainer.max_epochs not in (None, -1) else math.inf
    times = {"step": steps, "epoch": epochs if trainer.lightning_module.automatic_optimization else steps}
    return [(config.scheduler, times[config.interval] / config.frequency) for config in configs]
