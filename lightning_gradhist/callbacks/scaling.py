"""Hyper-parameters that go with the batch size: which an optimizer has, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_gradhist.batch_scaling import (
    BETAS,
    EPS,
    SCALED,
    WEIGHT_DECAY,
    scaled_beta,
    scaled_epsilon,
    scaled_weight_decay,
)
from lightning_gradhist.callbacks._lightning import MisconfigurationException
from lightning_gradhist.callbacks.gradients import is_a
from lightning_gradhist.report.result import GroupChange

# Those that say nothing of it in their groups. ALTO and LAMB add the decay to the direction, not to the gradient.
_DECOUPLED = ("AdamW", "AdamW8bit", "ALTO", "Lamb", "LAMB", "FusedLAMB", "Adafactor", "Muon", "Lion")


def check_scaled(names: Sequence[str] | None, epsilon: float | str, has_reference: bool) -> None:
    """Raises a MisconfigurationException where names are asked for that cannot be scaled."""
    if names is None:
        return
    unknown = [names] if isinstance(names, str) else [name for name in names if name not in SCALED]
    if unknown:
        raise MisconfigurationException(f"scale_with_batch must be a list of some of {SCALED}, got {unknown[0]!r}")
    if not has_reference:
        raise MisconfigurationException(
            "scale_with_batch needs the batch size at which the optimizer's values are trusted; pass"
            " reference_batch_size=... or reference='.../calibration.json'"
        )
    if EPS in names and epsilon != "keep":
        raise MisconfigurationException(
            f"scale_with_batch=['eps'] and epsilon={epsilon!r} contradict each other: either sets eps; leave 'eps' out, or"
            " pass epsilon='keep'"
        )


def check_optimizer(optimizer: Optimizer, names: Collection[str], adam_like: bool) -> None:
    """Raises a MisconfigurationException where an optimizer lacks what is to be scaled.

    Args:
        optimizer: whose groups are looked at.
        names: of :data:`lightning_gradhist.batch_scaling.SCALED`.
        adam_like: whether it is known to divide by an average of squares and an epsilon beside it.
    """
    has: dict[str, Callable[[dict[str, Any]], bool]] = {
        BETAS: lambda group: adam_like and len(group.get("betas", ())) == 2 and all(map(_is_number, group["betas"])),
        WEIGHT_DECAY: lambda group: _is_number(group.get("weight_decay")),
        EPS: lambda group: adam_like and _is_number(group.get("eps")),
    }
    what = {
        BETAS: "betas, two numbers, of which the second is the decay of an average of squares",
        WEIGHT_DECAY: "a weight_decay that is a number",
        EPS: "an eps of Adam's kind that is a number",
    }
    for name in names:
        lacking = [i for i, group in enumerate(optimizer.param_groups) if not has[name](group)]
        if lacking:
            raise MisconfigurationException(
                f"scale_with_batch: group {lacking[0]} of {type(optimizer).__name__} is not known to have {what[name]};"
                f" leave {name!r} out"
            )


def scaled_changes(
    optimizer: Optimizer,
    names: Collection[str],
    batch_ratio: float,
    rate_ratio: float,
    least_epsilon: Callable[[dict[str, Any]], float],
) -> tuple[list[GroupChange], list[str]]:
    """The changes to an optimizer, and a sentence for each thing to know about them.

    Args:
        optimizer: whose groups have the values of the reference.
        names: of :data:`lightning_gradhist.batch_scaling.SCALED`.
        batch_ratio: batch size as a multiple of the reference's.
        rate_ratio: learning rate as a multiple of the reference's.
        least_epsilon: the smallest epsilon that a group can hold.
    """
    changes, reasons = [], [f"{', '.join(names)} scaled to {batch_ratio:.4g} times the batch size of the reference"]
    for index, group in enumerate(optimizer.param_groups):
        if BETAS in names:
            beta = group["betas"][1]
            changes.append(GroupChange(index, "beta2", beta, scaled_beta(beta, batch_ratio)))
        if WEIGHT_DECAY in names and group["weight_decay"]:
            if is_decoupled(optimizer, group):
                decay = group["weight_decay"]
                changes.append(
                    GroupChange(index, "weight_decay", decay, scaled_weight_decay(decay, batch_ratio, rate_ratio))
                )
            else:
                reasons.append(
                    f"weight_decay of group {index} is kept: {type(optimizer).__name__} adds it to the gradient, as far as is"
                    " known, so that it is part of a loss that is the same at every batch size"
                )
        if EPS in names:
            after = max(scaled_epsilon(group["eps"], batch_ratio), least_epsilon(group))
            changes.append(GroupChange(index, "eps", group["eps"], after))
    return [change for change in changes if change.after != change.before], reasons


def decay_changes(optimizer: Optimizer, rate_change: float) -> list[GroupChange]:
    """The changes by which weights shrink as before when the learning rate is multiplied by ``rate_change``."""
    return [
        GroupChange(index, "weight_decay", group["weight_decay"], group["weight_decay"] / rate_change)
        for index, group in enumerate(optimizer.param_groups)
        if rate_change != 1 and group.get("weight_decay") and is_decoupled(optimizer, group)
    ]


def is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group's weight decay shrinks the weights themselves, rather than being added to the gradient."""
    if "decoupled_weight_decay" in group:
        return bool(group["decoupled_weight_decay"])
    return is_a(optimizer, *_DECOUPLED) or bool(getattr(optimizer, "adam_w_mode", False))  # the last is apex's


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
