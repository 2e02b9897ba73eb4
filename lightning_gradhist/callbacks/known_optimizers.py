"""What each class of optimizer does with its gradient: one table, and what is read off it.

To teach the callbacks another optimizer, add a line to :data:`RULES`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks._deepspeed import grouped_parameters, is_deepspeed, unwrapped
from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.epsilon import HALF_PRECISION_EPSILON


@dataclass(frozen=True)
class StepRule:
    """What the step of a class of optimizers does.

    Attributes:
        adaptive: whether it divides by ``sqrt(v) + eps``, with ``v`` an average of squared gradients and ``eps`` beside
            the root. Elsewhere ``eps`` is something else (Adadelta, Adafactor), is added to something else (Adamax,
            AdaBelief) or within the root (timm's RMSpropTF, Adai).
        second_moment: the state's key of ``v``; None where nobody can read it. With AMSGrad it is the largest so far.
        mean: the state's key of the average gradient whose square is taken off ``v`` in a ``centered`` group.
        corrects_bias: whether ``v`` is divided by ``1 - decay**step`` before ``eps`` is added, unless the group has a
            false ``bias_correction``.
        coupled_decay: whether weight decay is added to the gradient, where a group does not say
            ``decoupled_weight_decay`` or ``weight_decouple``.
        steps_in_half: whether float16 parameters are stepped in float16, unless the group is ``fused``.
        clips: whether gradients are clipped to the group's ``max_grad_norm`` within the step.
    """

    adaptive: bool = False
    second_moment: str | None = None
    mean: str | None = None
    corrects_bias: bool = True
    coupled_decay: bool = False
    steps_in_half: bool = False
    clips: bool = False


_ADAM = StepRule(adaptive=True, second_moment="exp_avg_sq")
_CLIPPING_ADAM = replace(_ADAM, clips=True)
_TORCH_ADAM = replace(_ADAM, steps_in_half=True)
_UNCORRECTED_ADAM = replace(_ADAM, corrects_bias=False)
_PACKED_ADAM = StepRule(adaptive=True, second_moment="state2")  # where it is not packed into 8 bits
_NOT_ADAPTIVE = StepRule(coupled_decay=True)
UNKNOWN = StepRule()
"""Of a class that is not in the table: nothing is taken for granted."""

RULES: dict[str, StepRule] = {
    **dict.fromkeys(["torch.Adam", "torch.AdamW", "torch.NAdam"], _TORCH_ADAM),
    "torch.RAdam": replace(_TORCH_ADAM, corrects_bias=False),  # after eps is added
    "torch.RMSprop": StepRule(True, "square_avg", "grad_avg", False, coupled_decay=True, steps_in_half=True),
    **dict.fromkeys(
        [f"torch.{name}" for name in ("SGD", "Adamax", "Adagrad", "Adadelta", "ASGD", "Rprop")], _NOT_ADAPTIVE
    ),
    **dict.fromkeys(["lightning_gradhist.AdamE", "lightning_gradhist.ALTO"], _ADAM),
    **dict.fromkeys(["apex.FusedAdam", "deepspeed.FusedAdam", "deepspeed.DeepSpeedCPUAdam"], _ADAM),
    **dict.fromkeys(["apex.FusedLAMB", "timm.Lamb"], _CLIPPING_ADAM),
    **dict.fromkeys([f"timm.{name}" for name in ("AdamP", "AdamWLegacy", "NAdamW")], _ADAM),
    **dict.fromkeys([f"pytorch_optimizer.{name}" for name in ("AdamP", "Lamb", "RAdam")], _UNCORRECTED_ADAM),
    **dict.fromkeys(["timm.RAdamLegacy", "torch_optimizer.Lamb"], _UNCORRECTED_ADAM),
    **{
        f"bitsandbytes.{paged}{name}{bits}": _PACKED_ADAM
        for paged in ("", "Paged")
        for name in ("Adam", "AdamW")
        for bits in ("", "8bit", "32bit")
    },
}
"""By the package that a class comes from, and its name."""


def innermost(optimizer: Optimizer) -> Any:
    """The optimizer that an ``EAdaptor`` wraps, or that ZeRO steps with on this rank; any other as it is."""
    optimizer = unwrapped(optimizer)
    for key, attribute in _WRAPPERS.items():
        if key in class_keys(optimizer):
            return innermost(getattr(optimizer, attribute))
    return optimizer


def class_name(optimizer: Optimizer) -> str:
    """The class of an optimizer, and of the one that it wraps, as ``EAdaptor(SGD)``: by which a record knows it."""
    outer, inner = type(unwrapped(optimizer)).__name__, innermost(optimizer)
    return outer if inner is unwrapped(optimizer) else f"{outer}({type(inner).__name__})"


def rule_of(optimizer: Optimizer) -> StepRule:
    """The rule of an optimizer: by its class, or a base whose ``step`` it has."""
    return next((RULES[key] for key in class_keys(innermost(optimizer)) if key in RULES), UNKNOWN)


def starts_with_signs(optimizer: Optimizer) -> bool:
    """Whether the first step is the sign of the gradient times the rate, as Adam's is: not by layers, and unbiased."""
    rule, other = rule_of(optimizer), {"layerwise": True, "bias_correction": False, "maximize": True}
    differs = any(group.get(key) is value for group in optimizer.param_groups for key, value in other.items())
    return rule.adaptive and rule.corrects_bias and not rule.clips and not differs


def own_clip_norm(optimizer: Optimizer) -> float | None:
    """The norm that an optimizer clips all gradients to within its step, or None."""
    return (rule_of(optimizer).clips and optimizer.param_groups[0].get("max_grad_norm")) or None


def centered(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> set[str]:
    """The names of the parameters whose ``v`` is a variance."""
    groups = zip(optimizer.param_groups, grouped_parameters(optimizer), strict=True)
    found = [own for group, own in groups if rule_of(optimizer).mean and group.get("centered")]
    ids = {id(parameter) for own in found for parameter in own}
    return {name for name, parameter in parameters.items() if id(parameter) in ids}


def least_epsilon(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """The smallest epsilon that a group can hold: torch's own steps in half precision make a smaller one 0."""
    in_half = any(parameter.dtype == torch.float16 for parameter in group["params"])
    steps_in_half = in_half and rule_of(optimizer).steps_in_half and not group.get("fused")
    return HALF_PRECISION_EPSILON if steps_in_half else 0.0


def why_without_layers(trainer: Trainer) -> str | None:
    """Why the step of an optimizer that goes by layers is not what it should be, as ZeRO does not give it any; else None."""
    for optimizer in map(unwrapped, trainer.optimizers if is_deepspeed(trainer) else ()):
        if any(group.get("layerwise") for group in optimizer.param_groups):
            return (
                f"{type(optimizer).__name__}(layerwise=True) needs the norm of each layer, and ZeRO steps a flat part of many"
                " layers; make it with layerwise=False, or use strategy='ddp', 'fsdp' or ModelParallelStrategy"
            )
    return None


def coupled_decay(optimizer: Optimizer) -> dict[int, float]:
    """Weight decay that the optimizer adds to the gradient, by the parameter's id."""
    # apex and deepspeed say it of the whole optimizer
    by_class = rule_of(optimizer).coupled_decay or not getattr(innermost(optimizer), "adam_w_mode", True)
    return {
        id(parameter): group["weight_decay"]
        for group, own in zip(optimizer.param_groups, grouped_parameters(optimizer), strict=True)
        if group.get("weight_decay")
        and not group.get("decoupled_weight_decay", group.get("weight_decouple", not by_class))
        for parameter in own
    }


_WRAPPERS = {"lightning_gradhist.EAdaptor": "inner", "torch.ZeroRedundancyOptimizer": "optim"}


def class_keys(optimizer: Optimizer) -> list[str]:
    """Package and name of its class, and of the bases whose step it has; another step may do anything."""
    step = inspect.unwrap(type(optimizer).step)
    bases = [cls for cls in type(optimizer).__mro__ if issubclass(cls, Optimizer)]
    own = [cls for cls in bases if inspect.unwrap(cls.step) is step]
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in own]
