"""The calibration: epsilon and learning rate, set before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, Optional, Union

from torch.optim import Optimizer, RMSprop

from lightning_gradhist.callbacks._lightning import (
    Callback,
    LightningModule,
    MisconfigurationException,
    Trainer,
    rank_zero_info,
    rank_zero_warn,
)
from lightning_gradhist.callbacks.gradients import effective_batch_size, optimizer_parameters, replicas
from lightning_gradhist.callbacks.handoff import apply_changes, base_rate
from lightning_gradhist.callbacks.monitor import model_shapes
from lightning_gradhist.callbacks.probe import ProbeRefusedError, no_trace, probe_gradients, why_impossible
from lightning_gradhist.epsilon import EpsilonRange, choose_epsilon, epsilon_range
from lightning_gradhist.explore import AUTO, explore_choice, resolve_explore, variance_factor
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.noise import GradientMoments, NoiseScale
from lightning_gradhist.report import plots
from lightning_gradhist.report.loggers import sinks
from lightning_gradhist.report.record import OptimizerRecord, RecordError, RunRecord
from lightning_gradhist.report.result import CalibrationResult, GroupChange
from lightning_gradhist.surge import LAWS, RateRatio, choose_ratio

_MIN_BATCHES = 4


class OptimizerCalibration(Callback):
    r"""Sets epsilon and the learning rate before the first step, and shows why.

    At the start of ``fit`` a probe takes ``probe_batches`` batches forward and backward at frozen weights, and leaves no
    trace: parameters, buffers, gradients, optimizer, schedulers, random generators, data order and metrics are as if it
    had not happened.

    *Epsilon.* From the probe's :math:`r = \sqrt{E g^2}`, of gradients as large as the optimizer will see them, comes the
    search space of :func:`lightning_gradhist.epsilon_range`. ``"auto"`` keeps an epsilon at or below the lower end, where
    it is idle, and lowers one above it to that end; it never raises one.

    *Learning rate.* A rate is only ever carried over from one that somebody trusts, times the ratio that a law gives for
    the batch sizes: the optimizer's own rate, trusted at ``reference_batch_size`` samples a step, or that of a recorded
    run (``reference``). ``"surge"`` is :class:`lightning_gradhist.SurgeLaw` with the noise scale ``B_adam``: the one over
    the recorded run, or the probe's, which at the start of a run is far too small, so that the ratio then stays between
    1 and the square root of the ratio of batch sizes. What the data do not support is refused: then ``fallback`` is
    used, and the report says why. A recorded rate is used for the same class of optimizer; another class takes the
    ratio alone, for its own rate.

    *Hand-off.* ``eps`` and ``lr``, and for ``ALTO`` and ``AdamE`` ``alpha`` and ``explore_beta`` where left on
    ``"auto"``, are written into every parameter group, ratios between groups kept; the learning rate also into
    ``initial_lr`` and the schedulers. Once: a resumed run keeps its values. The report goes to the console and the
    loggers, and stays in :attr:`result`.

    The effective batch size is the per-device batch, times accumulation, times data-parallel ranks.

    Args:
        reference_batch_size: samples of an optimizer step at which the optimizer's own learning rate is trusted.
        reference: path of the ``calibration.json`` that ``GradientHistogramMonitor`` left in a run of the same model.
        epsilon: ``"auto"``, ``"keep"``, or a number to be set.
        learning_rate: the law: ``"surge"``, ``"sqrt"``, ``"linear"`` or ``"keep"``.
        probe_batches: batches of the probe on each rank, at least 4. Half of them go into epsilon and the metric, half
            into the noise scale.
        apply: False to report only; the run then ends in the same bits as without the callback.
        batch_size: samples of one micro-batch on one device, where the loader does not tell it.
        fallback: the law in place of ``"surge"`` where that is refused: ``"keep"``, ``"sqrt"`` or ``"linear"``.
        confidence: of the intervals, between 0 and 1.

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
        epsilon: Union[float, str] = "auto",  # noqa: UP007
        learning_rate: str = "surge",
        probe_batches: int = 32,
        apply: bool = True,
        batch_size: Optional[int] = None,  # noqa: UP045
        fallback: str = "keep",
        confidence: float = 0.95,
    ) -> None:
        for name, size in (("reference_batch_size", reference_batch_size), ("batch_size", batch_size)):
            if size is not None and not size > 0:
                raise MisconfigurationException(f"{name} must be a positive number of samples, got {size!r}")
        if reference is not None and reference_batch_size is not None:
            raise MisconfigurationException(
                "reference and reference_batch_size contradict each other: a record knows its batch size; give one of them"
            )
        if epsilon not in ("auto", "keep") and not (isinstance(epsilon, (int, float)) and 0 <= epsilon < math.inf):
            raise MisconfigurationException(f"epsilon must be 'auto', 'keep' or a number from 0 up, got {epsilon!r}")
        if learning_rate not in LAWS:
            raise MisconfigurationException(f"learning_rate must be one of {LAWS}, got {learning_rate!r}")
        if fallback not in LAWS or fallback == "surge":
            raise MisconfigurationException(f"fallback must be 'keep', 'sqrt' or 'linear', got {fallback!r}")
        if probe_batches < _MIN_BATCHES:
            raise MisconfigurationException(f"probe_batches must be at least {_MIN_BATCHES}, got {probe_batches!r}")
        if not 0 < confidence < 1:
            raise MisconfigurationException(f"confidence must lie between 0 and 1, got {confidence!r}")
        self.reference_batch_size = reference_batch_size
        self.reference = reference
        self.epsilon = epsilon
        self.learning_rate = learning_rate
        self.probe_batches = probe_batches
        self.apply = apply
        self.batch_size = batch_size
        self.fallback = fallback
        self.confidence = confidence
        self.result: CalibrationResult | None = None
        self._record: RunRecord | None = None
        self._report: str | None = None
        self._restored = False

    def state_dict(self) -> dict[str, Any]:
        """The report; its being there tells a resumed run that the calibration is done."""
        return {"report": self._report}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Marks the calibration as done if it was."""
        self._report = state_dict["report"]
        self._restored = self._report is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reads the record, so that a wrong path is known before anything else is done."""
        if stage == "fit" and self.reference is not None:
            outcome = trainer.strategy.broadcast(_load(self.reference) if trainer.is_global_zero else None)
            if isinstance(outcome, RecordError):
                raise MisconfigurationException(f"reference: {outcome}")
            self._record = outcome

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calibrates, unless a checkpoint says that it was done."""
        restored, self._restored = self._restored, False
        if restored:
            rank_zero_info("OptimizerCalibration: the run goes on with the values it was calibrated to.")
            return
        self.result = None
        obstacle = _obstacle(trainer)
        if obstacle is not None:
            rank_zero_warn(f"OptimizerCalibration changes nothing: {obstacle}.")
            return
        if self._record is not None:
            try:
                self._record.check_model(model_shapes(pl_module))
            except RecordError as error:
                raise MisconfigurationException(f"reference: {error}") from None
        optimizer = trainer.optimizers[0]
        result = _Calibration(self, trainer, pl_module, optimizer, self._record).run()
        if self.apply:
            changes = trainer.strategy.broadcast(
                result.changes
            )  # equal on every rank by construction, and now for sure
            apply_changes(optimizer, [config.scheduler for config in trainer.lr_scheduler_configs], changes)
        self.result, self._report = result, result.to_text()
        rank_zero_info(self._report)
        if trainer.is_global_zero:
            _log(trainer, result)


def _obstacle(trainer: Trainer) -> str | None:
    if len(trainer.optimizers) != 1:
        return f"it handles one optimizer, and configure_optimizers returned {len(trainer.optimizers)}"
    if replicas(trainer) is None:
        return f"{type(trainer.strategy).__name__} is not supported, only one device and DDP are"
    if trainer.global_step > 0:
        return (
            f"training goes on at step {trainer.global_step} from a checkpoint that was not calibrated, and a calibration"
            " is only made before the first step"
        )
    return None


class _Calibration:
    """One calibration: gathers the evidence, decides, and says why."""

    def __init__(
        self,
        options: OptimizerCalibration,
        trainer: Trainer,
        module: LightningModule,
        optimizer: Optimizer,
        record: RunRecord | None,
    ) -> None:
        self.options = options
        self.trainer = trainer
        self.module = module
        self.optimizer = optimizer
        self.record = record
        self.batch_size = effective_batch_size(trainer, options.batch_size)
        self.micro_batches = trainer.accumulate_grad_batches * trainer.world_size
        self.reasons: list[str] = []
        self.problems: list[str] = []
        self.search_space: EpsilonRange | None = None
        self.noise: NoiseScale | None = None

    def run(self) -> CalibrationResult:
        explore = self._explore_changes()
        if self._needs_probe():
            self._probe()
        eps = self._epsilon_changes()
        ratio, reference_batch_size, from_record = self._ratio()
        rates = self._rate_changes(ratio.value)
        groups = self.optimizer.param_groups
        noise, source = self._noise(from_record)
        result = CalibrationResult(
            applied=self.options.apply,
            optimizer=type(self.optimizer).__name__,
            epsilon=_after(eps, "eps", groups[0].get("eps")),
            epsilon_range=self.search_space,
            learning_rate=_after(rates, "lr", base_rate(groups[0])),
            ratio=ratio.value,
            ratio_interval=(ratio.lower, ratio.upper),
            law=ratio.law,
            noise_scale=noise,
            noise_source=source,
            effective_batch_size=self.batch_size,
            reference_batch_size=reference_batch_size,
            changes=(*rates, *eps, *explore),
            reasons=(*self.problems, *self.reasons),
            gradients=self.noise.first_half.count + self.noise.measurements if self.noise else 0,
        )
        if self.problems:
            rank_zero_warn("OptimizerCalibration: " + ". ".join(self.problems) + ".")
        return result

    def _explore_changes(self) -> list[GroupChange]:
        waiting = [i for i, group in enumerate(self.optimizer.param_groups) if AUTO in (group.get("alpha"),)]
        if waiting and self.batch_size is None:
            self._unknown_batch_size("alpha and explore_beta stay on their choice for small batches")
            return []
        alpha, explore_beta = explore_choice(self.batch_size)
        found = (("alpha", alpha), ("explore_beta", explore_beta))
        return [GroupChange(group, name, AUTO, value) for group in waiting for name, value in found]

    def _needs_probe(self) -> bool:
        wants_epsilon = self.options.epsilon == "auto" and any(map(self._has_epsilon, self.optimizer.param_groups))
        wants_noise = self.options.learning_rate == "surge" and self.options.reference_batch_size is not None
        return wants_epsilon or (wants_noise and self.batch_size is not None)

    def _probe(self) -> None:
        impossible = why_impossible(self.trainer, self.module)
        planned = int(min(self.options.probe_batches, self.trainer.num_training_batches))
        if impossible is None and planned < _MIN_BATCHES:
            impossible = f"the loader has {planned} batches, and a probe needs {_MIN_BATCHES}"
        if impossible is not None:
            self.problems.append(
                f"no probe: {impossible}; set epsilon='keep' and learning_rate='keep', or use a record"
            )
            return
        if planned < self.options.probe_batches:
            self.problems.append(
                f"probe_batches={self.options.probe_batches}, but the loader has {planned} batches, which were used;"
                f" pass probe_batches={planned}"
            )
        parameters = optimizer_parameters(self.module, self.optimizer)
        trained = {name: p for name, p in parameters.items() if p.requires_grad}
        noise = NoiseScale(trained, (self.batch_size or self.micro_batches) / self.micro_batches)
        with no_trace(self.trainer, self.module):
            gradients = probe_gradients(self.trainer, self.module, self.optimizer, planned)
            try:
                self._measure_halves(noise, gradients, planned)
            except ProbeRefusedError as error:  # by the code of the module, and so on every rank
                self._no_probe(str(error))

    def _no_probe(self, why: str) -> None:
        self.problems.append(
            f"no probe: {why}; or do without one: epsilon='keep', and learning_rate='keep' or a record"
        )

    def _measure_halves(self, noise: NoiseScale, gradients: Any, planned: int) -> None:
        first = (planned + 1) // 2
        for gradient in islice(gradients, first):
            noise.update(gradient)
        self._over_ranks(noise)
        if noise.first_half.count < 2:
            self.problems.append(
                f"the probe got {noise.first_half.count} finite gradients from {planned} batches a rank: the loss or its"
                " gradient is not finite, or no parameter has a gradient; look at the first batches with"
                " Trainer(detect_anomaly=True)"
            )
            return
        self._find_search_space(noise.first_half)
        eps = self._epsilon_of(self.optimizer.param_groups[0])
        noise.split(eps, self._batch_ratio())
        for gradient in islice(gradients, planned - first):
            noise.update(gradient)
        self._over_ranks(noise)
        self.noise = noise
        used, wanted = noise.first_half.count + noise.measurements, planned * self.trainer.world_size
        if used < wanted:
            self.problems.append(
                f"{wanted - used} of {wanted} batches of the probe gave no finite gradient, and were left out"
            )

    def _over_ranks(self, noise: NoiseScale) -> None:
        if self.trainer.world_size > 1:
            noise.all_reduce()

    def _find_search_space(self, moments: GradientMoments) -> None:
        second_moment = moments.second_moment(self._batch_ratio())
        histogram = MagnitudeHistogram(list(second_moment)).to(self.module.device)
        histogram.update({name: v.sqrt() for name, v in second_moment.items()})
        try:
            self.search_space = epsilon_range(histogram.cpu())
        except ValueError as error:
            self.problems.append(f"no epsilon range: {error}")

    def _batch_ratio(self) -> float:
        # Adaptor E changes the variance of what enters the second moment; mean and noise scale are the gradient's.
        group = self.optimizer.param_groups[0]
        if "alpha" not in group:
            return self.micro_batches
        waiting = group["alpha"] == AUTO and self.batch_size is not None
        chosen = explore_choice(self.batch_size) if waiting else resolve_explore(group["alpha"], group["explore_beta"])
        return self.micro_batches / variance_factor(*chosen)

    def _has_epsilon(self, group: dict[str, Any]) -> bool:
        # Where eps is something else (Adafactor's pair, Adadelta's step) its range says nothing.
        return isinstance(group.get("eps"), float) and ("betas" in group or isinstance(self.optimizer, RMSprop))

    def _epsilon_of(self, group: dict[str, Any]) -> float:
        if not self._has_epsilon(group):
            return 0.0
        if self.options.epsilon == "auto":
            return choose_epsilon(group["eps"], self.search_space) if self.search_space else group["eps"]
        return group["eps"] if self.options.epsilon == "keep" else float(self.options.epsilon)

    def _epsilon_changes(self) -> list[GroupChange]:
        changes = []
        for index, group in enumerate(self.optimizer.param_groups):
            if not self._has_epsilon(group):
                if self.options.epsilon != "keep":
                    self.problems.append(
                        f"{type(self.optimizer).__name__} has no epsilon of Adam's kind in group {index}, so none is set;"
                        " pass epsilon='keep'"
                    )
                continue
            after = self._epsilon_of(group)
            if after != group["eps"]:
                changes.append(GroupChange(index, "eps", group["eps"], after))
            if self.options.epsilon == "auto" and self.search_space is not None:
                self._explain_epsilon(index, group["eps"], after)
        return changes

    def _explain_epsilon(self, index: int, before: float, after: float) -> None:
        assert self.search_space is not None
        share = f"{self.search_space.damped_share(before):.1%}"
        lower = f"{self.search_space.lower:g}"
        if after == before:
            why = f"eps {before:g} of group {index} is kept: at or below {lower} it is idle, it damps {share} of the coordinates"
        else:
            why = f"eps {before:g} of group {index} would damp {share} of the coordinates; lowered to {lower}, where it is idle"
        self.reasons.append(why)

    def _ratio(self) -> tuple[RateRatio, float | None, bool]:
        law, fallback = self.options.learning_rate, self.options.fallback
        recorded = self._recorded_optimizer()
        reference = recorded.batch_size if recorded else self.options.reference_batch_size
        keep = RateRatio(1.0, 1.0, 1.0, "keep")
        if law == "keep":
            return keep, reference, False
        if reference is None:
            self.problems.append(
                f"learning_rate={law!r} needs a rate that is trusted, so the rate is kept; pass reference_batch_size=... or"
                " reference='.../calibration.json', or learning_rate='keep'"
            )
            return keep, None, False
        if self.batch_size is None:
            self._unknown_batch_size("the learning rate is kept")
            return keep, reference, False
        noise, _ = self._noise(recorded is not None)
        ratio = choose_ratio(
            law, self.batch_size, reference, noise, from_record=recorded is not None, fallback=fallback
        )
        (self.problems if ratio.law != law else self.reasons).extend(ratio.reasons)
        return ratio, reference, recorded is not None

    def _noise(self, from_record: bool) -> tuple[Any, str | None]:
        recorded = self._recorded_optimizer()
        if from_record and recorded is not None:
            return recorded.noise.get("adam"), "record"
        if self.noise is None or self.batch_size is None:
            return None, None
        return self.noise.adam(self.options.confidence), "probe"

    def _recorded_optimizer(self) -> OptimizerRecord | None:
        return self.record.optimizers[0] if self.record and self.record.optimizers else None

    def _rate_changes(self, ratio: float) -> list[GroupChange]:
        own = [base_rate(group) for group in self.optimizer.param_groups]
        trusted = self._trusted_rates(own) if self.options.learning_rate != "keep" else own
        return [
            GroupChange(index, "lr", before, rate * ratio)
            for index, (before, rate) in enumerate(zip(own, trusted, strict=True))
            if before > 0 and rate * ratio != before
        ]

    def _trusted_rates(self, own: Sequence[float]) -> Sequence[float]:
        recorded = self._recorded_optimizer()
        if recorded is None:
            return own
        name = type(self.optimizer).__name__
        if recorded.name == name and len(recorded.learning_rates) == len(own):
            self.reasons.append(f"the rate is carried over from the recorded {recorded.learning_rates}")
            return recorded.learning_rates
        self.reasons.append(
            f"the record is of {recorded.name} with {_groups(recorded.learning_rates)}: {name} with {len(own)} takes the ratio"
            f" of rates from it, and its own rate as that for {recorded.batch_size:g} samples a step"
        )
        return own

    def _unknown_batch_size(self, consequence: str) -> None:
        self.problems.append(
            f"the batch size cannot be read from the training loader, so {consequence}; pass the samples of one micro-batch"
            " on one device, OptimizerCalibration(batch_size=...)"
        )


def _groups(rates: Sequence[float]) -> str:
    return "1 group" if len(rates) == 1 else f"{len(rates)} groups"


def _after(changes: Sequence[GroupChange], name: str, otherwise: Any) -> float | None:
    found = next((change.after for change in changes if change.group == 0 and change.name == name), otherwise)
    return found if isinstance(found, float) else None


def _load(path: str) -> RunRecord | RecordError:
    try:
        return RunRecord.load(path)
    except RecordError as error:
        return error


def _log(trainer: Trainer, result: CalibrationResult) -> None:
    try:
        before = {change.name: change.before for change in reversed(result.changes) if change.group == 0}
        figures = {}
        if plots.available() and trainer.loggers and result.epsilon_range is not None:
            eps = before.get("eps", result.epsilon)
            figures["calibration/epsilon_search_space"] = plots.epsilon_figure(
                result.epsilon_range, eps if isinstance(eps, float) else None, result.epsilon
            )
        if plots.available() and trainer.loggers and result.effective_batch_size and result.reference_batch_size:
            figures["calibration/learning_rate_over_batch_size"] = plots.learning_rate_figure(result)
        for sink in sinks(trainer.loggers):
            sink.text("calibration/report", result.to_markdown(), trainer.global_step)
            sink.scalars(result.scalars(), trainer.global_step)
            for tag, figure in figures.items():
                sink.figure(tag, figure, trainer.global_step)
    except Exception as error:  # the values are set; a logger must not undo that
        rank_zero_warn(f"OptimizerCalibration could not log its report, training goes on: {error!r}")
