"""Writing hyper-parameters into an optimizer and its schedulers, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_gradhist.logging.report import GroupChange

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # the last two are OneCycleLR's
_SCHEDULER_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")  # keys of LRScheduler.state_dict()


def base_rate(group: dict[str, Any]) -> float:
    """The learning rate of a group that its schedule is a multiple of: OneCycleLR's maximum, the initial or the only."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def keeps_own_rates(scheduler: Any) -> bool:
    """Whether a scheduler sets the rates from something else than what :func:`apply_changes` can scale."""
    if isinstance(scheduler, ReduceLROnPlateau):  # it lowers what it finds
        return False
    state = scheduler.state_dict()
    return not any(key in state for key in ("base_lrs", "_schedulers"))


def holds_before(optimizer: Optimizer, change: GroupChange) -> bool:
    """Whether a change is still to be made."""
    if change.group >= len(optimizer.param_groups):
        return False
    group = optimizer.param_groups[change.group]
    return (base_rate(group) if change.name == "lr" else group.get(change.name)) == change.before


def apply_changes(optimizer: Optimizer, schedulers: Iterable[Any], changes: Sequence[GroupChange]) -> None:
    """Writes changes into the groups; a learning rate scales the whole schedule of its group.

    Args:
        optimizer: whose ``param_groups`` are written.
        schedulers: all schedulers; those of other optimizers are left alone.
        changes: ``"lr"`` is in terms of :func:`base_rate`; other names are keys of the group.
    """
    groups = optimizer.param_groups
    factors = [1.0] * len(groups)
    for change in changes:
        if change.name == "lr":
            factors[change.group] = change.after / float(change.before)
        else:
            groups[change.group][change.name] = change.after
    for group, factor in zip(groups, factors, strict=True):
        for key in _GROUP_RATES:
            if key in group and factor != 1.0:
                _scale(group, key, factor)
    if any(factor != 1.0 for factor in factors):
        for scheduler in schedulers:
            if getattr(scheduler, "optimizer", None) is optimizer:
                scheduler.load_state_dict(_scaled_state(scheduler.state_dict(), factors))


def _scale(group: dict[str, Any], key: str, factor: float) -> None:
    if isinstance(group[key], Tensor):
        group[key].mul_(factor)  # in place: captured graphs and compiled steps hold this tensor
    else:
        group[key] *= factor


def _scaled_state(state: dict[str, Any], factors: Sequence[float]) -> dict[str, Any]:
    scaled = dict(state)
    for key in _SCHEDULER_RATES:
        if isinstance(state.get(key), list):
            scaled[key] = [rate * factor for rate, factor in zip(state[key], factors, strict=True)]
    if "eta_min" in state and len(set(factors)) == 1:  # one floor for all groups
        scaled["eta_min"] = state["eta_min"] * factors[0]
    if "_schedulers" in state:  # SequentialLR and ChainedScheduler
        scaled["_schedulers"] = [_scaled_state(inner, factors) for inner in state["_schedulers"]]
    return scaled
