"""The noise of the gradients, measured at the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.callbacks._lightning import is_overridden
from lightning_gradhist.callbacks.batch_size import (
    Digests,
    StepSamples,
    data_ranks,
    parts_of_a_step,
    repeats_samples,
)
from lightning_gradhist.callbacks.gradients import (
    LocalGradients,
    dense,
    has_gradient_hook,
    has_gradients,
    loss_scale,
    rounding_unit,
    squared_norm,
)
from lightning_gradhist.callbacks.monitor.checkpoint import Progress
from lightning_gradhist.callbacks.monitor.halves import HalfBatches
from lightning_gradhist.callbacks.monitor.observer import Step, StepObserver, WatchedOptimizer
from lightning_gradhist.callbacks.optimizer_state import metric_weights
from lightning_gradhist.callbacks.schedulers import base_rates, schedulers_in, stray_rate
from lightning_gradhist.callbacks.strategies import is_cut_up, own_parts
from lightning_gradhist.explore import is_number
from lightning_gradhist.logging.noise_report import noise_scalars
from lightning_gradhist.noise.sample import Sample
from lightning_gradhist.noise.step import measure_pair, measure_part, noise_and_signal
from lightning_gradhist.tensors import copies

_ALIKE = 1e-3  # relative difference of squared norms of gradients that nobody has changed
_ADDS_UP = 0.03  # relative difference of a gradient and the sum of its parts; a GPU may multiply in 10 bits
_AS_OFTEN_AS_LOGGED = 1000  # steps, after which a noise scale moves slowly
_APART = 10  # steps from one measurement to the next from then on


@dataclass
class FirstGradient:
    """Of the first gradient of a pair a sample of this rank's part, with the metric from before its step.

    The metric depends on neither gradient.
    """

    epoch: int
    step: int
    samples: StepSamples
    sizes: dict[str, int]
    sample: Sample
    gradients: dict[str, Tensor]
    weights: Mapping[str, Tensor] | None
    changed: list[Tensor]
    digests: list[Tensor]
    halves: Tensor | None
    """Noise and signal from the two halves of its batch, or None; NaN where they cannot be told."""

    def measure(self, second: Mapping[str, Tensor]) -> Tensor:
        """This rank's share of distance and product, as :func:`measure_pair` gives them."""
        if not self.gradients:  # others have all there is
            return torch.zeros(4, dtype=torch.float64, device="cpu")
        alike = {name: gradient for name, gradient in second.items() if gradient.numel() == self.sizes.get(name)}
        return measure_pair(self.gradients, self.sample.of_gradients(alike), self.weights)


