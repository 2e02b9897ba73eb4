"""The probe: gradients at frozen weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradhist.callbacks._lightning import (
    CombinedLoader,
    LightningModule,
    Trainer,
    apply_to_collection,
    is_overridden,
    is_param_in_hook_signature,
    isolate_rng,
)
from lightning_gradhist.callbacks.gradients import (
    as_real,
    is_a,
    is_sharded,
    local,
    local_gradient,
    loss_scale,
    optimizer_parameters,
    own_parts,
    shares,
)
from lightning_gradhist.callbacks.refusal import (
    ProbeRefusedError,
    first_reason,
    free_memory,
    is_out_of_memory,
    together,
)
from lightning_gradhist.noise import GradientMoments, NoiseScale

_T = TypeVar("_T")


class _Outcome(IntEnum):
    """How a batch went on this rank. The ranks agree on the worst, so that all call the same collectives."""

    DONE = 0
    NOT_FINITE = 1
    OUT_OF_MEMORY = 2
    ODD_SIZE = 3
    OVERFLOW = 4
    NO_BATCH = 5
    FAILED = 6


_WHY_LEFT_OUT = {
    _Outcome.NOT_FINITE: "gave no finite gradient",
    _Outcome.OUT_OF_MEMORY: "ran out of memory (a smaller batch, or a model without the probe's copies, may fit)",
    _Outcome.ODD_SIZE: "had another number of samples than the others, on one rank at least",
}


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
    iterator = _iterator_within(trainer)
    if iterator is not None:
        return (
            f"the training data holds an iterator ({iterator}), and what a probe takes from it would be lost to training;"
            " make it in __iter__, or read in a worker, DataLoader(num_workers=1)"
        )
    return _why_not_sharded(trainer, module) if is_sharded(trainer) else None


def _why_not_sharded(trainer: Trainer, module: LightningModule) -> str | None:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if shares(trainer) is None:
        return "the model is sharded over some of the ranks, and nobody knows whether the others hold the same"
    whole = [name for name, p in trained.items() if not isinstance(p, DTensor)]
    if whole and (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size) > 1:
        return (
            f"parameter {whole[0]!r} is not sharded, and how the ranks' gradients of it are put together only the module"
            " knows; shard it too: fully_shard(module)"
        )
    # Of torch, private: there is no public way to ask for hooks. FSDP2 runs them in the backward pass that the probe needs.
    hooked = [name for name, p in trained.items() if getattr(p, "_post_accumulate_grad_hooks", None)]
    if hooked:
        return f"parameter {hooked[0]!r} is sharded and has a hook, which the probe's backward pass would run"
    return None


def gradients_a_step(trainer: Trainer) -> int:
    """How many of the probe's gradients, over all ranks, an optimizer step is the mean of."""
    return trainer.accumulate_grad_batches * (1 if is_sharded(trainer) else trainer.world_size)


def pool(noise: NoiseScale, trainer: Trainer) -> None:
    """Puts together what the ranks have measured, at the end of each half; to be called on every rank."""
    if trainer.world_size > 1:
        (noise.all_reduce_shards if is_sharded(trainer) else noise.all_reduce)()


def mean_gradient(trainer: Trainer, probe: Probe, number: int) -> GradientMoments:
    """The mean of the gradients of up to ``number`` batches on each rank, over all ranks; to be called on every rank.

    Raises:
        ProbeRefusedError: as :meth:`Probe.gradients`, and where a rank has no memory for it.
    """
    moments = together(trainer, "to hold gradients", lambda: GradientMoments(probe.parameters))
    for gradient in probe.gradients(number):
        moments.update(gradient)
    if trainer.world_size > 1:
        moments.all_reduce()
    return moments


