"""What is handed to optimizer and schedulers, as a run then goes on with it."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from support import Net, final_state, fit, loader
from support import trainer as make_trainer
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LambdaLR, LRScheduler

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.noise.run_record import RunLength, RunRecord
from lightning_gradhist.plan import plan


class OwnRate(torch.optim.Optimizer):
    """An optimizer that makes its own rate, as Adafactor does: ``lr`` is None, and ``eps`` a pair."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": None, "eps": (1e-30, 1e-3)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(1e-2 * parameter.grad.sign())
        return loss


@pytest.mark.filterwarnings("ignore:OptimizerCalibration")
@pytest.mark.parametrize(
    "options",
    [{"apply": False}, {"learning_rate": "keep"}, {"reference_batch_size": 4, "learning_rate": "sqrt"}],
    ids=str,
)
def test_an_optimizer_that_makes_its_own_rate_is_left_alone(tmp_path, options: dict[str, Any]) -> None:
    plain = fit(tmp_path / "a", module=lambda: Net(OwnRate))
    calibration = OptimizerCalibration(**options)
    made = fit(tmp_path / "b", GradientHistogramMonitor(every_n_steps=2), calibration, module=lambda: Net(OwnRate))
    torch.testing.assert_close(final_state(made)["weights"], final_state(plain)["weights"], rtol=0, atol=0)
    said = any("lr is no number" in problem for problem in calibration.result.problems)
    assert said is ("learning_rate" in options and options["learning_rate"] == "sqrt")


@pytest.mark.parametrize(
    ("own", "law"),
    [pytest.param(OwnRate, "keep", id="the same"), pytest.param(torch.optim.AdamW, "sqrt", id="another")],
)
def test_the_record_of_an_optimizer_that_makes_its_own_rate_can_be_used(tmp_path, own: Any, law: str) -> None:
    path = _recorded(tmp_path / "a", lambda: Net(OwnRate))
    assert plan(RunRecord.load(path), [16])[0].to_text()
    calibration = OptimizerCalibration(reference=path, learning_rate=law, epsilon="keep")
    made = fit(tmp_path / "b", calibration, module=lambda: Net(own), data=loader(32, samples=256))
    assert calibration.result.problems == () and calibration.result.ratio == (2 if law == "sqrt" else 1)
    assert made.optimizers[0].param_groups[0]["lr"] == (pytest.approx(2e-3) if law == "sqrt" else None)


class Frozen(Net):
    """A frozen group, and the rates in force at each step."""

    def __init__(self, rates: tuple[float, float]) -> None:
        super().__init__()
        self.group_rates, self.seen = rates, []

    def configure_optimizers(self) -> Any:
        groups = [
            {"params": part.parameters(), "lr": rate}
            for part, rate in zip([self.body, self.head], self.group_rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups)
        return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 16, eta_min=2e-3), "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups])


@pytest.mark.parametrize("rates", [(1e-3, 1e-2), (0.0, 1e-2)], ids=["", "frozen"])
def test_the_floor_of_a_schedule_is_carried_over_with_it(tmp_path, rates: tuple[float, float]) -> None:
    plain = fit(tmp_path / "a", module=lambda: Frozen(rates)).lightning_module.seen
    calibration = OptimizerCalibration(reference_batch_size=2, learning_rate="sqrt", epsilon="keep")
    made = fit(tmp_path / "b", calibration, module=lambda: Frozen(rates)).lightning_module.seen
    torch.testing.assert_close(torch.tensor(made), 2 * torch.tensor(plain))
    assert calibration.result.ratio == 2


