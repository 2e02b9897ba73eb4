"""The noise of the gradients, measured at the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_gradhist.callbacks.batch_size import effective_batch_size, is_short_step
from lightning_gradhist.callbacks.calibration.handoff import base_rates
from lightning_gradhist.callbacks.gradients import LocalGradients, loss_scale, squared_norm
from lightning_gradhist.callbacks.monitor.observer import Step, StepObserver, WatchedOptimizer
from lightning_gradhist.callbacks.monitor.progress import Progress
from lightning_gradhist.callbacks.optimizers import metric_weights
from lightning_gradhist.callbacks.strategies import own_parts, parts_of_a_step
from lightning_gradhist.noise.step import measure_pair, measure_part
from lightning_gradhist.tensors import copies

_ALIKE = 1e-3  # relative difference of squared norms of gradients that nobody has changed


@dataclass
class FirstGradient:
    """This rank's part of the first gradient of a pair, with the metric from before its step, which depends on neither."""

    step: int
    gradients: dict[str, Tensor]
    weights: Mapping[str, Tensor] | None

    def measure(self, second: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of noise and signal, as :func:`measure_pair` gives them."""
        if not self.gradients:  # others have all there is
            return torch.zeros(4, dtype=torch.float64)
        alike = {name: g for name, g in second.items() if g.shape == getattr(self.gradients.get(name), "shape", None)}
        return measure_pair(self.gradients, alike, self.weights)


class NoiseMonitor(StepObserver):
    """Measures noise, without a backward pass of its own.

    Where a step has parts, the micro-batches of accumulation or the ranks of DDP, one of them on each rank is held against
    the whole step; else the gradients of two successive steps are held against each other, each of them in one pair, so
    that pairs are independent.

    Args:
        watched: the optimizer.
        progress: its steps and noise so far.
        batch_size: samples of a micro-batch on one device, where the user gave it.
    """

    def __init__(self, watched: WatchedOptimizer, progress: Progress, batch_size: int | None) -> None:
        self._watched, self._fit, self._progress = watched, watched.fit, progress
        self._batch_size = batch_size
        self._part: LocalGradients | None = None  # of the coming step's first micro-batch on this rank
        self._in_pair = False  # the same on all ranks
        self._first: FirstGradient | None = None  # None where this rank cannot measure it
        self._backwards = 0  # since the step before
        self._left: Tensor | None = None  # squared norm of the gradients as the last of them left it
        self._changed: list[Tensor] = []  # whether it was another one afterwards

    def prepare(self, due: bool) -> None:
        """Has the gradients of the first micro-batch copied, where the step has several."""
        self._drop_part()
        self._backwards, self._left, self._changed = 0, None, []
        if due and parts_of_a_step(self._fit.trainer) > 1:
            self._part = LocalGradients(self._watched.parameters)

    def before_backward(self) -> None:
        """Copies what has been unfrozen since, too, and compares where micro-batches have gone before."""
        if self._part is not None:
            self._part.extend(self._watched.parameters)
        if self._left is not None:
            with self._fit.guard.attempt("measure noise"):
                self._compare(self._squared_norm())

    def after_backward(self) -> None:
        """Ends the first micro-batch."""
        self._backwards += 1
        if self._part is not None:
            self._part.close()
            with self._fit.guard.attempt("measure noise"):
                self._left = self._squared_norm()

    def wants_gradients(self, due: bool) -> bool:
        """Whether a measurement begins or ends."""
        return due or self._in_pair

    def before_step(self, step: Step) -> None:
        """Measures."""
        if self._part is not None:
            self._measure_part(self._part, step)
        elif self._in_pair:
            self._complete_pair(step.parts)
        elif step.due:
            self._begin_pair(step.parts)

    def discard(self) -> None:
        """Measures nothing of the step before."""
        self._in_pair, self._first = False, None

    def close(self) -> None:
        """Drops what is held."""
        self.discard()
        self._drop_part()

    def _drop_part(self) -> None:
        if self._part is not None:
            self._part.close()
        self._part = None

    def _is_whole(self) -> bool:
        """Whether the step has as many samples as others: no short batch, and no micro-batch without a loss."""
        trainer = self._fit.trainer
        lacks_loss = (
            self._backwards != trainer.accumulate_grad_batches and trainer.lightning_module.automatic_optimization
        )
        return not lacks_loss and not is_short_step(trainer)

    def _samples(self) -> int | None:
        return effective_batch_size(self._fit.trainer, self._batch_size) if self._is_whole() else None

    def _compare(self, squares: Tensor) -> None:
        """Takes down, on the device, whether somebody has changed the gradients since backward left them."""
        if self._left is not None:
            self._changed.append((squares - self._left).abs() > _ALIKE * self._left)

    def _squared_norm(self) -> Tensor:
        return squared_norm([p.grad for p in self._watched.parameters.values() if p.grad is not None])

    def _rates(self) -> list[float | None]:
        schedulers = [config.scheduler for config in self._fit.trainer.lr_scheduler_configs]
        return base_rates(self._watched.optimizer, schedulers)

    def _begin_pair(self, parts: Mapping[str, Tensor] | None) -> None:
        self._in_pair = True
        batch_size, parameters, optimizer = self._samples(), self._watched.parameters, self._watched.optimizer
        if batch_size is None or not parts:
            return
        with self._fit.guard.attempt("measure noise"):
            self._progress.measures(batch_size, self._rates())
            held = copies({name: gradient for name, gradient in parts.items() if gradient.numel()})
            own = partial(own_parts, parameters=parameters, replicas=self._fit.replicas)
            self._first = FirstGradient(self._progress.steps, held, metric_weights(optimizer, parameters, own))

    def _complete_pair(self, parts: Mapping[str, Tensor] | None) -> None:
        first = self._first if parts and self._is_whole() else None
        self.discard()
        sums = self._sums(None if first is None else lambda: first.measure(parts or {}))
        if first is not None:
            self._progress.noise.add(first.step, self._progress.batch_size, sums)

    def _measure_part(self, copied: LocalGradients, step: Step) -> None:
        """Holds the gradient of one micro-batch of each rank against that of all."""
        trainer, watched, gradients = self._fit.trainer, self._watched, step.gradients
        parts = parts_of_a_step(trainer)  # 1 where accumulation has ended since the copy was ordered
        batch_size = self._samples() if parts > 1 else None
        copied.close()
        self.discard()  # begun before accumulation was

        def measure() -> Tensor:
            self._compare(squared_norm((gradients or {}).values()) * loss_scale(trainer) ** 2)
            part = copied.take(trainer, trainer.accumulate_grad_batches)
            known = {name: g for name, g in (gradients or {}).items() if name in copied.names}  # then and now
            sums = measure_part(part, known, metric_weights(watched.optimizer, watched.parameters), parts)
            return sums.masked_fill(torch.stack(self._changed).any().to(sums.device), math.nan)

        sums = self._sums(None if batch_size is None or gradients is None else measure)
        if batch_size is not None:
            self._progress.measures(batch_size, self._rates())
            self._progress.noise.add(self._progress.steps, batch_size, sums / self._fit.replicas.ranks)

    def _sums(self, measure: Callable[[], Tensor] | None) -> Tensor:
        """The sum ``[4]`` over ranks of what is measured on each, NaN if on one it is not; to be called on every rank."""
        sums = None
        if measure is not None:
            with self._fit.guard.attempt("measure noise"):
                sums = measure().to(self._fit.module.device)
        self._fit.sums.add_up(sums, 4, math.nan)
        return torch.full((4,), math.nan) if sums is None else sums
