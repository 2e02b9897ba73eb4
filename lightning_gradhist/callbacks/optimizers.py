"""What each class of optimizer does with its gradient: one table, and what is read off it.

To teach the callbacks another optimizer, add a line to :data:`RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks.strategies import local
from lightning_gradhist.epsilon import HALF_PRECISION_EPSILON
from lightning_gradhist.noise.step import adam_weight
from lightning_gradhist.tensors import as_real, elementwise


@dataclass(frozen=True)
class StepRule:
    """What the step of a class of optimizers does.

    Attributes:
        adaptive: whether it divides by ``sqrt(v) + eps``, with ``v`` an average of squared gradients and ``eps`` beside
            the root. Elsewhere ``eps`` is something else (Adadelta, Adafactor), or is added to something else (Adamax,
            AdaBelief).
        second_moment: the state's key of ``v``; None where nobody can read it.
        coupled_decay: whether weight decay is added to the gradient, where a group does not say
            ``decoupled_weight_decay``.
        steps_in_half: whether float16 parameters are stepped in float16, unless the group is ``fused``.
    """

    adaptive: bool = False
    second_moment: str | None = None
    coupled_decay: bool = False
    steps_in_half: bool = False


_ADAM = StepRule(adaptive=True, second_moment="exp_avg_sq")
_TORCH_ADAM = StepRule(adaptive=True, second_moment="exp_avg_sq", steps_in_half=True)
_OPAQUE = StepRule(adaptive=True)  # its state is packed, or in the hands of a C++ extension
_NOT_ADAPTIVE = StepRule(coupled_decay=True)
UNKNOWN = StepRule()
"""Of a class that is not in the table: nothing is taken for granted."""

RULES: dict[str, StepRule] = {
    "torch.Adam": _TORCH_ADAM,
    "torch.AdamW": _TORCH_ADAM,
    "torch.NAdam": _TORCH_ADAM,
    "torch.RAdam": _TORCH_ADAM,
    "torch.RMSprop": StepRule(adaptive=True, coupled_decay=True, steps_in_half=True),
    **dict.fromkeys(
        [f"torch.{name}" for name in ("SGD", "Adamax", "Adagrad", "Adadelta", "ASGD", "Rprop")], _NOT_ADAPTIVE
    ),
    "lightning_gradhist.AdamE": _ADAM,
    "lightning_gradhist.ALTO": _ADAM,
    "apex.FusedAdam": _ADAM,
    "apex.FusedLAMB": _ADAM,
    "deepspeed.FusedAdam": _ADAM,
    "deepspeed.DeepSpeedCPUAdam": _ADAM,
    "bitsandbytes.Adam8bit": _OPAQUE,
    "bitsandbytes.AdamW8bit": _OPAQUE,
    "timm.Lamb": _ADAM,
    "pytorch_optimizer.Lamb": _ADAM,
    "torch_optimizer.Lamb": _ADAM,
}
"""By the package that a class, or one of its bases, comes from, and its name."""


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that an ``EAdaptor`` wraps; any other as it is."""
    wraps = any(key == "lightning_gradhist.EAdaptor" for key in _keys(optimizer))
    return optimizer.inner if wraps else optimizer  # type: ignore[attr-defined,no-any-return]


def rule_of(optimizer: Optimizer) -> StepRule:
    """The rule of an optimizer, by its class or the first of its bases that is in the table."""
    return next((RULES[key] for key in _keys(innermost(optimizer)) if key in RULES), UNKNOWN)


def least_epsilon(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """The smallest epsilon that a group can hold: torch's own steps in half precision make a smaller one 0."""
    in_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
    steps_in_half = in_half and rule_of(optimizer).steps_in_half and not group.get("fused")
    return HALF_PRECISION_EPSILON if steps_in_half else 0.0


def coupled_decay(optimizer: Optimizer) -> dict[int, float]:
    """Weight decay that the optimizer adds to the gradient, by the parameter's id."""
    by_class = rule_of(optimizer).coupled_decay
    return {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", not by_class)
        for parameter in group["params"]
    }


def epsilons(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The epsilon of each parameter's group, by name, where it has one."""
    given = [(group.get("eps"), group["params"]) for group in optimizer.param_groups]
    eps = {id(p): float(one) for one, params in given if isinstance(one, (float, int, Tensor)) for p in params}
    return {name: eps[id(parameter)] for name, parameter in parameters.items() if id(parameter) in eps}


def second_moment(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adam's bias-corrected second moment by name, of a DTensor this rank's shard; empty where there is none (yet)."""
    moments, corrections = _moments(optimizer, parameters)
    divided = torch._foreach_div(list(moments.values()), list(corrections.values())) if moments else []
    return dict(zip(moments, divided, strict=True))


def metric_weights(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    parts: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> dict[str, Tensor] | None:
    """Adam's metric by name, from the state of an optimizer; None where it has no second moment (yet).

    Args:
        optimizer: whose step is asked for.
        parameters: names and parameters.
        parts: the parts of tensors that are asked for; of all of them by default.
    """
    moments, corrections = _moments(optimizer, parameters)
    eps = epsilons(optimizer, parameters)
    alike: dict[tuple[float, float], dict[str, Tensor]] = {}
    for name, moment in parts(moments).items():
        alike.setdefault((eps.get(name, 0.0), corrections[name]), {})[name] = moment
    weights: dict[str, Tensor] = {}
    for (one, correction), some in alike.items():
        weights |= elementwise(partial(_weight, eps=one, correction=correction), some)
    return weights or None


def damping_epsilons(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The epsilon that is added to the root of a parameter's second moment, by name, where there is one.

    AMSGrad adds it to another root, of the largest second moment so far.
    """
    key = rule_of(optimizer).second_moment
    states = {name: optimizer.state.get(parameter, {}) for name, parameter in parameters.items()}
    return {
        name: eps
        for name, eps in epsilons(optimizer, parameters).items()
        if key is not None and _holds(states[name], key, parameters[name]) and "max_exp_avg_sq" not in states[name]
    }


def _moments(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The second moments, and what each has still to be divided by."""
    key = rule_of(optimizer).second_moment
    decay = {id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    moments: dict[str, Tensor] = {}
    corrections: dict[str, float] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if key is not None and _holds(state, key, parameter) and id(parameter) in decay:
            step = local(state["step"]) if isinstance(state["step"], Tensor) else state["step"]
            moments[name], corrections[name] = as_real(local(state[key])), 1.0
            if isinstance(step, Tensor) and step.device.type != "cpu":  # without waiting for the device
                moments[name] = moments[name] / (1 - decay[id(parameter)] ** step)
            else:
                corrections[name] = 1 - decay[id(parameter)] ** float(step)
    return moments, corrections


def _holds(state: Mapping[str, Any], key: str, parameter: Tensor) -> bool:
    """Whether the state of a parameter has a second moment, and the step that its bias depends on."""
    moment = state.get(key)
    return "step" in state and isinstance(moment, Tensor) and moment.shape == parameter.shape


def _weight(second_moment: Tensor, eps: float, correction: float) -> Tensor:
    root = math.sqrt(correction)
    return adam_weight(second_moment.float(), eps * root).mul_(root)  # the correction, without a pass of its own


def _keys(optimizer: Optimizer) -> list[str]:
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(optimizer).__mro__]
