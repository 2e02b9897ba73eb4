"""Follows the steps of one optimizer, and tells the observers of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_gradhist.callbacks._deepspeed import is_deepspeed, is_zero, unwrapped
from lightning_gradhist.callbacks._lightning import is_a
from lightning_gradhist.callbacks.gradients import before_update, found_inf, has_gradients, may_skip_steps
from lightning_gradhist.callbacks.monitor.checkpoint import Progress
from lightning_gradhist.callbacks.monitor.observer import Step, StepObserver, WatchedOptimizer


class OptimizerMonitor:
    """The steps of one optimizer: which are due, which are taken, and which are skipped. Observers are told in their order."""

    def __init__(
        self, watched: WatchedOptimizer, progress: Progress, every_n_steps: int, observers: Sequence[StepObserver]
    ) -> None:
        self.watched = watched
        self._progress = progress
        self._every_n_steps = every_n_steps
        self.observers = observers
        self._last_step = -1
        self._has_seen_gradients = False
        self._first_versions = self._versions()
        self._coming: Step | None = None
        self._taken: Step | None = None
        optimizer = unwrapped(watched.optimizer)
        self._handles = [before_update(optimizer, self._at_update)]
        if not is_zero(watched.optimizer):  # which steps with it group by group
            self._handles.append(optimizer.register_step_post_hook(self._after_update))
        self._prepare()

    def before_step(self) -> None:
        """The optimizer is about to step, for all that Lightning knows."""
        number = self.watched.fit.trainer.global_step
        is_evaluated_again = number == self._last_step  # as by LBFGS
        if is_evaluated_again and not is_deepspeed(self.watched.fit.trainer):  # which may be a step ahead of Lightning
            return
        self.settle()
        self._last_step = number
        step = self._coming = Step(number, self._is_due())
        if not self._has_seen_gradients:
            self._has_seen_gradients = has_gradients(self.watched.fit.trainer, self.watched.parameters.values())
        if any(observer.wants_gradients(step.due) for observer in self.observers):
            step.gradients, step.parts = self.watched.gradients()
        for observer in self.observers:
            observer.before_step(step)
        self._progress.steps += 1
        self._prepare()

    def settle(self) -> None:
        """A step is over by now; one that has begun and was not taken was skipped."""
        self._after_update()
        step, self._coming = self._coming, None
        if step is None:
            return
        self._progress.skipped = self._progress.skipped + 1
        self._discard()
        if step.due:
            self._log_skipped(step)

    def warn_if_unseen(self) -> None:
        """Says after some training that the weights have changed, and no step or no gradient of one was seen."""
        if not self._has_seen_gradients and self._versions() != self._first_versions:
            self._warn_unseen()

    def close(self) -> None:
        """Lets go of the optimizer and of the model."""
        for handle in self._handles:
            handle.remove()
        for observer in self.observers:
            observer.close()

    def _versions(self) -> int:
        return sum(parameter._version for parameter in self.watched.parameters.values())

    def _is_due(self) -> bool:
        return self._progress.steps % self._every_n_steps == 0

    def _prepare(self) -> None:
        due = self._is_due()
        for observer in self.observers:
            observer.prepare(due)

    def _discard(self) -> None:
        for observer in self.observers:
            observer.discard()

    def _at_update(self) -> None:
        step, self._coming = self._coming, None
        if step is None:
            # Others are LBFGS's evaluations, or steps of a run within this one, as LearningRateFinder makes without callbacks.
            callbacks = self.watched.fit.trainer.callbacks  # type: ignore[attr-defined]
            if self._last_step < 0 and any(is_a(one, "GradientHistogramMonitor") for one in callbacks):
                self._warn_unseen()
            return
        skips = found_inf(self.watched.optimizer)
        if skips is not None:
            self._progress.skipped = self._progress.skipped + skips
        if not step.due:
            return
        self._taken = step
        step.skipped = skips is not None and bool(skips)
        for observer in self.observers:
            observer.at_update(step)
        if step.skipped:
            self._discard()
        self._log_skipped(step)

    def _after_update(self, *_hook: Any) -> None:
        step, self._taken = self._taken, None
        if step is not None:
            for observer in self.observers:
                observer.after_update(step)

    def _warn_unseen(self) -> None:
        name = type(unwrapped(self.watched.optimizer)).__name__
        self.watched.fit.warn_once(
            "unseen",
            f"does not see the steps of {name}, or no gradient at them, and logs none of them:"
            " they go past Lightning, and so past on_before_optimizer_step. Call step(), and no other method (as"
            " first_step() of SAM), of the optimizers that self.optimizers() gives, not of those of"
            " self.optimizers(use_pl_optimizer=False), pass the closure on in an optimizer_step of your own, and do not step"
            " within the backward pass.",
        )

    def _log_skipped(self, step: Step) -> None:
        fit = self.watched.fit
        if fit.trainer.is_global_zero and may_skip_steps(fit.trainer):
            with fit.guard.attempt("log"):
                found = {f"gradient_skipped_steps{self.watched.suffix}": float(self._progress.skipped)}
                fit.send(lambda sink: sink.scalars(found, step.number))


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether an optimizer tells of its steps, as each does that calls the constructor of its base class.

    Some that do not, as timm's Lookahead, make a list of hooks that nobody calls.
    """
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return bool(getattr(type(optimizer).step, "hooked", False))  # private: torch's mark of a step that calls them
