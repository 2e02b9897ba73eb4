"""What an optimizer's state says of its step: the second moment, and the metric that it makes.

Which optimizers are known, and under which key their state has it, stands in ``known_optimizers.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist._dtensor import local
from lightning_gradhist.callbacks._deepspeed import is_zero, zero_slots
from lightning_gradhist.callbacks.known_optimizers import StepRule, class_keys, innermost, rule_of
from lightning_gradhist.explore import is_number
from lightning_gradhist.noise.step import adam_weight
from lightning_gradhist.tensors import as_real, elementwise, joined, widened


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
        eps = (moment.eps or 0.0) * (root if moment.corrects else 1.0)
        alike.setdefault((eps, root), {})[name] = value
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
    return {name: moment.eps for name, moment in moments.items() if moment.eps is not None}


@dataclass(frozen=True)
class _Moment:
    value: Tensor
    correction: float | Tensor
    """What its bias is corrected by: ``1 - decay**step``; a tensor where only the device knows the step."""
    corrects: bool
    """Whether the optimizer does so before it adds epsilon."""
    steps: float | Tensor
    """How many gradients it is an average of."""
    eps: float | None
    """Of the parameter's group, where it has one."""


def _moments(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, _Moment]:
    rule = rule_of(optimizer)
    found = {name: _moment(rule, *stepped) for name, *stepped in _stepped(optimizer, parameters)}
    return {name: moment for name, moment in found.items() if moment is not None}


def _stepped(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Any, Any, torch.Size]]:
    """Name, group, state and shape of each parameter; under ZeRO of this rank's part of it."""
    state = innermost(optimizer).state
    if is_zero(optimizer):
        for name, slot in zero_slots(optimizer, parameters).items():
            whole = state.get(slot.flat, {})
            own = {
                key: slot.of(value) for key, value in whole.items() if getattr(value, "shape", None) == slot.flat.shape
            }
            yield name, optimizer.param_groups[slot.group], {**whole, **own}, torch.Size([slot.size])
        return
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in parameters.items():
        yield name, groups.get(id(parameter), {}), state.get(parameter, {}), parameter.shape


def _moment(rule: StepRule, group: Mapping[str, Any], state: Mapping[str, Any], shape: torch.Size) -> _Moment | None:
    key = rule.second_moment or ""
    value = state.get(f"max_{key}", state.get(key))
    step, decay = state.get("step", group.get("step")), group.get("betas", (None, group.get("alpha")))[1]
    packed = not isinstance(value, Tensor) or value.shape != shape or value.dtype == torch.uint8
    if packed or step is None or decay is None:
        return None
    value = as_real(local(value))
    if rule.mean is not None and group.get("centered"):
        mean = as_real(local(state[rule.mean]))
        value = (widened(value) - mean.square()).clamp_(min=0)
    corrects = rule.corrects_bias and bool(group.get("bias_correction", True))
    step, memory = local(step) if isinstance(step, Tensor) else step, 1 / (1 - decay) if decay < 1 else math.inf
    eps = group.get("eps")
    eps = float(eps) if is_number(eps) or isinstance(eps, Tensor) else None
    if isinstance(step, Tensor) and step.device.type != "cpu":  # without waiting for the device
        return _Moment(value, 1 - decay**step, corrects, step.clamp(max=memory), eps)
    number = float(step)
    correction = 1 - float(decay) ** number
    return _Moment(value, correction, corrects, min(number, memory), eps) if correction > 0 else None


def _weight(second_moment: Tensor, eps: float, root: float) -> Tensor:
    return adam_weight(widened(second_moment), eps).mul_(root)  # the correction, without a pass of its own


def _is_spread(optimizer: Optimizer) -> bool:
    """Whether each rank has the state of other parameters."""
    return "torch.ZeroRedundancyOptimizer" in class_keys(optimizer)
