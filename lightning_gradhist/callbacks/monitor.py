"""The monitor: gradient-magnitude histograms, and the noise scale of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.gradients import (
    Replicas,
    as_real,
    effective_batch_size,
    is_short_step,
    model_shapes,
    optimizer_parameters,
    ready_gradients,
    replicas,
)
from lightning_gradhist.callbacks.handoff import base_rate
from lightning_gradhist.histogram import MagnitudeHistogram, slice_of
from lightning_gradhist.noise import METRICS, NoiseRecord, adam_weight, measure_pair
from lightning_gradhist.report import plots
from lightning_gradhist.report.loggers import Sink
from lightning_gradhist.report.magnitudes import magnitude_report, worst_layers
from lightning_gradhist.report.record import FILE_NAME, OptimizerRecord, RunRecord
from lightning_gradhist.report.writer import HostCopy, Once, Outlets

_FEW = 3  # pairs below which there is no interval


class GradientHistogramMonitor(Callback):
    r"""Logs histograms of the gradient magnitudes of every layer, and records the noise scale of the run.

    What is counted is the gradient that the optimizer will use, once per optimizer step that is logged: accumulated over
    micro-batches, averaged over ranks, unscaled under 16-mixed, before clipping. Under DDP every rank counts its own part
    of it, and one all-reduce of the bins for all layers together gives the whole. Steps ``0, every_n_steps, ...`` are
    logged.

    TensorBoard gets, on rank zero, ``gradient_magnitude/<parameter>`` and ``gradient_magnitude/all`` with
    :math:`\log_{10}|g|` on the horizontal axis, the scalars that
    :func:`lightning_gradhist.report.magnitudes.magnitude_report` lists, and at the 1st, 2nd, 4th, 8th, ... logged step and
    at the end a table of the worst layers, ``gradient_worst_layers``, and with matplotlib a heatmap of layers by magnitude,
    ``gradient_magnitude_by_layer``. With several optimizers the names of what is over all layers end in the optimizer's
    index. W&B gets the same; MLflow and Comet get quantiles in place of the histograms, and all other loggers get
    scalars and quantiles; :func:`lightning_gradhist.report.loggers.register_sink` takes further ones.

    Reports are made and written in a thread for each logger that allows it (TensorBoard, W&B, MLflow), and are written
    when ``fit`` ends, also by an exception. What a logger raises costs one warning. For one that is behind by four logged
    steps training waits up to 10 seconds, and then leaves out, with a warning, what it has no time for; the end of
    ``fit`` waits for it at most 30 seconds.

    From a logged step and the one after it, the noise scale is measured (see
    :class:`lightning_gradhist.noise.NoiseRecord`): ``B_simple``, and ``B_adam`` once the optimizer has a second moment.
    It is kept in the checkpoint, and in ``calibration.json`` in the log directory, which
    ``OptimizerCalibration(reference=...)`` reads; a record is of use from some ten logged steps on. From a logged step to
    the next this holds one copy of the gradients and one of the second moment; all other steps cost nothing. A step with
    fewer samples than the others, as the last of an epoch may have, is not measured.

    Works with one device and DDP, automatic and manual optimization, and several optimizers, which are told apart by
    their parameters. With other strategies it warns and stays off.

    Args:
        every_n_steps: optimizer steps from one logged step to the next, at least 1.
        bins_per_octave: bins per power of two of the magnitude, a power of two from 1 to 128.
        noise_scale: whether to measure the noise scale.
        batch_size: samples of one micro-batch on one device, where the loader does not tell it; under manual
            optimization, samples of one optimizer step on one device.

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
        self._outlets: Outlets | None = None
        self._failed = False

    @property
    def state_key(self) -> str:
        """Differs between instances with different arguments, so that several can be in one Trainer."""
        arguments = ("every_n_steps", "bins_per_octave", "noise_scale", "batch_size")
        return f"{type(self).__qualname__}[{','.join(f'{name}={getattr(self, name)}' for name in arguments)}]"

    @property
    def noise_records(self) -> list[NoiseRecord]:
        """The noise measured so far, one record an optimizer."""
        return [watched.noise for watched in self._watched]

    def state_dict(self) -> dict[str, Any]:
        """Steps seen and noise measured, an entry an optimizer."""
        return {"optimizers": [watched.state_dict() for watched in self._watched] or self._restored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state up; it is given to the optimizers when training goes on."""
        self._restored = list(state_dict["optimizers"])
        self._watched = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what there is to watch: strategy, loggers, batch size."""
        self._replicas = replicas(trainer)
        if self._replicas is None:
            rank_zero_warn(
                f"GradientHistogramMonitor is off: {type(trainer.strategy).__name__} does not replicate the gradient,"
                " and only one device and DDP are supported. Use strategy='ddp', or remove the callback."
            )
            return
        states = self.state_dict()["optimizers"] if trainer.global_step > 0 else []
        self._watched = [_Watched(**state) for state in states[: len(trainer.optimizers)]]
        self._watched += [_Watched() for _ in range(len(trainer.optimizers) - len(self._watched))]
        self._restored = []
        self._log_dir = self._directory(trainer)
        if self.noise_scale and effective_batch_size(trainer, self.batch_size) is None:
            rank_zero_warn(
                "GradientHistogramMonitor records no noise scale: the batch size cannot be read from the training loader,"
                " or not under manual optimization. Give the samples of one micro-batch on one device (under manual"
                " optimization, of one step), GradientHistogramMonitor(batch_size=...), or turn it off with"
                " noise_scale=False."
            )
        elif not trainer.loggers and not trainer.barebones:
            rank_zero_warn(
                "GradientHistogramMonitor has no logger to write histograms to; use Trainer(logger=TensorBoardLogger(...))."
                + (f" The noise scale is still recorded in {self._log_dir}." if self.noise_scale else "")
            )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Counts, logs and measures where this step is due."""
        index = next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), None)
        if index is None or self._replicas is None:
            return
        watched = self._watched[index]
        if watched.last_step == trainer.global_step:  # LBFGS evaluates a step several times
            return
        watched.last_step = trainer.global_step
        due, paired = watched.steps % self.every_n_steps == 0, watched.pending is not None
        if due or paired:
            parameters = optimizer_parameters(pl_module, optimizer)
            gradients = ready_gradients(trainer, optimizer, parameters)
            sizes = {name: as_real(p.detach()).numel() for name, p in parameters.items()}
            short = self.noise_scale and is_short_step(trainer)
            if paired:
                self._guarded(lambda: watched.complete_pair({} if short else gradients))
            if due:
                histogram = self._count(gradients, sizes, pl_module.device)
                if trainer.is_global_zero:
                    self._guarded(lambda: self._log(trainer, pl_module, index, histogram))
                if not paired and not short:  # each gradient is in one pair, so that pairs are independent
                    self._guarded(lambda: self._hold(trainer, watched, optimizer, parameters, gradients))
        watched.steps += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record."""
        self._save_record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last heatmap, writes the record, and waits for what is still to be written."""
        for index, watched in enumerate(self._watched):
            last = watched.last_logged
            if trainer.is_global_zero and last is not None:
                self._guarded(lambda i=index, last=last: self._draw(trainer, i, *last))  # type: ignore[misc]
        self._release()
        self._save_record(trainer, pl_module)
        self._guarded(self._close)
        if self.noise_scale and self._log_dir is not None and any(len(noise) < _FEW for noise in self.noise_records):
            rank_zero_info(
                f"GradientHistogramMonitor measured the noise scale at fewer than {_FEW} steps, too few to calibrate another"
                f" run from; lower every_n_steps={self.every_n_steps}."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the record, so that an interrupted run is of use, and waits for what is still to be written."""
        self._release()
        self._save_record(trainer, pl_module)
        self._guarded(self._close)

    def _directory(self, trainer: Trainer) -> Path | None:
        """Where the record goes: one place for each run, the same on every rank; None for runs that leave nothing."""
        first = next(
            other for other in getattr(trainer, "callbacks", [self]) if isinstance(other, GradientHistogramMonitor)
        )
        if getattr(trainer, "fast_dev_run", False) or trainer.barebones or first is not self:
            return None  # of several monitors the first writes the record
        return Path(trainer.strategy.broadcast(_run_directory(trainer) if trainer.is_global_zero else ""))

    def _hold(
        self,
        trainer: Trainer,
        watched: _Watched,
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor],
    ) -> None:
        batch_size = effective_batch_size(trainer, self.batch_size)
        if not self.noise_scale or batch_size is None:
            return
        rates = [base_rate(group) for group in optimizer.param_groups]
        watched.learning_rates = [max(pair) for pair in zip_longest(rates, watched.learning_rates, fillvalue=0.0)]
        watched.batch_size = batch_size
        watched.hold(gradients, _second_moment(optimizer, parameters), _epsilon(optimizer))

    def _count(
        self, gradients: Mapping[str, Tensor], sizes: Mapping[str, int], device: torch.device
    ) -> MagnitudeHistogram:
        assert self._replicas is not None
        with device:  # made there, not copied there
            histogram = MagnitudeHistogram(list(sizes), self.bins_per_octave)
        mine = slice_of(gradients, sizes, self._replicas.rank, self._replicas.ranks)
        self._guarded(lambda: histogram.update(dict(mine)))
        if self._replicas.ranks > 1:
            histogram.sync()
        return histogram

    def _log(self, trainer: Trainer, module: LightningModule, index: int, histogram: MagnitudeHistogram) -> None:
        watched, step = self._watched[index], trainer.global_step
        on_host = HostCopy(histogram)
        report = Once(lambda: magnitude_report(on_host(), "gradient", f"all{self._suffix(index)}"))
        self._send(trainer, lambda sink: sink.scalars(report().scalars, step))
        self._send(trainer, lambda sink: sink.histograms(report().histograms, step))
        watched.logged += 1
        watched.last_logged = (on_host, step)
        if math.log2(watched.logged).is_integer():  # figures and files cost far more than a count
            self._draw(trainer, index, on_host, step)
            watched.last_logged = None
            self._save_record(trainer, module)

    def _draw(self, trainer: Trainer, index: int, histogram: HostCopy, step: int) -> None:
        suffix, title = self._suffix(index), f"gradient magnitudes by layer, step {step}"
        figure = Once(lambda: plots.magnitude_heatmap(histogram(), title))

        def show(sink: Sink) -> None:
            if plots.available() and sink.shows_figures and histogram().counts.any():
                sink.figure(f"gradient_magnitude_by_layer{suffix}", figure(), step)

        self._send(trainer, lambda sink: sink.text(f"gradient_worst_layers{suffix}", worst_layers(histogram()), step))
        self._send(trainer, show)

    def _send(self, trainer: Trainer, job: Callable[[Sink], None]) -> None:
        if self._outlets is None:
            self._outlets = Outlets(trainer.loggers, lambda said: rank_zero_warn(f"GradientHistogramMonitor {said}"))
        self._outlets.send(job)

    def _close(self) -> None:
        if self._outlets is not None:
            outlets, self._outlets = self._outlets, None
            outlets.close()

    def _suffix(self, index: int) -> str:
        return f"_{index}" if len(self._watched) > 1 else ""

    def _release(self) -> None:
        for watched in self._watched:
            watched.last_logged = watched.pending = None

    def _save_record(self, trainer: Trainer, module: LightningModule) -> None:
        if self._log_dir is None or not trainer.is_global_zero or not any(map(len, self.noise_records)):
            return
        path = self._log_dir / FILE_NAME
        self._guarded(lambda: self._record(trainer, module).save(path))

    def _record(self, trainer: Trainer, module: LightningModule) -> RunRecord:
        entries = [
            watched.record(type(optimizer).__name__)
            for watched, optimizer in zip(self._watched, trainer.optimizers, strict=True)
        ]
        return RunRecord(model_shapes(module), trainer.global_step, entries)

    def _guarded(self, log: Callable[[], None]) -> None:
        # Monitoring never stops training: a full disk or a broken logger costs one warning. No collectives in here.
        try:
            log()
        except Exception as error:
            if not self._failed:
                rank_zero_warn(f"GradientHistogramMonitor could not log, training goes on: {error!r}")
            self._failed = True


