"""What looks at the steps of an optimizer, and what it is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhist._dtensor import local
from lightning_gradhist.callbacks.gradients import lies_otherwise, ready_gradients
from lightning_gradhist.callbacks.monitor.fit import Fit
from lightning_gradhist.callbacks.parameters import optimizer_parameters
from lightning_gradhist.callbacks.strategies import own_parts
from lightning_gradhist.histogram import MagnitudeHistogram


@dataclass(frozen=True)
class WatchedOptimizer:
    """An optimizer of a fit.

    The names of what is over all its rows have the suffix; ``find_rows`` gives the row of each parameter that is counted.
    """

    fit: Fit
    optimizer: Optimizer
    suffix: str
    find_rows: Callable[[], dict[str, str]]
    _named: dict[tuple[int, ...], dict[str, nn.Parameter]] = field(default_factory=dict, init=False, repr=False)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters now, by the names in the module that they had when the optimizer was given them."""
        now = tuple(id(parameter) for group in self.optimizer.param_groups for parameter in group["params"])
        if now not in self._named:
            found = optimizer_parameters(self.fit.module, self.optimizer)
            if len(found) < len(now):  # lazy ones are still to come
                return found
            self._named.clear()
            self._named[now] = found
        return self._named[now]

    def replicated(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those gradients that every rank should have whole; none where there is no other rank."""
        if self.fit.replicas.ranks == 1:
            return {}
        parameters = self.parameters
        return {name: g for name, g in gradients.items() if self.fit.replicas.are_whole(parameters[name])}

    def gradients(self) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """The gradients that it will use, and this rank's part of them; None where there is no memory for them."""
        fit, parameters = self.fit, self.parameters
        gradients = parts = None
        if not self._has_room(parameters):
            return None, None
        with fit.guard.attempt("look at the gradients"):
            gradients = ready_gradients(fit.trainer, self.optimizer, parameters)
            parts = own_parts(gradients, parameters, fit.replicas)
        return gradients, parts

    def _has_room(self, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether every rank has memory for gradients that have to be laid out anew, which is a collective."""
        otherwise, has_room = [p for p in parameters.values() if lies_otherwise(p)], False
        if not otherwise:
            return True
        with self.fit.guard.attempt("look at the gradients"):
            has_room = bool([torch.empty_like(local(p)) for p in otherwise])
        return self.fit.sums.all_true(has_room)


@dataclass
class Step:
    """A step of an optimizer, from ``on_before_optimizer_step`` until it is done.

    Attributes:
        number: the trainer's ``global_step``.
        due: whether it is to be logged.
        gradients: that it will use, or None where they cannot be had on this rank, or nobody wants them.
        parts: this rank's parts of them, or None.
        histogram: of the gradients, once they are counted.
        skipped: whether the loss scaler has the optimizer leave it out; known of a step that is due.
        drawn: whether figures of it are drawn.
    """

    number: int
    due: bool
    gradients: Mapping[str, Tensor] | None = None
    parts: Mapping[str, Tensor] | None = None
    histogram: MagnitudeHistogram | None = None
    skipped: bool = False
    drawn: bool = False


class StepObserver:
    """Looks at the steps of an optimizer. Each method is called on every rank, in the order in which they stand here."""

    def prepare(self, due: bool) -> None:
        """The step before is over; the backward passes of the coming one, which may be due, begin."""

    def before_forward(self, batch: Any) -> None:
        """A batch is about to be trained on."""

    def before_backward(self) -> None:
        """A micro-batch is about to go backward; parameters may have been made or unfrozen since the one before."""

    def after_backward(self) -> None:
        """A micro-batch has gone backward."""

    def wants_gradients(self, due: bool) -> bool:
        """Whether :meth:`before_step` looks at the gradients."""
        return False

    def before_step(self, step: Step) -> None:
        """The gradients are whole, and not clipped."""

    def at_update(self, step: Step) -> None:
        """The optimizer is about to change the weights, in a step that is due; the gradients are clipped."""

    def after_update(self, step: Step) -> None:
        """The optimizer has taken a step that is due."""

    def discard(self) -> None:
        """The step is skipped."""

    def finish(self) -> None:
        """Training has come to its end, and reports can be made whole."""

    def close(self) -> None:
        """Lets go of the model, also after an exception."""