class OwnWarmUp(Net):
    """Its ``optimizer_step`` warms up, as in Lightning's docs."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (self.trainer.global_step + 1) / 8)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


class SetsRates(L.Callback):
    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-2 / (1 + trainer.current_epoch)


class Forgetful(CosineAnnealingLR):
    """It saves its steps alone."""

    def state_dict(self) -> Any:
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def get_lr(self) -> Any:
        share = 0.5 + 0.5 * math.cos(math.pi * self.last_epoch / self.T_max)
        return [self.eta_min + share * (base - self.eta_min) for base in self.base_lrs]


class Half(CosineAnnealingLR):
    """It saves its base rates, and not its floor."""

    get_lr = Forgetful.get_lr

    def state_dict(self) -> Any:
        return {name: value for name, value in super().state_dict().items() if name != "eta_min"}


class Nested(CosineAnnealingLR):
    """It saves all, under names of its own."""

    def state_dict(self) -> Any:
        return {"state": super().state_dict()}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict["state"])


@pytest.mark.parametrize("kind", [CosineAnnealingLR, Forgetful, Half, Nested])
def test_a_scheduler_that_does_not_save_its_rates_has_the_calibrated_ones_in_a_resumed_run(tmp_path, kind: Any) -> None:
    def module() -> Any:
        return Net(scheduler=lambda optimizer: kind(optimizer, 64, eta_min=1e-3))

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    seen: list[float] = []
    options = {"reference_batch_size": 2, "learning_rate": "sqrt", "epsilon": "keep"}
    made = fit(tmp_path, OptimizerCalibration(**options), Rates(), module=module, max_epochs=2)
    expected, seen = seen, []
    made = fit(tmp_path, OptimizerCalibration(**options), Rates(), module=module)
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path, OptimizerCalibration(**options), Rates(), max_epochs=2)
    made.fit(module(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert seen == pytest.approx(expected)


OPTIONS: dict[str, Any] = {"reference_batch_size": 2, "learning_rate": "sqrt", "epsilon": 1e-12}  # of batches of 8


class Dropped(Net):
    """Its ``on_load_checkpoint`` does not take some of the checkpoint."""

    def __init__(self, *keys: str) -> None:
        super().__init__(scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 64))
        self.keys = keys

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update({key: [] for key in self.keys})


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("keys", [("optimizer_states", "lr_schedulers"), ("optimizer_states",), ("lr_schedulers",)])
def test_what_a_checkpoint_does_not_bring_back_is_set_again(tmp_path, keys: tuple[str, ...]) -> None:
    made = fit(tmp_path, OptimizerCalibration(**OPTIONS), module=Dropped)
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path, OptimizerCalibration(**OPTIONS), max_epochs=2)
    made.fit(Dropped(*keys), loader(), ckpt_path=tmp_path / "half.ckpt")
    group = made.optimizers[0].param_groups[0]
    assert (group["initial_lr"], group["eps"]) == (pytest.approx(2e-2), 1e-12)
    assert made.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([2e-2])
    assert 1e-2 < group["lr"] <= 2e-2


def test_what_a_checkpoint_brings_back_otherwise_is_told_of(tmp_path) -> None:
    class Rewritten(Net):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["optimizer_states"][0]["param_groups"][0].update(lr=1e-2)

    fit(tmp_path, OptimizerCalibration(**OPTIONS), module=Rewritten).save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path, OptimizerCalibration(**OPTIONS), max_epochs=2)
    with pytest.warns(UserWarning, match="lr of parameter group 0 is 0.01; calibrated, 0.01 becomes 0.02") as caught:
        made.fit(Rewritten(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert len([one for one in caught if "OptimizerCalibration" in str(one.message)]) == 1
    assert made.optimizers[0].param_groups[0]["lr"] == 1e-2


class Table(LRScheduler):
    """It has absolute rates."""

    def get_lr(self) -> list[float]:
        return [[1e-2, 8e-3, 6e-3][min(self.last_epoch, 2)]]


def test_a_scheduler_that_comes_later_and_would_not_follow_is_told_of(tmp_path) -> None:
    fit(tmp_path, OptimizerCalibration(**OPTIONS)).save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path, OptimizerCalibration(**OPTIONS), max_epochs=2)
    module = Net(scheduler=Table)
    module.on_load_checkpoint = lambda checkpoint: checkpoint.update(lr_schedulers=[])
    with pytest.warns(UserWarning, match="not all that was calibrated is in force. Table .* would not follow"):
        made.fit(module, loader(), ckpt_path=tmp_path / "half.ckpt")


class Decays(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.3


@pytest.mark.parametrize("resumed", [True, False], ids=["resumed", "a second fit with the same optimizer"])
def test_a_rate_that_the_run_has_lowered_is_in_force(tmp_path, resumed: bool) -> None:
    class Kept(Net):
        def configure_optimizers(self) -> Any:
            self.optimizer = getattr(self, "optimizer", None) or super().configure_optimizers()
            return self.optimizer

    made = fit(tmp_path, OptimizerCalibration(**OPTIONS), Decays(), module=Kept)
    rate = made.optimizers[0].param_groups[0]["lr"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="OptimizerCalibration")
        if resumed:
            made.save_checkpoint(tmp_path / "half.ckpt")
            made = make_trainer(tmp_path, OptimizerCalibration(**OPTIONS), max_epochs=2)
            made.fit(Kept(), loader(), ckpt_path=tmp_path / "half.ckpt")
        else:
            made.fit_loop.max_epochs = 2
            made.fit(made.lightning_module, loader())
            rate *= 0.3
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(rate)


class Tried(Net):
    """Whose rate and batch size may be tried."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__(lambda p: torch.optim.AdamW(p, lr=self.lr))
        self.lr, self.batch_size = 1e-3, batch_size

    def train_dataloader(self) -> Any:
        return loader(self.batch_size)