class NoiseMonitor(StepObserver):
    """Measures noise, without a backward pass of its own.

    Where a step has parts, the micro-batches of accumulation or the ranks of DDP, one of them on each rank is held against
    the whole step; else one half of a batch, where the layers allow it (:class:`HalfBatches`); else the gradients of two
    successive steps are held against each other, each of them in one pair, so that pairs are independent.
    """

    def __init__(self, watched: WatchedOptimizer, progress: Progress) -> None:
        self._watched, self._fit, self._progress = watched, watched.fit, progress
        self._part: LocalGradients | None = None  # of the coming step's first micro-batch on this rank
        self._halves: HalfBatches | None = None  # of the coming step
        self._halves_batch = False  # whether the coming step's batch is measured by them
        self._sample = Sample({})  # of it, and of what is compared
        self._batch = -1  # of the gradient that was looked at last
        self._in_pair = False  # the same on all ranks, as the next
        self._not_before = 0  # steps, at which a measurement begins
        self._first: FirstGradient | None = None  # None where this rank cannot measure it
        self._backwards = 0  # since the step before
        self._wanted = False  # the gradients of the coming step
        self._rates: dict[int, float] = {}  # of the groups at the first step that was measured
        self._digests: list[Tensor] = []  # of its batches on this rank
        self._digests_of_run = Digests()
        self._compares = False  # the gradients at the coming step with those that backward leaves
        self._left: Tensor | None = None  # squared norm of the gradients as the last of them left it
        self._changed: list[Tensor] = []  # marks of the coming step, 0 where nobody has changed its gradients

    def prepare(self, due: bool) -> None:
        """Has the gradients of the first micro-batch copied, where the step has several."""
        self._drop_copies()
        self._backwards, self._left, self._changed, self._digests = 0, None, [], []
        trainer, begins = self._fit.trainer, self._begins(due)
        whole = not is_cut_up(trainer)
        is_one_batch = parts_of_a_step(trainer) == 1
        has_parts = begins and not is_one_batch and not is_overridden("backward", self._fit.module)
        if has_parts and self._fit.replicas.ranks == 1:  # of several one alone may have a hook
            has_parts = not self._changes_sums()
        self._wanted = self.wants_gradients(due)
        self._compares = whole and self._wanted
        if self._compares:
            parameters = self._watched.parameters
            sizes = {name: parameter.numel() for name, parameter in parameters.items() if parameter.requires_grad}
            self._sample = Sample.at(self._progress.steps, sizes)
        if has_parts:
            self._part = LocalGradients(parameters, self._sample.of_gradients)
        alone = begins and whole and self._is_automatic and is_one_batch and not self._in_pair
        self._halves_batch = alone and self._progress.steps > 0  # before, there is no metric

    def _changes_sums(self) -> bool:
        """Whether somebody may change what micro-batches add up to while they do, by a hook; on this rank."""
        hooked = any(map(has_gradient_hook, self._watched.parameters.values()))
        return hooked and self._fit.trainer.accumulate_grad_batches > 1

    def before_forward(self, batch: Any) -> None:
        """Takes the batch's digest, and looks at the layers, where the halves of the batch are measured."""
        with self._fit.guard.attempt("measure noise"):
            told = self._digests_of_run.of(self._fit.trainer, batch) if self._wanted else None
            self._digests += [] if told is None else [told]
            if self._halves_batch:
                self._drop_copies()
                self._halves = HalfBatches(self._fit.module, self._watched.parameters, self._progress.steps)

    def before_backward(self) -> None:
        """Copies what has been unfrozen since, too, and compares with what is left of micro-batches, or of the step before."""
        if self._part is not None:
            self._part.extend(self._watched.parameters)
        if not self._compares or not self._is_automatic:  # a zero_grad may have come between
            return
        if has_gradients(self._fit.trainer, self._watched.parameters.values()):
            with self._fit.guard.attempt("measure noise"):
                there = self._squared_norm()
                if self._left is None:  # a zero_grad has left them, of a step with other samples
                    self._changed.append(torch.where(there == 0, 0.0, math.nan))
                else:
                    self._compare(there, self._left)

    def after_backward(self) -> None:
        """Ends the first micro-batch."""
        self._backwards += 1
        self._end_copies()
        if self._compares:
            with self._fit.guard.attempt("measure noise"):
                self._left = self._squared_norm()

    def wants_gradients(self, due: bool) -> bool:
        """Whether a measurement begins or ends."""
        return self._begins(due) or self._in_pair

    def before_step(self, step: Step) -> None:
        """Measures."""
        now, batch = self._progress.steps, self._fit.trainer.fit_loop.total_batch_idx
        if not self.wants_gradients(step.due) or batch == self._batch:  # another step with the same samples
            return
        self._batch = batch
        if self._part is not None:
            self._measure_part(self._part, step)
        elif self._in_pair:
            self._complete_pair(step)
            return
        else:
            self._begin_pair(step)
        if now >= _AS_OFTEN_AS_LOGGED:
            self._not_before = now + _APART

    def at_update(self, step: Step) -> None:
        """Logs the noise scale so far: the first times, then eight times until there are twice as many logged steps."""
        logged, fit = self._progress.logged, self._fit
        if step.skipped or not fit.trainer.is_global_zero or logged % max(1, logged // 8):
            return
        with fit.guard.attempt("log"):
            found = noise_scalars(self._progress.noise, self._watched.suffix)
            if found:
                fit.show_margins()
                fit.send(lambda sink: sink.scalars(found, step.number))

    def discard(self) -> None:
        """Measures nothing of the step before."""
        self._in_pair, self._first = False, None

    def finish(self) -> None:
        """Ends the last pair."""
        self._leave_pair()

    def close(self) -> None:
        """Drops what is held."""
        self.discard()
        self._drop_copies()

    def _end_copies(self) -> None:
        for copied in (self._part, self._halves):
            if copied is not None:
                copied.close()

    def _drop_copies(self) -> None:
        self._end_copies()
        self._part = self._halves = None

    def _begins(self, due: bool) -> bool:
        """Whether a measurement begins at the coming step; the same on all ranks, of which others may know their samples."""
        may = self._fit.samples.problem is None or self._fit.replicas.ranks > 1
        return due and may and self._progress.steps >= self._not_before

    @property
    def _is_automatic(self) -> bool:
        return bool(self._fit.trainer.lightning_module.automatic_optimization)

    @property
    def _tolerance(self) -> float:
        """The relative difference of a gradient and the sum of its parts that is rounding."""
        return max(math.sqrt(rounding_unit(self._fit.trainer)), _ADDS_UP)

    def _samples(self) -> StepSamples | None:
        """The samples of this step; None where they are not known, and where a micro-batch had no loss."""
        samples = self._fit.samples.of_step(self._fit.trainer)
        return None if samples and self._is_automatic and samples.batches != self._backwards else samples

    def _compare(self, squares: Tensor, left: Tensor) -> None:
        """Takes down, on the device, whether somebody may have changed the gradients since backward left them."""
        self._changed.append(_mark(squares - left, _ALIKE * left))

    def _compare_at_step(self, gradients: Mapping[str, Tensor] | None, digests: Sequence[Tensor] = ()) -> None:
        """Takes down, too, whether two of the batches that are compared have the same samples, as their digests say."""
        if digests:
            self._changed.append(torch.where(_repeat(torch.stack([*digests])), math.nan, 0.0))
        if gradients is not None and self._left is not None:
            squares = squared_norm(self._sample.of(gradients).values()) * loss_scale(self._fit.trainer) ** 2
            self._compare(squares, self._left)

    def _squared_norm(self) -> Tensor:
        there = {name: dense(p.grad) for name, p in self._watched.parameters.items() if p.grad is not None}
        return squared_norm(self._sample.of(there).values())

    def _begin_pair(self, step: Step) -> None:
        """Begins a pair, but where the halves of the batch tell the noise at once."""
        self._in_pair = True
        samples = self._samples()
        if samples is None or not step.parts:
            return
        with self._fit.guard.attempt("measure noise"):
            self._take_rates()
            self._compare_at_step(step.gradients)
            halves = None
            with self._fit.guard.attempt("look at the two halves of a batch"):
                halves = self._of_halves(step.gradients, samples)
            if halves is not None and halves.is_cpu and _tell(halves):
                self._progress.noise.add(self._progress.steps, samples.effective, halves)
                self._in_pair = False  # no other rank has begun one: there are halves on one device alone
            else:
                self._first = self._first_gradient(step.parts, samples, halves)

    def _leave_pair(self) -> None:
        """Ends a pair without its second gradient; of what a device measures it is not known whether the halves tell it."""
        first = self._first
        self.discard()
        if first is not None and first.halves is not None and (not first.halves.is_cpu or _tell(first.halves)):
            with self._fit.guard.attempt("measure noise"):
                self._progress.noise.add(first.step, first.samples.effective, first.halves)

    def _first_gradient(
        self, parts: Mapping[str, Tensor], samples: StepSamples, halves: Tensor | None
    ) -> FirstGradient:
        optimizer, parameters, trainer = self._watched.optimizer, self._watched.parameters, self._fit.trainer
        number, sizes = self._progress.steps, {name: gradient.numel() for name, gradient in parts.items()}
        sample = Sample.at(number, sizes)
        held = copies(sample.of_gradients(parts))

        def own(moments: dict[str, Tensor]) -> dict[str, Tensor]:
            found = sample.of(own_parts(moments, parameters, self._fit.replicas))
            return {name: found[name].to(held[name].device) for name in found.keys() & held.keys()}

        weights = metric_weights(optimizer, parameters, own, is_cut_up(trainer))
        return FirstGradient(
            trainer.current_epoch, number, samples, sizes, sample, held, weights, self._changed, self._digests, halves
        )

    def _of_halves(self, gradients: Mapping[str, Tensor] | None, samples: StepSamples) -> Tensor | None:
        """Noise and signal of the coming step, from the two halves of its batch."""
        if self._halves is None or gradients is None:
            return None
        fit, watched, number = self._fit, self._watched, samples.first
        trainer = fit.trainer
        metric = partial(metric_weights, watched.optimizer, watched.parameters)
        if self._halves.error is not None:
            fit.guard.warn("look at the two halves of a batch", self._halves.error)
        sums = self._halves.measure(gradients, number, loss_scale(trainer), self._tolerance, metric)
        if sums is None:
            return None
        first, second = number // 2, number - number // 2
        return noise_and_signal(_unless(self._changed, sums), second / first / number, 1 / number, samples.effective)

    def _complete_pair(self, step: Step) -> None:
        first, samples, parts = self._first, self._samples(), step.parts
        repeats = first is not None and self._repeats(first)
        self._progress.repeats += repeats
        if first is None or samples is None or not parts or repeats:
            self._leave_pair()
            self._sums(None, None)
            return
        self.discard()
        begun, second = first, parts

        def measure() -> Tensor:
            self._compare_at_step(step.gradients, begun.digests + self._digests)
            return _unless(begun.changed + self._changed, begun.measure(second))

        spread = first.samples.variance + samples.variance
        sums = self._sums(step.gradients, measure, spread, 0.0, samples.effective)
        self._add(first.step, sums, first.halves)

    def _repeats(self, first: FirstGradient) -> bool:
        """Whether this step may have samples of a pair's first one again."""
        trainer = self._fit.trainer
        with self._fit.guard.attempt("measure noise"):  # the user's loader may raise
            return first.epoch != trainer.current_epoch and repeats_samples(trainer)
        return True

    def _measure_part(self, copied: LocalGradients, step: Step) -> None:
        """Holds the gradient of one micro-batch of each rank against that of all."""
        trainer, watched, gradients = self._fit.trainer, self._watched, step.gradients
        samples = self._samples()
        copied.close()
        self.discard()  # begun before accumulation was
        if samples is None or samples.micro_batches < 2 or gradients is None or self._changes_sums():
            self._sums(None, None)
            return
        ranks, times = self._fit.replicas.ranks, trainer.accumulate_grad_batches
        short = times / samples.batches  # the loss is divided by as many as the end of an epoch may leave out

        def measure() -> Tensor:
            self._compare_at_step(gradients, self._digests)
            part = copied.take(trainer, times)
            then_and_now = {name: gradient for name, gradient in gradients.items() if name in copied.names}
            known = self._sample.of_gradients(then_and_now)
            if short != 1:
                known = {name: gradient * short for name, gradient in known.items()}
            weights = metric_weights(watched.optimizer, watched.parameters, self._sample.of)
            measured = measure_part(part, known, weights)
            if times == 1:  # the ranks' parts make up the whole, unless it was changed
                excess = measure_pair(part, known, None)[1] - measured[1]
                return torch.cat([_unless(self._changed, measured), excess.reshape(1).to(measured)]) / ranks
            return _unless(self._changed, measured) / ranks

        spread = (1 - 2 / samples.micro_batches) / samples.first / ranks + samples.variance
        sums = self._sums(gradients, measure, spread, samples.variance, samples.effective)
        self._take_rates()
        self._add(self._progress.steps, sums)

    def _take_rates(self) -> None:
        """Takes down the base rates, but for those of another schedule than the run began with, as SWA's.

        Where the run raises rates itself, as in ``optimizer_step``, the highest may be one of a step that is not measured.
        """
        optimizer, schedulers = self._watched.optimizer, schedulers_in(self._fit.trainer)
        groups = optimizer.param_groups
        with self._fit.guard.attempt("measure noise"):  # they are the user's
            self._rates = self._rates or {i: g["lr"] for i, g in enumerate(groups) if is_number(g.get("lr"))}
            stray = stray_rate(optimizer, schedulers, self._rates)
            if stray is not None and groups[stray]["lr"] > max(
                self._rates[stray], groups[stray].get("initial_lr", 0.0)
            ):
                self._progress.forget_rates()
            elif schedulers == self._fit.schedulers or not self._progress.learning_rates:
                self._progress.measures(base_rates(optimizer, schedulers))

    def _add(self, step: int, sums: Tensor, halves: Tensor | None = None) -> None:
        """Adds what was measured on all ranks, or the halves of a batch where they tell it, without waiting for it."""
        with self._fit.guard.attempt("measure noise"):
            spread, excess, samples = sums[4:]
            measured = noise_and_signal(sums[:4], spread, excess, samples)
            if halves is not None:
                halves = halves.to(measured.device)
                measured = torch.where((halves[:2] + samples).isfinite().all(), halves, measured)
            self._progress.noise.add(step, samples, measured)

    def _sums(
        self, gradients: Mapping[str, Tensor] | None, measure: Callable[[], Tensor] | None, *sizes: float
    ) -> Tensor:
        """The sum ``[7]`` over ranks of what is measured on each, and of the sizes; to be called on every rank.

        NaN if on one rank it is not, or their gradients differ, or two have the same samples. Negative infinity if gradients
        have been changed, also where parts, of which the fifth number tells, do not make up the whole.
        """
        fit, sums = self._fit, None
        ranks, own = fit.replicas.ranks, fit.replicas.rank
        if measure is not None and gradients is not None:
            with fit.guard.attempt("measure noise"):
                measured = measure() if ranks == 1 else measure().to(fit.module.device)
                extents = [measured.new_full((), size) for size in sizes]
                checked = torch.cat([measured[:4], torch.stack(extents), measured.new_zeros(ranks + 3)])
                has_own = self._digests and ranks == data_ranks(fit.trainer)
                checked[7 + own] = self._digests[0] if has_own else math.nan
                checked[-3] = measured[4:].sum()
                fit.sums.check(checked, self._watched.replicated(gradients))
                sums = checked
        fit.sums.add_up(sums, 10 + ranks, math.nan)
        if sums is None:
            return torch.full((7,), math.nan, device="cpu")
        with fit.guard.attempt("measure noise"):
            fit.sums.mark_unlike(sums, math.nan)
            sums[:4] += _mark(sums[-3], self._tolerance * sums[1].abs())
            sums[:7].masked_fill_(_repeat(sums[7:-3]), math.nan)
        return sums[:7]


def _repeat(digests: Tensor) -> Tensor:
    """Whether two batches have the same samples; NaN is like no other."""
    return (digests.sort().values.diff() == 0).any()


def _mark(off: Tensor, most: Tensor) -> Tensor:
    """What is added to sums by a number that should be 0: negative infinity where it is not, NaN where nobody can tell."""
    return torch.where(off.abs() <= most, 0.0, torch.where(off.isfinite(), -math.inf, math.nan))


def _unless(marks: list[Tensor], sums: Tensor) -> Tensor:
    """The sums, negative infinity where gradients have been changed, NaN where samples come again."""
    return sums + sum(mark.to(sums) for mark in marks)


def _tell(halves: Tensor) -> bool:
    """Whether the two halves of a batch tell the noise."""
    return bool(halves[:2].isfinite().all())
