"""What was calibrated, while the run goes on: whether it is in force, and set again in what is made anew."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch.optim import Optimizer

from lightning_gradhist.callbacks._deepspeed import unwrapped
from lightning_gradhist.callbacks._lightning import Trainer, rank_zero_info, rank_zero_warn
from lightning_gradhist.callbacks.calibration import explain
from lightning_gradhist.callbacks.calibration.handoff import is_at, set_defaults, take_up
from lightning_gradhist.callbacks.run_length import horizons
from lightning_gradhist.callbacks.schedulers import schedulers_in, stray_rate
from lightning_gradhist.logging.calibration_result import GroupChange


class Watch:
    """Looks at the optimizer that was calibrated, by the changes that were made in it, and the ratio of learning rates."""

    def __init__(self, changes: Sequence[GroupChange] = (), ratio: float | None = None) -> None:
        self.changes, self.ratio = changes, ratio
        self._optimizer: Optimizer | None = None
        self._schedulers: list[Any] = []
        self._groups = sys.maxsize  # that the optimizer has, as far as it was looked at
        self._rates: dict[int, float] = {}  # by group, while they are looked at

    def begin(self, trainer: Trainer, missing: Sequence[GroupChange] = ()) -> None:
        """Looks at what is there now; ``missing`` is not in force, and not looked at."""
        self._optimizer, self._schedulers = calibrated(trainer), schedulers_in(trainer)
        groups = self._optimizer.param_groups
        written = [change.group for change in self.changes if change.name == "lr" and change not in missing]
        self._groups = len(groups)
        self._rates = {group: float(groups[group]["lr"]) for group in written if group < len(groups)}

    def take_up(self, trainer: Trainer, restored: Collection[str] = ()) -> None:
        """Goes on with what was set, and sets it again in what the user's code has made anew."""
        optimizer = calibrated(trainer)
        missing: list[GroupChange] = []  # in the optimizer that was calibrated all is as it was left
        stray = None
        if optimizer is not self._optimizer:
            missing, stray = take_up(optimizer, horizons(trainer), self.changes, restored)
            set_defaults(optimizer, self.changes)
        self.begin(trainer, missing)
        told = [explain.not_in_force(change, optimizer.param_groups, self.ratio) for change in missing]
        told += [explain.stray_schedule(stray)] if stray else []
        if not told:
            rank_zero_info("OptimizerCalibration: the run goes on with the values it was calibrated to.")
            return
        rank_zero_warn(
            "OptimizerCalibration: the run goes on, and not all that was calibrated is in force."
            f" {'. '.join(told)}. Set it in your code, unless that takes it from a calibrated value; or train with a new"
            " Trainer, which calibrates anew."
        )

    def look_at_optimizer(self, trainer: Trainer) -> None:
        """Notices an optimizer that was made anew, and groups that came later, whose rate may be a calibrated one or not."""
        if not self.changes or len(trainer.optimizers) != 1:
            return
        if calibrated(trainer) is not self._optimizer:
            self.take_up(trainer)
        groups = calibrated(trainer).param_groups
        late, self._groups = self._groups, max(self._groups, len(groups))
        told = []
        for index in range(late, len(groups)):
            alike = {change.name for change in self.changes if is_at(groups[index].get(change.name), change.after)}
            odd = {change.name: change for change in self.changes if change.name not in alike}
            told += [explain.not_in_force(replace(change, group=index), groups, self.ratio) for change in odd.values()]
        if told:
            rank_zero_warn(
                f"OptimizerCalibration: parameter group {late} came after the calibration. {'. '.join(told)}. Set it in your"
                " code, unless that takes it from a calibrated value."
            )

    def look_at_rates(self, trainer: Trainer) -> None:
        """Warns once where something else sets the learning rate, as an ``optimizer_step`` with a warm-up of its own."""
        optimizer = calibrated(trainer)
        group = stray_rate(optimizer, self._schedulers, self._rates)
        if group is None:
            return
        # Where the recorded rate took the place of the optimizer's, their factor says nothing of those that are set elsewhere.
        change = next(change for change in self.changes if (change.name, change.group) == ("lr", group))
        ratio, self._rates = self.ratio or change.factor, {}
        then = "leave it there as it was in the recorded run" if ratio == 1 else f"multiply it there by {ratio:.4g}"
        rank_zero_warn(
            f"OptimizerCalibration: at step {trainer.global_step} the learning rate of parameter group {group} is"
            f" {float(optimizer.param_groups[group]['lr']):.4g}, which neither the calibration nor a scheduler that it"
            " knows has set. If what did (optimizer_step, a callback, a scheduler of its own) does not take it from a calibrated"
            f" rate, {then}, or pass learning_rate='keep'."
        )


def calibrated(trainer: Trainer) -> Optimizer:
    """The optimizer that is calibrated; where ZeRO steps with it, not ZeRO's own."""
    found: Optimizer = unwrapped(trainer.optimizers[0])
    return found