class TriesRates(LearningRateFinder):
    """Where an epoch starts, as Lightning's documentation has it; it restores a checkpoint of its own."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in (0, 2):
            self.lr_find(trainer, pl_module)


class TriesSizes(BatchSizeFinder):
    on_fit_start = TriesRates.on_fit_start

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.scale_batch_size(trainer, pl_module)


@pytest.mark.parametrize(
    ("finder", "batch_size"),
    [
        pytest.param(lambda: TriesRates(num_training_steps=5), 8, id="rates"),
        pytest.param(lambda: TriesSizes(max_trials=2, steps_per_trial=2), 4, id="batch sizes"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False], ids=["the finder first", "the calibration first"])
def test_a_run_in_which_something_is_tried_where_it_starts_is_calibrated(
    tmp_path, finder: Any, batch_size: int, is_first: bool
) -> None:
    calibration = OptimizerCalibration(**OPTIONS)
    callbacks = [finder(), calibration][:: 1 if is_first else -1]
    trainer = make_trainer(tmp_path, *callbacks)
    trainer.fit(Tried())
    assert calibration.result.effective_batch_size == batch_size
    group = trainer.optimizers[0].param_groups[0]
    tried_or_own = calibration.result.changes[0].before
    assert group["lr"] == pytest.approx(tried_or_own * math.sqrt(batch_size / 2))


def test_a_resumed_run_in_which_rates_are_tried_is_told_of_another_batch_size(tmp_path) -> None:
    made = make_trainer(tmp_path, OptimizerCalibration(**OPTIONS), max_epochs=2)
    made.fit(Tried())
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(
        tmp_path, OptimizerCalibration(**OPTIONS), TriesRates(num_training_steps=2, update_attr=False), max_epochs=4
    )
    with pytest.warns(UserWarning, match="calibrated for 8 samples a step and goes on with 16"):
        made.fit(Tried(16), ckpt_path=tmp_path / "half.ckpt")


def test_one_callback_calibrates_each_new_run_in_which_rates_are_tried(tmp_path) -> None:
    calibration = OptimizerCalibration(**OPTIONS)
    for folder, batch_size in (("a", 8), ("b", 32)):
        finder = LearningRateFinder(num_training_steps=2, update_attr=False)
        make_trainer(tmp_path / folder, finder, calibration).fit(Tried(batch_size))
        assert calibration.result.ratio == pytest.approx(math.sqrt(batch_size / 2))


def test_a_checkpoint_without_a_calibration_is_not_taken_for_calibrated(tmp_path) -> None:
    fit(tmp_path, module=Tried).save_checkpoint(tmp_path / "plain.ckpt")
    made = fit(tmp_path, OptimizerCalibration(**OPTIONS), module=Tried)
    made.fit_loop.max_epochs = 2
    with pytest.warns(
        UserWarning, match="changes nothing: training goes on at step 16 of a run to which no calibration"
    ):
        made.fit(made.lightning_module, loader(), ckpt_path=tmp_path / "plain.ckpt")
    assert made.optimizers[0].param_groups[0]["lr"] == 1e-3


def test_a_rate_that_a_plateau_has_lowered_to_what_it_was_is_in_force(tmp_path) -> None:
    class Plateau(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=0)
            return [optimizer], [{"scheduler": scheduler, "monitor": "step"}]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("step", -float(self.global_step), on_epoch=True, on_step=False)
            return super().training_step(batch, batch_idx)

    fit(tmp_path, OptimizerCalibration(**OPTIONS), module=Plateau, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path, OptimizerCalibration(**OPTIONS), max_epochs=3, max_steps=33)
    made.fit(Plateau(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2)


class Absolute(torch.optim.lr_scheduler.LRScheduler):
    def get_lr(self) -> Any:
        return [1e-2 for _ in self.optimizer.param_groups]


@pytest.mark.parametrize(
    ("module", "lr", "told"),
    [
        pytest.param(lambda: Net(), 2e-2, None, id="another module like it"),
        pytest.param(
            lambda: Net(lambda p: torch.optim.AdamW(p, lr=5e-3)),
            5e-3,
            "is 0.005; .* multiply it by 2",
            id="another rate",
        ),
        pytest.param(
            lambda: Net(scheduler=lambda o: Absolute(o)),
            1e-2,
            "is 0.01; .*Absolute .* would not follow",
            id="absolute rates",
        ),
    ],
)
def test_a_second_fit_tells_of_what_is_not_in_force(tmp_path, module: Any, lr: float, told: str | None) -> None:
    made = fit(tmp_path, OptimizerCalibration(**OPTIONS))
    made.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        made.fit(module(), loader())
    group = made.optimizers[0].param_groups[0]
    assert (group["lr"], group["eps"]) == (pytest.approx(lr), 1e-12)


@pytest.mark.parametrize("optimizer", [lambda p: torch.optim.AdamW(p, lr=1e-2), lambda p: ALTO(p, lr=1e-2)])
def test_an_optimizer_that_is_made_anew_in_mid_run_has_the_values_again(tmp_path, optimizer: Any) -> None:
    class MadeAnew(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.setup_optimizers(self.trainer)

    calibration = OptimizerCalibration(**OPTIONS)
    made = fit(tmp_path, calibration, module=lambda: MadeAnew(optimizer), max_epochs=2)
    group = made.optimizers[0].param_groups[0]
    assert {change.name: group[change.name] for change in calibration.result.changes} == {
        change.name: pytest.approx(change.after) for change in calibration.result.changes
    }


AVERAGING = StochasticWeightAveraging(swa_lrs=5e-3, swa_epoch_start=2, annealing_epochs=1)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler", "ignore:Swapping scheduler")
@pytest.mark.parametrize(
    ("module", "callbacks", "step"),
    [
        pytest.param(lambda: OwnWarmUp(), [], 0, id="optimizer_step"),
        pytest.param(lambda: Net(), [SetsRates()], 16, id="a callback"),
        pytest.param(lambda: Net(), [AVERAGING], 32, id="a scheduler of a callback"),
    ],
)
def test_a_rate_that_the_run_sets_itself_is_told_of_once(tmp_path, module: Any, callbacks: Any, step: int) -> None:
    options = {"reference_batch_size": 2, "learning_rate": "sqrt", "epsilon": "keep"}
    with pytest.warns(UserWarning, match=f"at step {step} the learning rate of .* multiply it there by 2") as caught:
        fit(tmp_path, OptimizerCalibration(**options), *callbacks, module=module, max_epochs=3)
    assert len([one for one in caught if "neither the calibration nor" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*neither the calibration nor")
        fit(tmp_path / "kept", OptimizerCalibration(**options, apply=False), *callbacks, module=module, max_epochs=3)


class PlainWarmUp:
    """No class of torch's, and without base rates."""

    def __init__(self, optimizer: Any, max_lr: float) -> None:
        self.optimizer, self.max_lr, self.steps = optimizer, max_lr, -1
        self.step()

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.max_lr * min(1.0, (self.steps + 1) / 10)

    def state_dict(self) -> Any:
        return {"steps": self.steps}

    def load_state_dict(self, state: Any) -> None:
        self.steps = state["steps"]


