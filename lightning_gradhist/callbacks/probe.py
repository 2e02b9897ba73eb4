"""The probe: gradients at frozen weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_gradhist.callbacks._lightning import (
    CombinedLoader,
    LightningModule,
    Trainer,
    is_overridden,
    is_param_in_hook_signature,
)
from lightning_gradhist.callbacks.gradients import as_real, is_a, loss_scale, optimizer_parameters


class ProbeRefusedError(RuntimeError):
    """The probe cannot be made; the message says why, and the way out. Raised on every rank or on none."""


class _Outcome(IntEnum):
    """How a batch went on this rank. The ranks agree on the worst, so that all call the same collectives."""

    DONE = 0
    OVERFLOW = 1
    NO_BATCH = 2
    FAILED = 3


def why_impossible(trainer: Trainer, module: LightningModule) -> str | None:
    """Why this module cannot be probed, or None if it can."""
    if not module.automatic_optimization:
        return (
            "under manual optimization training_step would step the optimizer, so it cannot be tried at frozen weights"
        )
    if isinstance(trainer.train_dataloader, Iterator):
        return "the training data is an iterator, and what a probe takes from it would be lost to training"
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return "the model has lazy parameters; let it see a batch before training"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step takes the loader's iterator itself"
    return None


class Probe:
    """Gradients of single batches on this rank, neither averaged over ranks nor divided for accumulation.

    To be used within :func:`no_trace`. Each is the gradient of the optimizer's objective, a coupled weight decay
    included, dense and real. The ranks go in step: each reads a batch, or none does.

    Args:
        trainer: whose training data and precision are used.
        module: whose ``training_step`` is called. Neither a DDP wrapper nor an override of ``backward`` has a part in it.
        optimizer: whose parameters are asked for.

    Attributes:
        parameters: names and real parameters that gradients are given for.
        batches: number of batches that were read.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        self.batches = 0
        self._trainer = trainer
        self._module = module
        self._parameters = {n: p for n, p in optimizer_parameters(module, optimizer).items() if p.requires_grad}
        self.parameters = {name: as_real(p.detach()) for name, p in self._parameters.items()}
        self._decay = _coupled_decay(optimizer)
        self._scale = loss_scale(trainer)
        self._source = _batches(trainer, module)

    def gradients(self, number: int) -> Iterator[dict[str, Tensor | None]]:
        """Reads up to ``number`` batches more.

        Yields:
            names and gradients, None for a parameter that the batch did not use. A batch without a loss or with a
            gradient that is not finite is passed over; under 16-mixed the loss scale is lowered first, as the scaler
            would.

        Raises:
            ProbeRefusedError: where the training step fails, or cannot be differentiated without the hooks of the
                parameters.
        """
        for _ in range(number):
            batch, error = self._next()
            outcome = _Outcome.FAILED if error else _Outcome.NO_BATCH if batch is None else _Outcome.DONE
            worst = self._worst(outcome)
            if worst is _Outcome.FAILED:
                raise ProbeRefusedError(self._first_reason(error)) from error
            if worst is _Outcome.NO_BATCH:
                return
            gradients = self._of_batch(batch)
            self.batches += 1
            if gradients is not None:
                yield gradients

    def _next(self) -> tuple[Any, Exception | None]:
        try:
            return next(self._source, None), None
        except Exception as error:  # of a dataset, or of what puts samples together
            return None, error

    def _of_batch(self, batch: Any) -> dict[str, Tensor | None] | None:
        loss: Tensor | None = None
        error: Exception | None = None
        gradients: dict[str, Tensor | None] = {}
        outcome = _Outcome.DONE
        try:
            loss = _loss(self._trainer, self._module, batch, self.batches)
        except Exception as caught:
            error, outcome = caught, _Outcome.FAILED
        while True:
            if error is None:
                try:
                    gradients = self._differentiate(loss)
                    overflow = self._scale > 1.0 and loss is not None and not _all_finite(gradients)
                    outcome = _Outcome.OVERFLOW if overflow else _Outcome.DONE
                except Exception as caught:
                    error, outcome = caught, _Outcome.FAILED
            worst = self._worst(outcome)
            if worst is _Outcome.FAILED:
                raise ProbeRefusedError(self._first_reason(error)) from error
            if worst is _Outcome.DONE:
                return gradients if gradients and _all_finite(gradients) else None
            self._scale /= 2

    def _differentiate(self, loss: Tensor | None) -> dict[str, Tensor | None]:
        if loss is None:
            return {}
        # Not loss.backward(): it runs the hooks of DDP's reducer, and with static_graph=True that counts calls and would
        # no longer average the gradients of training. It runs the users' hooks too, which may step an optimizer.
        if _has_reentrant_checkpoint(loss):  # autograd.grad would find nothing behind it, and say nothing
            raise ProbeRefusedError(
                "activation checkpointing with use_reentrant=True can only be differentiated by backward(), which runs the"
                " hooks of the parameters; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        parameters = list(self._parameters.values())
        again = self._scale > 1.0  # only then may a lower scale be tried
        found = torch.autograd.grad(loss * self._scale, parameters, retain_graph=again, allow_unused=True)
        return {n: self._finished(g, p) for (n, p), g in zip(self._parameters.items(), found, strict=True)}

    def _finished(self, gradient: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
        if gradient is None:
            return None
        dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
        unscaled = dense if self._scale == 1.0 else dense / self._scale
        decay = self._decay.get(id(parameter), 0.0)
        return as_real(unscaled.add(parameter.detach(), alpha=decay) if decay else unscaled)

    def _first_reason(self, error: Exception | None) -> str:
        """Why it failed, on the first rank on which it did."""
        reason = None if error is None else f"the training data, training_step or its gradient raised {error!r}"
        reasons = [str(error) if isinstance(error, ProbeRefusedError) else reason]
        if self._trainer.world_size > 1:
            reasons *= self._trainer.world_size
            torch.distributed.all_gather_object(reasons, reasons[0])
        return next(reason for reason in reasons if reason is not None)

    def _worst(self, outcome: _Outcome) -> _Outcome:
        if self._trainer.world_size == 1:
            return outcome
        worst = torch.tensor(int(outcome), device=self._module.device)
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        return _Outcome(int(worst))


def _batches(trainer: Trainer, module: LightningModule) -> Iterator[Any]:
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    loaders.flattened = [_fresh(loader) for loader in loaders.flattened]
    datamodule = getattr(trainer, "datamodule", None)
    overridden = datamodule is not None and is_overridden("on_before_batch_transfer", datamodule)
    hooks: Any = datamodule if overridden else module
    for batch, _, _ in loaders:
        batch = trainer.precision_plugin.convert_input(batch)
        batch = hooks.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _fresh(loader: Any) -> Any:
    loader = copy.copy(loader)
    if isinstance(loader, DataLoader):
        # Persistent workers hang on this private attribute; the copy starts its own, and training keeps its.
        loader._iterator = None
    return loader


def _loss(trainer: Trainer, module: LightningModule, batch: Any, batch_index: int) -> Tensor | None:
    arguments = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_index)
    with trainer.precision_plugin.train_step_context():
        output = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":  # torch.utils.checkpoint's name for it; there is no public one
            return True
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)
    return False


def _coupled_decay(optimizer: Optimizer) -> dict[int, float]:
    """Weight decay that the optimizer adds to the gradient, by the parameter's id."""
    coupled_by_class = is_a(optimizer, "SGD", "RMSprop", "Adamax", "Adagrad", "Adadelta", "ASGD", "Rprop")
    return {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", not coupled_by_class)
        for parameter in group["params"]
    }


def _all_finite(gradients: Mapping[str, Tensor | None]) -> bool:
    finite = [gradient.isfinite().all() for gradient in gradients.values() if gradient is not None]
    return bool(finite) and bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all())


def clip_factor(second_moment: Mapping[str, Tensor], max_norm: float) -> float:
    """By how much clipping to a norm scales a gradient of the expected length, at most 1."""
    squares = math.fsum(float(v.sum()) for v in second_moment.values())
    return min(1.0, max_norm / math.sqrt(squares)) if squares > 0 else 1.0
