"""The monitor: gradient-magnitude histograms, and the noise scale of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.batch_size import effective_batch_size
from lightning_gradhist.callbacks.gradients import (
    LocalGradients,
    before_update,
    found_inf,
    loss_scaler,
    ready_gradients,
)
from lightning_gradhist.callbacks.guard import Guard
from lightning_gradhist.callbacks.monitor.noise import ComingStep, NoiseWatch
from lightning_gradhist.callbacks.monitor.optimizer_state import StateWatch
from lightning_gradhist.callbacks.monitor.record_file import RecordFile
from lightning_gradhist.callbacks.monitor.rows import Rows, told_apart
from lightning_gradhist.callbacks.monitor.watched import Step, Watched
from lightning_gradhist.callbacks.parameters import model_shapes, optimizer_parameters
from lightning_gradhist.callbacks.strategies import (
    Replicas,
    is_sharded,
    least_over_ranks,
    own_parts,
    parts_of_a_step,
    replicas,
)
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging.charts import magnitude_report, worst_layers
from lightning_gradhist.logging.sinks import Sink
from lightning_gradhist.logging.writer import NOT_COUNTED, HostCopy, Once, Outlets, send_heatmap
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.interval import ENOUGH

_MANY = 200  # rows beyond which a page of histograms is no longer read
_ARGUMENTS = ("every_n_steps", "group_by", "include", "exclude", "when", "optimizer_state", "noise_scale", "batch_size")
When = Literal["before_clip", "after_clip", "local"]


class GradientHistogramMonitor(Callback):
    r"""Logs histograms of the gradient magnitudes of every layer, and records the noise scale of the run.

    What is counted is the gradient that the optimizer will use, once per optimizer step that is logged: accumulated over
    micro-batches, averaged over ranks, unscaled under 16-mixed, before clipping. Every rank counts its own part of it,
    under DDP a slice and under FSDP2 its shard, and one all-reduce of the bins for all layers together gives the whole.
    Steps ``0, every_n_steps, ...`` are logged. A step that the loss scaler of 16-mixed skips is not; how many it skipped is
    logged as ``gradient_skipped_steps``.

    TensorBoard gets, on rank zero, ``gradient_magnitude/<parameter or group>`` and ``gradient_magnitude/all`` with
    :math:`\log_{10}|g|` on the horizontal axis, the scalars that
    :func:`lightning_gradhist.logging.charts.magnitude_report` lists, and at the 1st, 2nd, 4th, 8th, ... logged step and
    at the end a table of the worst layers, ``gradient_worst_layers``, and with matplotlib a heatmap of layers by magnitude,
    ``gradient_magnitude_by_layer``. With several optimizers the names of what is over all layers, and of rows that two
    of them have, end in the optimizer's index. W&B gets the same; MLflow and Comet get quantiles in place of the
    histograms, and all other loggers get scalars and quantiles;
    :func:`lightning_gradhist.logging.sinks.register_sink` takes further ones. All names begin with
    ``gradient_clipped`` in place of ``gradient`` if counted after clipping, and with ``gradient_local`` if before
    averaging.

    Reports are made and written in a thread for each logger that allows it (TensorBoard, W&B, MLflow), and are written
    when ``fit`` ends, also by an exception. What a logger raises costs one warning. For one that is behind by four logged
    steps training waits up to 10 seconds, and then leaves out, with a warning, what it has no time for; the end of
    ``fit`` waits for it at most 30 seconds.

    At logged steps the noise scale is measured (see :class:`lightning_gradhist.noise.NoiseRecord`), before clipping:
    ``B_simple``, and ``B_adam`` once the optimizer has a second moment. Under DDP or accumulation, with automatic
    optimization, from the gradients of the step's first micro-batch on each rank against that of the whole step, without
    bias; this holds a copy of the gradients during the step. Else from a logged step and the one after it; this holds, of
    this rank's part, one copy of the gradients and one of the second moment from the one to the other. All other steps
    cost nothing. The noise is kept in the checkpoint, and in ``calibration.json`` in the log directory, which
    ``OptimizerCalibration(reference=...)`` reads; a record is of use from some ten logged steps on. A step with fewer
    samples than the others, as the last of an epoch may have, is not measured.

    With ``optimizer_state`` a logged step also tells what the optimizer makes of the gradients, over all ranks:
    ``optimizer_update_ratio/<parameter or group>``, the norm of the step's change of the weights over their norm before
    it; the histograms ``optimizer_second_moment/<parameter or group>`` of :math:`\sqrt{\hat v}` after the step; and
    ``optimizer_damped_share/<parameter or group>``, the share of weights with :math:`\sqrt{\hat v} < \epsilon`, whose
    step is less than half of what it would be without epsilon (those whose every gradient was zero are left out). A
    heatmap of the second moment by layer, with the epsilon in force drawn in, comes with that of the gradients. Where
    epsilon damps more than 10% of a row, one warning a run says so, on the logged step after. A skipped step has none
    of this, and an optimizer without epsilon or without Adam's second moment (SGD; AMSGrad, which divides by another
    one) has the ratio alone. A logged step costs one more all-reduce, and memory for a copy of this rank's part of the
    weights and, when it is done, for a moment one of the second moment.

    Works with one device, DDP and ModelParallelStrategy (FSDP2, tensor parallelism), automatic and manual optimization,
    and several optimizers, which are told apart by their parameters. With other strategies it warns and stays off.

    Args:
        every_n_steps: optimizer steps from one logged step to the next, at least 1.
        group_by: what shares a histogram. None: every parameter has its own. A number ``n``: the parameters below the same
            ``n`` first parts of the module path, so that 1 gives one a child of the module. A regular expression: those
            whose names it finds the same first group in, or has the same match in where it has no group. A function:
            those for whose names it returns the same. A parameter for which this gives nothing has its own.
        include: regular expression; only parameters are counted in whose names it is found, or of whose layer it
            matches the class name in whole, or that of a base: ``"Linear"``, ``"Conv.d"``, ``"encoder"``.
        exclude: likewise, what is not counted: ``".*Norm.*|bias"``. Noise is measured of all parameters regardless.
        when: ``"before_clip"``, or ``"after_clip"`` for what the optimizer really uses: after ``gradient_clip_val``, or
            the module's own ``configure_gradient_clipping``. Under manual optimization the step begins where the module
            calls ``optimizer.step()``, so that ``"before_clip"`` counts, and noise is measured, after ``clip_gradients``.
            ``"local"`` for what each rank computed itself, before DDP averages it, over all ranks together; with
            accumulation it is the sum over the step's micro-batches. A step that is logged then holds a copy of the
            gradients.
        optimizer_state: whether to log the optimizer's update and second moment as well.
        noise_scale: whether to measure the noise scale.
        batch_size: samples of one micro-batch on one device, where the loader does not tell it; under manual
            optimization, samples of one optimizer step on one device.
        name: tells this monitor from another one in the same Trainer whose arguments look the same, as those of two that
            group by a ``lambda`` each do. It goes into :attr:`state_key`, by which a checkpoint knows the monitor.

    Raises:
        MisconfigurationException: for an argument out of its range, and at the start of training for a filter that
            matches nothing, for a ``group_by`` that differs between ranks, and for ``when="local"`` where no rank has a
            gradient of its own (ModelParallelStrategy).

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
        if batch_size is not None and batch_size < 1:
            raise MisconfigurationException(f"batch_size must be a positive number of samples, got {batch_size!r}")
        if when not in get_args(When):
            raise MisconfigurationException(f"when must be one of {get_args(When)}, got {when!r}")
        self.every_n_steps = every_n_steps
        self.group_by = group_by
        self.include = include
        self.exclude = exclude
        self.when = when
        self.optimizer_state = optimizer_state
        self.noise_scale = noise_scale
        self.batch_size = batch_size
        self.name = name
        self._rows = Rows(group_by, include, exclude)
        self._optimizers: list[Optimizer] = []
        self._watched: list[Watched] = []
        self._states: StateWatch | None = None
        self._restored: list[dict[str, Any]] = []
        self._replicas: Replicas | None = None
        self._noise: NoiseWatch | None = None
        self._handles: list[RemovableHandle] = []
        self._log_dir: Path | None = None
        self._outlets: Outlets | None = None
        self._record: RecordFile | None = None
        self._guard = Guard()
        self._has_warned_unseen = False

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay with the optimizers of this process, and threads in it.
        return {**self.__dict__, "_handles": [], "_optimizers": [], "_states": None, "_record": None}

    @property
    def state_key(self) -> str:
        """Differs between instances with different arguments, so that several can be in one Trainer."""
        values = {name: getattr(self, name) for name in _ARGUMENTS}
        if callable(self.group_by):  # whose repr has an address in memory, another one in every process
            values["group_by"] = getattr(self.group_by, "__qualname__", type(self.group_by).__qualname__)
        if self.name is not None:
            values["name"] = self.name
        return f"{type(self).__qualname__}[{','.join(f'{name}={value!r}' for name, value in values.items())}]"

    @property
    def noise_records(self) -> list[NoiseRecord]:
        """The noise measured so far, one record an optimizer."""
        return [watched.noise for watched in self._watched]

    def state_dict(self) -> dict[str, Any]:
        """Steps seen and skipped, and noise measured, an entry an optimizer."""
        return {"optimizers": self._restored or [watched.state_dict() for watched in self._watched]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state up; it is given to the optimizers when training goes on, also in the middle of a run."""
        self._restored = list(state_dict["optimizers"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at what there is to watch: strategy, loggers, batch size."""
        self._guard, self._has_warned_unseen = Guard(), False
        self._noise = self._record = self._states = None
        self._replicas = replicas(trainer)
        if self._replicas is None:
            rank_zero_warn(
                f"GradientHistogramMonitor is off: it does not know how {type(trainer.strategy).__name__} spreads the"
                " gradients of this model over ranks. One device, DDP, and ModelParallelStrategy where every mesh has all"
                " ranks are supported; use one of them (for FSDP and DeepSpeed, ModelParallelStrategy with fully_shard),"
                " or remove the callback."
            )
            return
        if self.when == "local" and is_sharded(trainer):
            raise MisconfigurationException(
                "when='local' counts what each rank computed before averaging, which ModelParallelStrategy does not leave in"
                " any parameter; use when='before_clip', or strategy='ddp'"
            )
        rows = self._rows.check(pl_module)
        self._check_group_by(trainer, pl_module)
        if self.group_by is None and rows > _MANY:
            rank_zero_info(
                f"GradientHistogramMonitor logs {rows} histograms, one a parameter; group_by=1, 2, ... gives one a module"
                " at that depth, and include= and exclude= choose among the parameters."
            )
        self._log_dir = self._directory(trainer)
        if self._log_dir is not None and trainer.is_global_zero:
            self._record = RecordFile(self._log_dir, self._guard)
        known = effective_batch_size(trainer, self.batch_size) is not None
        if self.noise_scale and least_over_ranks(float(known), trainer) > 0:
            self._noise = NoiseWatch(self._replicas, self.batch_size, self._guard)
        if self.optimizer_state:
            self._states = StateWatch(self._replicas)
        self._watch(trainer, pl_module, self.state_dict()["optimizers"] if trainer.global_step > 0 else [])
        if self._replicas is None:
            return
        if self.noise_scale and self._noise is None:
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

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Goes on where a checkpoint was restored, as ``LearningRateFinder`` does, or optimizers were made, in mid-run."""
        if self._replicas is None:
            return
        if self._restored or self._optimizers != trainer.optimizers:
            self._watch(trainer, pl_module, self.state_dict()["optimizers"])
        for watched, optimizer in zip(self._watched, self._optimizers, strict=False):
            if any(copies is not None and copies.untouched for copies in (watched.local, watched.part)):
                self._await_local_gradients(trainer, watched, optimizer)  # of what has been unfrozen since, too

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Counts and measures where this step is due."""
        index = next((i for i, other in enumerate(self._optimizers) if other is optimizer), None)
        if index is None or self._replicas is None:
            return
        watched = self._watched[index]
        if watched.last_step == trainer.global_step:  # LBFGS evaluates a step several times
            return
        self._settle(trainer, index)
        watched.last_step = trainer.global_step
        step = watched.begun = Step(trainer.global_step, watched.steps % self.every_n_steps == 0)
        if step.due or watched.in_pair:
            parameters = optimizer_parameters(pl_module, optimizer)
            gradients, parts = self._gradients(trainer, optimizer, parameters)
            if self._noise is not None:
                self._noise.step(trainer, ComingStep(watched, optimizer, parameters, gradients, parts))
            if watched.local is not None:
                parts = self._guard.made(partial(watched.local.take, trainer))
            if step.due and self.when != "after_clip":
                step.histogram = self._count(trainer, index, parts)
        watched.steps += 1
        self._await_local_gradients(trainer, watched, optimizer)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the first micro-batch of a step."""
        for watched in self._watched:
            if watched.part is not None:
                watched.part.remove()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notices steps that the loss scaler skipped."""
        for index in range(len(self._watched)):
            self._settle(trainer, index)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the record, where there is something new in it."""
        if self._record is not None and self._record.saved != sum(map(len, self.noise_records)):
            self._save_record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the last heatmap, writes the record, and waits for what is still to be written."""
        for index, watched in enumerate(self._watched):
            last = watched.last_logged
            if trainer.is_global_zero and last is not None:
                self._guard.done(lambda i=index, last=last: self._draw(trainer, i, *last))  # type: ignore[misc]
        if self._states is not None:
            self._guard.done(partial(self._states.close, partial(self._send, trainer)))
        self._finish(trainer, pl_module)
        fewest = min(map(len, self.noise_records), default=0)
        if self.noise_scale and self._log_dir is not None and fewest < ENOUGH:
            rank_zero_info(
                f"GradientHistogramMonitor measured the noise scale at {fewest} steps, and some {ENOUGH} are wanted to calibrate"
                f" another run from the record of this one; lower every_n_steps={self.every_n_steps}, or train longer."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes the record, so that an interrupted run is of use, and waits for what is still to be written."""
        self._finish(trainer, pl_module)

    def _check_group_by(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuses a function that groups otherwise on another rank, whose counts would be added to other rows."""
        if trainer.world_size == 1 or not callable(self.group_by):
            return
        rows = list(self._rows.of(module, model_shapes(module)).items())
        same = rows == trainer.strategy.broadcast(rows)
        if not least_over_ranks(float(same), trainer):
            raise MisconfigurationException(
                "group_by gives other groups on other ranks; it must depend on nothing but the parameter's name, not on"
                " the rank nor on hash(), which differs from process to process"
            )

    def _directory(self, trainer: Trainer) -> Path | None:
        """Where the record goes: one place for each run, the same on every rank; None for runs that leave nothing."""
        first = next(
            other for other in getattr(trainer, "callbacks", [self]) if isinstance(other, GradientHistogramMonitor)
        )
        if getattr(trainer, "fast_dev_run", False) or trainer.barebones or first is not self:
            return None  # of several monitors the first writes the record
        return Path(trainer.strategy.broadcast(_run_directory(trainer) if trainer.is_global_zero else ""))

    def _watch(self, trainer: Trainer, module: LightningModule, states: list[dict[str, Any]]) -> None:
        """Watches the optimizers that there are now from these states on, or from their first step."""
        self._release()
        self._restored = []
        hookless = [type(optimizer).__name__ for optimizer in trainer.optimizers if not _has_step_hooks(optimizer)]
        if hookless:
            self._replicas = self._log_dir = None
            self._close_record()
            rank_zero_warn(
                f"GradientHistogramMonitor is off: {hookless[0]} has no step hooks, as it does not call the constructor of"
                " torch.optim.Optimizer. Have it call super().__init__(), or remove the callback."
            )
            return
        self._optimizers = list(trainer.optimizers)
        self._watched = [Watched(**state) for state in states[: len(self._optimizers)]]
        self._watched += [Watched() for _ in range(len(self._optimizers) - len(self._watched))]
        for index, (watched, optimizer) in enumerate(zip(self._watched, self._optimizers, strict=True)):
            self._handles.append(before_update(optimizer, partial(self._take_step, trainer, module, index)))
            self._handles.append(optimizer.register_step_post_hook(partial(self._end_step, trainer, module, index)))
            self._await_local_gradients(trainer, watched, optimizer)

    def _take_step(self, trainer: Trainer, module: LightningModule, index: int) -> None:
        """Logs a step that is due, when the optimizer takes it; what is counted after clipping is counted now."""
        watched, optimizer = self._watched[index], self._optimizers[index]
        step, watched.begun = watched.begun, None
        if step is None:
            self._warn_unseen(watched, optimizer)
            return
        skips = found_inf(optimizer)
        if skips is not None:
            watched.skipped = watched.skipped + skips
        if step.due and self._states is not None:
            self._guard.done(partial(self._states.begin, module, optimizer, self._rows_of(trainer, index)))
        if step.due and self.when == "after_clip":
            parameters = optimizer_parameters(module, optimizer)
            step.histogram = self._count(trainer, index, self._gradients(trainer, optimizer, parameters)[1])
        histogram = step.histogram
        if histogram is None:
            return
        if skips is not None and skips:
            watched.drop_pair()
        elif trainer.is_global_zero:
            self._guard.done(lambda: self._log(trainer, module, index, histogram))
        if trainer.is_global_zero:
            self._guard.done(lambda: self._log_skipped(trainer, index, step.number))

    def _warn_unseen(self, watched: Watched, optimizer: Optimizer) -> None:
        # Later ones are LBFGS's evaluations, or of a restored run.
        if not watched.steps and not self._has_warned_unseen:
            self._has_warned_unseen = True
            rank_zero_warn(
                f"GradientHistogramMonitor does not see the steps of {type(optimizer).__name__}: they go past Lightning, and"
                " so past on_before_optimizer_step. Step the optimizers that self.optimizers() gives, not those of"
                " self.optimizers(use_pl_optimizer=False), and pass the closure on in an optimizer_step of your own."
            )

    def _end_step(
        self, trainer: Trainer, module: LightningModule, index: int, optimizer: Optimizer, *_hook: Any
    ) -> None:
        """Logs what a step that is due has made of the weights."""
        states = self._states
        if states is None or not states.begun:
            return
        end = partial(states.end, module, optimizer, trainer.global_step, self._suffix(index), self._guard)
        report = self._guard.made(end)
        if report is not None and trainer.is_global_zero and not found_inf(optimizer):
            watched, send = self._watched[index], partial(self._send, trainer)
            self._guard.done(lambda: states.log(report, send, draws=watched.last_logged is None))

    def _settle(self, trainer: Trainer, index: int) -> None:
        """A step that was begun and not taken was skipped: it is counted, and neither drawn nor measured."""
        watched = self._watched[index]
        step, watched.begun = watched.begun, None
        if step is None:
            return
        watched.skipped = watched.skipped + 1
        watched.drop_pair()
        if trainer.is_global_zero and step.due:
            self._guard.done(lambda: self._log_skipped(trainer, index, step.number))

    def _gradients(
        self, trainer: Trainer, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor] | None, dict[str, Tensor] | None]:
        """The gradients, and this rank's part of them; None where there is no memory for them."""
        replicas = self._replicas
        assert replicas is not None
        gradients = self._guard.made(lambda: ready_gradients(trainer, optimizer, parameters))
        if gradients is None:
            return None, None
        return gradients, self._guard.made(lambda: own_parts(gradients, parameters, replicas))

    def _await_local_gradients(self, trainer: Trainer, watched: Watched, optimizer: Optimizer) -> None:
        """Has gradients of the coming step copied before ranks average them, if it is to be logged."""
        watched.drop_copies()
        parts = self._noise is not None and parts_of_a_step(trainer) > 1
        if watched.steps % self.every_n_steps == 0 and (self.when == "local" or parts):
            parameters = optimizer_parameters(trainer.lightning_module, optimizer)
            watched.local = LocalGradients(parameters) if self.when == "local" else None
            watched.part = LocalGradients(parameters) if parts else None

    def _rows_of(self, trainer: Trainer, index: int) -> dict[str, str]:
        """The row of each parameter of an optimizer that is counted."""
        module = trainer.lightning_module
        rows = [self._rows.of(module, optimizer_parameters(module, optimizer)) for optimizer in self._optimizers]
        return told_apart(rows, index)

    def _count(self, trainer: Trainer, index: int, parts: Mapping[str, Tensor] | None) -> MagnitudeHistogram | None:
        """The histogram of all ranks' parts, None where this rank could not count its own; to be called on every rank.

        A rank that could not count takes part with a table by which the others know.
        """
        assert self._replicas is not None
        rows = self._rows_of(trainer, index)
        histogram = MagnitudeHistogram(list(dict.fromkeys(rows.values())), trainer.lightning_module.device)
        mine = {name: part for name, part in (parts or {}).items() if name in rows and part.numel()}
        counted = parts is not None and self._guard.done(lambda: histogram.update(mine, rows))
        if not counted:
            histogram.table.fill_(NOT_COUNTED)
        if self._replicas.ranks > 1:  # in place, which needs no memory
            histogram.all_reduce()
        return histogram if counted else None

    def _log_skipped(self, trainer: Trainer, index: int, step: int) -> None:
        if loss_scaler(trainer) is not None:
            skipped = float(self._watched[index].skipped)
            tag = f"gradient_skipped_steps{self._suffix(index)}"
            self._send(trainer, lambda sink: sink.scalars({tag: skipped}, step))

    @property
    def _kind(self) -> str:
        """What the names of histograms, figures and scalars begin with."""
        return {"before_clip": "gradient", "after_clip": "gradient_clipped", "local": "gradient_local"}[self.when]

    def _log(self, trainer: Trainer, module: LightningModule, index: int, histogram: MagnitudeHistogram) -> None:
        watched, step = self._watched[index], trainer.global_step
        on_host = HostCopy(histogram)
        report = Once(lambda: magnitude_report(on_host(), self._kind, f"all{self._suffix(index)}"))
        self._send(trainer, lambda sink: sink.scalars(report().scalars, step))
        self._send(trainer, lambda sink: sink.histograms(report().histograms, step))
        watched.logged += 1
        watched.last_logged = (on_host, step)
        if math.log2(watched.logged).is_integer():  # figures and files cost far more than a count
            self._draw(trainer, index, on_host, step)
            watched.last_logged = None
            self._save_record(trainer, module)

    def _draw(self, trainer: Trainer, index: int, histogram: HostCopy, step: int) -> None:
        suffix, send = self._suffix(index), partial(self._send, trainer)
        send(lambda sink: sink.text(f"{self._kind}_worst_layers{suffix}", worst_layers(histogram()), step))
        title = f"gradient magnitudes by layer, step {step}"
        send_heatmap(send, f"{self._kind}_magnitude_by_layer{suffix}", step, title, histogram)

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

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        self._save_record(trainer, module)
        self._close_record()
        self._release()
        self._states = None
        self._guard.done(self._close)

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizers = [], []
        for watched in self._watched:
            watched.release()

    def _save_record(self, trainer: Trainer, module: LightningModule) -> None:
        if self._record is not None:
            self._record.save(module, trainer.global_step, self._optimizers, self._watched)

    def _close_record(self) -> None:
        if self._record is not None:
            self._record.close()
        self._record = None


def _has_step_hooks(optimizer: Optimizer) -> bool:
    try:
        optimizer.register_step_pre_hook(lambda *_: None).remove()
    except AttributeError:
        return False
    return True


def _run_directory(trainer: Trainer) -> str:
    logger: Any = trainer.loggers[0] if trainer.loggers else None
    if getattr(logger, "log_dir", None):
        return str(logger.log_dir)
    path = Path(getattr(logger, "save_dir", None) or trainer.default_root_dir)
    return str(path if logger is None else path / str(logger.name) / str(logger.version))