def _run_directory(trainer: Trainer) -> str:
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    if getattr(logger, "log_dir", None):
        return str(logger.log_dir)
    path = Path(getattr(logger, "save_dir", None) or trainer.default_root_dir)
    return str(path if logger is None else path / str(logger.name) / str(logger.version))


class _Watched:
    """What the monitor keeps of one optimizer."""

    def __init__(
        self,
        steps: int = 0,
        logged: int = 0,
        samples: list[dict[str, Any]] | None = None,
        learning_rates: list[float] | None = None,
        batch_size: int = 0,
    ) -> None:
        self.steps = steps
        self.logged = logged
        self.noise = NoiseRecord(samples or [])
        self.learning_rates = learning_rates or []
        """The highest base rate of each group so far: what a schedule, or a warm-up by hand, rises to or falls from."""
        self.batch_size = batch_size
        self.last_step = -1
        self.last_logged: tuple[HostCopy, int] | None = None
        self.pending: tuple[int, dict[str, Tensor], dict[str, Tensor] | None] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "logged": self.logged,
            "samples": [dict(sample) for sample in self.noise.samples],
            "learning_rates": list(self.learning_rates),
            "batch_size": self.batch_size,
        }

    def hold(self, gradients: Mapping[str, Tensor], second_moment: Mapping[str, Tensor] | None, eps: float) -> None:
        """Keeps this step's gradient for the next one, with the metric of before, which depends on neither."""
        weights = None
        if second_moment is not None:
            weights = {name: adam_weight(v.float(), eps) for name, v in second_moment.items()}
        self.pending = (self.steps, {name: g.clone() for name, g in gradients.items()}, weights)

    def complete_pair(self, gradients: Mapping[str, Tensor]) -> None:
        assert self.pending is not None
        step, first, weights = self.pending
        self.pending = None
        if gradients:
            self.noise.add(step, self.batch_size, measure_pair(first, gradients, weights))

    def record(self, name: str) -> OptimizerRecord:
        noise = {metric: self.noise.estimate(metric) for metric in METRICS}
        return OptimizerRecord(name, self.learning_rates, self.batch_size, noise, list(self.noise.samples))


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
            step = state["step"]
            on_host = not isinstance(step, Tensor) or step.device.type == "cpu"
            correction = 1 - decay[id(parameter)] ** (float(step) if on_host else step)  # no waiting for the device
            moments[name] = as_real(state["exp_avg_sq"]) / correction
    return moments or None
