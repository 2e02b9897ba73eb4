"""What each class of optimizer does with its gradient: one table, and what is read off it.

To teach the callbacks another optimizer, add a line to :data:`RULES`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist._dtensor import local
from lightning_gradhist.callbacks._deepspeed import grouped_parameters, is_deepspeed, is_zero, unwrapped, zero_slots
from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.epsilon import HALF_PRECISION_EPSILON
from lightning_gradhist.explore import is_number
from lightning_gradhist.noise.step import adam_weight
from lightning_gradhist.tensors import as_real, elementwise, joined, widened


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
        if key in _keys(optimizer):
            return innermost(getattr(optimizer, attribute))
    return optimizer


def class_name(optimizer: Optimizer) -> str:
    """The class of an optimizer, and of the one that it wraps, as ``EAdaptor(SGD)``: by which a record knows it."""
    outer, inner = type(unwrapped(optimizer)).__name__, innermost(optimizer)
    return outer if inner is unwrapped(optimizer) else f"{outer}({type(inner).__name__})"


def rule_of(optimizer: Optimizer) -> StepRule:
    """The rule of an optimizer: by its class, or a base whose ``step`` it has."""
    return next((RULES[key] for key in _keys(innermost(optimizer)) if key in RULES), UNKNOWN)


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


def epsilons(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The epsilon of each parameter's group, by name, where it has one."""
    given = {stepped.name: _epsilon(stepped.group) for stepped in _stepped(optimizer, parameters)}
    return {name: eps for name, eps in given.items() if eps is not None}


