"""A probe from its start to its end: how many batches it has, that it leaves no trace, and why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradhist.callbacks._lightning import CombinedLoader, LightningModule, Trainer, is_param_in_hook_signature
from lightning_gradhist.callbacks.probe.outcome import ProbeRefusedError, free_memory, is_out_of_memory, on_every_rank
from lightning_gradhist.callbacks.probe.progress import progress
from lightning_gradhist.callbacks.probe.restore import no_trace
from lightning_gradhist.callbacks.strategies import is_sharded, least_over_ranks, replicas

Measure = Callable[[int, Callable[[], Any]], None]
"""Given the number of batches to read on each rank, and what to call for each."""


def run_probe(trainer: Trainer, module: LightningModule, wanted: int, least: int, measure: Measure) -> str | None:
    """Calls what measures within :func:`no_trace`, with a progress bar; to be called on every rank.

    Args:
        trainer: at its first batch.
        module: at its first batch.
        wanted: batches on each rank.
        least: the fewest that do.
        measure: what is done with as many batches as are wanted, or an epoch has.

    Returns:
        Why there is no probe, or None. What does not end the training ends it on no rank.
    """
    impossible = why_impossible(trainer, module)
    available = 0.0 if impossible else trainer.num_training_batches
    # Loaders may differ in length between ranks, and all must come to the same decision.
    planned = int(least_over_ranks(min(wanted, available), trainer))
    if impossible is None and planned < least:
        impossible = f"it needs {least} batches, and an epoch has {planned}"
    return impossible or _tried(trainer, module, planned, measure)


def _tried(trainer: Trainer, module: LightningModule, planned: int, measure: Measure) -> str | None:
    try:
        with ExitStack() as stack:
            tick = on_every_rank(trainer, "its start", lambda: _begin(stack, trainer, module, planned))
            measure(planned, tick)
        return None
    except ProbeRefusedError as error:
        why = str(error)
    except Exception as error:
        if trainer.world_size > 1 or not is_out_of_memory(error):
            raise  # ranks that have not failed wait for this one
        why = f"there is no memory for it beside the model ({error})"
    free_memory()
    return why


def _begin(stack: ExitStack, trainer: Trainer, module: LightningModule, planned: int) -> Callable[[], Any]:
    stack.enter_context(no_trace(trainer, module))
    return stack.enter_context(progress(trainer, planned))


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
    if replicas(trainer) is None:
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
