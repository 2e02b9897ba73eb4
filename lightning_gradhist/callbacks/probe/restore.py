"""Leaving no trace: everything that a training step may change is put back."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_gradhist.callbacks._lightning import (
    CombinedLoader,
    DummyLogger,
    LightningModule,
    Trainer,
    isolate_rng,
)
from lightning_gradhist.callbacks.strategies import local

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What nn.Module keeps outside its plain attributes; there is no public way to take a buffer or submodule off again.
_REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule) -> Generator[None, None, None]:
    """On leaving, everything that a training step may change is as it was, and nothing has reached the loggers.

    That is: parameters, buffers and submodules; the attributes of all submodules, metrics among them, and what is in
    their lists, dicts, sets, tuples, tensors, arrays and random generators, and in what has a ``state_dict`` and takes it
    back; optimizers and schedulers; the attributes of trainer, data module, samplers and datasets; the random generators
    of torch on every device, numpy and Python, and those within loaders, samplers and datasets. What other objects hold
    inside, and data that can be read only once, cannot be put back. It takes one copy of the parameters.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_random_state())
        stack.enter_context(_loggers(trainer))
        memory = _Memory()
        memory.keep(module)
        memory.keep(trainer.optimizers)
        memory.keep([config.scheduler for config in trainer.lr_scheduler_configs])
        for thing in (trainer, getattr(trainer, "datamodule", None)):
            if thing is not None:
                memory.keep_attributes(thing)
        for loader in CombinedLoader(trainer.train_dataloader).flattened:
            memory.keep_data(loader)
        stack.callback(memory.restore)
        stack.callback(_reshard, module)
        yield