class Peak(LRScheduler):
    """Its rates have nothing to do with the optimizer's."""

    def __init__(self, optimizer: Any, peak_lr: float) -> None:
        self.peak_lr = peak_lr
        super().__init__(optimizer)

    def get_lr(self) -> Any:
        return [self.peak_lr * min(1.0, (self.last_epoch + 1) / 10) for _ in self.base_lrs]


class Scheduled(Net):
    def __init__(self, lr: float, scheduler: Any) -> None:
        super().__init__(lambda p: torch.optim.Adam(p, lr=lr), scheduler)
        self.highest = 0.0

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.highest = max(self.highest, optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("lr", "scheduler"),
    [
        pytest.param(1e-3, lambda o: PlainWarmUp(o, 1e-2), id="a plain class"),
        pytest.param(1e-3, lambda o: Peak(o, 1e-2), id="a scheduler with a rate of its own"),
        pytest.param(
            1.0, lambda o: LambdaLR(o, lambda s: 1e-2 * min(1.0, (s + 1) / 10)), id="a function on a rate of 1"
        ),
        pytest.param(1e-3, lambda o: CyclicLR(o, 1e-3, 1e-2, 10, cycle_momentum=False), id="between two rates"),
    ],
)
def test_a_schedule_of_its_own_takes_the_ratio_alone(tmp_path, lr: float, scheduler: Any) -> None:
    path = _recorded(tmp_path / "a", lambda: Scheduled(lr, scheduler))
    assert RunRecord.load(path).optimizers[0].learning_rates == []
    calibration = OptimizerCalibration(reference=path, learning_rate="sqrt", epsilon="keep")
    made = fit(tmp_path / "b", calibration, module=lambda: Scheduled(lr, scheduler), data=loader(32, samples=512))
    assert made.lightning_module.highest == pytest.approx(2e-2) and calibration.result.learning_rate is None
    assert "so only the ratio is used: each of them times 2" in calibration.result.reasons[-1]


