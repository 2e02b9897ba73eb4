"""What the monitor keeps of one optimizer."""

from __future__ import annotations

from collections.abc import Mapping
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
from lightning_gradhist.noise import METRICS, NoiseRecord, adam_weight, elementwise, measure_pair
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
        for copies in (self.local, self.part):
            if copies is not None:
                copies.remove()
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
        held = elementwise(torch.clone, {name: g for name, g in gradients.items() if g.numel()})
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
    decay = {id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    moments: dict[str, Tensor] = {}
    corrections: list[Any] = []
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if has_second_moment(state, parameter) and id(parameter) in decay:
            step = local(state["step"]) if isinstance(state["step"], Tensor) else state["step"]
            on_host = not isinstance(step, Tensor) or step.device.type == "cpu"
            moments[name] = as_real(local(state["exp_avg_sq"]))
            corrections.append(1 - decay[id(parameter)] ** (float(step) if on_host else step))  # without waiting
    if not moments:
        return {}
    if all(isinstance(correction, float) for correction in corrections):
        return dict(zip(moments, torch._foreach_div(list(moments.values()), corrections), strict=True))
    return {name: moment / correction for (name, moment), correction in zip(moments.items(), corrections, strict=True)}


def metric_weights(moments: Mapping[str, Tensor], eps: Mapping[str, float]) -> dict[str, Tensor] | None:
    """Adam's metric by name, from :func:`second_moment` and :func:`epsilons`; None where the former is empty."""
    by_eps: dict[float, dict[str, Tensor]] = {}
    for name, moment in moments.items():
        by_eps.setdefault(eps.get(name, 0.0), {})[name] = moment
    weights: dict[str, Tensor] = {}
    for one, alike in by_eps.items():
        weights |= elementwise(partial(_weight, eps=one), alike)
    return weights or None


def epsilons(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """The epsilon of each parameter's group, by name, where it has one."""
    given = [(group.get("eps"), group["params"]) for group in optimizer.param_groups]
    eps = {id(p): float(one) for one, params in given if isinstance(one, (float, int, Tensor)) for p in params}
    return {name: eps[id(parameter)] for name, parameter in parameters.items() if id(parameter) in eps}


def _weight(second_moment: Tensor, eps: float) -> Tensor:
    return adam_weight(second_moment.float(), eps)