class Probe:
    """Gradients of single batches on this rank, neither averaged over ranks nor divided for accumulation.

    To be used within :func:`no_trace`. Each is the gradient of the optimizer's objective, a coupled weight decay
    included, dense and real. The ranks go in step: each reads a batch, or none does. Where parameters are sharded (FSDP2,
    tensor parallelism), a gradient is the mean over the ranks' batches, and each rank is given another part of it; what
    then fails within a pass ends the run, as in training, since the other ranks wait within the model.

    Args:
        trainer: whose training data and precision are used.
        module: whose ``training_step`` is called. Neither a DDP wrapper nor an override of ``backward`` has a part in it.
        optimizer: whose parameters are asked for.
        batch_size: samples of a batch on this rank, where known. If the first batch can be counted and has as many, later
            ones with another number are passed over.
        tick: called for each batch that was read.
        with_decay: whether a coupled weight decay is part of the gradients.
        source: batches to be taken in place of the training data's, such as those of :meth:`hold`.

    Attributes:
        parameters: names and real parameters, or parts of them, that gradients are given for.
        batches: number of batches that were read.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Optimizer,
        batch_size: float | None = None,
        tick: Callable[[], Any] = lambda: None,
        with_decay: bool = True,
        source: Iterable[Any] | None = None,
    ) -> None:
        self.batches = 0
        self._trainer = trainer
        self._module = module
        self._batch_size = batch_size
        self._tick = tick
        self._parameters = {n: p for n, p in optimizer_parameters(module, optimizer).items() if p.requires_grad}
        self._shares = shares(trainer) if is_sharded(trainer) else None
        self._module_parameters = list(module.parameters())  # now: within a pass, FSDP2 shows others in their place
        self.parameters = self._own({name: _real(p) for name, p in self._parameters.items()})
        self._decay = _coupled_decay(optimizer) if with_decay else {}
        self._scale = loss_scale(trainer)
        self._source = _batches(trainer, module) if source is None else iter(source)
        self._left_out = dict.fromkeys(_WHY_LEFT_OUT, 0)

    def gradients(self, number: int) -> Iterator[Mapping[str, Tensor | None]]:
        """Reads up to ``number`` batches more.

        Yields:
            names and gradients, None for a parameter that the batch did not use. A batch is passed over if it has no
            loss, or a gradient that is not finite, or another size than the first, or runs out of memory; under 16-mixed
            the loss scale is lowered first, as the scaler would.

        Raises:
            ProbeRefusedError: where the training step fails, or cannot be differentiated without the hooks of the
                parameters.
        """
        return self._each(number, self._passed)

    def losses(self, number: int, places: Sequence[Callable[[], None]]) -> Iterator[Sequence[float]]:
        """Reads up to ``number`` batches more, forward only.

        Args:
            number: of batches.
            places: each is called before a forward pass; that at the first is the one that has to be finite. The random
                numbers of all passes of a batch are the same.

        Yields:
            the losses of a batch, one for each place. A batch is passed over as by :meth:`gradients`.

        Raises:
            ProbeRefusedError: where the training step fails.
        """
        return self._each(number, partial(self._losses_of, places))

    def hold(self, number: int) -> list[Any]:
        """Reads up to ``number`` batches more, on their device; those of another size than the first are passed over."""
        return list(self._each(number, lambda batch: (batch, _Outcome.DONE)))

    def _each(self, number: int, measure: Callable[[Any], tuple[_T, _Outcome]]) -> Iterator[_T]:
        for _ in range(number):
            batch, outcome, error = self._next()
            worst = self._worst(outcome)
            if worst is _Outcome.FAILED:
                self._refuse(error)
            if worst is _Outcome.NO_BATCH:
                return
            measured = None
            if worst is _Outcome.DONE:
                measured, worst = self._of_batch(batch, measure)
            self.batches += 1
            self._tick()
            if measured is not None and worst is _Outcome.DONE:
                yield measured
            else:
                self._left_out[worst] += 1

    def left_out(self) -> list[str]:
        """What became of the batches that gave no gradient, over all ranks; to be called on every rank."""
        counts = torch.tensor([*self._left_out.values()], device=self._module.device)
        if self._trainer.world_size > 1:
            torch.distributed.all_reduce(counts)
        of = self.batches * self._trainer.world_size
        found = zip(counts.tolist(), _WHY_LEFT_OUT.values(), strict=True)
        return [f"{count} of {of} batches of the probe {why}, and were left out" for count, why in found if count]

    def over_shards(self, total: float) -> float:
        """The sum over ranks that hold different parts of a gradient, else the number itself; for every rank."""
        if self._shares is None:
            return total
        summed = torch.tensor(total, dtype=torch.float64, device=self._module.device)
        torch.distributed.all_reduce(summed)
        return float(summed)

    def _next(self) -> tuple[Any, _Outcome, Exception | None]:
        try:
            batch = next(self._source, None)
        except Exception as error:  # of a dataset, or of what puts samples together
            return None, _Outcome.FAILED, error
        if batch is None:
            return None, _Outcome.NO_BATCH, None
        samples = _samples(batch)
        if self.batches == 0 and samples != self._batch_size:
            self._batch_size = None  # what can be counted in a batch is not its samples
        odd = self._batch_size is not None and samples != self._batch_size
        return batch, _Outcome.ODD_SIZE if odd else _Outcome.DONE, None

    def _of_batch(self, batch: Any, measure: Callable[[Any], tuple[_T, _Outcome]]) -> tuple[_T | None, _Outcome]:
        while True:
            measured, outcome, error = self._tried(batch, measure)
            worst = self._worst(outcome)
            if worst is _Outcome.FAILED:
                self._refuse(error)
            if worst is not _Outcome.OVERFLOW:
                return measured, outcome if self._shares is None else worst  # of a sharded one, each has a part
            self._scale /= 2

    def _tried(
        self, batch: Any, measure: Callable[[Any], tuple[_T, _Outcome]]
    ) -> tuple[_T | None, _Outcome, Exception | None]:
        try:
            return (*measure(batch), None)
        except Exception as error:
            if self._shares is not None:
                raise  # the others wait within the model's own collectives, as they would in training
            if not is_out_of_memory(error):
                return None, _Outcome.FAILED, error
        free_memory()  # here, where the error that held the graph is gone
        return None, _Outcome.OUT_OF_MEMORY, None

    def _passed(self, batch: Any) -> tuple[Mapping[str, Tensor | None], _Outcome]:
        """Forward and backward; again from the start where the scale is lowered, so that no graph has to be retained."""
        loss = _loss(self._trainer, self._module, batch, self.batches)
        loss = loss if loss is not None and loss.requires_grad else None
        missing = _Outcome.NOT_FINITE if loss is None else _Outcome.DONE
        if self._shares is not None:
            missing = self._worst(missing)  # a backward pass is a collective
        if loss is None or missing is not _Outcome.DONE:
            return {}, _Outcome.NOT_FINITE
        gradients = self._whole(loss) if self._shares is None else self._sharded(loss)
        if _all_finite(gradients):
            return gradients, _Outcome.DONE
        overflow = self._scale > 1.0 and bool(loss.isfinite().all())
        return {}, _Outcome.OVERFLOW if overflow else _Outcome.NOT_FINITE

    def _losses_of(self, places: Sequence[Callable[[], None]], batch: Any) -> tuple[Sequence[float], _Outcome]:
        losses = []
        for go in places:
            go()
            with torch.no_grad(), isolate_rng():
                loss = _loss(self._trainer, self._module, batch, self.batches)
            losses.append(math.nan if loss is None else float(loss))
        return losses, _Outcome.DONE if math.isfinite(losses[0]) else _Outcome.NOT_FINITE

    def _whole(self, loss: Tensor) -> dict[str, Tensor | None]:
        # Not loss.backward(): it runs the hooks of DDP's reducer, and with static_graph=True that counts calls and would
        # no longer average the gradients of training. It runs the users' hooks too, which may step an optimizer.
        if _has_reentrant_checkpoint(loss):  # autograd.grad would find nothing behind it, and say nothing
            raise ProbeRefusedError(
                "activation checkpointing with use_reentrant=True can only be differentiated by backward(), which runs the"
                " hooks of the parameters; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
            )
        found = torch.autograd.grad(loss * self._scale, list(self._parameters.values()), allow_unused=True)
        return {
            name: None if g is None else self._finished(as_real(g.to_dense() if g.layout != torch.strided else g), p)
            for (name, p), g in zip(self._parameters.items(), found, strict=True)
        }

    def _sharded(self, loss: Tensor) -> Mapping[str, Tensor | None]:
        """By backward(), in which FSDP2 averages over ranks; autograd knows nothing of the shards."""
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
        unscaled = gradient if self._scale == 1.0 else gradient / self._scale
        decay = self._decay.get(id(parameter), 0.0)
        return unscaled.add(_real(parameter), alpha=decay) if decay else unscaled

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank answers for: all of them, or where parameters are sharded each value on one rank alone."""
        return tensors if self._shares is None else own_parts(tensors, self._parameters, self._shares)

    def _refuse(self, error: Exception | None) -> NoReturn:
        """Says why it failed, on the first rank on which it did."""
        reason = None if error is None else f"the training data, training_step or its gradient raised {error!r}"
        own = str(error) if isinstance(error, ProbeRefusedError) else reason
        raise ProbeRefusedError(first_reason(self._trainer, own)) from error

    def _worst(self, outcome: _Outcome) -> _Outcome:
        if self._trainer.world_size == 1:
            return outcome
        worst = torch.tensor(int(outcome), device=self._module.device)
        torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX)
        return _Outcome(int(worst))