class OfBaseRates(LRScheduler):
    def get_lr(self) -> Any:
        return [base / (1 + self.last_epoch) for base in self.base_lrs]


class WarmUpOfItsOwn(Net):
    """Whose schedule reads the module, and so cannot be tried."""

    def __init__(self, lr: float) -> None:
        super().__init__(lambda parameters: torch.optim.AdamW(parameters, lr), lambda o: LambdaLR(o, self.share))
        self.warm_up = 4

    def share(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warm_up)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(lambda lr: Net(lambda p: torch.optim.AdamW(p, lr), OfBaseRates), id="a class of the user's"),
        pytest.param(WarmUpOfItsOwn, id="a function that reads the module"),
        pytest.param(
            lambda lr: Net(
                lambda p: torch.optim.AdamW(p, lr), lambda o: LambdaLR(o, lambda s: min(1.0, (s + 1) / 1000))
            ),
            id="a warm-up that is longer than the run",
        ),
    ],
)
def test_the_recorded_rate_is_used_where_a_schedule_has_shares_of_it(tmp_path, module: Any) -> None:
    path = _recorded(tmp_path / "a", lambda: module(1e-2))
    assert RunRecord.load(path).optimizers[0].learning_rates == [1e-2]
    calibration = OptimizerCalibration(reference=path, learning_rate="sqrt", epsilon="keep")
    fit(tmp_path / "b", calibration, module=lambda: module(3e-2), data=loader(32, samples=512))
    assert calibration.result.learning_rate == pytest.approx(2e-2)


@pytest.mark.parametrize("share", [lambda s: (s + 1) * 4000**-1.5 / 8, lambda s: 1 + s / 4], ids=["Noam's", "beyond 1"])
def test_the_rate_of_a_warm_up_that_is_cut_short_is_not_told_where_it_is_none(tmp_path, share: Any) -> None:
    path = _recorded(tmp_path, lambda: Net(lambda p: torch.optim.AdamW(p, 1.0), lambda o: LambdaLR(o, share)))
    assert RunRecord.load(path).optimizers[0].learning_rates == []


class Stops(L.Callback):
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = True


