"""Leaving no trace: a probe has a trainer, a module and data of its own."""

from __future__ import annotations

import gc
import math
import os
import warnings
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

from lightning_gradhist._dtensor import local
from lightning_gradhist.callbacks._deepspeed import is_zero, unwrapped
from lightning_gradhist.callbacks._lightning import LightningModule, PassThroughProfiler, Trainer, isolate_rng
from lightning_gradhist.callbacks.probe.copies import LARGE, Copier
from lightning_gradhist.callbacks.probe.outcome import ProbeEnded
from lightning_gradhist.callbacks.probe.places import put_copies_in_place
from lightning_gradhist.callbacks.probe.silence import SilentRun, without_log_records
from lightning_gradhist.callbacks.probe.stand_ins import signals_held_back, without_threads
from lightning_gradhist.callbacks.strategies import is_cut_up


@dataclass(frozen=True)
class Apart:
    """What a probe may use up.

    Attributes:
        trainer: a copy, with optimizers, schedulers, callbacks, data module and loaders that are copies, and loggers that
            write nothing.
        module: a copy; of a sharded module itself, with copies of all that it holds but its parameters.
        reading: gives what is to be entered while data are read, and with True in a training step.
    """

    trainer: Trainer
    module: LightningModule
    reading: Callable[..., AbstractContextManager[None]]


@contextmanager
def no_trace(trainer: Trainer, module: LightningModule) -> Generator[Apart, None, None]:
    """Gives copies of trainer and module, after which everything is as if they had not been used.

    The module, its optimizers and schedulers, the loaders with their datasets and samplers, the data module and the
    callbacks are copied together, so that what they share is shared in the copy; of the weights this is one copy. Large
    tensors and arrays of the data are not copied: to write into one ends the probe, as does what cannot be copied and is
    used (:class:`lightning_gradhist.callbacks.probe.copies.Missing`). A sharded module cannot be copied; its parameters are
    put back, and all else that it holds is copied. The global random generators of torch on every device, numpy and Python,
    the environment and the working directory are put back. Signals wait for the end, and log records go nowhere. What
    lies outside of all this is not put back: files, other processes, what only modules and classes of Python refer to.
    """
    with ExitStack() as stack:
        connector = stack.enter_context(signals_held_back(trainer.received_sigterm))  # until all is put back
        stack.enter_context(without_log_records())
        stack.enter_context(torch.enable_grad())
        # Scripted functions have their runs counted, also of a copy, and are optimized after the first.
        stack.enter_context(torch.jit.optimized_execution(False))  # type: ignore[no-untyped-call]
        stack.enter_context(isolate_rng())
        stack.callback(_put_back_environment, dict(os.environ))
        with suppress(OSError):  # where the working directory is gone
            stack.callback(_put_back_folder, os.getcwd())
        copier = Copier()
        copier.put(trainer._signal_connector, connector)  # type: ignore[attr-defined] # private
        with warnings.catch_warnings(), without_threads(copier.refusals), _without_collections():
            warnings.simplefilter("ignore")  # as of itertools, which Python will not copy for ever
            apart, own = _apart(stack, copier, trainer, module)
        vars(own)["log"] = SilentRun()  # the loop would take what is logged for a value of training
        stack.callback(_end_workers, apart)
        yield Apart(apart, own, copier.reading)


@contextmanager
def _without_collections() -> Generator[None, None, None]:
    """Within it no garbage is collected: each collection would look through all that was copied so far."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


def _apart(stack: ExitStack, copier: Copier, trainer: Any, module: Any) -> tuple[Any, Any]:
    # Private: the first has the batches that are read ahead.
    copier.lend(trainer.fit_loop._data_fetcher, trainer.progress_bar_callback)
    copier.put(trainer.profiler, PassThroughProfiler())
    for logger in trainer.loggers:
        copier.copy(logger)  # first, so that what it writes with is known where a module keeps it
    apart = copier.shell(trainer)  # filled at last, so that no path to the data or the module leads over it
    if is_cut_up(trainer):
        for part in trainer.model.modules():
            if isinstance(part, FullyShardedDataParallel):
                part.check_is_root()  # which makes what its first forward pass would: that stays
        copier.lend(*trainer.model.modules(), *module.parameters())
        copier.lend(*(each for zero in filter(is_zero, trainer.optimizers) for each in (zero, unwrapped(zero))))
    copier.by_id = {id(one): one for one in (*module.modules(), *module.parameters(), *module.buffers())}
    copier.limit = LARGE
    copier.copy(trainer.train_dataloader, "train_dataloader")
    copier.limit = math.inf
    own = copier.copy(module, "module")
    if own is module:
        _lend_sharded(stack, copier, module)
    else:
        there = dict(own.named_parameters(remove_duplicate=False))
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if name in there:  # also those of modules that copy themselves by ways of their own, as ScriptModules do
                copier.put(parameter, there[name])
        copier.put(trainer.model, own)  # DDP's wrapper
    copier.fill(apart, vars(trainer))
    put_copies_in_place(copier, stack)
    return apart, own


def _lend_sharded(stack: ExitStack, copier: Copier, module: nn.Module) -> None:
    """Puts copies in the place of all that the modules hold, but their parameters and each other."""
    # FSDP1's own modules hold nothing else.
    parts = [part for part in module.modules() if not isinstance(part, FullyShardedDataParallel)]
    before = [(part, dict(vars(part))) for part in parts]
    contents = [(own, own.clone()) for own in (local(p.detach()) for p in module.parameters())]
    stack.callback(_put_back, before, contents)
    for part, attributes in before:
        vars(part).update({name: copier.copy(value, f"module.{name}") for name, value in attributes.items()})


def _put_back(before: list[tuple[nn.Module, dict[str, Any]]], contents: list[tuple[Tensor, Tensor]]) -> None:
    for part, _ in before:
        if isinstance(part, FSDPModule):
            part.reshard()  # a forward without a backward leaves whole parameters in the place of the shards
    for part, attributes in before:
        vars(part).clear()
        vars(part).update(attributes)
    write_back(contents)


def write_back(contents: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Gives tensors their contents again."""
    with torch.no_grad():
        for own, content in contents:
            own.copy_(content)


def _end_workers(trainer: Any) -> None:
    """Ends those of the copied loaders, for which to be collected as garbage takes 5 s each: torch waits for them in vain."""
    with suppress(Exception, ProbeEnded):  # of a loader of the user's
        trainer.fit_loop._combined_loader.reset()  # private, as where batches are read


def _put_back_environment(environment: dict[str, str]) -> None:
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update({name: value for name, value in environment.items() if os.environ.get(name) != value})


def _put_back_folder(folder: str) -> None:
    with suppress(OSError):
        os.chdir(folder)
