from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import Batches, Net, dataset, fit, loader, logged_scalars, trainer
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader

from lightning_gradhist import AdamE, GradientHistogramMonitor, OptimizerCalibration, SurgeLaw
from lightning_gradhist.callbacks.adapt import FACTOR
from lightning_gradhist.intervals import ratio_estimate

STEPS = 48
pytestmark = pytest.mark.filterwarnings("ignore:GradientHistogramMonitor has no logger")


class Plain(L.LightningModule):
    """A linear classifier, whose noise scale is known well after a few steps."""

    def __init__(self, scheduler: Any = None, optimizer: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.scheduler = scheduler
        self.optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, lr=1e-2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("flat", 1.0)
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.scheduler(optimizer), "interval": "step", "monitor": "flat"},
        }


class Rates(L.Callback):
    """The learning rates of each step, the decay of the first group, and the factor that the calibration tells."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []
        self.decay: list[float] = []
        self.factors: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append([float(group["lr"]) for group in optimizer.param_groups])
        self.decay.append(optimizer.param_groups[0]["weight_decay"])
        for callback in trainer.callbacks:
            if isinstance(callback, OptimizerCalibration) and callback.state_dict()["adapted"]:
                self.factors.append(callback.state_dict()["adapted"]["value"])


def calibration(mode: str = "always", **options: Any) -> OptimizerCalibration:
    return OptimizerCalibration(
        **{
            "reference_batch_size": 2,
            "epsilon": "keep",
            "confidence": 0.5,
            "probe_batches": 32,
            "adapt": mode,
            **options,
        }
    )


def run(folder: Path, *callbacks: L.Callback, module: Any = None, steps: int = STEPS, **options: Any) -> Rates:
    """Trains at 32 samples a step, in two micro-batches, so that every step is measured by itself."""
    rates = Rates()
    L.seed_everything(3, verbose=False)
    options = {"max_steps": steps, "max_epochs": -1, "logger": False, **options, "accumulate_grad_batches": 2}
    made = trainer(folder, *callbacks, rates, **options)
    made.fit(module or Plain(), DataLoader(dataset(512), 16))
    return rates


SCHEDULERS = {
    "none": None,
    "one cycle": lambda o: schedules.OneCycleLR(o, 1e-2, total_steps=STEPS + 1),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, STEPS, eta_min=1e-3),
    "warm-up": lambda o: schedules.LambdaLR(o, lambda step: min(1.0, (step + 1) / 20)),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, factor=0.5, patience=9, min_lr=2e-3),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=12), schedules.CosineAnnealingLR(o, STEPS)], [12]
    ),
}


@pytest.mark.parametrize("scheduler", [pytest.param(make, id=name) for name, make in SCHEDULERS.items()])
def test_the_schedule_keeps_its_shape_and_moves_as_a_whole(tmp_path, scheduler: Any) -> None:
    plain = run(tmp_path, module=Plain(scheduler))
    adapted = run(tmp_path, calibration(), GradientHistogramMonitor(every_n_steps=1), module=Plain(scheduler))
    assert len(set(adapted.factors)) > 20 and max(adapted.factors) > 1.05 * min(adapted.factors)
    for step, factor in enumerate(adapted.factors):
        assert adapted.seen[step][0] == pytest.approx(plain.seen[step][0] * factor, rel=1e-9), step


def test_the_factor_is_the_laws_at_the_recent_noise_scale(tmp_path) -> None:
    calibrated, monitor = calibration(), GradientHistogramMonitor(every_n_steps=1)
    run(tmp_path, calibrated, monitor, logger=TensorBoardLogger(tmp_path, name="", version=""))
    samples, value, expected = monitor.noise_records[0].samples, calibrated.result.ratio, {}
    for step in range(1, STEPS + 1):
        known = [s for s in samples[:step] if s["noise_adam"] is not None]
        recent = known[-max(8, len(known) // 4) :]
        noise = ratio_estimate(
            [s["noise_adam"] * s["batch_size"] for s in recent],
            [s["signal_adam"] for s in recent],
            scale=1,
            confidence=0.5,
        )
        ratios = [
            SurgeLaw(b, valid_until=b * math.pi / 2).ratio(32, 2)
            for b in (noise.lower, noise.upper)
            if 0 < b < math.inf
        ]
        if len(recent) < 8 or len(ratios) < 2 or ratios[1] >= 2 * ratios[0]:
            continue
        aim = SurgeLaw(noise.value, valid_until=noise.value * math.pi / 2).ratio(32, 2)
        value *= (min(max(aim, 1), 4) / value) ** (1 - 2 ** (-1 / 8))
        expected[step] = value
    assert len(expected) > 20
    assert logged_scalars(tmp_path, FACTOR) == pytest.approx(expected, rel=1e-6)


def test_a_warmup_goes_one_way_and_ends_at_the_ratio_of_the_record(tmp_path) -> None:
    data = loader(4, samples=1024)
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), module=Plain, data=data, logger=False)
    path = str(tmp_path / "calibration.json")
    whole = calibration(None, reference=path, reference_batch_size=None)
    fit(tmp_path / "whole", whole, module=Plain, data=loader(32, samples=1024), max_steps=1, logger=False)
    blind = calibration("warmup", reference=path, reference_batch_size=None, probe_batches=4)
    run(tmp_path / "blind", blind, GradientHistogramMonitor(every_n_steps=1), steps=1)
    assert blind.result.ratio == whole.result.ratio  # the probe cannot tell
    calibrated = calibration("warmup", reference=path, reference_batch_size=None)
    seen = run(tmp_path / "run", calibrated, GradientHistogramMonitor(every_n_steps=1), steps=144).seen
    end, rates = whole.result.ratio, [rate / 1e-2 for (rate,) in seen]
    assert calibrated.result.ratio == pytest.approx(rates[0]) and rates[0] < 0.95 * end
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(end) and rates[-1] == rates[-5]
    assert any("as far as" in reason for reason in calibrated.result.reasons)


@pytest.mark.parametrize("mode", ["warmup", "always"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, mode: str) -> None:
    def fitted(epochs: int, ckpt: Any = None, batch_size: int = 16) -> tuple[L.Trainer, list[Any], dict[str, Any]]:
        rates, calibrated = Rates(), calibration(mode)
        L.seed_everything(3, verbose=False)
        callbacks = (calibrated, GradientHistogramMonitor(every_n_steps=1), rates)
        options = {"logger": False, "accumulate_grad_batches": 2}
        made = trainer(tmp_path, *callbacks, max_epochs=epochs, **options)
        made.fit(Plain(SCHEDULERS["sequential"]), DataLoader(dataset(512), batch_size), ckpt_path=ckpt)
        return made, rates.seen, calibrated.state_dict()["adapted"]

    _, whole, state = fitted(4)
    assert len({rate for (rate,) in whole[32:]}) > 12
    half, _, _ = fitted(2)
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    _, again, resumed = fitted(4, tmp_path / "half.ckpt")
    assert again == whole[32:]
    assert resumed == state and state["value"] != state["start"]
    with pytest.warns(UserWarning, match="for 32 samples a step and goes on with 64.*adapt moves the rate as for 32"):
        fitted(3, tmp_path / "half.ckpt", batch_size=32)


def test_a_second_fit_starts_anew(tmp_path) -> None:
    calibrated, monitor, rates = calibration(probe_batches=16), GradientHistogramMonitor(every_n_steps=1), Rates()
    made = trainer(tmp_path, calibrated, monitor, rates, logger=False)
    module = Plain()
    made.fit(module, DataLoader(dataset(512), 32))
    made.fit_loop.max_epochs = 2
    made.fit(module, DataLoader(dataset(512), 32))  # Lightning makes the optimizer anew
    assert len(rates.seen) == 32
    assert rates.seen[16] == rates.seen[0] == [pytest.approx(1e-2 * calibrated.result.ratio)]
    assert rates.seen[31] != rates.seen[16]


def test_groups_keep_their_ratios_and_a_rate_in_a_tensor_is_changed_in_place(tmp_path) -> None:
    held = torch.tensor(1e-2)

    def groups(parameters: Any) -> Any:
        weight, bias = parameters
        return torch.optim.Adam(
            [{"params": [weight]}, {"params": [bias], "lr": 3e-3}, {"params": [], "lr": 0.0}], lr=held
        )

    calibrated = calibration()
    seen = run(tmp_path, calibrated, GradientHistogramMonitor(every_n_steps=1), module=Plain(optimizer=groups)).seen
    assert float(held) == pytest.approx(1e-2 * calibrated.state_dict()["adapted"]["value"], rel=1e-5)
    assert seen[-1][0] != seen[0][0]
    for first, second, none in seen:
        assert second == pytest.approx(0.3 * first, rel=1e-5) and none == 0


def test_the_decay_of_the_weights_per_sample_stays(tmp_path) -> None:
    calibrated = calibration(scale_with_batch=["weight_decay"])
    module = Plain(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1))
    rates = run(tmp_path, calibrated, GradientHistogramMonitor(every_n_steps=1), module=module)
    assert len(set(rates.decay)) > 20
    for (rate,), decay in zip(rates.seen, rates.decay, strict=True):
        assert rate * decay == pytest.approx(1e-2 * 0.1 * 16)


def test_others_see_the_rate(tmp_path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    callbacks = (LearningRateMonitor("step"), calibration(), GradientHistogramMonitor(every_n_steps=1))
    seen = run(tmp_path, *callbacks, logger=logger, log_every_n_steps=1, steps=24).seen
    with (tmp_path / "metrics.csv").open(encoding="utf-8") as file:
        logged = {int(row["step"]): float(row["lr-Adam"]) for row in csv.DictReader(file) if row["lr-Adam"]}
    assert len(set(logged.values())) > 12
    for step in range(1, 24):  # at the first it looks before the calibration does
        assert logged[step] == pytest.approx(seen[step][0], rel=1e-6), step


def test_the_bundled_optimizer_follows_too(tmp_path) -> None:
    module = Plain(optimizer=lambda parameters: AdamE(parameters, lr=1e-2))
    rates = run(tmp_path, calibration(), GradientHistogramMonitor(every_n_steps=1), module=module)
    assert len({rate for (rate,) in rates.seen}) > 20


def test_report_only_moves_nothing(tmp_path) -> None:
    rates = run(tmp_path, calibration(apply=False), GradientHistogramMonitor(every_n_steps=1))
    assert {rate for (rate,) in rates.seen} == {1e-2}


class Own:
    """A scheduler that is not torch's, and sets the rate from what it keeps itself."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, *_: Any) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class WithOwn(Plain):
    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