def _real(parameter: nn.Parameter) -> Tensor:
    return as_real(local(parameter.detach()))


def _samples(batch: Any) -> int | None:
    """The length that all tensors of a batch have in common, or None; to tell it, nothing may be guessed."""
    sizes: set[int] = set()
    waiting = [batch]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tensor):
            sizes.add(part.size(0) if part.ndim else 1)
        elif isinstance(part, (Mapping, list, tuple)):
            waiting.extend(part.values() if isinstance(part, Mapping) else part)
    return sizes.pop() if len(sizes) == 1 else None


def _iterator_within(trainer: Trainer) -> str | None:
    """An attribute of data that are read in this process and hold an iterator, or None."""
    for loader in CombinedLoader(trainer.train_dataloader).flattened:
        data = loader.dataset if isinstance(loader, DataLoader) and loader.num_workers == 0 else loader
        by_index = hasattr(type(data), "__getitem__") and not isinstance(data, IterableDataset)
        if not by_index and not isinstance(data, DataLoader) and hasattr(data, "__dict__"):
            for name, value in vars(data).items():
                if isinstance(value, Iterator):
                    return f"{type(data).__name__}.{name}"
    return None


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
    arguments = [apply_to_collection(batch, Tensor, _copied, allow_frozen=True)]  # the same batch may come again
    if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
        arguments.append(batch_index)
    with trainer.precision_plugin.train_step_context():
        output = module.training_step(*arguments)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


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


def clip_factor(square: float, max_norm: float) -> float:
    """By how much clipping to a norm scales a gradient of this expected squared length, at most 1."""
    return min(1.0, max_norm / math.sqrt(square)) if square > 0 else 1.0
