"""What the monitor says at the start of training and at its end."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradhist.callbacks._lightning import Trainer, rank_zero_info, rank_zero_warn
from lightning_gradhist.callbacks.batch_size import taken_as
from lightning_gradhist.callbacks.monitor.checkpoint import Progress
from lightning_gradhist.callbacks.monitor.fit import Fit
from lightning_gradhist.callbacks.strategies import changing_hook
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.interval import ENOUGH

NO_OPTIMIZER = "configure_optimizers returned no optimizer, whose steps it would look at; return yours there."
NO_MEMORY = "a rank has no memory for the 4 MiB that it takes; have the model or the batch take less."


def unknown_strategy(name: str) -> str:
    """Why it is off under a strategy, and the way out."""
    return (
        f"it does not know how {name} spreads the gradients of this model over ranks. One device, DDP, FSDP,"
        " ModelParallelStrategy where every mesh has its data dimension, and DeepSpeed's ZeRO in stages 1, 2 and 3 (not with"
        " NVMe, experts or Muon) are supported; use one of them, or remove the callback."
    )


def no_step_hooks(name: str) -> str:
    """Why it is off with a class of optimizers, and the way out."""
    return (
        f"{name} has no step hooks, as it does not call the constructor of torch.optim.Optimizer. Have it call"
        " super().__init__(), or remove the callback."
    )


def why_no_noise(trainer: Trainer) -> str | None:
    """What keeps the gradients of a run from telling its noise, or None."""
    if getattr(trainer, "overfit_batches", False):
        return "overfit_batches trains on the same few batches again, and their gradients do not tell of others"
    hook = changing_hook(trainer)
    return hook and f"the communication hook {hook} changes the gradients, which cannot be told from noise"


def tell_of_lacks(fit: Fit, wants_noise: bool, record: str | None) -> None:
    """Says once, when the first batch has come, what is not certain, or not recorded, and where nothing is logged."""
    samples = fit.samples.unconfirmed if wants_noise else None
    if samples is not None and "unconfirmed" not in fit.warned:
        fit.warned.add("unconfirmed")
        rank_zero_info(f"GradientHistogramMonitor: {taken_as(samples, 'GradientHistogramMonitor')}.")
    if "lacks" in fit.warned:
        return
    why_none = why_no_noise(fit.trainer)
    if wants_noise and why_none is not None:
        fit.warned.add("lacks")
        rank_zero_info(f"GradientHistogramMonitor records no noise scale: {why_none}.")
    elif wants_noise and fit.samples.problem is not None:
        fit.warn_once(
            "lacks",
            f"records no noise scale: {fit.samples.problem}. Give the samples of one micro-batch on one device (under manual"
            " optimization, of one step), GradientHistogramMonitor(batch_size=...), or turn it off with noise_scale=False.",
        )
    elif not fit.trainer.loggers and not fit.trainer.barebones and not getattr(fit.trainer, "fast_dev_run", False):
        fit.warn_once(
            "lacks",
            "has no logger to write histograms to; use Trainer(logger=TensorBoardLogger(...))."
            + (f" The noise scale goes into {record}, once it has been measured." if wants_noise and record else ""),
        )


def tell_of_record(records: Sequence[NoiseRecord], path: str) -> None:
    """Says at the end what was recorded, and where."""
    estimates = [(record.estimate("adam"), record) for record in records]
    estimates = [(found if math.isfinite(found.value) else one.estimate("simple"), one) for found, one in estimates]
    said = [
        f"noise scale {_samples(found.value)} samples ({_samples(found.lower)} "
        + (f"to {_samples(found.upper)}" if math.isfinite(found.upper) else "or more")
        + f") over {found.measurements:,} measurements"
        for found, _ in estimates
        if math.isfinite(found.value)
    ]
    rank_zero_info(f"GradientHistogramMonitor: {'; '.join(said) or 'no noise scale could be told'}: {path}")


def _samples(value: float) -> str:
    return f"{float(f'{value:.3g}'):,g}"


def tell_at_end(progress: Sequence[Progress], every_n_steps: int) -> None:
    """Says why the record is of no use to calibrate another run from, where it is not, and steps were logged."""
    counts = [(one.noise.estimate("simple").measurements, len(one.noise), one.repeats) for one in progress]
    measured, tried, repeats = min(counts, default=(ENOUGH, ENOUGH, 0))
    logged = min((one.logged - one.logged_before for one in progress), default=0)
    if measured >= ENOUGH or not logged:
        return
    said = (
        f"GradientHistogramMonitor measured the noise scale at {measured} of {tried} steps, and some {ENOUGH} are wanted to"
        " calibrate another run from the record of this one: "
    )
    if repeats > tried:
        rank_zero_warn(
            f"{said}epochs of 10 batches or fewer have the same samples again, and two steps on them tell of no noise. Have the"
            " loader make more batches of an epoch, with a smaller batch_size."
        )
    elif tried < ENOUGH and 4 * (tried + 1) <= logged:  # a pair takes two
        rank_zero_warn(
            f"{said}most steps that were logged were not made from one backward pass for each batch, as where training_step"
            " returns None, and with LBFGS."
        )
    elif 2 * measured >= tried:
        rarer = f"lower every_n_steps={every_n_steps}, or " if every_n_steps > 1 else ""
        rank_zero_info(f"{said}{rarer}train longer.")
    else:
        rank_zero_warn(
            f"{said}the gradients or their squares were not finite, or were changed between the backward pass and the optimizer's"
            " step; clip with Trainer(gradient_clip_val=...) or in configure_gradient_clipping. Under manual optimization noise"
            " is not measured where the module clips. Nor is it where optimizer_zero_grad leaves gradients of the step before, or"
            " where ranks or workers have the same samples: split an IterableDataset in its __iter__, by"
            " torch.distributed.get_rank() and torch.utils.data.get_worker_info(), and where a dataset draws at random, have it"
            " do so by the index."
        )