def optimizer_weights(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that an optimizer changes, by name: of a DTensor this rank's shard, under ZeRO its part in fp32."""
    if is_zero(optimizer):
        return {name: slot.of(slot.flat) for name, slot in zero_slots(optimizer, parameters).items()}
    return {name: as_real(local(parameter.detach())) for name, parameter in parameters.items()}


def second_moment(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is under the root that epsilon is added to, by name, of a DTensor this rank's shard.

    Empty where there is none (yet), and where ZeRO spreads it over ranks.
    """
    moments = {} if _is_spread(optimizer) else _moments(optimizer, parameters)
    return {name: moment.value / (moment.correction if moment.corrects else 1.0) for name, moment in moments.items()}


def metric_weights(
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    parts: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    of_shards: bool = False,
) -> dict[str, Tensor] | None:
    """The metric in which an optimizer steps, by name, from its state; None where it has no second moment (yet).

    The factor that corrects a bias is in it whether or not the optimizer corrects: it does not change a noise scale, and
    early and late steps of a run then count alike. With ZeRO it is that of the parameters that this rank steps. To ``v`` is
    added what one more gradient of the parameter's mean square would add: a coordinate that has hardly had any would
    outweigh all others. Not so where a rank has a shard (``of_shards``), whose mean is another than the whole's.
    ``parts`` picks the parts of whole tensors that are asked for; all of them by default.
    """
    moments = _moments(optimizer, parameters)
    alike: dict[tuple[float, float], dict[str, Tensor]] = {}
    for name, value in parts({name: moment.value for name, moment in moments.items()}).items():
        moment, root = moments[name], 1.0
        if not isinstance(moment.correction, Tensor):
            root = math.sqrt(moment.correction)
        elif moment.corrects:
            value = value / moment.correction
        alike.setdefault((moment.eps * (root if moment.corrects else 1.0), root), {})[name] = value
    weights: dict[str, Tensor] = {}
    for (eps, root), some in alike.items():
        before = joined if of_shards else partial(_with_one_more, moments=moments)
        weights |= elementwise(partial(_weight, eps=eps, root=root), some, before)
    return weights or None


def _with_one_more(batch: Mapping[str, Tensor], moments: Mapping[str, _Moment]) -> Tensor:
    """The values of a batch ``[values]``; to those that are not zero is added what one more gradient would add."""
    values, counts = widened(joined(batch)), [moments[name].steps for name in batch]
    sizes = [value.numel() for value in batch.values()]
    if values.is_cpu and len(batch) > 1:
        lengths = torch.tensor(sizes, device=values.device)
        means = torch.segment_reduce(values.double(), "mean", lengths=lengths) / torch.tensor(counts, device="cpu")
        more = means.to(values.dtype).repeat_interleave(lengths, output_size=len(values))
    else:
        parts = zip(values.split(sizes), counts, strict=True)
        more = torch.cat([(part.mean() / count).expand(len(part)) for part, count in parts])
    return torch.addcmul(values, more, values.sign())


def damping_epsilons(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The epsilon that is added to the root of :func:`second_moment`, by name, where there is one."""
    moments = {} if _is_spread(optimizer) else _moments(optimizer, parameters)
    return {name: eps for name, eps in epsilons(optimizer, parameters).items() if name in moments}


@dataclass(frozen=True)
class _Moment:
    value: Tensor
    correction: float | Tensor
    """What its bias is corrected by: ``1 - decay**step``; a tensor where only the device knows the step."""
    corrects: bool
    """Whether the optimizer does so before it adds epsilon."""
    steps: float | Tensor
    """How many gradients it is an average of."""
    eps: float


def _moments(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, _Moment]:
    rule = rule_of(optimizer)
    found = {stepped.name: _moment(rule, stepped) for stepped in _stepped(optimizer, parameters)}
    return {name: moment for name, moment in found.items() if moment is not None}


@dataclass(frozen=True)
class _Stepped:
    """What an optimizer has of a parameter; under ZeRO of this rank's part of it."""

    name: str
    group: Mapping[str, Any]
    state: Mapping[str, Any]
    shape: torch.Size


def _stepped(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> Iterator[_Stepped]:
    state = innermost(optimizer).state
    if is_zero(optimizer):
        for name, slot in zero_slots(optimizer, parameters).items():
            whole = state.get(slot.flat, {})
            own = {
                key: slot.of(value) for key, value in whole.items() if getattr(value, "shape", None) == slot.flat.shape
            }
            yield _Stepped(name, optimizer.param_groups[slot.group], {**whole, **own}, torch.Size([slot.size]))
        return
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        yield _Stepped(name, groups.get(id(parameter), {}), state.get(parameter, {}), parameter.shape)


def _moment(rule: StepRule, stepped: _Stepped) -> _Moment | None:
    key, state, group = rule.second_moment or "", stepped.state, stepped.group
    value = state.get(f"max_{key}", state.get(key))
    step, decay = state.get("step", group.get("step")), group.get("betas", (None, group.get("alpha")))[1]
    packed = not isinstance(value, Tensor) or value.shape != stepped.shape or value.dtype == torch.uint8
    if packed or step is None or decay is None:
        return None
    value = as_real(local(value))
    if rule.mean is not None and group.get("centered"):
        mean = as_real(local(state[rule.mean]))
        value = (widened(value) - mean.square()).clamp_(min=0)
    corrects = rule.corrects_bias and bool(group.get("bias_correction", True))
    step, memory = local(step) if isinstance(step, Tensor) else step, 1 / (1 - decay) if decay < 1 else math.inf
    eps = _epsilon(group) or 0.0
    if isinstance(step, Tensor) and step.device.type != "cpu":  # without waiting for the device
        return _Moment(value, 1 - decay**step, corrects, step.clamp(max=memory), eps)
    number = float(step)
    correction = 1 - float(decay) ** number
    return _Moment(value, correction, corrects, min(number, memory), eps) if correction > 0 else None


def _epsilon(group: Mapping[str, Any]) -> float | None:
    eps = group.get("eps")
    return float(eps) if is_number(eps) or isinstance(eps, Tensor) else None


def _weight(second_moment: Tensor, eps: float, root: float) -> Tensor:
    return adam_weight(widened(second_moment), eps).mul_(root)  # the correction, without a pass of its own


_WRAPPERS = {"lightning_gradhist.EAdaptor": "inner", "torch.ZeroRedundancyOptimizer": "optim"}


def _is_spread(optimizer: Optimizer) -> bool:
    """Whether each rank has the state of other parameters."""
    return "torch.ZeroRedundancyOptimizer" in _keys(optimizer)


def _keys(optimizer: Optimizer) -> list[str]:
    """Package and name of its class, and of the bases whose step it has; another step may do anything."""
    step = inspect.unwrap(type(optimizer).step)
    bases = [cls for cls in type(optimizer).__mro__ if issubclass(cls, Optimizer)]
    own = [cls for cls in bases if inspect.unwrap(cls.step) is step]
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in own]
