"""The monitor: gradient-magnitude histograms, and the noise scale of a run."""

from __future__ import annotations

import math
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Optional, Union, get_args

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradhist.callbacks._deepspeed import ends_accumulation, unwrapped
from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.batch_size import SampleCount
from lightning_gradhist.callbacks.known_optimizers import why_without_layers
from lightning_gradhist.callbacks.monitor import messages
from lightning_gradhist.callbacks.monitor.checkpoint import Progress, likeness
from lightning_gradhist.callbacks.monitor.fit import Fit
from lightning_gradhist.callbacks.monitor.magnitudes import MagnitudeMonitor, When, check_when
from lightning_gradhist.callbacks.monitor.noise import NoiseMonitor
from lightning_gradhist.callbacks.monitor.observer import StepObserver, WatchedOptimizer
from lightning_gradhist.callbacks.monitor.optimizer_monitor import OptimizerMonitor, has_step_hooks
from lightning_gradhist.callbacks.monitor.record_file import TASK, RecordFile, record_directory
from lightning_gradhist.callbacks.monitor.rows import Rows, distinct_rows
from lightning_gradhist.callbacks.monitor.updates import UpdateMonitor
from lightning_gradhist.callbacks.parameters import model_shapes
from lightning_gradhist.callbacks.run_length import own_schedule, run_length
from lightning_gradhist.callbacks.strategies import replicas
from lightning_gradhist.explore import is_number
from lightning_gradhist.logging.writer import LoggerQueues
from lightning_gradhist.noise import NoiseRecord


