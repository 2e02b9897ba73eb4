"""Short runs with some epsilons, from the same initial state and on the same batches."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.gradients import (
    as_real,
    batch_of_rank,
    clip,
    gradient_for,
    is_sharded,
    optimizer_parameters,
    parameters_of,
    step_once,
)
from lightning_gradhist.callbacks.handoff import base_rate, prepare
from lightning_gradhist.callbacks.no_trace import no_trace
from lightning_gradhist.callbacks.probe import Probe, mean_gradient
from lightning_gradhist.callbacks.refusal import together
from lightning_gradhist.callbacks.scaling import decay_changes, is_decoupled
from lightning_gradhist.callbacks.session import run_probe
from lightning_gradhist.epsilon_search import (
    HELD_OUT,
    LEAST_STEPS,
    STEPS,
    TRAJECTORIES,
    Candidate,
    EpsilonSearch,
    control_rates,
    search_result,
)
from lightning_gradhist.report.result import GroupChange

Tried = Callable[["float | None"], tuple[float, float]]
"""Squared length of the step with an epsilon, None for the present one, and its descent along the gradient."""


class ShortRun:
    """A copy of an optimizer that steps the real weights, at its base rates; to be used within :func:`no_trace`.

    A step is for the mean gradient of as many batches as an optimizer step has, over all ranks, clipped as the trainer
    clips. It holds the optimizer's state and two copies of the parameters.

    Args:
        trainer: whose accumulation and clipping count.
        probe: for gradients without weight decay, and losses.
        parameters: names and parameters that the probe gives gradients of.
        optimizer: to be copied.
        changes: of its groups, to be made in the copy.
        factor: of its learning rates.

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
        factor: float = 1.0,
    ) -> None:
        self.gradients = self.forwards = 0
        self._trainer = trainer
        self._probe = probe
        self._parameters = parameters
        self._optimizer = _copy(optimizer)
        prepare(self._optimizer.param_groups, changes, factor)

    def steps(self, number: int, look: Callable[[Tried], None] | None = None) -> None:
        """Makes up to so many steps.

        Args:
            number: of steps; one whose batches give no finite gradient is left out.
            look: called before each step with what gives the squared length that the step would have with an epsilon, or
                with the present one, and its descent along the gradient.
        """
        for _ in range(number):
            moments = mean_gradient(self._trainer, self._probe, self._trainer.accumulate_grad_batches)
            self.gradients += moments.count
            if moments.count:
                together(self._trainer, "the optimizer's step", partial(self._step, moments.mean, look))

    def loss(self, batches: int) -> float:
        """The mean over batches and ranks at the present weights; infinite where one is not finite."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._trainer.lightning_module.device)
        for losses in self._probe.losses(batches, [_stay]):
            sums += torch.tensor([1.0, *losses], dtype=torch.float64, device=sums.device)
        if self._trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        number, total = sums.tolist()
        self.forwards += int(number)
        return total / number if number == batches * self._trainer.world_size else math.inf

    def _step(self, gradients: Mapping[str, Tensor], look: Callable[[Tried], None] | None) -> None:
        mine = parameters_of(self._optimizer)
        before = [p.grad for p in mine]
        try:
            for p in mine:
                p.grad = None
            for name, p in self._parameters.items():
                p.grad = gradient_for(p, gradients[name])
            clip(self._trainer, mine)
            if look is not None:
                look(self._tried)
            step_once(self._optimizer)
        finally:
            for p, gradient in zip(mine, before, strict=True):
                p.grad = gradient

    def _tried(self, eps: float | None) -> tuple[float, float]:
        """The step that a copy of this copy makes, from the same state and for the same gradient, less decoupled decay."""
        copied = _copy(self._optimizer)
        for group in copied.param_groups:
            group["eps"] = group["eps"] if eps is None else eps
            if group.get("weight_decay") and is_decoupled(copied, group):
                group["weight_decay"] = 0.0  # it does not go with the rate: see decay_changes
        before = {name: p.detach().clone() for name, p in self._parameters.items()}
        step_once(copied)
        square = descent = 0.0
        with torch.no_grad():
            for name, p in self._parameters.items():
                step = as_real(before[name] - p).flatten().double()
                square += float(step @ step)
                descent += float(step @ as_real(p.grad).flatten().double()) if p.grad is not None else 0.0
                p.copy_(before[name])
        return square, descent


class EpsilonSearchProbe:
    r"""Tries epsilons in short runs within a probe, and finds whether one is better than the present.

    A trajectory is a number of batches of its own, of which the last are held out. From the same weights, optimizer state
    and random numbers, at the base learning rates, each epsilon trains on the others and is judged by the mean loss on
    those held out. The learning rate of a candidate is multiplied by

    .. math:: \sqrt{\sum_k |\Delta_k(\epsilon_0)|^2 / \sum_k |\Delta_k(\epsilon)|^2}

    over the steps ``k`` of the present epsilon's first trajectory, where :math:`\Delta_k(\epsilon)` is the optimizer's
    step with ``eps`` from the present state, for the present gradient: one factor, which a whole run can have, so that
    the updates are as large. A rescaling at each step would hide what cannot be handed on. The present epsilon is run at
    other rates too, as :func:`lightning_gradhist.epsilon_search.search_result` says. Decoupled weight decay has no part in
    the steps that are compared, and is divided by the factor of the rate, so that weights shrink alike in all runs.

    The batches of one trajectory are held while it lasts, and up to nine copies of the parameters.

    Args:
        trainer: at its first batch.
        module: at its first batch.
        changes: of the optimizer's groups, that come before.
        batch_size: samples of a micro-batch on this rank, where the user gave it.

    Attributes:
        found: what the runs came to, or None.
        why_none: why there were none, or None.
        left_out: one sentence for each kind of batch that gave nothing.
    """

    def __init__(
        self, trainer: Trainer, module: LightningModule, changes: Sequence[GroupChange], batch_size: int | None = None
    ) -> None:
        self.found: EpsilonSearch | None = None
        self.why_none: str | None = None
        self.left_out: list[str] = []
        self._trainer = trainer
        self._module = module
        self._optimizer = trainer.optimizers[0]
        self._changes = changes
        self._batch_size = batch_size
        self._accumulated = trainer.accumulate_grad_batches
        self._gradients = self._forwards = 0

    def run(self, present: float, tried: Sequence[Candidate], confidence: float) -> None:
        """Makes the runs; to be called on every rank.

        Args:
            present: epsilon of the first group, for the report.
            tried: what is compared with the optimizer as it is, after the changes; at least one.
            confidence: of the decision, between 0 and 1.
        """
        obstacle = self._obstacle()
        if obstacle is None:
            wanted, least = (TRAJECTORIES * (steps * self._accumulated + HELD_OUT) for steps in (STEPS, LEAST_STEPS))
            measure = partial(self._measure, present, tried, confidence)
            obstacle = run_probe(self._trainer, self._module, wanted, least, measure)
        self.why_none = obstacle or self.why_none

    def _obstacle(self) -> str | None:
        if is_sharded(self._trainer):
            return "it moves whole weights, and those of this strategy are sharded"
        if not any(base_rate(group) > 0 for group in self._optimizer.param_groups):
            return "every learning rate of the optimizer is zero, so nothing would move"
        return None

    def _measure(
        self, present: float, tried: Sequence[Candidate], confidence: float, batches: int, tick: Callable[[], Any]
    ) -> None:
        rank_batch = batch_of_rank(self._trainer, self._batch_size)
        reader = Probe(self._trainer, self._module, self._optimizer, rank_batch, tick)
        steps = min(STEPS, (batches // TRAJECTORIES - HELD_OUT) // self._accumulated)
        factors: list[float] = []
        rates: Sequence[float] = ()
        losses: list[list[float]] = []
        for number in range(TRAJECTORIES):
            held = reader.hold(steps * self._accumulated + HELD_OUT)
            if len(held) < LEAST_STEPS * self._accumulated + HELD_OUT:
                break
            run = partial(self._loss_after, held, number)
            compared = _Compared([candidate.eps for candidate in tried])
            losses.append([run(self._changes, 1.0, None if factors else compared.add)])
            if not factors:
                factors = [f if c.equal_rms else 1.0 for c, f in zip(tried, compared.factors(), strict=True)]
                gains = compared.gains(factors)
                rates = control_rates([gain for c, gain in zip(tried, gains, strict=True) if c.equal_rms])
            losses[-1] += [run(self._at(rate), rate) for rate in rates]
            for candidate, factor in zip(tried, factors, strict=True):
                changes = self._at(factor, candidate.eps)
                losses[-1].append(run(changes, factor) if factor < math.inf else math.inf)
        self.left_out = reader.left_out()
        cost = {"steps": steps, "gradients": self._gradients, "forwards": self._forwards}
        try:
            self.found = search_result(present, rates, tried, factors, losses, confidence, **cost)
        except ValueError as error:
            self.why_none = str(error)

    def _at(self, factor: float, eps: float | None = None) -> list[GroupChange]:
        """The changes that go with a factor of the learning rate, and with an epsilon other than the present."""
        changes = [*self._changes, *decay_changes(self._optimizer, factor)]
        if eps is not None:
            groups = enumerate(self._optimizer.param_groups)
            changes += [GroupChange(index, "eps", group["eps"], eps) for index, group in groups]
        return changes

    def _loss_after(
        self,
        held: Sequence[Any],
        trajectory: int,
        changes: Sequence[GroupChange],
        factor: float,
        look: Callable[[Tried], None] | None = None,
    ) -> float:
        """The loss on the batches held out, after a run on the others; the weights are as before then."""
        with ExitStack() as stack:
            begin = partial(no_trace, self._trainer, self._module)
            together(self._trainer, "to copy the weights", lambda: stack.enter_context(begin()))
            _seed(trajectory * self._trainer.world_size + self._trainer.global_rank)
            probe = Probe(self._trainer, self._module, self._optimizer, with_decay=False, source=held)
            trained = {n: p for n, p in optimizer_parameters(self._module, self._optimizer).items() if p.requires_grad}
            run = together(
                self._trainer,
                "to copy the optimizer",
                lambda: ShortRun(self._trainer, probe, trained, self._optimizer, changes, factor),
            )
            run.steps((len(held) - HELD_OUT) // self._accumulated, look)
            loss = run.loss(HELD_OUT)
        self._gradients += run.gradients
        self._forwards += run.forwards
        return loss


class _Compared:
    """Sums over steps of their squared lengths and descents: those of the present epsilon, and of each candidate's."""

    def __init__(self, eps: Sequence[float]) -> None:
        self._eps = (None, *eps)
        self._sums = [(0.0, 0.0)] * len(self._eps)

    def add(self, tried: Tried) -> None:
        found = [tried(eps) for eps in self._eps]
        self._sums = [(a + c, b + d) for (a, b), (c, d) in zip(self._sums, found, strict=True)]

    def factors(self) -> list[float]:
        """Of the learning rates, for updates as large; infinite where an epsilon leaves none, or there are none."""
        present, *others = (square for square, _ in self._sums)
        usable = [present > 0 and 0 < other < math.inf for other in others]
        return [math.sqrt(present / other) if ok else math.inf for other, ok in zip(others, usable, strict=True)]

    def gains(self, factors: Sequence[float]) -> list[float]:
        """Of the descents, at these factors; 1 where the present epsilon's steps do not descend."""
        present, *others = (descent for _, descent in self._sums)
        return (
            [other * f / present for other, f in zip(others, factors, strict=True)]
            if present > 0
            else [1.0] * len(others)
        )


def _copy(optimizer: Optimizer) -> Optimizer:
    """A copy that steps the same parameters."""
    same = {id(p): p for p in parameters_of(optimizer)}
    return copy.deepcopy(optimizer, same)


def _seed(seed: int) -> None:
    """Within :func:`no_trace`, which puts the generators back; Lightning's own would leave a variable of the process."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _stay() -> None:
    """The losses are those at the present weights."""
