"""A probe from its start to its end: how many batches it has, that it leaves no trace, and why there is none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from lightning_gradhist.callbacks._lightning import LightningModule, Trainer
from lightning_gradhist.callbacks.gradients import full_batches, least_over_ranks
from lightning_gradhist.callbacks.no_trace import no_trace
from lightning_gradhist.callbacks.probe import why_impossible
from lightning_gradhist.callbacks.progress import progress
from lightning_gradhist.callbacks.refusal import ProbeRefusedError, free_memory, is_out_of_memory, together

Measure = Callable[[int, Callable[[], Any]], None]
"""Given the number of batches to read on each rank, and what to call for each."""


def run_probe(trainer: Trainer, module: LightningModule, wanted: int, least: int, measure: Measure) -> str | None:
    """Calls what measures within :func:`no_trace`, with a progress bar; to be called on every rank.

    Args:
        trainer: at its first batch.
        module: at its first batch.
        wanted: batches on each rank.
        least: the fewest that do.
        measure: what is done with as many full batches as are wanted, or the loader has.

    Returns:
        Why there is no probe, or None. What does not end the training ends it on no rank.
    """
    impossible = why_impossible(trainer, module)
    available = 0.0 if impossible else full_batches(trainer)
    # Loaders may differ in length between ranks, and all must come to the same decision.
    planned = int(least_over_ranks(min(wanted, available), trainer))
    if impossible is None and planned < least:
        impossible = f"it needs {least} full batches, and the loader has {planned}"
    return impossible or _tried(trainer, module, planned, measure)


def _tried(trainer: Trainer, module: LightningModule, planned: int, measure: Measure) -> str | None:
    try:
        with ExitStack() as stack:
            tick = together(trainer, "its start", lambda: _begin(stack, trainer, module, planned))
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
