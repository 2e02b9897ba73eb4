"""The noise of the gradients, measured at the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.batch_size import effective_batch_size, is_short_step
from lightning_gradhist.callbacks.calibration.handoff import base_rates
from lightning_gradhist.callbacks.guard import Guard
from lightning_gradhist.callbacks.monitor.watched import Watched
from lightning_gradhist.callbacks.optimizers import metric_weights
from lightning_gradhist.callbacks.strategies import Replicas, own_parts, parts_of_a_step
from lightning_gradhist.noise.step import measure_part


@dataclass(frozen=True)
class ComingStep:
    """A step that an optimizer is about to make.

    Attributes:
        watched: of the optimizer.
        optimizer: that is about to step.
        parameters: names and parameters of the optimizer.
        gradients: that it will use, or None where they cannot be had on this rank.
        parts: this rank's parts of them, or None.
    """

    watched: Watched
    optimizer: Optimizer
    parameters: Mapping[str, nn.Parameter]
    gradients: Mapping[str, Tensor] | None
    parts: Mapping[str, Tensor] | None


class NoiseWatch:
    """Measures noise, without a backward pass of its own.

    Where a step has parts, the micro-batches of accumulation or the ranks of DDP, one of them on each rank is held against
    the whole step; else the gradients of two successive steps are held against each other, each of them in one pair, so
    that pairs are independent.

    Args:
        replicas: how gradients are spread over ranks.
        batch_size: samples of a micro-batch on one device, where the user gave it.
        guard: for what may fail.
    """

    def __init__(self, replicas: Replicas, batch_size: int | None, guard: Guard) -> None:
        self._replicas = replicas
        self._batch_size = batch_size
        self._guard = guard

    def step(self, trainer: Trainer, step: ComingStep) -> None:
        """Measures at one step of an optimizer, at ``on_before_optimizer_step``; to be called on every rank."""
        if step.watched.part is not None:
            self._measure_part(trainer, step)
        elif step.watched.in_pair:
            self._complete_pair(trainer, step.watched, step.parts)
        else:
            self._begin_pair(trainer, step)

    def _begin_pair(self, trainer: Trainer, step: ComingStep) -> None:
        watched, parts = step.watched, step.parts
        watched.in_pair = True
        batch_size = effective_batch_size(trainer, self._batch_size)
        if batch_size is not None and parts and not is_short_step(trainer):

            def hold() -> None:
                rates = _rates(trainer, step.optimizer)
                own = partial(own_parts, parameters=step.parameters, replicas=self._replicas)
                watched.hold(batch_size, rates, parts, metric_weights(step.optimizer, step.parameters, own))

            self._guard.done(hold)

    def _complete_pair(self, trainer: Trainer, watched: Watched, parts: Mapping[str, Tensor] | None) -> None:
        first = watched.first if parts and not is_short_step(trainer) else None
        watched.drop_pair()
        sums = self._sums(trainer, None if first is None else lambda: first.measure(parts or {}))
        if first is not None:
            watched.noise.add(first.step, watched.batch_size, sums)

    def _measure_part(self, trainer: Trainer, step: ComingStep) -> None:
        """Holds the gradient of one micro-batch of each rank against that of all."""
        watched, gradients = step.watched, step.gradients
        assert watched.part is not None
        copies, parts = watched.part, parts_of_a_step(trainer)
        alone = parts == 1  # accumulation may have ended since the copy was ordered
        batch_size = None if alone or is_short_step(trainer) else effective_batch_size(trainer, self._batch_size)
        copies.remove()
        watched.drop_pair()  # begun before accumulation was

        def measure() -> Tensor:
            part = copies.take(trainer, trainer.accumulate_grad_batches)
            return measure_part(part, gradients or {}, metric_weights(step.optimizer, step.parameters), parts)

        sums = self._sums(trainer, None if batch_size is None or gradients is None else measure)
        if batch_size is not None:
            watched.note(batch_size, _rates(trainer, step.optimizer))
            watched.noise.add(watched.steps, batch_size, sums / self._replicas.ranks)

    def _sums(self, trainer: Trainer, measure: Callable[[], Tensor] | None) -> Tensor:
        """The sum ``[4]`` over ranks of what is measured on each, NaN if on one it is not; to be called on every rank."""
        sums = torch.full((4,), math.nan, dtype=torch.float64, device=trainer.lightning_module.device)
        if measure is not None:
            self._guard.done(lambda: sums.copy_(measure()))
        if self._replicas.ranks > 1:
            torch.distributed.all_reduce(sums)
        return sums


def _rates(trainer: Trainer, optimizer: Optimizer) -> list[float | None]:
    return base_rates(optimizer, [config.scheduler for config in trainer.lr_scheduler_configs])
