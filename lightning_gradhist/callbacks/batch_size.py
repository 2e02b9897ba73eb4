"""How many samples an optimizer step has."""

from __future__ import annotations

import math
from collections.abc import Sized

from torch.utils.data import DataLoader

from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.strategies import is_sharded


def effective_batch_size(trainer: Trainer, batch_size: int | None = None) -> int | None:
    """Samples of an optimizer step: per-device batch, times accumulation, times data-parallel ranks.

    Args:
        trainer: with its training data set up.
        batch_size: per-device batch size where the user has given it; else it is read from the loader. Under manual
            optimization, where only the user knows how much is accumulated, samples of a step on one device.

    Returns:
        None where it cannot be read: no loader or several, one that does not tell its batch size, or manual
        optimization.
    """
    automatic = trainer.lightning_module.automatic_optimization
    if automatic:
        batch_size = batch_of_rank(trainer, batch_size)
    if not isinstance(batch_size, int):
        return None
    sampler = trainer.distributed_sampler_kwargs  # the ranks of a tensor-parallel group share their samples
    ranks = sampler["num_replicas"] if sampler else trainer.world_size
    return batch_size * (trainer.accumulate_grad_batches if automatic else 1) * ranks


def batch_of_rank(trainer: Trainer, batch_size: int | None = None) -> int | None:
    """Samples of a micro-batch on this rank: as given, else what the loader tells; None where it does not."""
    if batch_size is None:
        loader = trainer.train_dataloader
        batch_size = getattr(loader, "batch_size", None)
        if batch_size is None:
            batch_size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return batch_size if isinstance(batch_size, int) else None


def full_batches(trainer: Trainer) -> float:
    """Number of batches of an epoch on this rank that are as large as the others; infinite where it is not known."""
    loader = trainer.train_dataloader
    batches = trainer.num_training_batches
    uneven = (
        isinstance(loader, DataLoader)
        and isinstance(loader.batch_size, int)
        and not loader.drop_last
        and math.isfinite(batches)
        and isinstance(loader.sampler, Sized)  # not so of an IterableDataset, which may have no length
        and batches == len(loader)
        and len(loader.sampler) % loader.batch_size > 0
    )
    return batches - 1 if uneven else batches


def is_short_step(trainer: Trainer) -> bool:
    """Whether the present optimizer step has fewer samples than the others: the last of an epoch may."""
    seen = trainer.fit_loop.epoch_loop.batch_idx + 1
    short_window = seen % trainer.accumulate_grad_batches > 0
    return trainer.is_last_batch and (short_window or full_batches(trainer) < trainer.num_training_batches)


def gradients_a_step(trainer: Trainer) -> int:
    """How many of the probe's gradients, over all ranks, an optimizer step is the mean of."""
    return trainer.accumulate_grad_batches * (1 if is_sharded(trainer) else trainer.world_size)
