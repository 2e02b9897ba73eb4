"""The calibration: epsilon and learning rate, set before the first step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from types import NoneType
from typing import Any, Literal, Optional, Union

from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.batch_size import SampleCount, accumulated, effective_batch_size
from lightning_gradhist.callbacks.calibration.decide import decide
from lightning_gradhist.callbacks.calibration.evidence import MIN_BATCHES, gather
from lightning_gradhist.callbacks.calibration.handoff import OPTIMIZER, SCHEDULERS, apply_changes, set_defaults
from lightning_gradhist.callbacks.calibration.watch import Watch, calibrated
from lightning_gradhist.callbacks.known_optimizers import class_name, why_without_layers
from lightning_gradhist.callbacks.parameters import model_shapes, named_parameters, optimizer_parameters
from lightning_gradhist.callbacks.schedulers import scheduled_accumulation, schedulers_in
from lightning_gradhist.callbacks.strategies import is_sharded, replicas
from lightning_gradhist.explore import is_number
from lightning_gradhist.learning_rate import LAWS, PLAIN_LAWS, Law, PlainLaw
from lightning_gradhist.logging import figures
from lightning_gradhist.logging.calibration_result import CalibrationResult, GroupChange
from lightning_gradhist.logging.sinks import sink_of
from lightning_gradhist.noise.run_record import OptimizerRecord, RecordError, RunRecord


class _Phase(Enum):
    """Where a calibration is, from one hook to the next."""

    IDLE = "nothing is to be done"
    WAITING = "the first batch is to be calibrated"
    RESUMED = "the first batch shows whether the run goes on at its batch size"


@dataclass(frozen=True)
class _Applied:
    """What a run was calibrated to, which its checkpoints hold."""

    report: str | None = None  # None where nothing was applied
    changes: tuple[GroupChange, ...] = ()
    batch_size: float | None = None  # samples of an optimizer step that they are for; None where they may vary
    ratio: float | None = None  # of learning rates; None in states of older versions

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> _Applied:
        """Reads a state, also one of an older version, which may lack keys and have others; raises for anything else."""
        changes = tuple(GroupChange(**change) for change in state.get("changes", ()))
        found = cls(state["report"], changes, state.get("batch_size"), state.get("ratio"))
        numbers = [0.0 if n is None else n for n in (found.batch_size, found.ratio)] + [c.group for c in changes]
        after = [change.after for change in changes]  # an alpha may be negative
        has_text = isinstance(found.report, (str, NoneType))
        if not (has_text and all(map(_is_number, numbers)) and all(map(is_number, after))):
            raise TypeError(f"a text, numbers and groups are wanted, got {state!r}")
        return found


class OptimizerCalibration(Callback):
    r"""Sets epsilon and the learning rate before the first step, and shows why.

    Without arguments it lowers an epsilon that damps the optimizer's steps. Told at which batch size a learning rate is
    trusted, by ``reference_batch_size`` or by the record of a run (``reference``), it carries that rate over to the batch
    size of this run: the samples counted in the batches that come, times accumulation, over all data-parallel ranks. The
    report goes to the console and the loggers, and stays in :attr:`result`.

    *The probe.* Before the first batch ``probe_batches`` batches go forward and backward at frozen weights, on copies: of
    the module with all that it holds, of optimizers, schedulers, callbacks, loaders, samplers and datasets, and of what the
    user's own functions, classes and modules keep in variables. Loggers are silent, and the random generators of torch,
    numpy and Python, environment variables and the working directory are put back. So the run goes on as if there had been
    no probe.

    - What cannot be copied, as a generator, an open file or a running thread, ends the probe, and the report says its path.
    - Tensors and arrays of the data of more than 1 MiB, and others of more than 64 MiB that are variables of a script or a
      class, are read in place; the probe ends where one is written into.
    - What functions remember (``functools.cache``) is forgotten in the probe, and made again there. A list that a thread
      fills, and that the data look at again and again, stays empty there: use a ``queue.Queue``, with which the probe ends.
    - Out of reach are files that ``training_step`` writes, other processes, modules that it is the first to import, and what
      installed packages keep to themselves.
    - The copies take the memory of the parameters and buffers once, and what is measured several times that of the
      parameters. Under FSDP2 the parameters themselves are used, and put back.
    - A batch that runs out of memory or is not finite is left out, and the report says so.

    *Epsilon* matters within the search spaces of :func:`lightning_gradhist.epsilon_range`, here of :math:`r = \sqrt{E g^2}`
    for gradients as large as the optimizer will see them (batch size, clipping, adaptor E). ``"auto"`` keeps an epsilon that
    damps at most 2% of all coordinates together, and lowers another to the largest power of ten that does; what is zero but
    for rounding, as the gradient of a bias before a normalization, counts as zero. It never raises one, but to 1e-7 where
    torch's optimizer would step in float16, in which 1e-8 is zero.

    *Learning rate.* What is trusted is the optimizer's own rate at ``reference_batch_size`` samples a step, or that of a
    recorded run of the same class of optimizer; another class takes the record's ratio alone, for its own rate, and so does
    a run whose scheduler makes rates of its own: ``CyclicLR``, and one of one's own or a ``LambdaLR`` that goes up to another
    rate than the optimizer's. It is multiplied by the ratio that a law gives for the two batch sizes.

    - ``"surge"``, :class:`lightning_gradhist.SurgeLaw`, needs the noise scale ``B_adam``: the one over the recorded run, or
      the probe's, which at the start of a run is far too small, so that the ratio then stays between 1 and the square
      root of the ratio of batch sizes. Past its bound it levels off. What the data do not support is refused: then
      ``fallback`` is used, and the report says why. It is for runs of as many samples. Of a record that knows its length
      the steps count, too, against those that the Trainer will make: at as many the ratio is kept between 1 and the fourth
      root, and between the two mixed (:func:`lightning_gradhist.learning_rate.choose_ratio`). Else equal samples are taken.
      Where there is a probe, it also tries the first step of Adam. If that would raise the loss, the rate is lowered until
      it does not, in steps of :math:`\sqrt2`. It need not be shorter than the first step of the recorded run.
    - ``"sqrt"``, ``"fourth_root"``, ``"linear"`` and ``"keep"`` need none. Where the first step would raise the loss, a warning
      says so.

    *Hand-off.* All is written into every parameter group, ratios between groups kept, with the ``alpha`` and
    ``explore_beta`` of ``ALTO`` and ``AdamE`` where they were left on ``"auto"``; the learning rate also into ``initial_lr``
    and the schedulers, with the rates that these keep of their own (``eta_min``).

    - The rate is kept, and the report names the scheduler, where a copy of one does not follow at every step; likewise an
      optimizer that keeps rates outside its groups.
    - Where the run's own code sets the rate at a step, one warning gives the factor by which it would have to multiply it.
    - Groups that are added later, as by ``BackboneFinetuning``, begin with the calibrated epsilon, where the groups have
      one, and the rate that they are added with; a warning names what is not calibrated.
    - A resumed run keeps its values, and warns where it goes on at another batch size. Optimizers and schedulers that are
      made anew, in a second fit or in mid-run, are given them again; a warning names what cannot be.
    - Callbacks that read the learning rate at the first batch, such as ``LearningRateMonitor``, must come after this one.

    Args:
        reference_batch_size: samples of an optimizer step at which the optimizer's own learning rate is trusted.
        reference: path of the ``calibration.json`` that ``GradientHistogramMonitor`` left in a run of the same model, or
            its URL (``s3://``, ``gs://``). Of a record of several optimizers, that of the same parameters is used.
        epsilon: ``"auto"``, ``"keep"``, or a number to be set.
        learning_rate: the law: ``"surge"``, which needs a noise scale, or ``"sqrt"``, ``"fourth_root"``, ``"linear"`` or
            ``"keep"``.
        probe_batches: batches of the probe on each rank, at least 4. Half of them go into epsilon and the metric, half
            into the noise scale.
        apply: False to report only; the run then ends in the same bits as without the callback.
        batch_size: samples of one micro-batch on one device, where they cannot be counted; under manual optimization,
            samples of one optimizer step on one device.
        fallback: the law in place of ``"surge"`` where that is refused: one of the other four.

    Attributes:
        result: what was found, with the report; None before, in a run that goes on from a checkpoint, and in the main
            process of ``ddp_spawn`` and ``ddp_fork``, whose ranks keep it.

    Raises:
        MisconfigurationException: for an argument out of its range, ``reference`` together with
            ``reference_batch_size``, and a record that is missing, broken, of another version or of another model.

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
        epsilon: Union[float, Literal["auto", "keep"]] = "auto",  # noqa: UP007
        learning_rate: Law = "surge",
        probe_batches: int = 32,
        apply: bool = True,
        batch_size: Optional[int] = None,  # noqa: UP045
        fallback: PlainLaw = "keep",
    ) -> None:
        for name, size in (("reference_batch_size", reference_batch_size), ("batch_size", batch_size)):
            if size is not None and not (_is_number(size) and size > 0):
                raise MisconfigurationException(f"{name} must be a positive number of samples, got {size!r}")
        if reference is not None and reference_batch_size is not None:
            raise MisconfigurationException(
                "reference and reference_batch_size contradict each other: a record knows its batch size; give one of them"
            )
        if epsilon not in ("auto", "keep") and not _is_number(epsilon):
            raise MisconfigurationException(f"epsilon must be 'auto', 'keep' or a number from 0 up, got {epsilon!r}")
        if learning_rate not in LAWS:
            raise MisconfigurationException(f"learning_rate must be one of {LAWS}, got {learning_rate!r}")
        if fallback not in PLAIN_LAWS:
            raise MisconfigurationException(f"fallback must be one of {PLAIN_LAWS}, got {fallback!r}")
        if not isinstance(probe_batches, int) or probe_batches < MIN_BATCHES:
            raise MisconfigurationException(
                f"probe_batches must be an integer from {MIN_BATCHES} up, got {probe_batches!r}"
            )
        self.reference_batch_size = reference_batch_size
        self.reference = reference
        self.epsilon = epsilon
        self.learning_rate = learning_rate
        self.probe_batches = probe_batches
        self.apply = apply
        self.batch_size = batch_size
        self.fallback = fallback
        self.result: CalibrationResult | None = None
        self._recorded: OptimizerRecord | None = None
        self._applied = _Applied()
        self._phase = _Phase.IDLE
        self._restored: set[str] = set()  # by the checkpoint that was loaded in this fit
        self._watch = Watch()

    def __getstate__(self) -> dict[str, Any]:  # what is looked at stays in this process
        return {**self.__dict__, "_watch": Watch()}

    def state_dict(self) -> dict[str, Any]:
        """The report, whose being there tells a resumed run that the calibration is done, and its changes."""
        state = {**asdict(self._applied), "changes": [asdict(change) for change in self._applied.changes]}
        return {key: value for key, value in state.items() if (key, value) != ("ratio", None)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Marks the calibration as done if it was, and takes up its changes."""
        try:
            self._applied = _Applied.from_state_dict(state_dict)
        except Exception as error:
            rank_zero_warn(f"OptimizerCalibration begins anew: its state in the checkpoint cannot be read ({error!r}).")
            self._applied = _Applied()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets the run of another Trainer, and a checkpoint that was only validated, before one may be loaded."""
        if stage == "fit" and trainer.global_step == 0:
            self._applied = _Applied()
        self._restored = set()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Notices what the module's own ``on_load_checkpoint`` has emptied, and so is not brought back."""
        if trainer.training:
            self._applied = _Applied()  # load_state_dict follows, where the checkpoint is of a run with this callback
        self._restored = {name for name in (OPTIMIZER, SCHEDULERS) if checkpoint.get(name) != []}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out whether this run is to be calibrated, and reads the record if so."""
        self._phase = _Phase.IDLE
        if self._applied.report is not None:
            self._watch.changes, self._watch.ratio = self._applied.changes, self._applied.ratio
            self._watch.take_up(trainer, self._restored)
            self._phase = _Phase.RESUMED
            return
        self.result, self._watch = None, Watch()
        obstacle = _obstacle(trainer)
        if obstacle is not None:
            tell = rank_zero_info if trainer.global_step > 0 and not self.apply else rank_zero_warn
            tell(f"OptimizerCalibration changes nothing: {obstacle}.")
            return
        self._recorded = self._read_record(trainer, pl_module)
        self._phase = _Phase.WAITING

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Calibrates at the first batch, when the module has seen the start of training and of the epoch."""
        phase, self._phase = self._phase, _Phase.IDLE
        samples = SampleCount(self.batch_size)
        if phase is not _Phase.IDLE:
            samples.count(trainer, batch)
        if phase is _Phase.RESUMED:
            self._look_at_batch_size(trainer, samples)
        elif phase is _Phase.WAITING:
            self._calibrate(trainer, pl_module, samples)
        self._watch.look_at_optimizer(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Warns once where something else sets the learning rate, as an ``optimizer_step`` with a warm-up of its own."""
        self._watch.look_at_rates(trainer)

    def _calibrate(self, trainer: Trainer, module: LightningModule, samples: SampleCount) -> None:
        result = decide(self, gather(self, trainer, module, samples, self._recorded))
        if result.problems:
            sentences = [problem[:1].upper() + problem[1:] for problem in result.problems[1:]]
            is_tried = 0 < getattr(trainer, "fast_dev_run", 0) < MIN_BATCHES  # and has too few batches on purpose
            tell = rank_zero_info if is_tried else rank_zero_warn
            tell(f"OptimizerCalibration: {'. '.join([result.problems[0], *sentences])}.")
        if self.apply:
            changes = trainer.strategy.broadcast(result.changes)  # equal by construction, and now for sure
            apply_changes(calibrated(trainer), schedulers_in(trainer), changes)
            set_defaults(calibrated(trainer), changes)
            batch_size = result.effective_batch_size if samples.is_steady else None
            self._applied = _Applied(result.to_text(), changes, batch_size, result.ratio)
            self._watch = Watch(changes, result.ratio)
            self._watch.begin(trainer)
        self.result = result
        rank_zero_info(result.to_text())
        if trainer.is_global_zero:
            _log(trainer, result)

    def _look_at_batch_size(self, trainer: Trainer, samples: SampleCount) -> None:
        """Warns where a run goes on at another batch size than its values are for; accumulation is set by now."""
        before, now = self._applied.batch_size, effective_batch_size(trainer, samples)
        if before is None or now is None or not self._applied.changes:
            return
        begun = accumulated(trainer, scheduled_accumulation(trainer).get(0))  # as the callback has it
        if math.isclose(before / begun, now / accumulated(trainer)):
            return
        rank_zero_warn(
            f"OptimizerCalibration: the run was calibrated for {before:g} samples a step and goes on with {now:g}; its values"
            f" stay those for {before:g}, and a record of the run will have them as those for {now:g}. For the new batch"
            " size, load the weights alone into a new run, with the record of this one up to here as reference, or with the"
            " reference that this one had."
        )

    def _read_record(self, trainer: Trainer, module: LightningModule) -> OptimizerRecord | None:
        if self.reference is None:
            return None
        outcome: Any = trainer.strategy.broadcast(_load(self.reference) if trainer.is_global_zero else None)
        optimizer = trainer.optimizers[0]
        try:
            if isinstance(outcome, RecordError):
                raise outcome
            frozen = [name for name, parameter in named_parameters(module).items() if not parameter.requires_grad]
            outcome.check_model(model_shapes(trainer), frozen)
            return outcome.of_optimizer(class_name(optimizer), [*optimizer_parameters(module, optimizer)])
        except RecordError as error:
            raise MisconfigurationException(f"reference: {error}") from None


def _obstacle(trainer: Trainer) -> str | None:
    if not any(optimizer.param_groups for optimizer in trainer.optimizers):
        return "configure_optimizers returned no optimizer"
    if len(trainer.optimizers) != 1:
        return f"it handles one optimizer, and configure_optimizers returned {len(trainer.optimizers)}"
    if not is_sharded(trainer) and replicas(trainer) is None:  # nobody knows how it spreads gradients
        return (
            f"{type(trainer.strategy).__name__} is not supported here, only one device, DDP, FSDP, ModelParallelStrategy and"
            " DeepSpeed's ZeRO in stages 1 to 3 are"
        )
    without_layers = why_without_layers(trainer)
    if without_layers is not None:
        return without_layers
    if trainer.global_step > 0:
        return (
            f"training goes on at step {trainer.global_step} of a run to which no calibration was applied, and one is only"
            " made before the first step"
        )
    return None


def _is_number(value: Any) -> bool:
    return is_number(value) and 0 <= value < math.inf


def _load(path: str) -> RunRecord | RecordError:
    try:
        return RunRecord.load(path)
    except Exception as error:  # whatever it is, the other ranks are told; its cause they may not be able to read
        return RecordError(str(error))


def _log(trainer: Trainer, result: CalibrationResult) -> None:
    drawn: dict[str, Any] = {}
    with _training_goes_on():
        drawn = figures.of_calibration(result) if figures.available() and trainer.loggers else {}
    for logger in trainer.loggers:
        with _training_goes_on():  # and the other loggers get theirs
            sink = sink_of(logger)
            sink.text("calibration/report", result.to_markdown(), trainer.global_step)
            sink.scalars(result.scalars(), trainer.global_step)
            for tag, figure in drawn.items():
                sink.figure(tag, figure, trainer.global_step)


@contextmanager
def _training_goes_on() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the values are set; a logger must not undo that
        rank_zero_warn(f"OptimizerCalibration could not log its report, training goes on: {error!r}")
