"""The probe: gradients at frozen weights, as if they had never been computed."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer, RMSprop
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from lightning_gradhist.callbacks._lightning import (
    CombinedLoader,
    DummyLogger,
    LightningModule,
    Trainer,
    is_overridden,
    is_param_in_hook_signature,
    isolate_rng,
)
from lightning_gradhist.callbacks.gradients import loss_scale, optimizer_parameters

_PLAIN = (bool, int, float, str, bytes, tuple, type(None))
_CONTAINERS = (list, dict, set)


class ProbeRefusedError(RuntimeError):
    """The probe cannot be made; the message says why, and the way out."""


def why_impossible(trainer: Trainer, module: LightningModule) -> str | None:
    """Why this module cannot be probed, or None if it can."""
    if not module.automatic_optimization:
        return (
            "under manual optimization training_step would step the optimizer, so it cannot be tried at frozen weights"
        )
    if trainer.train_dataloader is None:
        return "there is no training loader"
    if isinstance(trainer.train_dataloader, Iterator):
        return "the training data is an iterator, and what a probe takes from it would be lost to training"
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step takes the loader's iterator itself"
    return None


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule) -> Generator[None, None, None]:
    """On leaving, everything that a training step may change is as it was.

    That is: buffers, metrics, plain Python attributes (numbers, strings, lists, dicts, sets) of all
    submodules, random generators of torch on every device, numpy and Python, and those of loader and samplers. Nothing
    reaches the loggers. Other objects that a training step changes, and data that can be read only once, cannot be put
    back.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for keeper in (
            _random_state(),
            _loggers(trainer),
            _metrics(module),
            _attributes(module),
            _buffers(module),
            _generators(trainer),
        ):
            stack.enter_context(keeper)
        yield


def probe_gradients(
    trainer: Trainer, module: LightningModule, optimizer: Optimizer, limit: int
) -> Iterator[dict[str, Tensor | None]]:
    """Gradients of single batches on this rank, neither averaged over ranks nor divided for accumulation.

    To be used within :func:`no_trace`. Each is the gradient of the optimizer's objective, a coupled weight decay
    included. A batch without loss or with a non-finite gradient is passed over; under 16-mixed the loss scale is first
    lowered, as the scaler would.

    Args:
        trainer: whose training data and precision are used.
        module: whose ``training_step`` is called. Neither a DDP wrapper nor an override of ``backward`` has a part in it.
        optimizer: whose parameters are asked for.
        limit: number of batches to read at the most.

    Yields:
        names and gradients, None for a parameter that the batch did not use.

    Raises:
        ProbeRefusedError: where the module cannot be differentiated without running the hooks of its parameters.
    """
    parameters = {n: p for n, p in optimizer_parameters(module, optimizer).items() if p.requires_grad}
    decay = _coupled_decay(optimizer)
    scale = loss_scale(trainer)
    for batch_index, batch in enumerate(_batches(trainer, module, limit)):
        while (loss := _loss(trainer, module, batch, batch_index)) is not None:
            found = _differentiate(loss * scale, parameters)
            gradients = {n: _gradient(g, parameters[n], scale, decay) for n, g in found.items()}
            if _all_finite(gradients):
                yield gradients
                break
            if scale <= 1.0:
                break
            scale /= 2


