"""The probe: gradients at frozen weights. What it refuses is found in ``copies.py``, ``stand_ins.py`` and ``run.py``."""

from __future__ import annotations

import copy
import math
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from lightning_gradhist._dtensor import local
from lightning_gradhist.callbacks._deepspeed import zero_loss_scale
from lightning_gradhist.callbacks._lightning import (
    LightningModule,
    SIGTERMException,
    Trainer,
    apply_to_collection,
    is_overridden,
    is_param_in_hook_signature,
    isolate_rng,
)
from lightning_gradhist.callbacks.batch_size import Digests, data_ranks
from lightning_gradhist.callbacks.gradients import local_gradient, loss_scale
from lightning_gradhist.callbacks.known_optimizers import coupled_decay
from lightning_gradhist.callbacks.parameters import optimizer_parameters
from lightning_gradhist.callbacks.probe.first_step import largest_factor
from lightning_gradhist.callbacks.probe.outcome import (
    WHY_LEFT_OUT,
    Outcome,
    ProbeEnded,
    ProbeRefusedError,
    agree,
    free_memory,
    is_out_of_memory,
    on_every_rank,
)
from lightning_gradhist.callbacks.probe.restore import Apart, write_back
from lightning_gradhist.callbacks.strategies import (
    averages_in_backward,
    end_forward,
    is_fsdp,
    least_over_ranks,
    own_parts,
    replicas,
    sum_over_ranks,
)
from lightning_gradhist.noise import NoiseScale
from lightning_gradhist.tensors import as_real, widened


def pool(noise: NoiseScale, trainer: Trainer) -> None:
    """Puts together what the ranks have measured, at the end of each half; to be called on every rank."""
    if trainer.world_size > 1 and averages_in_backward(trainer):
        noise.all_reduce_shards(device=trainer.lightning_module.device)
    elif trainer.world_size > 1:
        noise.all_reduce()