@pytest.mark.filterwarnings("ignore:.*doesn't follow PyTorch's LRScheduler API")
def test_a_scheduler_that_keeps_its_own_rates_is_refused(tmp_path) -> None:
    with pytest.warns(UserWarning, match="Own keeps base rates that cannot be scaled from outside"):
        rates = run(tmp_path, calibration(), GradientHistogramMonitor(every_n_steps=1), module=WithOwn(Own))
    assert {rate for (rate,) in rates.seen} == {1e-2}


def test_a_monitor_that_measures_nothing_is_said(tmp_path) -> None:
    calibrated = calibration(learning_rate="surge", batch_size=32)
    with pytest.warns(UserWarning) as caught:
        fit(tmp_path, calibrated, GradientHistogramMonitor(), module=Plain, data=Batches(32))
    assert any("adapt moves nothing" in str(w.message) for w in caught)


def test_a_run_that_was_calibrated_without_stays(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    without, data = calibration(None, probe_batches=16), DataLoader(dataset(512), 32)
    made = fit(tmp_path / "a", without, monitor, module=Plain(), data=data, logger=False)
    made.save_checkpoint(tmp_path / "half.ckpt")
    rates, monitor = Rates(), GradientHistogramMonitor(every_n_steps=1)
    again = trainer(tmp_path / "b", calibration(), monitor, rates, max_epochs=3, logger=False)
    with pytest.warns(UserWarning, match="adapt moves nothing, as this run was calibrated to a rate that stays"):
        again.fit(Plain(), data, ckpt_path=tmp_path / "half.ckpt")
    assert len(rates.seen) == 32 and len({rate for (rate,) in rates.seen}) == 1


@pytest.mark.parametrize(
    ("monitors", "message"),
    [
        pytest.param([], "this Trainer has none; add GradientHistogramMonitor", id="no monitor"),
        pytest.param([GradientHistogramMonitor(noise_scale=False)], "noise_scale=False. measures none", id="no noise"),
    ],
)
def test_there_must_be_something_to_follow(tmp_path, monitors: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(tmp_path, calibration(), *monitors, module=Net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "sometimes"}, "adapt must be None or one of .*, got 'sometimes'"),
        ({"learning_rate": "sqrt"}, "learning_rate='sqrt' does not take"),
        ({"learning_rate": "greedy", "reference_batch_size": None}, "learning_rate='greedy' does not take"),
        ({"reference_batch_size": None}, "needs the batch size at which the rate is trusted"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        calibration(**options)