def test_a_late_peak_of_a_long_run_is_a_share_of_the_rate(tmp_path) -> None:
    """Not each of the 4,000 steps is looked at."""
    module = lambda: Net(scheduler=lambda o: LambdaLR(o, lambda s: s / 2470 if s <= 2470 else 0.1))  # noqa: E731
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=2), Stops(), module=module, max_epochs=250)
    assert RunRecord.load(tmp_path / "calibration.json").optimizers[0].learning_rates == [1e-2]


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_of_rates_set_by_hand_the_ratio_alone_is_told(tmp_path) -> None:
    small = lambda: OwnWarmUp(lambda p: torch.optim.AdamW(p, lr=1e-3))  # noqa: E731
    path = _recorded(tmp_path / "a", small)
    recorded = RunRecord.load(path).optimizers[0]
    assert recorded.learning_rates == [] and recorded.length == RunLength(64, made=64)
    options = {"reference": path, "learning_rate": "sqrt", "epsilon": "keep"}
    data, told = loader(32, samples=256), "neither the calibration nor .* multiply it there by 2, or"
    with pytest.warns(UserWarning, match=told):
        made = fit(tmp_path / "b", OptimizerCalibration(**options), module=small, data=data, max_steps=4)
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path, OptimizerCalibration(**options), max_epochs=2, max_steps=8)
    with pytest.warns(UserWarning, match=told):
        made.fit(small(), data, ckpt_path=tmp_path / "half.ckpt")


def test_rates_set_by_hand_are_left_at_the_batch_size_of_the_record(tmp_path) -> None:
    calibration = OptimizerCalibration(reference=_recorded(tmp_path / "a", Net), epsilon="keep")
    with pytest.warns(UserWarning, match="leave it there as it was in the recorded run"):
        fit(tmp_path / "b", calibration, module=lambda: OwnWarmUp(lambda p: torch.optim.AdamW(p, lr=1e-3)))


def test_another_module_is_told_the_rate_of_a_record_and_no_factor(tmp_path) -> None:
    path = _recorded(tmp_path / "a", Net)
    of_rate = lambda lr: Net(lambda p: torch.optim.AdamW(p, lr=lr))  # noqa: E731
    made = fit(tmp_path / "b", OptimizerCalibration(reference=path, epsilon="keep"), module=lambda: of_rate(1e-3))
    made.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="is 0.005, and 0.01 where it is calibrated"):
        made.fit(of_rate(5e-3), loader())


def test_a_monitor_that_comes_when_a_run_is_resumed_records_the_rate(tmp_path) -> None:
    """Where the schedule has fallen already."""
    module = lambda: Net(scheduler=lambda o: LambdaLR(o, lambda s: max(0.0, 1 - s / 40)))  # noqa: E731
    fit(tmp_path / "a", module=module).save_checkpoint(tmp_path / "half.ckpt")
    made = make_trainer(tmp_path / "b", GradientHistogramMonitor(every_n_steps=1), max_epochs=2)
    made.fit(module(), loader(), ckpt_path=tmp_path / "half.ckpt")
    rate = made.optimizers[0].param_groups[0]["initial_lr"]
    assert RunRecord.load(tmp_path / "b" / "calibration.json").optimizers[0].learning_rates == [rate]


class Outside(Net):
    """Its optimizer has a parameter that is none of the module's."""

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.parameters(), *self.others], 1e-2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.others[0].sum().square()

    @property
    def others(self) -> Any:
        return self.__dict__.setdefault("apart", [nn.Parameter(torch.ones(3))])


def test_parameters_outside_the_module_are_in_the_record(tmp_path) -> None:
    path = _recorded(tmp_path / "a", Outside)
    assert RunRecord.load(path).optimizers[0].parameters[-1] == "parameter_6"
    calibration = OptimizerCalibration(reference=path, learning_rate="sqrt", epsilon="keep")
    fit(tmp_path / "b", calibration, module=Outside, data=loader(32, samples=512))
    assert calibration.result.learning_rate == pytest.approx(2e-2)
    assert "of the recorded rate" in " ".join(calibration.result.reasons)


