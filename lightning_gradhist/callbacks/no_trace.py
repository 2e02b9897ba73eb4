"""Leaving no trace: everything that a training step may change is put back."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric, MetricCollection

from lightning_gradhist.callbacks._lightning import (
    CombinedLoader,
    DummyLogger,
    LightningModule,
    Trainer,
    isolate_rng,
)


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule) -> Generator[None, None, None]:
    """On leaving, everything that a training step may change is as it was, and nothing has reached the loggers.

    That is: parameters, buffers, metrics, the attributes of all submodules (and what is in lists, dicts, sets, tensors
    and arrays among them), random generators of torch on every device, numpy and Python, and those of loaders, samplers
    and datasets. What other objects hold inside, and data that can be read only once, cannot be put back. It takes one
    copy of the parameters.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        for keeper in (
            _random_state(),
            _loggers(trainer),
            _metrics(module),
            _attributes(module),
            _tensors(module),
            _generators(trainer),
        ):
            stack.enter_context(keeper)
        yield


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
    module.log = _log_nothing  # type: ignore[method-assign]  # the loop would take it for a value of training
    try:
        yield
    finally:
        del module.log
        trainer.loggers = loggers


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``LightningModule.log`` during a probe."""


@contextmanager
def _metrics(module: LightningModule) -> Generator[None, None, None]:
    places: list[tuple[nn.Module, str, nn.Module]] = []
    outermost = "\0"
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, (Metric, MetricCollection)) and not path.startswith(f"{outermost}."):
            outermost = path
            parent, _, name = path.rpartition(".")
            places.append((module.get_submodule(parent), name, child))
    copies = {id(metric): copy.deepcopy(metric) for _, _, metric in places}  # one for a metric under two names
    for holder, name, metric in places:
        holder.register_module(name, copies[id(metric)])
    try:
        yield
    finally:
        for holder, name, metric in places:
            holder.register_module(name, metric)


@contextmanager
def _attributes(module: LightningModule) -> Generator[None, None, None]:
    seen: set[int] = set()
    kept = [
        (child, {name: _keep(value, seen) for name, value in _own_attributes(child).items()})
        for child in module.modules()
    ]
    try:
        yield
    finally:
        for child, attributes in kept:
            for name in _own_attributes(child).keys() - attributes.keys():
                delattr(child, name)
            vars(child).update({name: restore() for name, restore in attributes.items()})


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    registries = vars(nn.Module()).keys() - {"training"}  # parameters, buffers, submodules and hooks
    return {name: value for name, value in vars(module).items() if name not in registries}


def _keep(value: Any, seen: set[int]) -> Callable[[], Any]:
    """Returns what puts back the contents of a value, and returns the value."""
    if id(value) in seen or not isinstance(value, (list, deque, set, dict, Tensor, np.ndarray)):
        return lambda: value
    seen.add(id(value))
    if isinstance(value, (Tensor, np.ndarray)):
        return _keep_numbers(value)
    if isinstance(value, dict):
        items = {key: _keep(item, seen) for key, item in value.items()}
        return lambda: _refill(value, lambda: value.update({key: restore() for key, restore in items.items()}))
    members = [_keep(item, seen) for item in value]
    put: Any = value.update if isinstance(value, set) else value.extend
    return lambda: _refill(value, lambda: put([restore() for restore in members]))


def _refill(container: Any, fill: Callable[[], None]) -> Any:
    container.clear()
    fill()
    return container


def _keep_numbers(value: Any) -> Callable[[], Any]:
    if isinstance(value, Tensor) and (is_lazy(value) or value.layout != torch.strided):
        return lambda: value
    before = value.detach().clone() if isinstance(value, Tensor) else value.copy()
    equal: Any = torch.equal if isinstance(value, Tensor) else np.array_equal

    def restore() -> Any:
        with torch.no_grad():
            if not equal(value, before):  # an expanded tensor or a read-only array cannot be written, nor has it been
                value[...] = before
        return value

    return restore


@contextmanager
def _tensors(module: LightningModule) -> Generator[None, None, None]:
    # Parameters too: a training step may move a teacher's weights, or an embedding with max_norm its own.
    registered = [
        (child, name, tensor, tensor.detach().clone())
        for child in module.modules()
        for name, tensor in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False))
        if not is_lazy(tensor)
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for child, name, tensor, before in registered:
                tensor.copy_(before)
                if getattr(child, name) is not tensor:
                    setattr(child, name, tensor)


@contextmanager
def _generators(trainer: Trainer) -> Generator[None, None, None]:
    loaders = CombinedLoader(trainer.train_dataloader).flattened
    seen: set[int] = set()
    states = [(generator, generator.get_state()) for loader in loaders for generator in _reachable(loader, seen)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _reachable(thing: Any, seen: set[int]) -> Iterator[torch.Generator]:
    # Samplers wrap samplers, and Lightning's wrapper for DDP keeps the user's in a dataset.
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Generator):
        yield thing
    elif isinstance(thing, (DataLoader, Sampler, Dataset)):
        for part in vars(thing).values():
            yield from _reachable(part, seen)
