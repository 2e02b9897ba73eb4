"""A probe from its start to its end: how many batches it has, that it leaves no trace, and why there is none."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_gradhist._flat import is_flat, is_of_fsdp
from lightning_gradhist.callbacks._deepspeed import cuts_weights_up, is_deepspeed
from lightning_gradhist.callbacks._lightning import LightningModule, Trainer, is_a, is_param_in_hook_signature
from lightning_gradhist.callbacks.gradients import has_gradient_hook
from lightning_gradhist.callbacks.parameters import named_parameters
from lightning_gradhist.callbacks.probe.outcome import (
    ProbeEnded,
    ProbeRefusedError,
    free_memory,
    is_out_of_memory,
    on_every_rank,
)
from lightning_gradhist.callbacks.probe.restore import Apart, no_trace
from lightning_gradhist.callbacks.strategies import averages_in_backward, least_over_ranks, replicas

Measure = Callable[[Apart, int, Callable[[], Any]], None]
"""Given what it may use up, the number of batches to read on each rank, and what to call for each."""


def run_probe(trainer: Trainer, module: LightningModule, wanted: int, least: int, measure: Measure) -> str | None:
    """Calls what measures within :func:`no_trace`, with a progress bar; to be called on every rank, at the first batch.

    It is given as many batches on each rank as are wanted, or as an epoch has; ``least`` are the fewest that do.

    Returns:
        Why there is no probe, or None. What does not end the training ends it on no rank.
    """
    impossible = _why_impossible(trainer, module)
    available = 0.0 if impossible else trainer.num_training_batches
    # Loaders may differ in length between ranks, and all must come to the same decision.
    planned = int(least_over_ranks(min(wanted, available), trainer))
    if impossible is None and planned < least:
        run = "fast_dev_run" if getattr(trainer, "fast_dev_run", False) else "an epoch"
        impossible = f"it needs {least} batches, and {run} has {planned}"
    if impossible is not None:
        return impossible
    try:
        _measured(trainer, module, planned, measure)
    except (ProbeRefusedError, ProbeEnded) as error:
        return str(error)
    except Exception as error:
        if trainer.world_size > 1 or not is_out_of_memory(error):
            raise  # ranks that have not failed wait for this one
        return f"there is no memory for it beside the model ({error})"
    finally:
        free_memory()  # the copies refer to each other
    return None


def _measured(trainer: Trainer, module: LightningModule, planned: int, measure: Measure) -> None:
    with ExitStack() as stack:
        apart, tick = on_every_rank(
            trainer,
            "to copy module and data",
            lambda: (stack.enter_context(no_trace(trainer, module)), stack.enter_context(_progress(trainer, planned))),
        )
        measure(apart, planned, tick)


@contextmanager
def _progress(trainer: Trainer, batches: int) -> Generator[Callable[[], Any], None, None]:
    """A bar under Lightning's own while it lasts, to be moved by calling what it gives.

    It is the bar of the trainer's ``TQDMProgressBar``, so it is silent, and looks, as that one. Another kind of progress
    bar, which owns the whole display, prints one line. Without a progress bar there is nothing.
    """
    display: Any = trainer.progress_bar_callback
    if not is_a(display, "TQDMProgressBar"):
        if display is not None and trainer.is_global_zero:
            display.print(f"Calibration: a probe of {batches} batches")
        yield lambda: None
        return
    bar = display.init_validation_tqdm()  # at its place below the bar of training, and gone when it is closed
    try:
        bar.set_description("Calibration", refresh=False)
        bar.reset(batches)
        yield bar.update
    finally:
        bar.close()


def _why_impossible(trainer: Trainer, module: LightningModule) -> str | None:
    if not module.automatic_optimization:
        return (
            "under manual optimization training_step would step the optimizer, so it cannot be tried at frozen weights"
        )
    if any(is_lazy(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return "the model has lazy parameters; let it see a batch before training"
    if cuts_weights_up(trainer):
        return (
            "ZeRO in stage 3 gathers weights in DeepSpeed's own passes, which a probe cannot make without a trace; use stage 2,"
            " or calibrate the rate from a record, reference='.../calibration.json'"
        )
    if is_deepspeed(trainer) and trainer.accumulate_grad_batches > 1:
        return (
            "Lightning and DeepSpeed both divide accumulated gradients, which a probe does not see; do not accumulate, or"
            " calibrate the rate from a record, reference='.../calibration.json'"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        return "training_step takes the loader's iterator itself"
    return _why_not_sharded(trainer, module) if averages_in_backward(trainer) else None


def _why_not_sharded(trainer: Trainer, module: LightningModule) -> str | None:
    trained = {name: p for name, p in named_parameters(module).items() if p.requires_grad}
    if replicas(trainer) is None:
        return "the model is sharded over some of the ranks, and nobody knows whether the others hold the same"
    whole = [name for name, p in trained.items() if not (isinstance(p, DTensor) or is_of_fsdp(p))]
    if whole and (trainer.distributed_sampler_kwargs or {}).get("num_replicas", trainer.world_size) > 1:
        return (
            f"parameter {whole[0]!r} is not sharded, and how the ranks' gradients of it are put together only the module"
            " knows; shard it too: fully_shard(module)"
        )
    flat = [name for name, p in trained.items() if is_flat(p)]
    if flat:
        return f"parameter {flat[0]!r} is several layers in one; use FSDPStrategy(use_orig_params=True), which is the default"
    # FSDP2 runs hooks in the backward pass that the probe needs.
    hooked = [name for name, p in trained.items() if has_gradient_hook(p)]
    if hooked:
        return f"parameter {hooked[0]!r} is sharded and has a hook, which the probe's backward pass would run"
    return None
