"""What the monitor keeps of one optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks.gradients import LocalGradients, as_real, local
from lightning_gradhist.callbacks.handoff import base_rate
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.noise import METRICS, NoiseRecord, adam_weight, copies, elementwise, measure_pair
from lightning_gradhist.report.record import OptimizerRecord
from lightning_gradhist.report.writer import HostCopy


@dataclass
class Step:
    """A step from ``on_before_optimizer_step`` until the optimizer takes it, if it does."""

    number: int
    """The trainer's ``global_step``."""
    due: bool
    """Whether it is to be logged."""
    histogram: MagnitudeHistogram | None = None


@dataclass
class Held:
    """This rank's part of the first gradient of a pair."""

    step: int
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor] | None

    def measure(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of noise and signal, as :func:`measure_pair` gives them."""
        if not self.gradients:  # others have all there is
            return torch.zeros(4, dtype=torch.float64)
        return measure_pair(self.gradients, gradients, self.weights)


class Watched:
    """The steps of one optimizer, those that were logged or skipped, and its noise."""

    def __init__(
        self,
        steps: int = 0,
        logged: int = 0,
        samples: list[dict[str, Any]] | None = None,
        learning_rates: list[float] | None = None,
        batch_size: int = 0,
        skipped: int = 0,
    ) -> None:
        self.steps = steps
        self.logged = logged
        self.skipped: int | Tensor = skipped
        """Steps that the loss scaler skipped; a tensor where only the device knows."""
        self.noise = NoiseRecord(samples or [])
        self.learning_rates = learning_rates or []
        """The highest base rate of each group so far: what a schedule, or a warm-up by hand, rises to or falls from."""
        self.batch_size = batch_size
        self.measured = 0
        """Times that noise was measured, also in vain; the same on all ranks."""
        self.last_step = -1
        self.last_logged: tuple[HostCopy, int] | None = None
        self.begun: Step | None = None
        self.local: LocalGradients | None = None
        self.part: LocalGradients | None = None
        """Of the coming step's first micro-batch on this rank."""
        self.in_pair = False
        """Whether the step before was the first of a pair; the same on all ranks."""
        self.first: Held | None = None
        """None where this rank cannot measure it."""

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which the constructor takes."""
        return {
            "steps": self.steps,
            "logged": self.logged,
            "samples": [dict(sample) for sample in self.noise.samples],
            "learning_rates": list(self.learning_rates),
            "batch_size": self.batch_size,
            "skipped": int(self.skipped),
        }

    def release(self) -> None:
        """Lets go of what belongs to the model."""
        self.drop_pair()
        self.drop_copies()
        self.last_logged = self.begun = None

    def drop_copies(self) -> None:
        """Copies nothing of the coming step."""
        for awaited in (self.local, self.part):
            if awaited is not None:
                awaited.remove()
        self.local = self.part = None

    def drop_pair(self) -> None:
        """Measures nothing of the step before."""
        self.in_pair, self.first = False, None

    def hold(
        self,
        batch_size: int,
        optimizer: Optimizer,
        gradients: Mapping[str, Tensor],
        weights: Mapping[str, Tensor] | None,
    ) -> None:
        """Keeps this step's gradient for the next one, with the metric of before, which depends on neither."""
        self.note(batch_size, optimizer)
        held = copies({name: g for name, g in gradients.items() if g.numel()})
        self.first = Held(self.steps, held, None if weights is None else dict(weights))

    def note(self, batch_size: int, optimizer: Optimizer) -> None:
        """Takes down what a record says of the steps that were measured."""
        rates = [base_rate(group) for group in optimizer.param_groups]
        self.learning_rates = [max(pair) for pair in zip_longest(rates, self.learning_rates, fillvalue=0.0)]
        self.batch_size = batch_size

    def record(self, name: str) -> OptimizerRecord:
        """The noise so far, of the optimizer of this class name."""
        noise = {metric: self.noise.estimate(metric) for metric in METRICS}
        return OptimizerRecord(name, self.learning_rates, self.batch_size, noise, list(self.noise.samples))


def has_second_moment(state: Mapping[str, Any], parameter: Tensor) -> bool:
    """Whether an optimizer's state of a parameter has Adam's second moment, and the step that its bias depends on."""
    moment = state.get("exp_avg_sq")
    return "step" in state and isinstance(moment, Tensor) and moment.shape == parameter.shape


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


def _moments(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The second moments, and what each has still to be divided by."""
    decay = {id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    moments: dict[str, Tensor] = {}
    corrections: dict[str, float] = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if has_second_moment(state, parameter) and id(parameter) in decay:
            step = local(state["step"]) if isinstance(state["step"], Tensor) else state["step"]
            moments[name], corrections[name] = as_real(local(state["exp_avg_sq"])), 1.0
            if isinstance(step, Tensor) and step.device.type != "cpu":  # without waiting for the device
                moments[name] = moments[name] / (1 - decay[id(parameter)] ** step)
            else:
                corrections[name] = 1 - decay[id(parameter)] ** float(step)
    return moments, corrections


def epsilons(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The epsilon of each parameter's group, by name, where it has one."""
    given = [(group.get("eps"), group["params"]) for group in optimizer.param_groups]
    eps = {id(p): float(one) for one, params in given if isinstance(one, (float, int, Tensor)) for p in params}
    return {name: eps[id(parameter)] for name, parameter in parameters.items() if id(parameter) in eps}


def _weight(second_moment: Tensor, eps: float, correction: float) -> Tensor:
    root = math.sqrt(correction)
    return adam_weight(second_moment.float(), eps * root).mul_(root)  # the correction, without a pass of its own