class HalfOwnRate(OwnRate):
    """Its second group has a rate."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        self.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "lr": 1e-2})


def test_no_rate_of_a_group_is_recorded_as_that_of_another(tmp_path) -> None:
    path = _recorded(tmp_path, lambda: Net(HalfOwnRate))
    assert RunRecord.load(path).optimizers[0].learning_rates == []


class TwoParts(L.LightningModule):
    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.backbone, self.head, self.make_optimizer = nn.Linear(8, 16), nn.Linear(16, 3), optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(torch.relu(self.backbone(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def thaw() -> Any:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1, should_align=False)


def test_a_group_that_comes_later_begins_with_the_calibrated_values(tmp_path) -> None:
    module = lambda: TwoParts(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-1))  # noqa: E731
    calibration = OptimizerCalibration(reference_batch_size=2, learning_rate="sqrt")
    with pytest.warns(UserWarning, match="parameter group 1 came after the calibration.*multiply it by 2") as caught:
        made = fit(tmp_path, thaw(), calibration, module=module, max_epochs=3)
    first, late = made.optimizers[0].param_groups
    assert late["eps"] == first["eps"] == calibration.result.epsilon < 1e-1
    assert len([one for one in caught if "came after" in str(one.message)]) == 1


class FrozenPart(TwoParts):
    """Its backbone is frozen for the whole run."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self.backbone.requires_grad_(False)


def _recorded(folder: Any, module: Any, *callbacks: Any) -> str:
    callbacks = (*callbacks, GradientHistogramMonitor(every_n_steps=2, batch_size=8))
    fit(folder, *callbacks, module=module, data=loader(8, samples=256), max_epochs=2)
    return str(folder / "calibration.json")


@pytest.mark.filterwarnings("ignore:OptimizerCalibration. parameter group 1 came after")
@pytest.mark.parametrize(
    ("recorded", "thawing", "lr"),
    [
        pytest.param(TwoParts, True, 1e-2, id="thawed in both"),
        pytest.param(FrozenPart, True, 1e-2, id="frozen for good in the record"),
        pytest.param(FrozenPart, False, 1e-3, id="frozen in the record alone"),
    ],
)
def test_a_run_with_frozen_parameters_is_calibrated_from_a_record_of_the_same_model(
    tmp_path, recorded: Any, thawing: bool, lr: float
) -> None:
    """With the recorded rate of the same groups, 1e-2, and else with its own, 1e-3."""
    first = [thaw()] if recorded is TwoParts else []
    path = _recorded(tmp_path / "a", lambda: recorded(lambda p: torch.optim.AdamW(p, lr=1e-2)), *first)
    calibration = OptimizerCalibration(reference=path, learning_rate="sqrt", epsilon="keep")
    made = fit(
        tmp_path / "b",
        *([thaw()] if thawing else []),
        calibration,
        module=lambda: TwoParts(lambda p: torch.optim.AdamW(p, lr=1e-3)),
        data=loader(32, samples=64),
        max_epochs=2,
    )
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(2 * lr)
    assert len(made.optimizers[0].param_groups) == 1 + thawing


