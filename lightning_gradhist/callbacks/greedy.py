"""The loss along the optimizer's own steps, and the learning rate at which one of them lowers it most."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.gradients import (
    batch_of_rank,
    clip,
    gradient_for,
    is_sharded,
    optimizer_parameters,
    parameters_of,
    step_once,
)
from lightning_gradhist.callbacks.handoff import base_rate, prepare
from lightning_gradhist.callbacks.probe import Probe, mean_gradient
from lightning_gradhist.callbacks.refusal import together
from lightning_gradhist.callbacks.session import run_probe
from lightning_gradhist.greedy import (
    FITTED_STEPS,
    PILOT_SHARES,
    PILOT_STEPS,
    GreedyRate,
    NoGreedyRateError,
    find_minimum,
    fitted_lengths,
    greedy_rate,
)
from lightning_gradhist.report.result import GroupChange


class OwnSteps:
    """Steps that an optimizer would make from the present weights, and how the loss changes along them.

    A step is that of a copy of the optimizer, in double precision, for the mean gradient of as many batches as an
    optimizer step has, over all ranks, clipped as the trainer clips. Its loss is that of one more batch on each rank,
    forward only, with the same random numbers at each length. To be used within :func:`no_trace`; it holds three copies
    of the parameters in single precision, and for a moment two in double, with the optimizer's state.

    Args:
        trainer: whose accumulation and clipping count.
        probe: for gradients without weight decay, and losses.
        parameters: names and parameters that the probe gives gradients of.
        optimizer: whose steps are asked for; they must be proportional to its learning rates.
        changes: of its groups, to be made in the copy.
        rate: a learning rate that lengths are in units of: that of the optimizer's first group.

    Attributes:
        gradients: number of gradients that were taken, over all ranks.
        forwards: number of forward passes beside, over all ranks.
    """

    def __init__(
        self,
        trainer: Trainer,
        probe: Probe,
        parameters: Mapping[str, Tensor],
        optimizer: Optimizer,
        changes: Sequence[GroupChange],
        rate: float,
    ) -> None:
        self.gradients = self.forwards = 0
        self._trainer = trainer
        self._probe = probe
        self._parameters = parameters
        self._optimizer = optimizer
        self._changes = changes
        self._rate = rate
        self._origin = {name: p.detach().clone() for name, p in parameters.items()}

    def reach(self) -> float:
        """The learning rate at which a step is as long as all weights together.

        Raises:
            NoGreedyRateError: where there is no step, or it has no length.
        """
        step = self._next_step()
        length = 0.0 if step is None else _norm(step)
        weights = _norm(self._origin)
        if not (length > 0 and weights > 0):
            raise NoGreedyRateError(f"the optimizer's step has length {length:.3g}, and the weights {weights:.3g}")
        return weights / length

    def changes(self, number: int, rates: Sequence[float]) -> list[list[float]]:
        """The change of the loss at each of some learning rates, one row for each step that gave a finite gradient."""
        rows = []
        for _ in range(number):
            step = self._next_step()
            if step is not None:
                rows += self._along(step, rates)
        return rows

    def _next_step(self) -> dict[str, Tensor] | None:
        """What is subtracted from the weights at a learning rate of one; the same on every rank."""
        moments = mean_gradient(self._trainer, self._probe, self._trainer.accumulate_grad_batches)
        if moments.count == 0:
            return None
        self.gradients += moments.count
        return together(self._trainer, "the optimizer's step", lambda: self._step_of(moments.mean))

    def _step_of(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copied = copy.deepcopy(self._optimizer)
        mine, theirs = parameters_of(self._optimizer), parameters_of(copied)
        for p in theirs:
            _widen(p, copied.state.get(p, {}))
            p.grad = None
        copy_of = {id(p): other for p, other in zip(mine, theirs, strict=True)}
        stepped = {name: copy_of[id(p)] for name, p in self._parameters.items()}
        before = {name: p.detach().clone() for name, p in stepped.items()}
        for name, p in stepped.items():
            p.grad = gradient_for(p, gradients[name])
        clip(self._trainer, theirs)
        prepare(copied.param_groups, self._changes)
        step_once(copied)
        return {
            name: ((before[name] - p.detach()) / self._rate).to(_at_least_single(self._origin[name]))
            for name, p in stepped.items()
        }

    def _along(self, step: Mapping[str, Tensor], rates: Sequence[float]) -> list[list[float]]:
        """The mean over ranks, of one batch on each; no row where none gave a loss at the weights of the start."""
        places = [partial(self._go_to, step, rate) for rate in (0.0, *rates)]
        sums = torch.zeros(1 + len(rates), dtype=torch.float64, device=self._trainer.lightning_module.device)
        for start, *losses in self._probe.losses(1, places):
            sums += torch.tensor([1.0, *(loss - start for loss in losses)], dtype=torch.float64, device=sums.device)
        self._go_to(step, 0.0)
        if self._trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        number, *totals = sums.tolist()
        self.forwards += int(number) * len(places)
        return [[total / number for total in totals]] if number else []

    @torch.no_grad()
    def _go_to(self, step: Mapping[str, Tensor], rate: float) -> None:
        for name, p in self._parameters.items():
            p.copy_(self._origin[name] - rate * step[name] if rate else self._origin[name])


class GreedyProbe:
    """Finds the learning rate at which one step of the optimizer lowers the loss most, within a probe.

    Some steps of very different lengths find the minimum, the others measure it; each is made of other batches.

    Args:
        trainer: at its first batch.
        module: at its first batch.
        changes: of the optimizer's groups, that come before.
        batch_size: samples of a micro-batch on this rank, where the user gave it.

    Attributes:
        base: learning rate of the first group that has one, which the rate is found for; zero where none has.
        rate: what was found, or None.
        why_none: why nothing was found, or None.
        left_out: one sentence for each kind of batch that gave nothing.
        gradients: number of gradients that were taken, over all ranks.
        forwards: number of forward passes beside, over all ranks.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, changes: Sequence[GroupChange], batch_size: int | None = None
    ) -> None:
        self.rate: GreedyRate | None = None
        self.why_none: str | None = None
        self.left_out: list[str] = []
        self.gradients = self.forwards = 0
        self._trainer = trainer
        self._module = module
        self._optimizer = trainer.optimizers[0]
        self._changes = changes
        self._batch_size = batch_size
        self.base = next((rate for group in self._optimizer.param_groups if (rate := base_rate(group)) > 0), 0.0)

    def run(self, batches: int, confidence: float) -> None:
        """Measures with so many batches on each rank; to be called on every rank."""
        obstacle = self._obstacle(batches)
        if obstacle is None:
            measure = partial(self._measure, confidence)
            obstacle = run_probe(self._trainer, self._module, batches, self._fewest(), measure)
        self.why_none = obstacle or self.why_none

    def _obstacle(self, batches: int) -> str | None:
        if is_sharded(self._trainer):
            return "it moves whole weights, and those of this strategy are sharded"
        if not self.base > 0:
            return "every learning rate of the optimizer is zero, so its step has no direction"
        if batches < self._fewest():
            return f"it takes at least {self._fewest()} batches; pass probe_batches={self._fewest()}"
        return None

    def _a_step(self) -> int:
        return self._trainer.accumulate_grad_batches + 1  # and the batch of its losses

    def _fewest(self) -> int:
        return (PILOT_STEPS + FITTED_STEPS) * self._a_step() + self._trainer.accumulate_grad_batches

    def _measure(self, confidence: float, batches: int, tick: Callable[[], Any]) -> None:
        rank_batch = batch_of_rank(self._trainer, self._batch_size)
        probe = Probe(self._trainer, self._module, self._optimizer, rank_batch, tick, with_decay=False)
        trained = {n: p for n, p in optimizer_parameters(self._module, self._optimizer).items() if p.requires_grad}
        steps = together(
            self._trainer,
            "to hold the weights",
            lambda: OwnSteps(self._trainer, probe, trained, self._optimizer, self._changes, self.base),
        )
        number = (batches - self._trainer.accumulate_grad_batches) // self._a_step()
        try:
            self.rate = _rate_of(steps, number, confidence)
        except NoGreedyRateError as error:
            self.why_none = str(error)
        self.gradients, self.forwards = steps.gradients, steps.forwards
        self.left_out = probe.left_out()


def _rate_of(steps: OwnSteps, number: int, confidence: float) -> GreedyRate:
    pilots = max(PILOT_STEPS, number // 4)
    reach = steps.reach()
    rates: Sequence[float] = [share * reach for share in PILOT_SHARES]
    rates = fitted_lengths(find_minimum(rates, steps.changes(pilots, rates)))
    return greedy_rate(rates, steps.changes(number - pilots, rates), confidence)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([tensor.norm().double().cpu() for tensor in tensors.values()]).norm())


def _at_least_single(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _widen(parameter: Tensor, state: dict[str, Any]) -> None:
    """Puts a parameter into double precision, and what an optimizer holds of its shape: a small step must not be lost."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
            state[key] = value.double()
    parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float64))
