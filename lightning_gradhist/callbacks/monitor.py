"""The monitor: gradient-magnitude histograms, and the noise scale of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.gradients import (
    Replicas,
    effective_batch_size,
    optimizer_parameters,
    ready_gradients,
    replicas,
)
from lightning_gradhist.callbacks.handoff import base_rate
from lightning_gradhist.histogram import MagnitudeHistogram, slice_of
from lightning_gradhist.noise import METRICS, NoiseRecord, adam_weight, measure_pair
from lightning_gradhist.report import plots
from lightning_gradhist.report.loggers import Sink, log_magnitudes, sinks
from lightning_gradhist.report.record import FILE_NAME, OptimizerRecord, RunRecord


class GradientHistogramMonitor(Callback):
    r"""Logs histograms of the gradient magnitudes of every layer, and records the noise scale of the run.

    What is counted is the gradient that the optimizer will use, once per optimizer step that is logged: accumulated over
    micro-batches, averaged over ranks, unscaled under 16-mixed, before clipping. Under DDP every rank counts its own part
    of it, and one all-reduce of the bins for all layers together gives the whole. Steps ``0, every_n_steps, ...`` are
    logged; in between nothing is computed.

    TensorBoard gets, on rank zero, ``gradient_magnitude/<parameter>`` and ``gradient_magnitude/all`` with
    :math:`\log_{10}|g|` on the horizontal axis, the scalars that
    :func:`lightning_gradhist.report.loggers.log_magnitudes` lists, and with matplotlib a heatmap of layers by
    magnitude, ``gradient_magnitude_by_layer``, at the 1st, 2nd, 4th, 8th, ... logged step and at the end. Other loggers
    get the scalars.

    From each logged step and the one after it, the noise scale is measured (see
    :class:`lightning_gradhist.noise.NoiseRecord`): ``B_simple``, and ``B_adam`` once the optimizer has a second moment.
    It is kept in the checkpoint, and in ``calibration.json`` in the log directory, which
    ``OptimizerCalibration(reference=...)`` reads. That holds one copy of the gradients and one of the second moment
    from a logged step to the next.

    Works with one device and DDP, automatic and manual optimization, and several optimizers, which are told apart by
    their parameters. With other strategies it warns and stays off.

    Args:
        every_n_steps: optimizer steps from one logged step to the next, at least 1.
        bins_per_octave: bins per power of two of the magnitude, a power of two from 1 to 128.
        noise_scale: whether to measure the noise scale.
        batch_size: samples of one micro-batch on one device, where the loader does not tell it.

    Raises:
        MisconfigurationException: for an argument out of its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradhist import GradientHistogramMonitor
        >>> trainer = Trainer(callbacks=[GradientHistogramMonitor(every_n_steps=100)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        bins_per_octave: int = 8,
        noise_scale: bool = True,
        batch_size: Optional[int] = None,  # noqa: UP045 - LightningCLI on Python 3.10 reads the plain types
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise MisconfigurationException(f"every_n_steps must be an integer from 1 up, got {every_n_steps!r}")
        if batch_size is not None and batch_size < 1:
            raise MisconfigurationException(f"batch_size must be a positive number of samples, got {batch_size!r}")
        try:
            MagnitudeHistogram([], bins_per_octave)
        except ValueError as error:
            raise MisconfigurationException(str(error)) from None
        self.every_n_steps = every_n_steps
        self.bins_per_octave = bins_per_octave
        self.noise_scale = noise_scale
        self.batch_size = batch_size
        self._watched: list[_Watched] = []
        self._restored: list[dict[str, Any]] = []
        self._replicas: Replicas | None = None
        self._log_dir: Path | None = None
        self._effective_batch_size: int | None = None
        self._failed = False

    @property
    def state_key(self) -> str:
        """Differs between instances with different arguments, so that several can be in one Trainer."""
        return f"{type(self).__qualname__}[every_n_steps={self.every_n_steps},bins_per_octave={self.bins_per_octave}]"

    @property
    def noise_records(self) -> list[NoiseRecord]:
        """The noise measured so far, one record an optimizer."""
        return [watched.noise for watched in self._watched]

    def state_dict(self) -> dict[str, Any]:
        """Steps seen and noise measured, an entry an optimizer."""
        if not self._watched:
            return {"optimizers": self._restored}
        return {"optimizers": [watched.state_dict() for watched in self._watched]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state up; it is given to the optimizers when training starts."""
        self._restored = list(state_dict["optimizers"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what there is to watch: strategy, loggers, batch size."""
        self._replicas = replicas(trainer)
        if self._replicas is None:
            rank_zero_warn(
                f"GradientHistogramMonitor is off: {type(trainer.strategy).__name__} does not replicate the gradient, and"
                " only one device and DDP are supported. Use strategy='ddp', or remove the callback."
            )
            return
        restored = self._restored + [{}] * (len(trainer.optimizers) - len(self._restored))
        self._watched = [_Watched(**state) for state in restored[: len(trainer.optimizers)]]
        self._log_dir = (
            None if getattr(trainer, "fast_dev_run", False) else Path(trainer.log_dir or trainer.default_root_dir)
        )
        self._effective_batch_size = effective_batch_size(trainer, self.batch_size)
        if self.noise_scale and self._effective_batch_size is None:
            rank_zero_warn(
                "GradientHistogramMonitor records no noise scale: the batch size cannot be read from the training loader."
                " Give the samples of one micro-batch on one device, GradientHistogramMonitor(batch_size=...), or turn it"
                " off with noise_scale=False."
            )
        if not trainer.loggers:
            rank_zero_warn(
                "GradientHistogramMonitor has no logger to write histograms to; use Trainer(logger=TensorBoardLogger(...))."
                + (f" The noise scale is still recorded in {self._log_dir}." if self._records else "")
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Counts, logs and measures where this step is due."""
        index = next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), None)
        if index is None or self._replicas is None or index >= len(self._watched):
            return
        watched = self._watched[index]
        logged, paired = watched.steps % self.every_n_steps == 0, watched.pending is not None
        if logged or paired:
            parameters = optimizer_parameters(pl_module, optimizer)
            gradients = ready_gradients(trainer, optimizer, parameters)
            if paired:
                watched.complete_pair(gradients)
            if logged:
                histogram = self._count(
                    gradients, {name: p.numel() for name, p in parameters.items()}, pl_module.device
                )
                if trainer.is_global_zero:
                    self._guarded(lambda: self._log(trainer, watched, histogram.cpu(), trainer.global_step))
                if self._records:
                    watched.learning_rates = [base_rate(group) for group in optimizer.param_groups]
                    watched.hold(gradients, _second_moment(optimizer, parameters), _epsilon(optimizer), self._size)
        watched.steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record."""
        self._save_record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last heatmap and writes the record."""
        for watched in self._watched:
            last = watched.last_logged
            if trainer.is_global_zero and last is not None:
                self._guarded(lambda last=last: self._draw(trainer, *last))  # type: ignore[misc]
            watched.last_logged = watched.pending = None
        self._save_record(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the record, so that an interrupted run is of use."""
        self._save_record(trainer, pl_module)

    @property
    def _records(self) -> bool:
        return self.noise_scale and self._effective_batch_size is not None

    @property
    def _size(self) -> int:
        assert self._effective_batch_size is not None
        return self._effective_batch_size

    def _count(
        self, gradients: Mapping[str, Tensor], sizes: Mapping[str, int], device: torch.device
    ) -> MagnitudeHistogram:
        assert self._replicas is not None
        histogram = MagnitudeHistogram(list(sizes), self.bins_per_octave).to(device)
        dense = {name: g.to_dense() if g.layout != torch.strided else g for name, g in gradients.items()}
        histogram.update(dict(slice_of(dense, sizes, self._replicas.rank, self._replicas.ranks)))
        histogram.sync()
        return histogram

    def _log(self, trainer: Trainer, watched: _Watched, histogram: MagnitudeHistogram, step: int) -> None:
        for sink in sinks(trainer.loggers):
            log_magnitudes(sink, histogram, "gradient", step)
        watched.logged += 1
        if math.log2(watched.logged).is_integer():  # a figure costs far more than a count
            self._draw(trainer, histogram, step)
            watched.last_logged = None
        else:
            watched.last_logged = (histogram, step)

    def _draw(self, trainer: Trainer, histogram: MagnitudeHistogram, step: int) -> None:
        outlets: list[Sink] = sinks(trainer.loggers)
        if outlets and plots.available() and histogram.counts.any():
            figure = plots.magnitude_heatmap(histogram, f"gradient magnitudes by layer, step {step}")
            for sink in outlets:
                sink.figure("gradient_magnitude_by_layer", figure, step)

    def _save_record(self, trainer: Trainer, module: LightningModule) -> None:
        if self._log_dir is None or not self._records or not trainer.is_global_zero:
            return
        entries = [
            watched.record(type(optimizer).__name__, self._size)
            for watched, optimizer in zip(self._watched, trainer.optimizers, strict=True)
        ]
        if any(entry.samples for entry in entries):
            record = RunRecord(model_shapes(module), trainer.global_step, entries)
            path = self._log_dir / FILE_NAME
            self._guarded(lambda: record.save(path))

    def _guarded(self, log: Callable[[], None]) -> None:
        # Monitoring never stops training: a full disk or a broken logger costs one warning.
        try:
            log()
        except Exception as error:
            if not self._failed:
                rank_zero_warn(f"GradientHistogramMonitor could not log, training goes on: {error!r}")
            self._failed = True


class _Watched:
    """What the monitor keeps of one optimizer."""

    def __init__(
        self,
        steps: int = 0,
        logged: int = 0,
        samples: list[dict[str, Any]] | None = None,
        learning_rates: list[float] | None = None,
    ) -> None:
        self.steps = steps
        self.logged = logged
        self.noise = NoiseRecord(samples or [])
        self.learning_rates = learning_rates or []
        self.last_logged: tuple[MagnitudeHistogram, int] | None = None
        self.pending: tuple[int, int, dict[str, Tensor], dict[str, Tensor] | None] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "logged": self.logged,
            "samples": [dict(sample) for sample in self.noise.samples],
            "learning_rates": list(self.learning_rates),
        }

    def hold(
        self,
        gradients: Mapping[str, Tensor],
        second_moment: Mapping[str, Tensor] | None,
        eps: float,
        batch_size: int,
    ) -> None:
        """Keeps this step's gradient for the next one, with the metric of before, which depends on neither."""
        weights = None
        if second_moment is not None:
            weights = {name: adam_weight(v.float(), eps) for name, v in second_moment.items()}
        self.pending = (self.steps, batch_size, {name: g.clone() for name, g in gradients.items()}, weights)

    def complete_pair(self, gradients: Mapping[str, Tensor]) -> None:
        assert self.pending is not None
        step, batch_size, first, weights = self.pending
        self.noise.add(step, batch_size, measure_pair(first, gradients, weights))
        self.pending = None

    def record(self, name: str, batch_size: int) -> OptimizerRecord:
        noise = {metric: self.noise.estimate(metric) for metric in METRICS}
        return OptimizerRecord(name, self.learning_rates, batch_size, noise, list(self.noise.samples))


def model_shapes(module: LightningModule) -> dict[str, list[int]]:
    """Names and shapes of the parameters that are trained, by which a record knows its model."""
    return {name: list(p.shape) for name, p in module.named_parameters() if p.requires_grad}


def _epsilon(optimizer: Optimizer) -> float:
    eps = optimizer.param_groups[0].get("eps", 0.0)
    return eps if isinstance(eps, float) else 0.0


def _second_moment(optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Adam's bias-corrected second moment by name, or None for an optimizer that has none, or none yet."""
    decay = {id(p): group["betas"][1] for group in optimizer.param_groups if "betas" in group for p in group["params"]}
    moments = {}
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" in state and id(parameter) in decay:
            correction = 1 - torch.as_tensor(decay[id(parameter)]) ** torch.as_tensor(state["step"])
            moments[name] = state["exp_avg_sq"] / correction.to(state["exp_avg_sq"].device)
    return moments or None