class Grows(Net):
    """It has another layer from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.more = nn.Linear(3, 3)
            self.optimizers().add_param_group({"params": self.more.parameters()})


@pytest.mark.filterwarnings("ignore:OptimizerCalibration. parameter group 1 came after")
@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize(
    ("module", "callbacks"),
    [
        pytest.param(Net, lambda: [ModelPruning("l1_unstructured", amount=0.2)], id="pruned"),
        pytest.param(Grows, lambda: [], id="growing"),
    ],
)
def test_a_run_that_changes_its_parameters_can_use_its_record(tmp_path, module: Any, callbacks: Any, fits: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    made = fit(tmp_path / "a", monitor, *callbacks(), module=module, max_epochs=3)
    if fits == 2:
        made.fit_loop.max_epochs = 4
        made.fit(made.lightning_module, loader())
    path = str(tmp_path / "a" / "calibration.json")
    assert all("." in name and "_orig" not in name for name in RunRecord.load(path).optimizers[0].parameters)
    calibration = OptimizerCalibration(reference=path, learning_rate="sqrt", epsilon="keep")
    fit(tmp_path / "b", calibration, *callbacks(), module=module, data=loader(16), max_epochs=2)
    assert calibration.result.ratio == pytest.approx(math.sqrt(2))
    assert "of the recorded rate" in " ".join(calibration.result.reasons)


@pytest.mark.parametrize(
    ("eps", "told"),
    [
        pytest.param((1e-6, 1e-8), None, id="as all others"),
        pytest.param(
            (1e-6, 1e-5), "eps of parameter group 2 is 1e-08; calibrated, 1e-05 becomes 1e-12", id="another one"
        ),
    ],
)
def test_the_epsilon_of_a_group_that_comes_later_is_looked_at(tmp_path, eps: Any, told: str | None) -> None:
    class Late(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.optimizers().add_param_group({"params": [nn.Parameter(torch.zeros(3))]})

    def optimizer(parameters: Any) -> Any:
        first, *others = parameters
        return torch.optim.AdamW([{"params": [first], "eps": eps[0]}, {"params": others, "eps": eps[1]}], lr=1e-2)

    calibration = OptimizerCalibration(learning_rate="keep", epsilon=1e-12)
    with pytest.warns(UserWarning, match=told) if told else nullcontext():
        made = fit(tmp_path, calibration, module=lambda: Late(optimizer), max_epochs=2)
    assert made.optimizers[0].param_groups[2]["eps"] == (1e-8 if told else 1e-12)


def test_a_group_that_comes_later_begins_with_the_chosen_alpha(tmp_path) -> None:
    calibration = OptimizerCalibration(learning_rate="keep", epsilon="keep", batch_size=1024)
    made = fit(tmp_path, thaw(), calibration, module=lambda: TwoParts(lambda p: ALTO(p, lr=1e-2)), max_epochs=2)
    first, late = made.optimizers[0].param_groups
    assert (late["alpha"], late["explore_beta"]) == (first["alpha"], first["explore_beta"]) == (-5.0, 0.99)


def test_a_group_that_comes_later_in_a_resumed_run_does_too(tmp_path) -> None:
    def module() -> Any:
        return TwoParts(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=1e-1))

    calibration = OptimizerCalibration(learning_rate="keep")
    made = fit(tmp_path / "a", thaw(), calibration, module=module, max_epochs=1)
    made.save_checkpoint(tmp_path / "half.ckpt")
    L.seed_everything(7, verbose=False)
    again = OptimizerCalibration(learning_rate="keep")
    trainer = L.Trainer(
        callbacks=[thaw(), again], max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False
    )
    trainer.fit(module(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [group["eps"] for group in trainer.optimizers[0].param_groups] == [calibration.result.epsilon] * 2


GOOD = {
    "report": "done",
    "changes": [{"group": 0, "name": "eps", "before": 1e-1, "after": 1e-3}],
    "batch_size": 8.0,
    "of a later version": 1,
}


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({"changes": []}, id="no report"),
        pytest.param({**GOOD, "report": 3}, id="a number for a report"),
        pytest.param({**GOOD, "changes": [{**GOOD["changes"][0], "reason": "x"}]}, id="one more key"),
        pytest.param({**GOOD, "changes": [{"group": 0}]}, id="one key less"),
        pytest.param({**GOOD, "changes": [{**GOOD["changes"][0], "after": "auto"}]}, id="text for a number"),
        pytest.param({**GOOD, "changes": 7}, id="a number for a list"),
        pytest.param({**GOOD, "batch_size": "many"}, id="text for a batch size"),
        pytest.param({**GOOD, "batch_size": True}, id="a flag for a batch size"),
        pytest.param({**GOOD, "batch_size": -8.0}, id="a negative batch size"),
        pytest.param({**GOOD, "changes": [{**GOOD["changes"][0], "after": True}]}, id="a flag for a number"),
    ],
)
def test_a_state_that_cannot_be_read_begins_anew(state: dict[str, Any]) -> None:
    calibration = OptimizerCalibration()
    with pytest.warns(UserWarning, match="begins anew: its state in the checkpoint cannot be read"):
        calibration.load_state_dict(state)
    assert calibration.state_dict() == OptimizerCalibration().state_dict()
    calibration.load_state_dict(GOOD)
    assert calibration.state_dict()["changes"] == GOOD["changes"]


class KeyBias(L.LightningModule):
    """Attention of few features, so that the bias of its keys, whose gradient is zero, is 5% of all coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = batch[0].view(-1, 2, 4)
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), eps=1e-6)


def test_an_epsilon_is_not_lowered_for_rounding_noise(tmp_path) -> None:
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8)
    fit(tmp_path, calibration, module=KeyBias)
    lowest = calibration.result.epsilon_range.per_name["attention.in_proj_bias"][0]
    assert lowest < 1e-7  # which is more than 2% of the coordinates
    assert calibration.result.epsilon == 1e-6 and not calibration.result.changes
