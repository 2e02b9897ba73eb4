"""The learning rate of a run after the noise scale of the run."""

from __future__ import annotations

from dataclasses import replace

from lightning_gradhist.adapt import ADAPT, AdaptedRatio
from lightning_gradhist.callbacks._lightning import MisconfigurationException, Trainer, rank_zero_warn
from lightning_gradhist.callbacks.handoff import apply_changes, base_rate
from lightning_gradhist.callbacks.monitor import GradientHistogramMonitor
from lightning_gradhist.callbacks.scaling import decay_changes
from lightning_gradhist.report.loggers import sinks
from lightning_gradhist.report.result import GroupChange
from lightning_gradhist.surge import NOISE_LAWS

FACTOR = "calibration/adapted_factor"


def check_adapt(adapt: str | None, law: str, has_reference: bool) -> None:
    """Raises a MisconfigurationException where there is nothing that the rate could follow."""
    if adapt is None:
        return
    if adapt not in ADAPT:
        raise MisconfigurationException(f"adapt must be None or one of {ADAPT}, got {adapt!r}")
    if law not in NOISE_LAWS:
        raise MisconfigurationException(
            f"adapt={adapt!r} follows the noise scale, which learning_rate={law!r} does not take; pass one of {NOISE_LAWS}, or"
            " adapt=None"
        )
    if not has_reference:
        raise MisconfigurationException(
            f"adapt={adapt!r} needs the batch size at which the rate is trusted; pass reference_batch_size=... or"
            " reference='.../calibration.json'"
        )


def noise_monitor(trainer: Trainer) -> GradientHistogramMonitor:
    """The callback of a Trainer that measures the noise scale.

    Raises:
        MisconfigurationException: where there is none.
    """
    callbacks = getattr(trainer, "callbacks", [])
    monitors = [callback for callback in callbacks if isinstance(callback, GradientHistogramMonitor)]
    if not monitors:
        raise MisconfigurationException(
            "adapt follows the noise scale that GradientHistogramMonitor measures, and this Trainer has none; add"
            " GradientHistogramMonitor() to its callbacks, or leave adapt out"
        )
    for monitor in monitors:
        if monitor.noise_scale:
            return monitor
    raise MisconfigurationException(
        "adapt follows the noise scale, and GradientHistogramMonitor(noise_scale=False) measures none; leave noise_scale"
        " out, or adapt"
    )


class RateAdapter:
    """Moves the learning rate of one fit at each new measurement of the noise scale.

    Args:
        ratio: which the rate has now.
        confidence: of the interval of the noise scale.
        with_decay: whether to keep the product of rate and decoupled weight decay as it is.
    """

    def __init__(self, ratio: AdaptedRatio, confidence: float, with_decay: bool) -> None:
        self.ratio = ratio
        self.confidence = confidence
        self.with_decay = with_decay
        self._seen: int | None = None

    def follow(self, trainer: Trainer) -> None:
        """Looks whether there is a new measurement, and moves; to be called on every rank."""
        monitor = noise_monitor(trainer)
        if self._seen is None and not monitor.measures_noise:
            rank_zero_warn(
                "OptimizerCalibration: adapt moves nothing, as GradientHistogramMonitor measures no noise scale in this run;"
                " its own warning says why."
            )
        seen, self._seen = self._seen or 0, sum(monitor.noise_measured)
        if self._seen > seen and not self.ratio.arrived:
            value = self.ratio.value
            if trainer.is_global_zero:  # a rank without memory for a measurement has not recorded it
                value = self.ratio.after(monitor.noise_records[0].recent(confidence=self.confidence))
            self._move(trainer, trainer.strategy.broadcast(value))

    def _move(self, trainer: Trainer, value: float) -> None:
        change = value / self.ratio.value
        self.ratio = replace(self.ratio, value=value)
        if change == 1.0:
            return
        optimizer = trainer.optimizers[0]
        rates = [(index, base_rate(group)) for index, group in enumerate(optimizer.param_groups)]
        changes = [GroupChange(index, "lr", rate, rate * change) for index, rate in rates if rate > 0]
        changes += decay_changes(optimizer, change) if self.with_decay else []
        apply_changes(optimizer, [config.scheduler for config in trainer.lr_scheduler_configs], changes)
        if trainer.is_global_zero:
            _log(trainer, value)


def _log(trainer: Trainer, value: float) -> None:
    try:
        for sink in sinks(trainer.loggers):
            sink.scalars({FACTOR: value}, trainer.global_step)
    except Exception as error:  # the rate is set; a logger must not undo that
        rank_zero_warn(f"OptimizerCalibration could not log {FACTOR}, training goes on: {error!r}")