def _batches(trainer: Trainer, module: LightningModule, limit: int) -> Iterator[Any]:
    loaders = CombinedLoader(trainer.train_dataloader, "max_size_cycle")
    loaders.flattened = [_fresh(loader) for loader in loaders.flattened]
    datamodule = getattr(trainer, "datamodule", None)
    hooks: Any = datamodule if _overrides_transfer(datamodule) else module
    for _, (batch, _, _) in zip(range(limit), iter(loaders), strict=False):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = hooks.on_before_batch_transfer(batch, 0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _overrides_transfer(datamodule: Any) -> bool:
    return datamodule is not None and is_overridden("on_before_batch_transfer", datamodule)


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


def _differentiate(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor | None]:
    # Not loss.backward(): it runs the hooks of DDP's reducer, and with static_graph=True that counts calls and would no
    # longer average the gradients of training. It runs the users' hooks too, which may step an optimizer.
    if _has_reentrant_checkpoint(loss):  # autograd.grad would find nothing behind it, and say nothing
        raise ProbeRefusedError(
            "activation checkpointing with use_reentrant=True can only be differentiated by backward(), which runs the hooks"
            " of the parameters; use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)"
        )
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


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


def _gradient(
    gradient: Tensor | None, parameter: nn.Parameter, scale: float, decay: Mapping[int, float]
) -> Tensor | None:
    if gradient is None:
        return None
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    unscaled = dense if scale == 1.0 else dense / scale
    weight_decay = decay.get(id(parameter), 0.0)
    return unscaled.add(parameter.detach(), alpha=weight_decay) if weight_decay else unscaled


def _coupled_decay(optimizer: Optimizer) -> dict[int, float]:
    """Weight decay that the optimizer adds to the gradient, by the parameter's id."""
    coupled_by_class = isinstance(optimizer, (SGD, RMSprop))
    return {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        if group.get("weight_decay") and not group.get("decoupled_weight_decay", not coupled_by_class)
        for parameter in group["params"]
    }


def _all_finite(gradients: Mapping[str, Tensor | None]) -> bool:
    finite = [gradient.isfinite().all() for gradient in gradients.values() if gradient is not None]
    return bool(finite) and bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all())


@contextmanager
def _random_state() -> Generator[None, None, None]:
    error: BaseException | None = None
    with isolate_rng():  # puts the state back only where its body ends without an exception
        try:
            yield
        except BaseException as caught:
            error = caught
    if error is not None:
        raise error


@contextmanager
def _loggers(trainer: Trainer) -> Generator[None, None, None]:
    loggers, module = trainer.loggers, trainer.lightning_module
    trainer.loggers = [DummyLogger() for _ in loggers]
    module.log = _log_nothing  # type: ignore[method-assign]  # self.log raises outside the training loop
    try:
        yield
    finally:
        del module.log
        trainer.loggers = loggers


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``LightningModule.log`` during a probe."""


@contextmanager
def _metrics(module: LightningModule) -> Generator[None, None, None]:
    metrics: list[tuple[nn.Module, str, nn.Module]] = []
    outermost = "\0"
    for path, child in module.named_modules():
        if isinstance(child, (Metric, MetricCollection)) and not path.startswith(f"{outermost}."):
            outermost = path
            parent, _, name = path.rpartition(".")
            metrics.append((module.get_submodule(parent), name, child))
    for holder, name, metric in metrics:
        holder.register_module(name, copy.deepcopy(metric))
    try:
        yield
    finally:
        for holder, name, metric in metrics:
            holder.register_module(name, metric)


@contextmanager
def _attributes(module: LightningModule) -> Generator[None, None, None]:
    kept = [(child, _plain_attributes(child)) for child in module.modules()]
    contents = [(value, copy.copy(value)) for _, attributes in kept for value in attributes.values()
                if isinstance(value, _CONTAINERS)]  # fmt: skip
    try:
        yield
    finally:
        for child, attributes in kept:
            now = _plain_attributes(child)
            for name in now.keys() - attributes.keys():
                delattr(child, name)
            vars(child).update(attributes)
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    registries = vars(nn.Module()).keys()  # parameters, buffers, submodules and hooks are not Python state
    return {
        name: value
        for name, value in vars(module).items()
        if name not in registries and isinstance(value, (*_PLAIN, *_CONTAINERS))
    }


@contextmanager
def _buffers(module: LightningModule) -> Generator[None, None, None]:
    buffers = [
        (child, name, buffer, buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for child, name, buffer, before in buffers:
                buffer.copy_(before)
                setattr(child, name, buffer)


@contextmanager
def _generators(trainer: Trainer) -> Generator[None, None, None]:
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    holders = [h for x in loaders if isinstance(x, DataLoader) for h in (x, x.sampler, x.batch_sampler)]
    generators = [
        g for g in (getattr(holder, "generator", None) for holder in holders) if isinstance(g, torch.Generator)
    ]
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)
