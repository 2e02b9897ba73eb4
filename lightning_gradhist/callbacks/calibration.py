"""The calibration: epsilon and learning rate, set before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Optional, Union

from lightning_gradhist.adapt import AdaptedRatio
from lightning_gradhist.batch_scaling import WEIGHT_DECAY
from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.adapt import RateAdapter, check_adapt, noise_monitor
from lightning_gradhist.callbacks.decision import MIN_BATCHES, Decision, is_adam_like
from lightning_gradhist.callbacks.gradients import effective_batch_size, is_sharded, model_shapes, replicas
from lightning_gradhist.callbacks.handoff import apply_changes, holds_before
from lightning_gradhist.callbacks.scaling import check_optimizer, check_scaled
from lightning_gradhist.epsilon_search import SEARCH
from lightning_gradhist.greedy import GREEDY
from lightning_gradhist.report import plots
from lightning_gradhist.report.loggers import sinks
from lightning_gradhist.report.record import RecordError, RunRecord
from lightning_gradhist.report.result import CalibrationResult, GroupChange
from lightning_gradhist.surge import LAWS, PLAIN_LAWS


class OptimizerCalibration(Callback):
    r"""Sets epsilon and the learning rate before the first step, and shows why.

    Without arguments it lowers an epsilon that damps the optimizer's steps. Told at which batch size a learning rate is
    trusted, by ``reference_batch_size`` or by the record of a run (``reference``), it carries that rate over to the batch
    size of this run: the per-device batch, times accumulation, times data-parallel ranks. The report goes to the console
    and the loggers, and stays in :attr:`result`, which is None in a run that goes on from a checkpoint.

    *The probe.* Before the first batch ``probe_batches`` batches go forward and backward at frozen weights, and leave no
    trace: parameters, buffers, gradients, optimizer, schedulers, random generators, data order, metrics and the state
    that the module keeps are as if it had not happened (:func:`lightning_gradhist.callbacks.no_trace.no_trace` says what
    cannot be put back). It holds up to five copies of the parameters while it lasts; under FSDP2, of this rank's shards.
    A batch that runs out of memory, is not finite or has another size than the first is left out, and the report says so.

    *Epsilon* matters to most coordinates within the pooled search space of :func:`lightning_gradhist.epsilon_range`, and to
    some within the authors', here of :math:`r = \sqrt{E g^2}` for gradients as large as the optimizer will see them (batch
    size, clipping, adaptor E).

    - ``"auto"`` keeps an epsilon that damps at most 2% of all coordinates together, and lowers another to the largest power
      of ten that does. It never raises one, but to 1e-7 where torch's optimizer would step in float16, in which 1e-8 is
      zero.
    - ``"search"`` trains with the present epsilon and with the powers of ten up to the authors' upper end, in short runs from
      the initial state that leave no trace, each at a rate that makes its updates as large as those of the present one.
      Where that one damps more than ``"auto"`` lets it, what ``"auto"`` would set is tried too, at the rate as it is. The
      best is set, the learning rate is multiplied by its factor, and decoupled weight decay divided by it, but only where
      its loss is lower, with ``confidence`` over independent runs, than that of the present epsilon at this rate and at
      others, from half to eight times it and further up where it takes more to descend as fast: at updates of one size a
      larger epsilon lowers the loss faster at first, and often loses later. So it knows of the first steps alone, at the
      optimizer's own rate, before any ratio. It takes 600 to 1,400 gradients on each rank, times the accumulation, fewer
      where the loader has fewer than 120 batches, and says how many; it holds up to nine copies of the parameters, and 20
      batches or, with accumulation, the batches of 16 steps and 4 more. Where it cannot be made, as under FSDP2, where a
      scheduler keeps rates of its own, or where the groups' epsilons differ, the report says why, and epsilon is chosen as
      by ``"auto"``. :class:`lightning_gradhist.callbacks.epsilon_search.EpsilonSearchProbe` has the formulas.

    *Learning rate.* What is trusted is the optimizer's own rate at ``reference_batch_size`` samples a step, or that of a
    recorded run of the same class of optimizer; another class takes the record's ratio alone, for its own rate. It is
    multiplied by the ratio that a law gives for the two batch sizes.

    - ``"surge"``, :class:`lightning_gradhist.SurgeLaw`, and ``"saturating"``, :class:`lightning_gradhist.SaturatingLaw`, need
      the noise scale ``B_adam``: the one over the recorded run, or the probe's, which at the start of a run is far too
      small, so that the ratio then stays between 1 and the square root of the ratio of batch sizes. What the data do not
      support is refused: then ``fallback`` is used, and the report says why.
    - ``"surge"`` levels off past its bound, as Theorem 4 has it; ``"falling_surge"`` falls on. On four workloads
      (``benchmarks/calibration``) the one lost 4.8% of the best loss at equal samples and 4.9% at equal steps, the other
      2.7% and 6.9%: it is better where a larger batch makes runs of few steps.
    - ``"sqrt"``, ``"fourth_root"``, ``"linear"`` and ``"keep"`` need none.
    - ``"greedy"`` is for those without a reference, and finds the rate at which a single step lowers the loss most, by
      :func:`lightning_gradhist.greedy.greedy_rate`, from the loss at a few lengths of the steps that the optimizer itself
      would make. That is the best step and not the best run: the loss of the first step says little of how a rate does
      later. It is refused, and the rate kept, where the loss shows no minimum, where the interval spans a factor of two,
      where the loss falls along the whole range, and under FSDP2.

    *While training* the noise scale grows, and with it the law's ratio, away from 1. With ``adapt`` the rate follows: at
    each measurement of the ``GradientHistogramMonitor`` in the same Trainer, which then makes the host wait for the device,
    the whole schedule is multiplied by the change of :class:`lightning_gradhist.adapt.AdaptedRatio`. That goes half of the
    way to the law's ratio, at the noise scale of the last quarter of the measurements, within eight of them, and stays where
    the law is refused. It starts at the ratio of the probe, or of the record where the probe's is refused, and remains
    between 1 and the square root of the ratio of batch sizes.

    - ``"warmup"`` goes one way only, up for larger batches and down for smaller ones, as far as the ratio of the recorded
      run, beyond which it does not start, or else the square root.
    - ``"always"`` goes both ways.

    The factor is logged as ``calibration/adapted_factor``. A resumed run goes on as if it had not been interrupted, but for
    a pair of steps (see the monitor) that the checkpoint parts; a second ``fit`` begins anew.

    *What else goes with the batch size.* With ``scale_with_batch`` the optimizer's own values, too, are taken as trusted at
    the reference (:mod:`lightning_gradhist.batch_scaling` has the formulas).

    - ``"betas"``: the second, the memory of the average of squares, keeps its half-life in samples.
    - ``"weight_decay"`` shrinks the weights as much per sample where it is decoupled, and stays where it is added to the
      gradient.
    - ``"eps"`` falls with the square root of the batch size.

    *Hand-off.* All is written into every parameter group, ratios between groups kept, with the ``alpha`` and
    ``explore_beta`` of ``ALTO`` and ``AdamE`` where they were left on ``"auto"``; the learning rate also into ``initial_lr``
    and the schedulers. It is done once, but for ``adapt``: a resumed run keeps its values, and warns where it goes on at
    another batch size. Callbacks that read the learning rate at the first batch, such as ``LearningRateMonitor``, see the new
    one if they come after this one.

    Args:
        reference_batch_size: samples of an optimizer step at which the optimizer's own learning rate is trusted.
        reference: path of the ``calibration.json`` that ``GradientHistogramMonitor`` left in a run of the same model.
        epsilon: ``"auto"``, ``"search"``, ``"keep"``, or a number to be set.
        learning_rate: the law: ``"surge"``, ``"falling_surge"`` or ``"saturating"``, which need a noise scale, or ``"sqrt"``,
            ``"fourth_root"``, ``"linear"`` or ``"keep"``. Or ``"greedy"``, which takes neither reference nor fallback.
        probe_batches: batches of the probe on each rank, at least 4. Half of them go into epsilon and the metric, half
            into the noise scale. ``"greedy"`` takes as many for itself, at least
            17, and 9 more for each further batch of accumulation.
        apply: False to report only; the run then ends in the same bits as without the callback.
        batch_size: samples of one micro-batch on one device, where the loader does not tell it; under manual
            optimization, samples of one optimizer step on one device.
        fallback: the law in place of one that needs a noise scale, where that is refused: one of the other four. With
            ``adapt`` it is where the rate starts, also beyond the bounds that it then moves into.
        confidence: of the intervals, between 0 and 1.
        adapt: None for a rate that is set once, ``"warmup"`` or ``"always"`` for one that follows the noise scale. Needs a
            reference, a law that needs a noise scale, and a ``GradientHistogramMonitor`` that measures noise.
        scale_with_batch: what else is taken as trusted at the reference and scaled with the batch size: some of ``"betas"``,
            ``"weight_decay"`` and ``"eps"``, the last with ``epsilon="keep"`` only. Nothing by default.

    Raises:
        MisconfigurationException: for an argument out of its range, ``reference`` together with
            ``reference_batch_size``, either of them with ``"greedy"``, and a record that is missing, broken, of another
            version or of another model; for ``adapt`` and ``scale_with_batch`` without what they need, the former's monitor
            and the latter's keys in the optimizer's groups.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_gradhist import OptimizerCalibration
        >>> calibration = OptimizerCalibration(reference_batch_size=256)
        >>> trainer = Trainer(callbacks=[calibration], accelerator="cpu", logger=False)
    """

    def __init__(
        self,
        reference_batch_size: Optional[int] = None,  # noqa: UP045 - LightningCLI on Python 3.10 reads the plain types
        reference: Optional[str] = None,  # noqa: UP045
        epsilon: Union[float, str] = "auto",  # noqa: UP007
        learning_rate: str = "surge",
        probe_batches: int = 32,
        apply: bool = True,
        batch_size: Optional[int] = None,  # noqa: UP045
        fallback: str = "keep",
        confidence: float = 0.95,
        adapt: Optional[str] = None,  # noqa: UP045
        scale_with_batch: Optional[Sequence[str]] = None,  # noqa: UP045
    ) -> None:
        for name, size in (("reference_batch_size", reference_batch_size), ("batch_size", batch_size)):
            if size is not None and not size > 0:
                raise MisconfigurationException(f"{name} must be a positive number of samples, got {size!r}")
        if reference is not None and reference_batch_size is not None:
            raise MisconfigurationException(
                "reference and reference_batch_size contradict each other: a record knows its batch size; give one of them"
            )
        if epsilon not in ("auto", SEARCH, "keep") and not _is_number(epsilon):
            raise MisconfigurationException(
                f"epsilon must be 'auto', 'search', 'keep' or a number from 0 up, got {epsilon!r}"
            )
        if learning_rate not in (*LAWS, GREEDY):
            raise MisconfigurationException(f"learning_rate must be one of {(*LAWS, GREEDY)}, got {learning_rate!r}")
        if learning_rate == GREEDY and (reference, reference_batch_size, fallback) != (None, None, "keep"):
            raise MisconfigurationException(
                "learning_rate='greedy' is for those who have no reference: leave out reference, reference_batch_size and"
                " fallback, or name a law"
            )
        if fallback not in PLAIN_LAWS:
            raise MisconfigurationException(f"fallback must be one of {PLAIN_LAWS}, got {fallback!r}")
        if probe_batches < MIN_BATCHES:
            raise MisconfigurationException(f"probe_batches must be at least {MIN_BATCHES}, got {probe_batches!r}")
        if not 0 < confidence < 1:
            raise MisconfigurationException(f"confidence must lie between 0 and 1, got {confidence!r}")
        has_reference = reference is not None or reference_batch_size is not None
        check_adapt(adapt, learning_rate, has_reference)
        check_scaled(scale_with_batch, epsilon, has_reference)
        self.reference_batch_size = reference_batch_size
        self.reference = reference
        self.epsilon = epsilon
        self.learning_rate = learning_rate
        self.probe_batches = probe_batches
        self.apply = apply
        self.batch_size = batch_size
        self.fallback = fallback
        self.confidence = confidence
        self.adapt = adapt
        self.scale_with_batch = scale_with_batch
        self.result: CalibrationResult | None = None
        self._record: RunRecord | None = None
        self._report: str | None = None
        self._changes: tuple[GroupChange, ...] = ()
        self._calibrated_for: float | None = None
        self._waiting = False
        self._restored = False
        self._goes_on = False
        self._adapted: AdaptedRatio | None = None
        self._adapter: RateAdapter | None = None

    def state_dict(self) -> dict[str, Any]:
        """The report, whose being there tells a resumed run that the calibration is done, its changes, and the rate's."""
        adapted = self._adapter.ratio if self._adapter else self._adapted
        changes = [asdict(change) for change in self._changes]
        return {
            "report": self._report,
            "adapted": asdict(adapted) if adapted else None,
            "changes": changes,
            "batch_size": self._calibrated_for,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Marks the calibration as done if it was, and takes up its changes and the rate that moves on."""
        self._report = state_dict["report"]
        self._changes = tuple(GroupChange(**change) for change in state_dict.get("changes", ()))
        self._calibrated_for = state_dict.get("batch_size")
        adapted = state_dict.get("adapted")
        self._adapted, self._adapter = AdaptedRatio(**adapted) if adapted else None, None
        self._restored = self._report is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out whether this run is to be calibrated, and reads the record if so."""
        self._waiting = False
        if self.adapt is not None:
            noise_monitor(trainer)
        # A checkpoint may come before the first step (accumulation); one that was only validated counts for nothing.
        from_checkpoint = self._restored and trainer.ckpt_path is not None
        self._restored = False
        if (trainer.global_step > 0 or from_checkpoint) and self._report is not None:
            self._go_on(trainer, from_checkpoint)
            return
        self.result = self._report = self._adapted = self._adapter = self._calibrated_for = None
        self._changes = ()
        obstacle = _obstacle(trainer)
        if obstacle is not None:
            rank_zero_warn(f"OptimizerCalibration changes nothing: {obstacle}.")
            return
        check_optimizer(trainer.optimizers[0], self.scale_with_batch or (), is_adam_like(trainer.optimizers[0]))
        self._record = self._read_record(trainer, pl_module)
        self._waiting = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Calibrates at the first batch, when the module has seen the start of training and of the epoch."""
        if self._goes_on:
            self._goes_on = False
            self._look_at_batch_size(trainer)
        if not self._waiting:
            return
        self._waiting = False
        decision = Decision(self, trainer, pl_module, self._record)
        result = decision.result()
        if result.problems:
            rank_zero_warn("OptimizerCalibration: " + ". ".join(result.problems) + ".")
        if self.apply:
            # equal by construction, and now for sure
            self._changes, self._adapted = trainer.strategy.broadcast((result.changes, decision.adapted))
            apply_changes(trainer.optimizers[0], _schedulers(trainer), self._changes)
            self._report, self._calibrated_for = result.to_text(), result.effective_batch_size
            self._adapt()
        self.result = result
        rank_zero_info(result.to_text())
        if trainer.is_global_zero:
            _log(trainer, result)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the rate where it is to follow the noise scale."""
        if self._adapter is not None:
            self._adapter.follow(trainer)

    def _adapt(self) -> None:
        """Has the rate follow the noise scale from where it is."""
        if self.adapt is None or self._adapted is None:
            return
        ratio = replace(self._adapted, mode=self.adapt)
        self._adapter = RateAdapter(ratio, self.confidence, WEIGHT_DECAY in (self.scale_with_batch or ()))

    def _go_on(self, trainer: Trainer, from_checkpoint: bool) -> None:
        """Keeps what was set. A second fit makes the optimizer anew, unless a checkpoint brought it back."""
        rank_zero_info("OptimizerCalibration: the run goes on with the values it was calibrated to.")
        self._goes_on = True
        if self._adapted is not None and not from_checkpoint:
            self._adapted = replace(self._adapted, value=self._adapted.start)
        elif self.adapt is not None and self._adapted is None:
            rank_zero_warn(
                "OptimizerCalibration: adapt moves nothing, as this run was calibrated to a rate that stays."
            )
        self._adapt()
        if not from_checkpoint:
            optimizer = trainer.optimizers[0]
            changes = [change for change in self._changes if holds_before(optimizer, change)]
            apply_changes(optimizer, _schedulers(trainer), changes)

    def _look_at_batch_size(self, trainer: Trainer) -> None:
        """Warns where a run goes on at another batch size than its values are for; accumulation is set by now."""
        before, now = self._calibrated_for, effective_batch_size(trainer, self.batch_size)
        if before is None or now is None or before == now or not (self._changes or self._adapter):
            return
        rank_zero_warn(
            f"OptimizerCalibration: the run was calibrated for {before:g} samples a step and goes on with {now:g}; its values"
            f" stay{', and adapt moves the rate as' if self._adapter else ' those'} for {before:g}, and a record of the run will"
            f" have them as those for {now:g}. For the new batch size, load the weights alone into a new run, with the record"
            " of this one up to here as reference, or with the reference that this one had."
        )

    def _read_record(self, trainer: Trainer, module: LightningModule) -> RunRecord | None:
        if self.reference is None:
            return None
        outcome: Any = trainer.strategy.broadcast(_load(self.reference) if trainer.is_global_zero else None)
        try:
            if isinstance(outcome, RecordError):
                raise outcome
            outcome.check_model(model_shapes(module))
        except RecordError as error:
            raise MisconfigurationException(f"reference: {error}") from None
        return outcome


def _obstacle(trainer: Trainer) -> str | None:
    if len(trainer.optimizers) != 1:
        return f"it handles one optimizer, and configure_optimizers returned {len(trainer.optimizers)}"
    if replicas(trainer) is None and not is_sharded(trainer):
        return f"{type(trainer.strategy).__name__} is not supported, only one device, DDP and ModelParallelStrategy (FSDP2) are"
    if trainer.global_step > 0:
        return (
            f"training goes on at step {trainer.global_step} of a run to which no calibration was applied, and one is only"
            " made before the first step"
        )
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _load(path: str) -> RunRecord | RecordError:
    try:
        return RunRecord.load(path)
    except RecordError as error:
        return error


def _schedulers(trainer: Trainer) -> list[Any]:
    return [config.scheduler for config in trainer.lr_scheduler_configs]


def _log(trainer: Trainer, result: CalibrationResult) -> None:
    try:
        before = {change.name: change.before for change in reversed(result.changes) if change.group == 0}
        figures = {}
        drawn = plots.available() and bool(trainer.loggers)
        if drawn and result.epsilon_range is not None:
            eps = before.get("eps", result.epsilon)
            figures["calibration/epsilon_search_space"] = plots.epsilon_figure(
                result.epsilon_range, eps if isinstance(eps, float) else None, result.epsilon
            )
        if drawn and result.epsilon_search is not None:
            figures["calibration/epsilon_search"] = plots.epsilon_search_figure(result.epsilon_search)
        if drawn and result.effective_batch_size and result.reference_batch_size:
            figures["calibration/learning_rate_over_batch_size"] = plots.learning_rate_figure(result)
        if drawn and result.tradeoff():
            figures["calibration/steps_and_samples_over_batch_size"] = plots.tradeoff_figure(result)
        for sink in sinks(trainer.loggers):
            sink.text("calibration/report", result.to_markdown(), trainer.global_step)
            sink.scalars(result.scalars(), trainer.global_step)
            for tag, figure in figures.items():
                sink.figure(tag, figure, trainer.global_step)
    except Exception as error:  # the values are set; a logger must not undo that
        rank_zero_warn(f"OptimizerCalibration could not log its report, training goes on: {error!r}")