class GradientHistogramMonitor(Callback):
    r"""Logs histograms of the gradient magnitudes of every layer, and records the noise scale of the run.

    What is counted is the gradient that the optimizer will use, once per optimizer step that is logged: accumulated over
    micro-batches, averaged over ranks, unscaled under 16-mixed, before clipping. Every rank counts its own part, and one
    all-reduce of all layers' bins gives the whole. Steps ``0, every_n_steps, ...`` are logged, all other steps cost
    nothing. What fails in it, or in a logger, costs one warning and not the run.

    Args:
        every_n_steps: optimizer steps from one logged step to the next, from 1 up.
        group_by: what shares a histogram, a row. None: every parameter has its own. A number ``n``: the parameters below
            the same ``n`` first parts of the module path. A regular expression: those whose names it finds the same
            first group in, or has the same match in where it has no group. A function: those for whose names it returns
            the same. A parameter for which this gives nothing has its own.
        include: regular expression; only parameters are counted in whose names it is found, or of whose layer it
            matches the class name in whole, or that of a base: ``"Linear"``, ``"Conv.d"``, ``"encoder"``.
        exclude: likewise, what is not counted: ``".*Norm.*|bias"``. Noise is measured of all parameters regardless.
        when: ``"before_clip"``; ``"after_clip"`` for what the optimizer really uses; ``"local"`` for what each rank computed
            itself, before DDP averages it, summed over micro-batches (a logged step then holds a copy of the gradients).
        optimizer_state: whether to log the optimizer's update and second moment as well. A logged step then costs one
            more all-reduce, and memory for a copy of this rank's part of the weights and of the second moment.
        noise_scale: whether to measure the noise scale. It takes the loss for a mean over samples that are independent: it is
            wrong for sums over batches of several sizes, for mixup and contrastive losses, and for outputs that are
            normalised over the batch by hand.
        batch_size: samples of one micro-batch on one device where the loader does not tell it; of one optimizer step on
            one device under manual optimization.
        name: tells this monitor from another one in the same Trainer that counts the same rows ``when`` this one does, or
            groups by a ``lambda``, too. It goes into :attr:`state_key`, by which a checkpoint knows the monitor.

    Raises:
        MisconfigurationException: for an argument out of its range, and at the start of training for a filter that
            matches nothing, for a ``group_by`` that differs between ranks, and for ``when="local"`` where no rank has a
            gradient of its own (ModelParallelStrategy, FSDP, DeepSpeed), or ``"after_clip"`` under DeepSpeed.

    What is logged, on rank zero:

    - ``gradient_magnitude/<row>``: histogram with :math:`\log_{10}|g|` on the horizontal axis, and
      ``gradient_magnitude/all``.
    - ``gradient_norm/<row>``: of the finite values, NaN where there is none. It is made of the histogram: right to a few
      percent where a row has few values, or all about as large, and else far better.
    - ``gradient_zero_share``, ``gradient_nonfinite_share``, ``gradient_fp16_loss_share`` ``/all``, and ``/<row>`` where it is
      0.1% or more: values that are zero, not finite, or lost in float16. ``gradient_median/all`` and the losses in float8: see
      :func:`lightning_gradhist.logging.magnitude_report.magnitude_report`.
    - ``gradient_clip_factor``: what all gradients are multiplied by, where the Trainer clips by norm, not the
      module in a ``configure_gradient_clipping`` of its own, and no row is left out; as near as ``gradient_norm/all``.
    - ``noise_scale/adam``, ``noise_scale/simple``: over the run so far, in samples, with ``_lower`` and ``_upper``, the ends
      of their intervals (a chart on the custom scalars page), beside ``noise_scale/batch_size`` and
      ``noise_scale/critical_batch_size``; eight times until there are twice as many logged steps.
    - ``gradient_worst_layers``, a table, and ``gradient_magnitude_by_layer``, a heatmap (with matplotlib): at the 4th,
      16th, 64th, ... logged step and at the end.
    - ``gradient_skipped_steps``: steps that the loss scaler of 16-mixed has skipped. They are not logged otherwise.
    - ``optimizer_update_ratio/<row>`` (``optimizer_state``): the norm of the step's change of the weights over their norm.
    - ``optimizer_second_moment/<row>`` (``optimizer_state``): histogram of :math:`\sqrt{\hat v}` after the step; with it
      ``optimizer_second_moment_by_layer``, a heatmap with the epsilon in force.
    - ``optimizer_damped_share/<row>`` (``optimizer_state``): share of weights with :math:`\sqrt{\hat v} < \epsilon`, but
      for those whose every gradient was zero. More than 10% of a row costs one warning a run. SGD, Adagrad and others
      without Adam's second moment have the ratio alone.

    With ``when="after_clip"`` names begin with ``gradient_clipped``, with ``"local"`` with ``gradient_local``. With several
    optimizers, names of what is over all rows, and of rows that two of them have, end in the optimizer's index. TensorBoard
    and W&B get all of it; MLflow and Comet quantiles in place of histograms; other loggers scalars and quantiles
    (:func:`lightning_gradhist.logging.sinks.register_sink` takes further ones). Reports are made in a thread for each logger
    that allows it. For a logger that is behind by four logged steps training waits up to 10 seconds, then leaves out, with
    a warning, what it has no time for; the end of ``fit`` waits for it at most 30 seconds.

    The noise scale (:class:`lightning_gradhist.noise.NoiseRecord`) goes into the checkpoint and into ``calibration.json`` in
    the log directory, which ``OptimizerCalibration(reference=...)`` reads; some ten logged steps make it of use. It is
    ``calibration-1.json``, ... where another run has left one there; a resumed run goes on with its own. Under DDP
    or accumulation it is measured, without bias, from the gradients of a step's first micro-batch on each rank against
    those of the whole step; else, without bias, from the two halves of a batch of 16 or more, where layers that are known hold
    half of the parameters: linear, convolutions without groups, layer norms, and embeddings with them, not compiled and not
    checkpointed, with batch norm from 64 samples on; else from a logged step and the next, which overstates it where steps
    overshoot. It is measured of 262,144 values of each rank's gradients, others at each step, or of all where there are no
    more: these are copied. A step with fewer samples than others, or whose gradients a hook has changed, is not measured;
    nor where ranks or workers have the same samples, nor under PowerSGD or a communication hook of your own. The record also
    has the steps that the run was to make, and the warm-up and the shape of a schedule of torch's, of which a copy is stepped
    through the run before it begins.

    Works with one device, DDP, FSDP, ModelParallelStrategy (FSDP2, tensor parallelism) and DeepSpeed's ZeRO in stages 1, 2
    and 3, automatic and manual optimization, and several optimizers. With other strategies it warns and stays off. Under
    manual optimization the step begins where the module calls ``optimizer.step()``: ``"before_clip"`` counts after
    ``clip_gradients``, and noise is not measured where it or something else has changed what ``manual_backward`` left.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradhist import GradientHistogramMonitor
        >>> trainer = Trainer(callbacks=[GradientHistogramMonitor(every_n_steps=100)], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        group_by: Union[int, str, Callable[[str], Optional[str]], None] = None,  # noqa: UP007, UP045 - for LightningCLI on 3.10
        include: Optional[str] = None,  # noqa: UP045
        exclude: Optional[str] = None,  # noqa: UP045
        when: When = "before_clip",
        optimizer_state: bool = False,
        noise_scale: bool = True,
        batch_size: Optional[int] = None,  # noqa: UP045
        name: Optional[str] = None,  # noqa: UP045
    ) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise MisconfigurationException(f"every_n_steps must be an integer from 1 up, got {every_n_steps!r}")
        if batch_size is not None and not (is_number(batch_size) and 1 <= batch_size < math.inf):
            raise MisconfigurationException(f"batch_size must be a positive number of samples, got {batch_size!r}")
        if when not in get_args(When):
            raise MisconfigurationException(f"when must be one of {get_args(When)}, got {when!r}")
        self.every_n_steps, self.when = every_n_steps, when
        self.group_by, self.include, self.exclude = group_by, include, exclude
        self.optimizer_state, self.noise_scale = optimizer_state, noise_scale
        self.batch_size, self.name = batch_size, name
        self._rows = Rows(group_by, include, exclude)
        self._progress: list[Progress] = []
        self._restored: list[dict[str, Any]] = []
        self._run = ""  # what tells it from other runs; empty in checkpoints of older releases
        self._records_in: str | None = None  # a directory, the same on every rank; None where nothing is recorded
        self._model: dict[str, list[int] | None] = {}  # that the run began with
        self._module: weakref.ref[LightningModule] | None = None  # of the last fit
        self._fit: Fit | None = None  # while it is on
        self._optimizers: list[OptimizerMonitor] = []
        self._record: RecordFile | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and threads stay in this process.
        return {**self.__dict__, "_module": None, "_fit": None, "_optimizers": [], "_record": None}

    @property
    def state_key(self) -> str:
        """Differs between instances that count other rows, at another moment or under another :attr:`name`."""
        group_by = self.group_by
        if callable(group_by):  # whose repr has an address in memory, another one in every process
            group_by = getattr(group_by, "__qualname__", type(group_by).__qualname__)
        values = {"group_by": group_by, "include": self.include, "exclude": self.exclude, "when": self.when}
        if self.name is not None:
            values["name"] = self.name
        return f"{type(self).__qualname__}[{','.join(f'{name}={value!r}' for name, value in values.items())}]"

    @property
    def noise_records(self) -> list[NoiseRecord]:
        """The noise measured so far, one record an optimizer; under ``ddp_spawn`` and ``ddp_fork`` only the ranks have it."""
        return [progress.noise for progress in self._progress]

    def state_dict(self) -> dict[str, Any]:
        """Steps seen and skipped, and noise measured, an entry an optimizer."""
        return {"optimizers": self._restored or [one.state_dict() for one in self._progress], "run": self._run}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes up the state of the monitor most like this one, where its arguments, and so its key, were others."""
        states = checkpoint.get("callbacks", {})
        present = {one.state_key for one in _monitors(trainer)}
        others = [key for key in states if str(key).startswith(f"{type(self).__qualname__}[") and key not in present]
        if self.state_key not in states and others:
            self.load_state_dict(states[max(others, key=partial(likeness, self.state_key))])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state up; it is given to the optimizers when training goes on, also in the middle of a run."""
        try:
            states = list(state_dict["optimizers"])
            self._restored = [Progress.from_state_dict(state).state_dict() for state in states]
            self._run = str(state_dict.get("run", ""))
        except Exception as error:  # whatever it is, it must not stop the run
            self._restored, self._progress = [], []
            rank_zero_warn(
                f"GradientHistogramMonitor cannot read its state in the checkpoint, and begins anew: {error!r}. The noise that"
                " was measured before is missing in this run's record."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what there is to watch: strategy, loggers, batch size."""
        self._fit = self._record = None
        spread = replicas(trainer)
        if spread is None:
            self._turn_off(messages.unknown_strategy(type(trainer.strategy).__name__))
            return
        without_layers = why_without_layers(trainer)
        if without_layers is not None:
            rank_zero_warn(f"GradientHistogramMonitor: {without_layers}.")
        check_when(self.when, trainer)
        self._rows.check_start(trainer, pl_module)
        fit = Fit.start(trainer, pl_module, spread, SampleCount(self.batch_size))
        if fit is None:
            self._turn_off(messages.NO_MEMORY)
            return
        self._fit = fit
        self._measures_noise = self._may_measure_noise(trainer)
        is_same_model = self._module is not None and self._module() is pl_module
        self._module = weakref.ref(pl_module)
        goes_on = trainer.global_step > 0 and (self._restored or is_same_model)
        if not goes_on or not self._run:
            self._run = uuid.uuid4().hex
        self._records_in = self._directory_of_record(fit)
        if not (goes_on and is_same_model):
            self._model = {}
            with fit.guard.attempt(TASK):
                self._model = model_shapes(trainer)
        if self._records_in is not None and trainer.is_global_zero:
            self._record = RecordFile(self._records_in, self._run, fit.guard, self._model)
        self._watch(fit, self.state_dict()["optimizers"] if goes_on else [])

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Goes on where a checkpoint was restored, as ``LearningRateFinder`` does, or optimizers were made, in mid-run."""
        if self._fit is None:
            return
        if self._measures_noise:
            self._fit.samples.start_batch(trainer, batch, batch_idx)
        messages.tell_of_lacks(self._fit, self.noise_scale, self._records_in)
        measured, self._measures_noise = self._measures_noise, self._may_measure_noise(trainer)
        known = [each.watched.optimizer for each in self._optimizers]
        if self._restored or measured != self._measures_noise or known != trainer.optimizers:
            before = [one.logged_before for one in self._progress]
            self._watch(self._fit, self.state_dict()["optimizers"])
            for one, logged in zip(self._progress, before, strict=False):
                one.logged_before = logged  # the fit is the same
        for observer in self._observers:
            observer.before_forward(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Counts and measures where this step is due."""
        if self._fit is None or not ends_accumulation(trainer):
            return
        for each in self._optimizers:
            if each.watched.optimizer is optimizer:
                each.before_step()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Begins a micro-batch."""
        for observer in self._observers:
            observer.before_backward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends a micro-batch."""
        for observer in self._observers:
            observer.after_backward()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notices steps that the loss scaler skipped."""
        for each in self._optimizers:
            each.settle()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record, where there is something new in it, and says which optimizers' steps are not seen."""
        for each in self._optimizers:
            each.warn_if_unseen()
        if self._record is not None and self._record.lacks(self._progress):
            self._save_record()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last heatmap, writes the record, and waits for what is still to be written."""
        for observer in self._observers:
            observer.finish()
        fit = self._fit
        if fit is not None and self._measures_noise and fit.samples.problem is None and self._records_in is not None:
            messages.tell_at_end(self._progress, self.every_n_steps)
        self._finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the record, so that an interrupted run is of use, and waits for what is still to be written."""
        self._finish()

    def _may_measure_noise(self, trainer: Trainer) -> bool:
        return self.noise_scale and messages.why_no_noise(trainer) is None

    def _directory_of_record(self, fit: Fit) -> str | None:
        """Where the record goes, the same on every rank; None for runs that leave nothing."""
        trainer, path = fit.trainer, ""
        # Of several monitors the first that measures noise.
        writes = self is min(_monitors(trainer), key=lambda one: not one.noise_scale, default=self)
        if getattr(trainer, "fast_dev_run", False) or trainer.barebones or not writes:
            return None
        if trainer.is_global_zero:
            with fit.guard.attempt("find the logger's directory"):
                path = record_directory(trainer)
        return trainer.strategy.broadcast(path) or None

    def _watch(self, fit: Fit, states: Sequence[dict[str, Any]]) -> None:
        """Watches the optimizers that there are now from these states on, or from their first step."""
        self._release()
        self._restored = []
        optimizers = list(fit.trainer.optimizers)
        if not any(optimizer.param_groups for optimizer in optimizers):
            self._turn_off(messages.NO_OPTIMIZER)
            return
        hookless = [optimizer for optimizer in map(unwrapped, optimizers) if not has_step_hooks(optimizer)]
        if hookless:
            self._turn_off(messages.no_step_hooks(type(hookless[0]).__name__))
            return
        self._progress = [Progress.from_state_dict(state) for state in states[: len(optimizers)]]
        seen = fit.trainer.global_step if len(optimizers) == 1 else 0  # so that a resumed run logs the same steps
        self._progress += [Progress(seen) for _ in range(len(optimizers) - len(self._progress))]
        for index, (optimizer, progress) in enumerate(zip(optimizers, self._progress, strict=True)):
            with fit.guard.attempt("tell the length of the run"):
                progress.length = run_length(fit.trainer, optimizer, progress.length)
                is_decided = len(progress.noise) > 0  # by the steps that were measured
                progress.tells_rates = (
                    bool(progress.learning_rates) if is_decided else own_schedule(fit.trainer, optimizer) is None
                )
            suffix = f"_{index}" if len(optimizers) > 1 else ""
            watched = WatchedOptimizer(fit, optimizer, suffix, partial(self._rows_of, fit.module, index))
            observers = self._observers_of(watched, progress)
            self._optimizers.append(OptimizerMonitor(watched, progress, self.every_n_steps, observers))

    def _rows_of(self, module: LightningModule, index: int) -> dict[str, str]:
        """The row of each parameter of an optimizer that is counted."""
        return distinct_rows([self._rows.of(module, each.watched.parameters) for each in self._optimizers], index)

    @property
    def _observers(self) -> list[StepObserver]:
        return [observer for each in self._optimizers for observer in each.observers]

    def _observers_of(self, watched: WatchedOptimizer, progress: Progress) -> list[StepObserver]:
        noise = [NoiseMonitor(watched, progress)] if self._measures_noise else []
        updates = [UpdateMonitor(watched)] if self.optimizer_state else []
        return [*noise, MagnitudeMonitor(watched, progress, self.when, self._save_record), *updates]

    def _save_record(self) -> None:
        if self._record is not None and self._fit is not None:
            self._record.save(self._fit.trainer, [each.watched for each in self._optimizers], self._progress)

    def _finish(self) -> None:
        self._save_record()
        fit, record = self._fit, self._record
        self._fit = self._record = None
        self._release()
        end = time.monotonic() + LoggerQueues.patience  # for both together
        if record is not None:
            record.close(LoggerQueues.patience)
        if fit is not None:
            fit.close(max(0.0, end - time.monotonic()))
        if fit is not None and record is not None and record.saved and record.path is not None:
            with fit.guard.attempt("say what was recorded"):
                messages.tell_of_record(self.noise_records, record.path)

    def _release(self) -> None:
        for each in self._optimizers:
            each.close()
        self._optimizers = []

    def _turn_off(self, reason: str) -> None:
        if self._record is not None:
            self._record.close(LoggerQueues.patience)
        self._fit = self._record = self._records_in = None
        rank_zero_warn(f"GradientHistogramMonitor is off: {reason}")


def _monitors(trainer: Trainer) -> list[GradientHistogramMonitor]:
    return [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, GradientHistogramMonitor)]