def _reshard(module: nn.Module) -> None:
    """Puts the shards of FSDP2 back in the place of whole parameters, which a forward without a backward leaves there."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


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


class SilentLogger(DummyLogger):
    """Takes everything and writes nothing, in place of a logger whose directories it names."""

    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._of = logger

    @property
    def save_dir(self) -> Any:
        """That of the logger."""
        return self._of.save_dir

    @property
    def log_dir(self) -> Any:
        """That of the logger, or None."""
        return getattr(self._of, "log_dir", None)


@contextmanager
def _loggers(trainer: Trainer) -> Generator[None, None, None]:
    loggers, attributes = trainer.loggers, vars(trainer.lightning_module)
    own = attributes.get("log")
    trainer.loggers = [SilentLogger(logger) for logger in loggers]
    attributes["log"] = _log_nothing  # the loop would take what is logged for a value of training
    try:
        yield
    finally:
        del attributes["log"]
        attributes.update({} if own is None else {"log": own})
        trainer.loggers = loggers


def _log_nothing(*args: Any, **kwargs: Any) -> None:
    """Stands in for ``LightningModule.log`` during a probe."""


class _Memory:
    """Remembers the contents of objects, and puts them back into the same objects. What has not changed is not touched."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()

    def restore(self) -> None:
        """Puts everything back."""
        with torch.no_grad():
            for undo in reversed(self._undo):
                undo()

    def keep(self, value: Any) -> None:
        """Remembers a value, and what is in it."""
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            for child in value.modules():
                self._keep_module(child)
        elif isinstance(value, (Tensor, np.ndarray)):
            self._keep_numbers(value)
        elif isinstance(value, _GENERATORS):
            self._keep_generator(value)
        elif isinstance(value, (dict, list, deque, set, tuple)):
            self._keep_container(value)
        elif isinstance(value, Optimizer):  # loading its state would put new dicts and tensors in the place of the old
            self.keep(value.param_groups)
            self.keep(value.state)
        elif _is_stateful(value):
            self._keep_state(value)

    def keep_attributes(self, thing: Any) -> None:
        """Remembers which values the attributes of an object have, and not what is in them."""
        attributes = vars(thing)
        members = list(attributes.items())
        self._undo.append(lambda: _refill(attributes, members))

    def keep_data(self, loader: Any) -> None:
        """Remembers the generators behind a loader, its samplers with all they hold, and its datasets without their data."""
        for part in _reachable(loader, set()):
            if isinstance(part, Dataset):
                self.keep_attributes(part)
                if _is_stateful(part):
                    self._keep_state(part)
            else:
                self.keep(vars(part) if isinstance(part, Sampler) else part)

    def _keep_module(self, module: nn.Module) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            return
        registries = vars(nn.Module()).keys() - {"training"}
        own = {name: value for name, value in vars(module).items() if name not in registries}
        held = {name: vars(module)[name].copy() for name in _REGISTRIES}

        def undo() -> None:
            for name, content in held.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)
            for name in [name for name in vars(module) if name not in registries and name not in own]:
                del vars(module)[name]
            vars(module).update(own)

        self._undo.append(undo)
        # Parameters too: a training step may move a teacher's weights, or an embedding with max_norm its own.
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False), *own.values()):
            self.keep(value)

    def _keep_state(self, value: Any) -> None:
        state = copy.deepcopy(value.state_dict())
        self._undo.append(lambda: value.load_state_dict(state))

    def _keep_numbers(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            if value.flags.writeable:
                copied = value.copy()
                self._undo.append(lambda: np.copyto(value, copied))
        elif not is_lazy(value):
            own = local(value.detach())  # comparing DTensors would be a collective
            before = own.clone()
            self._undo.append(lambda: _write_back(own, before))

    def _keep_generator(self, value: Any) -> None:
        if isinstance(value, np.random.Generator):
            state: Any = value.bit_generator.state
            self._undo.append(lambda: setattr(value.bit_generator, "state", state))
        elif isinstance(value, random.Random):
            of_python = value.getstate()
            self._undo.append(lambda: value.setstate(of_python))
        else:
            of_other = value.get_state()
            self._undo.append(lambda: value.set_state(of_other))

    def _keep_container(self, value: Any) -> None:
        members = list(value.items()) if isinstance(value, dict) else list(value)
        for member in value.values() if isinstance(value, dict) else members:
            self.keep(member)
        if not isinstance(value, tuple):
            self._undo.append(lambda: _refill(value, members))


def _write_back(tensor: Tensor, before: Tensor) -> None:
    if tensor.layout == torch.strided and tensor.shape == before.shape and torch.equal(tensor, before):
        return  # an expanded tensor cannot be written, nor has it been
    tensor.copy_(before)


def _refill(container: Any, members: list[Any]) -> None:
    # By the methods of the base class: some of their own forbid it, as those of frozen dicts do.
    if isinstance(container, dict):
        if not _same([*container, *container.values()], [key for key, _ in members] + [value for _, value in members]):
            base = OrderedDict if isinstance(container, OrderedDict) else dict
            base.clear(container)
            for key, value in members:
                base.__setitem__(container, key, value)
    elif not _same(list(container), members):
        if isinstance(container, set):
            set.clear(container)
            set.update(container, members)
        else:
            kind: Any = deque if isinstance(container, deque) else list
            kind.clear(container)
            kind.extend(container, members)


def _same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(one is other for one, other in zip(ones, others, strict=True))


def _is_stateful(value: Any) -> bool:
    kind = type(value)
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict")) and not isinstance(
        value,
        DataLoader,  # to ask a stateful one starts its workers; the probe reads from a copy of it
    )


def _reachable(thing: Any, seen: set[int]) -> Iterator[Any]:
    """Generators, samplers and datasets behind a loader: samplers wrap samplers, Lightning's for DDP hides one in a dataset."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, (Sampler, Dataset, *_GENERATORS)):
        yield thing
    if isinstance(thing, (DataLoader, Sampler, Dataset)):
        for part in vars(thing).values():
            yield from _reachable(part, seen)
    elif isinstance(thing, (list, tuple)) and thing and isinstance(thing[0], Dataset):  # ConcatDataset
        for part in thing:
            yield from _reachable(part, seen)