class Probe:
    """Gradients of single batches on this rank, neither averaged over ranks nor divided for accumulation.

    Each is the gradient of the optimizer's objective, a coupled weight decay included, dense and real. The ranks go in step:
    each reads a batch, or none does. Where parameters are sharded (FSDP, tensor parallelism), a gradient is the mean over
    the ranks' batches, and each rank is given another part of it; what then fails within a pass ends the run, as in
    training, since the other ranks wait within the model.

    Args:
        apart: what :func:`lightning_gradhist.callbacks.probe.restore.no_trace` gives: the module whose ``training_step`` is
            called, the first optimizer, whose parameters are asked for, and the training data. Neither a DDP wrapper nor
            an override of ``backward`` has a part in it.
        count: counts the samples of a batch, where they can be told.
        tick: called for each batch that was read.
        keep: the last batches, of which so many are kept for :meth:`critical_factor`.

    Attributes:
        parameters: names and real parameters, or parts of them, that gradients are given for.
        batches: number of batches that were read.
        samples: of the gradient that was given last, None where they are not known. Where parameters are sharded, of the
            mean over ranks: as many as of a single batch with the same variance.
    """

    def __init__(
        self,
        apart: Apart,
        count: Callable[[Any], float | None] = lambda batch: None,
        tick: Callable[[], Any] = lambda: None,
        keep: int = 0,
    ) -> None:
        self.batches = 0
        self._trainer = trainer = apart.trainer
        self._module = module = apart.module
        self._reading = apart.reading
        optimizer: Optimizer = trainer.optimizers[0]
        self.samples: float | None = None
        self._count = count
        self._tick = tick
        known = optimizer_parameters(module, optimizer)
        self._parameters = {name: p for name, p in known.items() if p.requires_grad and not p.is_meta}
        self._replicas = replicas(trainer) if averages_in_backward(trainer) else None
        self._module_parameters = list(module.parameters())  # now: within a pass, FSDP shows others in their place
        self.parameters = self._own({name: _real(p) for name, p in self._parameters.items()})
        self._decay = coupled_decay(optimizer)
        self._scale = zero_loss_scale(trainer) or loss_scale(trainer)
        self._source = _batches(apart)
        self._left_out = dict.fromkeys(WHY_LEFT_OUT, 0)
        self._digests: set[float] = set()  # of the batches of all ranks
        self._digests_of_rank = Digests()
        self._kept: deque[tuple[Any, int]] = deque(maxlen=keep if self._replicas is None else 0)

    def gradients(self, number: int) -> Iterator[Mapping[str, Tensor | None]]:
        """Reads up to ``number`` batches more.

        Yields:
            names and gradients, None for a parameter that the batch did not use. A batch is passed over if it has no
            loss, or a gradient that is not finite, or runs out of memory; under 16-mixed the loss scale is lowered first,
            as the scaler would.

        Raises:
            ProbeRefusedError: where the training step fails, or cannot be differentiated without the hooks of the
                parameters.
        """
        for _ in range(number):
            batch, outcome, reason = self._next()
            worst = self._worst(Outcome.STOPPED if self._trainer.received_sigterm else outcome, reason)
            if worst is Outcome.STOPPED:
                raise SIGTERMException
            if worst is Outcome.NO_BATCH:
                return
            self._kept.append((batch, self.batches))
            gradient, worst = self._of_batch(batch)
            self.batches += 1
            self._tick()
            self.samples = self._samples(self._count(batch))
            if worst is Outcome.DONE:
                yield gradient
            else:
                self._left_out[worst] += 1

    def left_out(self) -> list[str]:
        """What became of the batches that gave no gradient, over all ranks; to be called on every rank."""
        of = self.batches * self._trainer.world_size
        found = zip(sum_over_ranks(self._trainer, *self._left_out.values()), WHY_LEFT_OUT.values(), strict=True)
        return [f"{count:.0f} of {of} batches of the probe {why}, and were left out" for count, why in found if count]

    def critical_factor(self, step: Callable[[], Mapping[str, Tensor]], largest: float) -> float | None:
        """By how much a first step may be multiplied before it raises the loss of the batches that are kept.

        To be called on every rank, at last: parameters and buffers are put back, and what else the module holds is not.

        Args:
            step: makes the names, and what is taken off the weights with factor 1.
            largest: the factor that is tried first, the same on all ranks; see :func:`largest_factor`.

        Returns:
            None where it is not known: parameters are sharded, a pass fails, or there is no memory for it.
        """
        if self._replicas is not None:
            return None
        held = [tensor.detach() for tensor in (*self._module.parameters(), *self._module.buffers())]
        try:
            made, contents = on_every_rank(
                self._trainer, "to hold gradients", lambda: (step(), [(own, own.clone()) for own in held])
            )
        except ProbeRefusedError:
            return None
        known: list[bool] = []  # whether a kept batch has a loss before the step

        def loss_at(factor: float) -> float:
            try:
                losses = self._losses_after(factor, made, contents)
                known[:] = known or map(math.isfinite, losses)
                total = sum(loss for loss, there in zip(losses, known, strict=True) if there)
            except (Exception, ProbeEnded):  # of a training step at other weights, or for lack of memory
                total = math.nan
            total, count = sum_over_ranks(self._trainer, total, float(sum(known)))
            return total / count if count else math.nan

        try:
            return largest_factor(loss_at, largest)
        finally:
            write_back(contents)
            self._kept.clear()

    def _losses_after(
        self, factor: float, step: Mapping[str, Tensor], before: Sequence[tuple[Tensor, Tensor]]
    ) -> list[float]:
        """The loss of each batch that is kept, NaN where there is none, infinite where it is not finite."""
        write_back(before)
        with isolate_rng():  # so that dropout is the same each time
            for name, change in step.items() if factor else ():
                _real(self._parameters[name]).sub_(factor * change)
            return [self._value(batch, index) for batch, index in self._kept]

    def _value(self, batch: Any, index: int) -> float:
        with self._reading(True):
            loss = _loss(self._trainer, self._module, batch, index)  # whose graph goes with this call
        if loss is None:
            return math.nan
        return value if math.isfinite(value := float(loss.detach())) else math.inf

    def over_shards(self, total: float) -> float:
        """The sum over ranks that hold different parts of a gradient, else the number itself; for every rank."""
        return total if self._replicas is None else sum_over_ranks(self._trainer, total)[0]

    def _next(self) -> tuple[Any, Outcome, str | None]:
        try:
            batch = next(self._source, None)
        except (Exception, ProbeEnded) as error:  # of a dataset, or of what puts samples together
            return None, Outcome.FAILED, _reason(error)
        return batch, Outcome.NO_BATCH if batch is None else Outcome.DONE, None

    def _samples(self, counted: float | None) -> float | None:
        """The samples of a gradient, of which the ranks have each counted their batch; to be called on every rank."""
        if self._replicas is None:
            return counted
        variance = self.over_shards(math.nan if counted is None else 1 / counted)
        return None if math.isnan(variance) else data_ranks(self._trainer) * self._trainer.world_size / variance

    def _is_repeated(self, batch: Any) -> bool:
        """Whether its samples have come before, on this rank or another, or come on one before it; for every rank.

        Where parameters are sharded, of the batches of any rank.
        """
        ranks = self._trainer.world_size
        told = self._digests_of_rank.of(self._trainer, batch)
        found: list[Any] = [float("nan" if told is None else told)] * ranks  # of which NaN is another one each time
        if ranks > 1:
            torch.distributed.all_gather_object(found, found[0])
        before, self._digests = self._digests, self._digests.union(found)
        if self._replicas is not None:
            return not before.isdisjoint(found) or len({*found}) < data_ranks(self._trainer)
        rank = self._trainer.global_rank
        return found[rank] in before.union(found[:rank])

    def _of_batch(self, batch: Any) -> tuple[Mapping[str, Tensor | None], Outcome]:
        is_repeated = self._is_repeated(batch)
        if is_repeated and self._replicas is not None:
            return {}, Outcome.REPEATED
        while True:
            gradient, outcome, reason = self._tried(batch)  # on every rank: a forward pass may be a collective
            if is_repeated and outcome is Outcome.DONE:
                gradient, outcome = {}, Outcome.REPEATED
            worst = self._worst(outcome, reason)
            if worst is not Outcome.OVERFLOW:
                return gradient, outcome if self._replicas is None else worst  # of a sharded one, each has a part
            self._scale /= 2

    def _tried(self, batch: Any) -> tuple[Mapping[str, Tensor | None], Outcome, str | None]:
        try:
            return (*self._passed(batch), None)
        except (Exception, ProbeEnded) as error:
            if self._replicas is not None:
                if isinstance(error, (ProbeEnded, ProbeRefusedError)):  # which would end the probe on this rank alone
                    raise RuntimeError(f"in the probe of a sharded model {error}") from None
                raise  # the others wait within the model's own collectives, as they would in training
            if not is_out_of_memory(error):
                return {}, Outcome.FAILED, _reason(error)
        free_memory()  # here, where the error that held the graph is gone
        return {}, Outcome.OUT_OF_MEMORY, None

    def _passed(self, batch: Any) -> tuple[Mapping[str, Tensor | None], Outcome]:
        """Forward and backward; again from the start where the scale is lowered, so that no graph has to be retained."""
        with self._reading(True):
            loss = _loss(self._trainer, self._module, batch, self.batches)
        missing = Outcome.NO_LOSS if loss is None else Outcome.DONE
        if self._replicas is not None:
            missing = self._worst(missing)  # a backward pass is a collective
        if loss is None or missing is not Outcome.DONE:
            end_forward(self._trainer)
            return {}, Outcome.NO_LOSS
        gradients = self._whole(loss) if self._replicas is None else self._sharded(loss)
        found = [gradient for gradient in gradients.values() if gradient is not None]
        if not found and self._replicas is None:
            return {}, Outcome.NO_LOSS
        largest = torch._foreach_norm([gradient for gradient in found if gradient.numel()], math.inf) if found else []
        if not largest or torch.stack([one.isfinite().to(loss.device) for one in largest]).all():
            return gradients, Outcome.DONE
        overflow = self._scale > 1.0 and bool(loss.isfinite().all())
        return {}, Outcome.OVERFLOW if overflow else Outcome.NOT_FINITE

    def _whole(self, loss: Tensor) -> dict[str, Tensor | None]:
        # Not loss.backward(): it runs the hooks of DDP's reducer, and with static_graph=True that counts calls and would
        # no longer average the gradients of training. It runs the users' hooks too, which may step an optimizer.
        if _has_reentrant_checkpoint(loss):  # autograd.grad would find nothing behind it, and say nothing
            raise ProbeRefusedError(
                "activation checkpointing with use_reentrant=True can only be differentiated by backward(), which runs the"
                " hooks of the parameters; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        # Those that are trained now: a training step may freeze some.
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        found = torch.autograd.grad(loss * self._scale, list(trained.values()), allow_unused=True)
        gradients: dict[str, Tensor | None] = dict.fromkeys(self._parameters)
        for (name, p), g in zip(trained.items(), found, strict=True):
            if g is not None:
                gradients[name] = self._finished(as_real(g.to_dense()), p)
        return gradients

    def _sharded(self, loss: Tensor) -> Mapping[str, Tensor | None]:
        """By backward(), in which FSDP averages over ranks; autograd knows nothing of the shards."""
        before = [p.grad for p in self._module_parameters]
        for p in self._module_parameters:
            p.grad = None
        try:
            (loss * self._scale).backward()  # type: ignore[no-untyped-call]
            there = {n: p for n, p in self._parameters.items() if p.grad is not None}
            return self._own({name: self._finished(local_gradient(p), p) for name, p in there.items()})
        finally:
            for p, gradient in zip(self._module_parameters, before, strict=True):
                p.grad = gradient

    def _finished(self, gradient: Tensor, parameter: nn.Parameter) -> Tensor:
        unscaled = gradient if self._scale == 1.0 else widened(gradient) / self._scale
        decay = self._decay.get(id(parameter), 0.0)
        return unscaled.add(_real(parameter), alpha=decay) if decay else unscaled

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank answers for: all of them, or where parameters are sharded each value on one rank alone."""
        return tensors if self._replicas is None else own_parts(tensors, self._parameters, self._replicas)

    def _worst(self, outcome: Outcome, reason: str | None = None) -> Outcome:
        """The worst of the ranks; if that is to have failed, the probe ends with the reason of the first rank that has one."""
        worst = Outcome(-int(least_over_ranks(-outcome, self._trainer)))
        if worst is Outcome.FAILED:
            agree(self._trainer, reason)
        return worst


def _reason(error: BaseException) -> str:
    """Why it failed; what it has passed by is let go: the graph of a batch, workers of a loader."""
    passed: BaseException | None = error
    while passed is not None:
        traceback.clear_frames(passed.__traceback__)
        passed = passed.__context__
    if isinstance(error, (ProbeRefusedError, ProbeEnded)):
        return str(error).strip().rpartition(f"{ProbeRefusedError.__name__}: ")[2]  # a worker's has its traceback
    return f"the training data, training_step or its gradient raised {error!r:.300}"


def _real(parameter: nn.Parameter) -> Tensor:
    return as_real(local(parameter.detach()))


def _batches(apart: Apart) -> Iterator[Any]:
    trainer: Any = apart.trainer
    overridden = trainer.datamodule is not None and is_overridden("on_before_batch_transfer", trainer.datamodule)
    hooks: Any = trainer.datamodule if overridden else apart.module
    with apart.reading():
        loaders = iter(trainer.fit_loop._combined_loader)  # private; in the mode that training has
    while True:
        with apart.reading():
            try:
                batch, _, _ = next(loaders)
            except StopIteration:
                return
            batch = hooks.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        yield batch


def _loss(trainer: Trainer, module: LightningModule, batch: Any, batch_index: int) -> Tensor | None:
    batch = _copy(batch)  # the same one may come again
    if module.on_train_batch_start(batch, batch_index) == -1:
        return None
    arguments = [batch]
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_index)
    if is_fsdp(trainer):  # which begins in the forward pass of its wrapper
        output = trainer.strategy.training_step(*arguments)
    else:
        with trainer.precision_plugin.train_step_context():
            output = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) and loss.requires_grad else None


def _copy(batch: Any) -> Any:
    """A batch, with its tensors, and what they hang on, copied; what no tensor hangs on is as it is in a container."""
    memo: dict[int, Any] = {}
    try:
        _share(batch, memo, {})
        with _Tensors():
            return copy.deepcopy(batch, memo)
    except Exception:  # there is what cannot be copied, as an open file
        return apply_to_collection(batch, Tensor, _copied, allow_frozen=True)


def _share(value: Any, memo: dict[int, Any], known: dict[int, bool]) -> bool:
    """Whether a tensor hangs on a value; objects on which none does stand for themselves in a memo of ``copy.deepcopy``."""
    if isinstance(value, (Tensor, str, int, float)) or id(value) in known:  # the most frequent first
        return isinstance(value, Tensor) or known.get(id(value), False)
    known[id(value)] = False  # until it is known, as of what refers to itself
    is_container = isinstance(value, (Mapping, list, tuple, set, frozenset))
    members = [*value.values()] if isinstance(value, Mapping) else [*value] if is_container else []
    if not isinstance(value, (type, ModuleType, FunctionType, nn.Module)):
        members += getattr(value, "__dict__", {}).values()
    known[id(value)] = any([_share(member, memo, known) for member in members])
    if not is_container and not known[id(value)]:
        memo[id(value)] = value
    return known[id(value)]


class _Tensors(TorchFunctionMode):
    """Has ``copy.deepcopy`` take of a tensor what it shows, not all that it is a view of, and no graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        copied = _copied(tensor)
        vars(copied).update(copy.deepcopy(vars(tensor), memo))
        return copied


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


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


def clip_factor(square: float, max_norm: float) -> float:
    """By how much clipping to a norm scales a gradient of this expected squared length, at most 1."""
    return min(1.0, max_norm / math.sqrt(square)) if square > 0 else 1.0
