from __future__ import annotations

import json
import math
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateMonitor
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from sklearn.datasets import load_digits
from support import Net, OpaqueBatches, TwoOptimizers, dataset, events, fit, loader, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_gradhist import (
    ALTO,
    AdamE,
    GradientHistogramMonitor,
    OptimizerCalibration,
    SurgeLaw,
    batch_size_tradeoff,
    critical_batch_size,
)
from lightning_gradhist.noise.run_record import RunRecord


def with_eps(eps: float, **options: Any) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-2, "eps": eps, **options})


def calibrated(folder: Any, calibration: OptimizerCalibration, **options: Any) -> tuple[Any, dict[str, Any]]:
    made = fit(folder, calibration, **options)
    return calibration.result, made.optimizers[0].param_groups[0]


def record_of_a_run(folder: Any, **options: Any) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GradientHistogramMonitor has no logger")  # the record is all we want
        fit(folder, GradientHistogramMonitor(every_n_steps=1), **{"max_epochs": 4, "logger": False, **options})
    return str(folder / "calibration.json")


def warned(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if "OptimizerCalibration" in str(w.message)]


# --- epsilon ---------------------------------------------------------------------------------------------------------


def test_an_epsilon_that_damps_is_lowered_until_it_is_idle(tmp_path) -> None:
    result, group = calibrated(
        tmp_path, OptimizerCalibration(learning_rate="keep"), module=Net(with_eps(1e-1)), data=loader(4)
    )
    assert group["eps"] == result.epsilon < 1e-1
    space = result.epsilon_range
    assert space.damped_share(1e-1) > 0.25 and space.damped_share(group["eps"]) <= 0.02 < space.damped_share(
        10 * group["eps"]
    )
    assert any("lowered to" in reason for reason in result.reasons)


def test_an_idle_epsilon_is_kept(tmp_path) -> None:
    result, group = calibrated(
        tmp_path, OptimizerCalibration(learning_rate="keep"), module=Net(with_eps(1e-30)), data=loader(4)
    )
    assert group["eps"] == result.epsilon == 1e-30
    assert result.changes == ()


@pytest.mark.parametrize(("epsilon", "expected"), [("keep", 1e-1), (3e-5, 3e-5), (0.0, 0.0)])
def test_epsilon_can_be_kept_or_given(tmp_path, epsilon: Any, expected: float) -> None:
    calibration = OptimizerCalibration(learning_rate="keep", epsilon=epsilon)
    _, group = calibrated(tmp_path, calibration, module=Net(with_eps(1e-1)))
    assert group["eps"] == expected


class DigitsNet(L.LightningModule):
    """Handwritten digits, a bias before a BatchNorm, and a factor on the loss."""

    def __init__(self, loss_scale: float) -> None:
        super().__init__()
        self.loss_scale = loss_scale
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss_scale * nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def digits_run(folder: Any, loss_scale: float, epsilon: str, seed: int) -> tuple[float, Any]:
    """The final loss, not scaled, and what the calibration found."""
    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    calibration = OptimizerCalibration(epsilon=epsilon, learning_rate="keep", probe_batches=8)
    made = trainer(folder, calibration, logger=False, max_epochs=2)
    L.seed_everything(seed, verbose=False)
    module = DigitsNet(loss_scale)
    made.fit(module, DataLoader(data, 64, shuffle=True, drop_last=True))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(module.train().net(data.tensors[0]), data.tensors[1])
    return float(loss), calibration.result


def test_auto_makes_the_run_the_same_at_every_scale_of_the_loss(tmp_path) -> None:
    unscaled = [digits_run(tmp_path, 1.0, "auto", seed)[0] for seed in range(3)]
    seed_noise = float(torch.tensor(unscaled).std())
    for loss_scale in (1e-8, 1e-4, 1e4):
        loss, _ = digits_run(tmp_path, loss_scale, "auto", seed=0)
        assert abs(loss - unscaled[0]) < seed_noise / 4, loss_scale
    default, _ = digits_run(tmp_path, 1e-8, "keep", seed=0)
    assert default > unscaled[0] + 20 * seed_noise


def test_a_bias_whose_gradient_is_rounding_noise_does_not_lower_epsilon(tmp_path) -> None:
    _, result = digits_run(tmp_path, 1.0, "auto", seed=0)
    assert result.epsilon_range.per_name["net.0.bias"][1] < 1e-6 and result.epsilon_range.lower < 1e-8
    assert result.epsilon == 1e-8 and result.changes == ()


class Regression(L.LightningModule):
    """Least squares: per-sample gradients, and so every quantity of the probe, have a closed form."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((8,), 0.5))
        self.make = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (batch[0] @ self.weight - batch[1]).square().mean() / 2

    def configure_optimizers(self) -> Any:
        return self.make([self.weight])


def per_sample_gradients(samples: int) -> Tensor:
    inputs, labels = dataset(samples).tensors
    return (inputs @ torch.full((8,), 0.5) - labels)[:, None] * inputs


@pytest.mark.parametrize("accumulate", [1, 4])
def test_range_and_noise_scale_are_those_of_the_data(tmp_path, accumulate: int) -> None:
    calibration = OptimizerCalibration(reference_batch_size=8, probe_batches=512, apply=False)
    module = Regression(with_eps(1e-8))
    result, _ = calibrated(
        tmp_path,
        calibration,
        module=module,
        data=loader(8, samples=4096),
        accumulate_grad_batches=accumulate,
        max_steps=1,
    )
    gradients = per_sample_gradients(4096).double()
    mean, variance = gradients.mean(0), gradients.var(0)
    rms = (mean.square() + variance / (8 * accumulate)).sqrt().sort().values
    low, high = result.epsilon_range.per_name["weight"]
    assert low == pytest.approx(float(rms[0]), rel=0.13)  # one bin
    assert high == pytest.approx(float(rms[7]), rel=0.13)
    weight = 1 / rms.new_tensor((mean.square() + variance / (8 * accumulate)).sqrt().tolist())
    expected = float((weight * variance).sum() / (weight * mean.square()).sum())
    assert result.noise_scale.lower < expected < result.noise_scale.upper
    assert result.noise_scale.value == pytest.approx(expected, rel=0.15)
    assert result.gradients == 512


HALF = "which holds nothing below 6e-8 but zero"


@pytest.mark.parametrize(
    ("optimizer", "before", "after"),
    [
        pytest.param(torch.optim.AdamW, 1e-8, 1e-7, id="raised"),
        pytest.param(torch.optim.AdamW, 1e-6, 1e-6, id="large enough"),
        pytest.param(AdamE, 1e-8, 1e-8, id="state in single"),
    ],
)
def test_float16_does_not_hold_the_default(tmp_path, optimizer: Any, before: float, after: float) -> None:
    module = Regression(lambda parameters: optimizer(parameters, lr=1e-3, eps=before))
    result, group = calibrated(
        tmp_path, OptimizerCalibration(learning_rate="keep"), module=module, data=loader(4), precision="16-true"
    )
    assert module.weight.dtype == torch.float16
    assert group["eps"] == result.epsilon == after
    assert any(HALF in reason for reason in result.reasons) == (after > before)


@pytest.mark.parametrize(("epsilon", "finite"), [("keep", False), ("auto", True)])
def test_the_floor_of_float16_saves_a_run(tmp_path, epsilon: str, finite: bool) -> None:
    class Small(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) / 1000  # squares of its gradients are 0 in float16

    module = Small(with_eps(1e-8, lr=1e-4))
    calibration = OptimizerCalibration(learning_rate="keep", epsilon=epsilon, probe_batches=4)
    fit(tmp_path, calibration, module=module, data=loader(4), precision="16-true", logger=False, max_steps=4)
    assert bool(module.weight.isfinite().all()) == finite


# --- learning rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "expected"), [("sqrt", 2.0), ("fourth_root", 2**0.5), ("linear", 4.0), ("keep", 1.0)])
def test_the_plain_laws(tmp_path, law: str, expected: float) -> None:
    calibration = OptimizerCalibration(reference_batch_size=4, learning_rate=law, epsilon="keep")
    result, group = calibrated(tmp_path, calibration, data=loader(16))
    assert result.ratio == pytest.approx(expected)
    assert group["lr"] == result.learning_rate == pytest.approx(1e-2 * expected)
    assert result.gradients == 0  # no probe was needed


@pytest.mark.parametrize(("reference", "low", "high"), [(1, 1.0, 4.0), (256, 0.25, 1.0)])
def test_a_probe_stays_between_one_and_the_square_root(tmp_path, reference: int, low: float, high: float) -> None:
    calibration = OptimizerCalibration(reference_batch_size=reference, probe_batches=8)
    result, group = calibrated(tmp_path, calibration, data=loader(16))
    assert low <= result.ratio <= high
    assert group["lr"] == pytest.approx(1e-2 * result.ratio)
    assert result.noise_source == "probe"


def test_a_record_gives_the_full_law_and_what_more_gpus_would_buy(tmp_path) -> None:
    torch.manual_seed(0)  # whose noise scale has a narrow interval
    path = record_of_a_run(tmp_path / "run", data=loader(8, samples=512), module=Net(with_eps(1e-8, lr=4e-3)))
    noise = RunRecord.load(path).optimizers[0].noise["adam"]
    law = SurgeLaw(noise.value, valid_until=math.pi / 2 * noise.value)
    result, group = calibrated(
        tmp_path / "next",
        OptimizerCalibration(reference=path, probe_batches=16),
        module=Net(with_eps(1e-8, lr=0.1)),
        data=loader(32, samples=512),
        max_epochs=1,
    )
    assert result.law == "surge" and result.noise_source == "record"
    assert result.ratio == pytest.approx(law.ratio(32, 8))
    assert group["lr"] == pytest.approx(4e-3 * law.ratio(32, 8))  # the recorded rate, not the 0.1 in the code
    assert any("of the recorded rate" in reason for reason in result.reasons)
    assert result.tradeoff() == batch_size_tradeoff(critical_batch_size(noise), 32)
    assert events(tmp_path / "next").Images("calibration/steps_and_samples_over_batch_size")


def test_another_class_takes_the_ratio_for_its_own_rate(tmp_path) -> None:
    path = record_of_a_run(tmp_path / "run", data=loader(8, samples=1024))
    calibration = OptimizerCalibration(reference=path, probe_batches=16)
    made = fit(tmp_path / "next", calibration, module=Net(lambda p: ALTO(p, lr=0.02)), data=loader(32, samples=512))
    group, result = made.optimizers[0].param_groups[0], calibration.result
    assert group["lr"] == pytest.approx(0.02 * result.ratio)
    assert any("the record is of AdamW" in reason for reason in result.reasons)


def test_groups_keep_their_ratios_and_schedules_follow(tmp_path) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": self.body.parameters(), "lr": 1e-2},
                {"params": self.head.parameters(), "lr": 1e-3, "eps": 1e-30},
            ]
            optimizer = torch.optim.AdamW(groups, eps=1e-1)
            return [optimizer], [{"scheduler": CosineAnnealingLR(optimizer, 100), "interval": "step"}]

    calibration = OptimizerCalibration(reference_batch_size=4, learning_rate="sqrt")
    made = fit(tmp_path, calibration, module=Groups(), data=loader(16, samples=512), max_steps=10)
    first, second = made.optimizers[0].param_groups
    assert (first["initial_lr"], second["initial_lr"]) == (pytest.approx(2e-2), pytest.approx(2e-3))
    assert made.lr_scheduler_configs[0].scheduler.base_lrs == pytest.approx([2e-2, 2e-3])
    factor = (1 + math.cos(math.pi * 10 / 100)) / 2
    assert (first["lr"], second["lr"]) == (pytest.approx(2e-2 * factor), pytest.approx(2e-3 * factor))
    assert first["eps"] == calibration.result.epsilon < 1e-1
    assert second["eps"] == 1e-30


@pytest.mark.parametrize("optimizer", [ALTO, AdamE])
@pytest.mark.parametrize(
    ("batch_size", "expected"),
    [pytest.param(64, (0.5, 0.01), id="small"), pytest.param(1024, (-5.0, 0.99), id="large")],
)
def test_auto_of_the_bundled_optimizers_is_resolved(tmp_path, optimizer: Any, batch_size: int, expected: Any) -> None:
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=4)
    _, group = calibrated(tmp_path, calibration, module=Net(optimizer), data=loader(batch_size, samples=4 * batch_size))
    assert (group["alpha"], group["explore_beta"]) == expected


def test_given_numbers_of_the_bundled_optimizers_are_kept(tmp_path) -> None:
    module = Net(lambda p: AdamE(p, alpha=-1.0, explore_beta=0.5))
    _, group = calibrated(tmp_path, OptimizerCalibration(learning_rate="keep"), module=module, data=loader(4))
    assert (group["alpha"], group["explore_beta"]) == (-1.0, 0.5)


# --- once, and only before the first step ----------------------------------------------------------------------------


def test_a_resumed_run_keeps_its_values(tmp_path) -> None:
    def net() -> Net:
        return Net(with_eps(1e-1), lambda o: OneCycleLR(o, 0.1, total_steps=100))

    calibration = OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt")
    whole = fit(tmp_path / "a", calibration, module=net, data=loader(4), max_epochs=2)
    half = fit(
        tmp_path / "b", OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt"), module=net, data=loader(4)
    )
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)

    again = OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt")
    made = trainer(tmp_path / "c", again, max_epochs=2)
    made.fit(net(), loader(4), ckpt_path=tmp_path / "half.ckpt")
    assert again.result is None and again.state_dict()["report"]
    expected, got = whole.optimizers[0].param_groups[0], made.optimizers[0].param_groups[0]
    assert got["eps"] == expected["eps"] == calibration.result.epsilon
    assert got["max_lr"] == pytest.approx(0.2) and got["lr"] == pytest.approx(expected["lr"])


class Turning:
    """Batches of 4, 8 and 12 samples, in turn, each epoch from the next one on."""

    turn = 0

    def __iter__(self) -> Any:
        Turning.turn += 1
        sizes = [[4, 8, 12][(number + Turning.turn) % 3] for number in range(12)]
        return iter([part.tolist() for part in torch.arange(sum(sizes)).split(sizes)])

    def __len__(self) -> int:
        return 12


@pytest.mark.filterwarnings("ignore:OptimizerCalibration. accumulation changes during the run")
@pytest.mark.parametrize("epsilon", ["auto", "keep"])
@pytest.mark.parametrize(
    ("data", "callbacks", "steps"),
    [
        pytest.param(lambda: DataLoader(dataset(96), batch_sampler=Turning()), [], 12, id="batches vary"),
        pytest.param(
            lambda: loader(8), [GradientAccumulationScheduler({0: 1, 1: 4})], 16, id="accumulation is scheduled"
        ),
    ],
)
def test_a_run_resumed_as_it_was_is_said_nothing_of(
    tmp_path, epsilon: Any, data: Any, callbacks: Any, steps: int
) -> None:
    options = {"reference_batch_size": 2, "learning_rate": "sqrt", "epsilon": epsilon}
    first = fit(tmp_path / "a", OptimizerCalibration(**options), *callbacks, data=data(), max_steps=steps)
    first.save_checkpoint(tmp_path / "half.ckpt")
    made = trainer(tmp_path / "b", OptimizerCalibration(**options), *callbacks, max_epochs=2)
    made.fit(Net(), data(), ckpt_path=tmp_path / "half.ckpt")
    assert made.global_step > steps


def test_a_run_resumed_at_another_batch_size_says_that_its_values_stay(tmp_path) -> None:
    first = fit(tmp_path / "a", OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt"), data=loader(4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    made = trainer(tmp_path / "b", OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt"), max_epochs=2)
    with pytest.warns(
        UserWarning, match="calibrated for 4 samples a step and goes on with 8; its values stay those for 4"
    ):
        made.fit(Net(), loader(8), ckpt_path=tmp_path / "half.ckpt")
    assert made.optimizers[0].param_groups[0]["lr"] == first.optimizers[0].param_groups[0]["lr"]


def test_a_resumed_run_whose_accumulation_a_callback_sets_is_at_the_same_batch_size(tmp_path) -> None:
    def made(folder: str, epochs: int) -> L.Trainer:
        calibration = OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt")
        return trainer(tmp_path / folder, calibration, GradientAccumulationScheduler({0: 4}), max_epochs=epochs)

    first = made("a", 1)
    first.fit(Net(), loader(4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    made("b", 2).fit(Net(), loader(4), ckpt_path=tmp_path / "half.ckpt")  # a warning would be an error


def test_a_resumed_run_of_which_nothing_was_set_may_change_its_batch_size(tmp_path) -> None:
    first = fit(tmp_path / "a", OptimizerCalibration(epsilon="keep", learning_rate="keep"), data=loader(4))
    first.save_checkpoint(tmp_path / "half.ckpt")
    made = trainer(tmp_path / "b", OptimizerCalibration(epsilon="keep", learning_rate="keep"), max_epochs=2)
    made.fit(Net(), loader(8), ckpt_path=tmp_path / "half.ckpt")  # a warning would be an error


def test_a_resumed_run_ends_in_the_weights_of_one_that_was_not_interrupted(tmp_path) -> None:
    def run(folder: str, epochs: int, **resumed: Any) -> Any:
        calibration = OptimizerCalibration(reference_batch_size=2, probe_batches=128)
        made = trainer(tmp_path / folder, calibration, max_epochs=epochs)
        made.fit(Regression(with_eps(1e-1)), DataLoader(dataset(512), 4), **resumed)
        return made

    whole = run("a", 2)
    run("b", 1).save_checkpoint(tmp_path / "half.ckpt")
    made = run("c", 2, ckpt_path=tmp_path / "half.ckpt")
    assert made.global_step == whole.global_step == 256
    assert torch.equal(made.lightning_module.weight, whole.lightning_module.weight)


def test_a_checkpoint_before_the_first_step_is_not_calibrated_again(tmp_path) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 0:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    def calibration() -> OptimizerCalibration:
        return OptimizerCalibration(reference_batch_size=4, learning_rate="sqrt", epsilon="keep")

    first = fit(tmp_path / "a", calibration(), Save(), accumulate_grad_batches=4)
    made = trainer(tmp_path / "b", calibration(), accumulate_grad_batches=4)
    made.fit(Net(), loader(), ckpt_path=tmp_path / "early.ckpt")
    rates = [one.optimizers[0].param_groups[0]["lr"] for one in (first, made)]
    assert rates == [pytest.approx(1e-2 * math.sqrt(8))] * 2


def test_a_run_that_has_begun_is_not_calibrated(tmp_path) -> None:
    made = fit(tmp_path / "a", module=Net(with_eps(1e-1)))
    made.save_checkpoint(tmp_path / "half.ckpt")
    made = trainer(tmp_path / "b", OptimizerCalibration(learning_rate="keep"), max_epochs=2)
    with pytest.warns(UserWarning, match="changes nothing: training goes on at step 16"):
        made.fit(Net(with_eps(1e-1)), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert made.optimizers[0].param_groups[0]["eps"] == 1e-1


def test_one_callback_calibrates_each_new_run(tmp_path) -> None:
    calibration = OptimizerCalibration(learning_rate="keep")
    for run in ("a", "b"):
        _, group = calibrated(tmp_path / run, calibration, module=Net(with_eps(1e-1)), data=loader(4))
        assert group["eps"] < 1e-1


def test_state_survives_a_round_trip() -> None:
    calibration = OptimizerCalibration()
    calibration.load_state_dict({"report": "done", "adapted": None})  # of a release that kept other things
    assert calibration.state_dict() == {"report": "done", "changes": [], "batch_size": None}


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_reaches_console_and_logger(tmp_path, caplog) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        result, _ = calibrated(
            tmp_path, OptimizerCalibration(reference_batch_size=2, probe_batches=16), module=Net(with_eps(1e-1))
        )
    assert result.to_text() in caplog.text
    found = events(tmp_path)
    text = found.Tensors("calibration/report/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == result.to_markdown() and "eps (group 0)" in text
    assert found.Tags()["images"] == ["calibration/epsilon_search_space", "calibration/learning_rate_over_batch_size"]
    scalars = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"] if tag.startswith("calibration")}
    assert scalars["calibration/epsilon"] == pytest.approx(result.epsilon)
    assert scalars["calibration/learning_rate"] == pytest.approx(result.learning_rate)
    assert scalars["calibration/noise_scale"] == pytest.approx(result.noise_scale.value)
    tags = [tag for kind in ("scalars", "histograms", "images", "tensors") for tag in found.Tags()[kind]]
    assert len(tags) == len(set(tags))


def test_a_logger_that_fails_undoes_nothing(tmp_path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            raise OSError("disk full")

    whole = CSVLogger(tmp_path / "whole")
    with pytest.warns(UserWarning, match="could not log its report, training goes on.*disk full"):
        _, group = calibrated(
            tmp_path, OptimizerCalibration(learning_rate="keep"), module=Net(with_eps(1e-1)), data=loader(4),
            logger=[Broken(tmp_path), whole], max_steps=2,
        )  # fmt: skip
    assert group["eps"] < 1e-1
    assert "calibration/epsilon" in (Path(whole.log_dir) / "metrics.csv").read_text()


# --- what changes the answer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_after_backward", "on_before_optimizer_step"])
def test_hooks_of_callbacks_that_the_probe_does_not_call_are_named(tmp_path, hook: str) -> None:
    watch = type("Watch", (L.Callback,), {hook: lambda *args: None})()
    others = (GradientHistogramMonitor(), LearningRateMonitor())
    calibration = OptimizerCalibration(learning_rate="keep")
    fit(tmp_path, calibration, watch, *others, max_steps=2)
    said = [reason for reason in calibration.result.reasons if "does not call" in reason]
    assert said == [
        f"the probe does not call {hook} of Watch: epsilon and noise scale are for gradients without it",
    ]


@pytest.mark.parametrize(
    "hook",
    ["backward", "configure_gradient_clipping", "optimizer_step", "on_after_backward", "on_before_optimizer_step"],
)
def test_hooks_that_the_probe_does_not_call_are_named(tmp_path, hook: str) -> None:
    kind = type("Own", (Net,), {hook: lambda self, *args, **options: getattr(Net, hook)(self, *args, **options)})
    result, _ = calibrated(tmp_path, OptimizerCalibration(learning_rate="keep"), module=kind())
    assert f"the probe does not call {hook} of the module" in " ".join(result.reasons)


def test_a_hook_of_a_parameter_that_the_probe_does_not_call_is_named(tmp_path) -> None:
    module = Net()
    name, parameter = next(iter(module.named_parameters()))
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    result, _ = calibrated(tmp_path, OptimizerCalibration(learning_rate="keep"), module=module)
    assert f"does not call the post-accumulate-grad hook of parameter {name!r}:" in " ".join(result.reasons)


def test_what_a_module_clips_itself_is_not_clipped_twice(tmp_path) -> None:
    kind = type("Own", (Net,), {"configure_gradient_clipping": lambda self, *args, **options: None})
    found = [
        calibrated(tmp_path, OptimizerCalibration(learning_rate="keep"), module=kind, gradient_clip_val=limit)[0]
        for limit in (None, 1e-3)
    ]
    assert found[0].epsilon_range == found[1].epsilon_range
    assert not any("clipped to a norm" in reason for reason in found[1].reasons)


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 1e-3), ("value", 1e-4)])
def test_epsilon_is_measured_on_the_clipped_gradient(tmp_path, algorithm: str, limit: float) -> None:
    calibration = OptimizerCalibration(learning_rate="keep")
    made = fit(
        tmp_path, calibration, module=Net(with_eps(1e-2)), data=loader(4),
        gradient_clip_val=limit, gradient_clip_algorithm=algorithm,
    )  # fmt: skip
    assert calibration.result.epsilon_range.damped_share(1e-2) == 1.0
    assert calibration.result.epsilon_range.upper_unrounded <= 1.1 * limit  # the middle of a bin
    clipped_to_a_norm = any("clipped to a norm" in reason for reason in calibration.result.reasons)
    assert clipped_to_a_norm == (algorithm == "norm")
    moments = [state["exp_avg_sq"].sqrt().max() for state in made.optimizers[0].state.values()]
    assert float(torch.stack(moments).max()) <= limit


def test_accumulation_by_schedule_counts(tmp_path) -> None:
    monitor, calibration = (
        GradientHistogramMonitor(every_n_steps=1),
        OptimizerCalibration(learning_rate="keep", epsilon="keep"),
    )
    fit(tmp_path, GradientAccumulationScheduler({0: 4, 1: 2}), monitor, calibration, max_epochs=2)
    assert calibration.result.effective_batch_size == 32
    # all steps but the first, before which the schedule was not yet in force
    assert [sample["batch_size"] for sample in monitor.noise_records[0].samples] == 3 * [32] + 8 * [16]


def test_an_integer_epsilon_is_one(tmp_path) -> None:
    _, group = calibrated(
        tmp_path, OptimizerCalibration(learning_rate="keep", epsilon=1e-9), module=Net(with_eps(0)), data=loader(4)
    )
    assert group["eps"] == 1e-9


@pytest.mark.parametrize("name", ["Adamax", "Adadelta", "Adagrad"])
def test_an_epsilon_of_another_kind_is_left_alone(tmp_path, name: str) -> None:
    module = Net(lambda p: getattr(torch.optim, name)(p, lr=1e-2, eps=1e-1))
    with pytest.warns(UserWarning, match=f"{name} is not known to have an epsilon of Adam's kind"):
        _, group = calibrated(tmp_path, OptimizerCalibration(learning_rate="keep"), module=module)
    assert group["eps"] == 1e-1


def test_a_law_for_adam_is_not_for_sgd(tmp_path) -> None:
    calibration = OptimizerCalibration(reference_batch_size=2, epsilon="keep")
    with pytest.warns(UserWarning, match="surge law is for optimizers like Adam, and SGD.*'linear', 'sqrt' or 'keep'"):
        _, group = calibrated(tmp_path, calibration, module=Net(lambda p: torch.optim.SGD(p, lr=0.1)))
    assert group["lr"] == 0.1


def test_a_scheduler_with_rates_of_its_own_is_not_overridden_in_vain(tmp_path) -> None:
    class Own:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.base = optimizer, [group["lr"] for group in optimizer.param_groups]

        def step(self, metric: Any = None) -> None:
            for group, rate in zip(self.optimizer.param_groups, self.base, strict=True):
                group["lr"] = rate

        def state_dict(self) -> dict[str, Any]:
            return {"base": self.base}

        def load_state_dict(self, state: Any) -> None:
            self.base = state["base"]

    class Scheduled(Net):
        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            scheduler.step()

    calibration = OptimizerCalibration(reference_batch_size=2, learning_rate="sqrt", epsilon="keep")
    with pytest.warns(
        UserWarning, match=r"Own \(base\) would not follow a changed rate at every step.*so the rate is kept"
    ):
        result, group = calibrated(tmp_path, calibration, module=Scheduled(scheduler=Own))
    assert group["lr"] == 1e-2 and result.learning_rate is None  # since it is the scheduler that makes them


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_validation_from_a_checkpoint_does_not_pass_for_a_calibration(tmp_path) -> None:
    made = fit(tmp_path / "a", OptimizerCalibration(learning_rate="keep"), module=Net(with_eps(1e-1)), data=loader(4))
    made.save_checkpoint(tmp_path / "done.ckpt")

    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    calibration = OptimizerCalibration(learning_rate="keep")
    made = trainer(tmp_path / "b", calibration)
    module = Validated(with_eps(1e-1))
    made.validate(module, DataLoader(dataset(8), 4), ckpt_path=tmp_path / "done.ckpt", verbose=False)
    made.fit(module, loader(4))
    assert calibration.result is not None
    assert made.optimizers[0].param_groups[0]["eps"] < 1e-1


def test_a_second_fit_goes_on_with_the_values(tmp_path) -> None:
    calibration = OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt")
    monitor = GradientHistogramMonitor(every_n_steps=4)
    made = fit(tmp_path, calibration, monitor, module=Net(with_eps(1e-1)), data=loader(4))
    result = calibration.result
    made.fit_loop.max_epochs = 2
    made.fit(made.lightning_module, loader(4))  # Lightning makes the optimizer anew
    group = made.optimizers[0].param_groups[0]
    assert calibration.result is result
    assert (group["eps"], group["lr"]) == (result.epsilon, pytest.approx(result.learning_rate))
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == list(range(0, 64, 4))
    assert RunRecord.load(tmp_path / "calibration.json").steps == 64


def test_a_resumed_run_does_not_need_its_record(tmp_path) -> None:
    path = record_of_a_run(tmp_path / "run", data=loader(8, samples=1024))
    calibration = OptimizerCalibration(reference=path, probe_batches=16)
    made = fit(tmp_path / "a", calibration, data=loader(32, samples=512))
    made.save_checkpoint(tmp_path / "half.ckpt")
    (tmp_path / "run" / "calibration.json").unlink()
    made = trainer(tmp_path / "b", OptimizerCalibration(reference=path, probe_batches=16), max_epochs=2)
    made.fit(Net(), loader(32, samples=512), ckpt_path=tmp_path / "half.ckpt")
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(calibration.result.learning_rate)


def test_a_trainer_of_the_other_package_is_as_good(tmp_path) -> None:
    pl = pytest.importorskip("pytorch_lightning")

    class Other(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return with_eps(10.0)(self.parameters())

    calibration, monitor = OptimizerCalibration(learning_rate="keep"), GradientHistogramMonitor(every_n_steps=4)
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    made = pl.Trainer(max_epochs=1, accelerator="cpu", logger=logger, callbacks=[calibration, monitor], **options)
    made.fit(Other(), loader(4))
    assert made.optimizers[0].param_groups[0]["eps"] == calibration.result.epsilon < 10.0
    assert events(tmp_path).Histograms("gradient_magnitude/layer.weight")


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"reference_batch_size": 0}, "reference_batch_size must be a positive", id="reference_batch_size"),
        pytest.param({"batch_size": -1}, "batch_size must be a positive", id="batch_size"),
        pytest.param({"batch_size": "8"}, "batch_size must be a positive.*got '8'", id="batch_size as text"),
        pytest.param({"reference_batch_size": True}, "must be a positive.*got True", id="reference_batch_size true"),
        pytest.param({"reference_batch_size": math.inf}, "must be a positive.*got inf", id="infinite"),
        pytest.param({"reference_batch_size": 8, "reference": "x"}, "contradict each other", id="two references"),
        pytest.param({"epsilon": "best"}, "epsilon must be 'auto', 'keep' or a number", id="epsilon"),
        pytest.param({"epsilon": -1.0}, "epsilon must be .* got -1.0", id="negative epsilon"),
        pytest.param({"epsilon": True}, "epsilon must be .* got True", id="epsilon true"),
        pytest.param({"epsilon": math.nan}, "epsilon must be .* got nan", id="epsilon nan"),
        pytest.param({"learning_rate": "cubic"}, "learning_rate must be one of .*surge", id="law"),
        pytest.param({"fallback": "surge"}, "fallback must be one of .*'sqrt', .*'surge'", id="fallback"),
        pytest.param({"probe_batches": 1}, "probe_batches must be an integer from 4 up, got 1", id="probe"),
        pytest.param({"probe_batches": 8.5}, "probe_batches must be .* got 8.5", id="half a batch"),
        pytest.param({"probe_batches": "8"}, "probe_batches must be .* got '8'", id="text"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        OptimizerCalibration(**options)


def _break(path: Any, how: str) -> str:
    content = json.loads(path.read_text())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_text(path.read_text()[:300])
    elif how == "version":
        path.write_text(json.dumps({**content, "schema_version": 99}))
    elif how == "no optimizer":
        path.write_text(json.dumps({**content, "optimizers": []}))
    elif how == "no batch size":
        path.write_text(json.dumps({**content, "optimizers": [{**content["optimizers"][0], "batch_size": 0}]}))
    elif how == "model":
        path.write_text(json.dumps({**content, "model": {**content["model"], "head.weight": [3, 99]}}))
    return str(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        pytest.param(
            "missing", "reference: .* does not exist; a run with GradientHistogramMonitor leaves", id="missing"
        ),
        pytest.param("truncated", "reference: .* cannot be read, it may be truncated", id="truncated"),
        pytest.param("version", "schema version 99, and this release reads 1", id="version"),
        pytest.param("no optimizer", "holds no optimizer with a batch size", id="no optimizer"),
        pytest.param("no batch size", "holds no optimizer with a batch size", id="no batch size"),
        pytest.param("model", r"another model: parameter 'head.weight' has shape \[3, 99\]", id="model"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_before_training(tmp_path, how: str, message: str) -> None:
    record_of_a_run(tmp_path / "run", max_epochs=1)
    path = _break(tmp_path / "run" / "calibration.json", how)
    made = trainer(tmp_path / "next", OptimizerCalibration(reference=path))
    with pytest.raises(MisconfigurationException, match=message):
        made.fit(Net(), loader())
    assert made.global_step == 0


class Endless(IterableDataset):
    """No length, and eight samples at a time."""

    def __init__(self, batches: int = 6) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        inputs, labels = dataset(8).tensors
        return ((inputs + i, labels) for i in range(self.batches))


def test_what_is_only_a_default_is_not_warned_of(tmp_path) -> None:
    result, _ = calibrated(tmp_path, OptimizerCalibration())
    assert result.problems == ()
    assert any("learning rate kept: no reference given" in reason for reason in result.reasons)
    assert "the probe used all 16 batches of an epoch" in result.reasons


CASES = [
    pytest.param(
        {"learning_rate": "sqrt"},
        {},
        "no reference given, .*'sqrt' needs .*pass reference_batch_size",
        id="no reference",
    ),
    pytest.param(
        {"reference_batch_size": 4, "probe_batches": 8},
        {"data": lambda: OpaqueBatches(8)},
        r"batch size cannot be read from the training loader.*OptimizerCalibration\(batch_size=\.\.\.\)",
        id="unknown batch size",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"module": lambda: Net(lambda p: torch.optim.SGD(p, 0.1))},
        "SGD is not known to have an epsilon of Adam's kind.*epsilon='keep'",
        id="optimizer without eps",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"data": lambda: loader(64)},
        "no probe: it needs 4 batches, and an epoch has 2",
        id="far too few batches",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"module": TwoOptimizers},
        "changes nothing: it handles one optimizer",
        id="two optimizers",
    ),
]


@pytest.mark.parametrize(("options", "run", "message"), CASES)
def test_what_cannot_be_done_is_said_once_and_loses_nothing(tmp_path, options, run, message) -> None:
    run = {name: value() if callable(value) else value for name, value in run.items()}
    with pytest.warns(UserWarning, match=message) as caught:
        made = fit(tmp_path, OptimizerCalibration(**options), max_epochs=1, **run)
    assert len(warned(caught)) == 1
    assert made.global_step > 0


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        pytest.param({}, lambda: loader(8), "learning rate kept: no reference given", id="no reference"),
        pytest.param({}, lambda: loader(8), "the probe used all 16 batches of an epoch", id="fewer batches"),
        pytest.param(
            {},
            lambda: DataLoader(Endless(3), batch_size=None),
            "the probe used all 3 batches of an epoch",
            id="shorter than it said",
        ),
    ],
)
def test_what_is_only_a_default_is_reported_and_not_warned_of(tmp_path, options, data, reason) -> None:
    calibration = OptimizerCalibration(**options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(tmp_path, calibration, max_epochs=1, data=data())
    assert not warned(caught) and not calibration.result.problems
    assert any(said.startswith(reason) for said in calibration.result.reasons), calibration.result.reasons


def test_fast_dev_run_has_few_batches_on_purpose(tmp_path) -> None:
    calibration = OptimizerCalibration(reference_batch_size=2)
    fit(tmp_path, calibration, fast_dev_run=True)  # a warning would be an error
    assert "no probe: it needs 4 batches, and fast_dev_run has 1" in calibration.result.problems[0]


def test_who_applies_nothing_is_not_warned_that_nothing_is_applied(tmp_path) -> None:
    made = fit(tmp_path, OptimizerCalibration(apply=False))
    made.fit_loop.max_epochs = 2
    made.fit(made.lightning_module, loader())  # a warning would be an error
    assert made.global_step == 32


def test_an_epsilon_in_a_tensor_stays_one(tmp_path) -> None:
    def optimizer(parameters: Any) -> Any:
        return torch.optim.AdamW([{"params": list(parameters), "eps": torch.tensor(1e-1)}], lr=1e-2)

    result, group = calibrated(tmp_path, OptimizerCalibration(epsilon=1e-9), module=Net(optimizer))
    assert isinstance(group["eps"], Tensor) and float(group["eps"]) == pytest.approx(1e-9) and not result.problems


class Varied(IterableDataset):
    """Batches of the sizes that it is told; nobody but the batches tells."""

    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes

    def __iter__(self) -> Any:
        return zip(*(tensor[: sum(self.sizes)].split(self.sizes) for tensor in dataset(512).tensors), strict=True)


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        pytest.param((2,), 2, id="less than a batch"),
        pytest.param((8, 8, 8, 8, 8, 3), 8, id="a short last one"),
        pytest.param((4, 12, 8, 20, 6, 10), 10, id="average of few"),
        pytest.param((4, 12, 8, 20) * 8, 11, id="average of many"),
    ],
)
def test_the_batches_that_come_are_counted(tmp_path, sizes: tuple[int, ...], found: int) -> None:
    calibration = OptimizerCalibration(reference_batch_size=4, learning_rate="sqrt", probe_batches=32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="OptimizerCalibration: no probe: it needs 4 batches")
        fit(tmp_path, calibration, max_epochs=1, data=DataLoader(Varied(*sizes), batch_size=None))
    assert calibration.result.effective_batch_size == pytest.approx(found)
    assert calibration.result.ratio == pytest.approx((found / 4) ** 0.5)
    vary = any("batches vary in size" in reason for reason in calibration.result.reasons)
    assert vary is (len(set(sizes)) > 2)


def test_a_loader_that_contradicts_what_comes_is_not_believed(tmp_path) -> None:
    class Lies(DataLoader):
        def __iter__(self) -> Any:
            return map(lambda batch: [torch.cat([part, part]) for part in batch], super().__iter__())

    said = "the training loader says 4 samples a batch, and the tensors of one that came have 8"
    for batch_size, found in ((None, None), (8, 8), (5, 5)):  # what the user says is believed
        calibration = OptimizerCalibration(reference_batch_size=4, learning_rate="sqrt", batch_size=batch_size)
        with pytest.warns(UserWarning, match=said) if batch_size is None else nullcontext():
            fit(tmp_path, calibration, max_epochs=1, data=Lies(dataset(), 4))
        assert calibration.result.effective_batch_size == found


def test_a_change_of_accumulation_later_in_the_run_is_said(tmp_path) -> None:
    calibration = OptimizerCalibration(reference_batch_size=4, learning_rate="sqrt", epsilon="keep")
    schedule = GradientAccumulationScheduler({0: 2, 1: 4})
    with pytest.warns(UserWarning, match="from 2 micro-batches a step to 4 from epoch 1 on"):
        fit(tmp_path, calibration, schedule, max_epochs=2, data=loader(8))
    assert calibration.result.effective_batch_size == 16


class Broken(Net):
    """A loss that is not finite in some batches, or in all, or depends on nothing."""

    def __init__(self, how: str) -> None:
        super().__init__(with_eps(1e-1))
        self.how = how

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.how == "some" and batch_idx % 4 == 1:
            return loss * math.nan
        if self.how == "all":
            return loss * math.inf
        return None if self.how == "none" else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(
    ("how", "message", "lowered"),
    [
        pytest.param(
            "some", "4 of 16 batches of the probe gave a gradient that is not finite", True, id="some not finite"
        ),
        pytest.param("all", "of 8 batches a rank, 0 gave a gradient.*detect_anomaly", False, id="none finite"),
        pytest.param(
            "none",
            "of 8 batches a rank, 0 gave a gradient.*no loss that depends on a parameter",
            False,
            id="no gradient",
        ),
    ],
)
def test_gradients_that_are_not_finite_are_left_out(tmp_path, how: str, message: str, lowered: bool) -> None:
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=16)
    with pytest.warns(UserWarning, match=message):
        made = fit(tmp_path, calibration, module=Broken(how), max_steps=16)
    assert (made.optimizers[0].param_groups[0]["eps"] < 1e-1) == lowered
    assert made.current_epoch == 1


def test_a_noise_scale_that_is_not_known_falls_back_as_told(tmp_path) -> None:
    class Noise(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (torch.randn(8) * self.weight).sum()  # a gradient of pure noise

    for fallback, expected in (("keep", 1.0), ("sqrt", 0.25)):
        path = record_of_a_run(
            tmp_path / fallback / "run", module=Noise(with_eps(1e-8)), data=loader(64, samples=256), max_epochs=1
        )
        calibration = OptimizerCalibration(reference=path, fallback=fallback, probe_batches=8)
        with pytest.warns(
            UserWarning, match=f"surge law refused: the noise scale is too uncertain.*fallback='{fallback}'"
        ):
            result, group = calibrated(
                tmp_path / fallback / "next", calibration, module=Noise(with_eps(1e-8)), data=loader(4, samples=64)
            )
        assert (result.law, result.ratio) == (fallback, pytest.approx(expected))
        assert group["lr"] == pytest.approx(1e-2 * expected)


def test_manual_optimization_is_not_probed(tmp_path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(with_eps(1e-1))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    calibration = OptimizerCalibration(reference_batch_size=2, learning_rate="sqrt", batch_size=8)
    with pytest.warns(UserWarning, match="no probe: under manual optimization training_step would step"):
        result, group = calibrated(tmp_path, calibration, module=Manual())
    assert group["lr"] == pytest.approx(2e-2)
    assert group["eps"] == 1e-1


def test_without_a_logger_the_result_is_there(tmp_path) -> None:
    result, group = calibrated(tmp_path, OptimizerCalibration(learning_rate="keep"), data=loader(4), logger=False)
    assert result.epsilon == group["eps"]


def test_without_a_training_loader_lightnings_own_error_comes(tmp_path) -> None:
    with pytest.raises(MisconfigurationException, match="train_dataloader"):
        trainer(tmp_path, OptimizerCalibration(), GradientHistogramMonitor()).fit(Net())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own use of jsonargparse
def test_the_command_line_takes_the_callbacks(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["program"])
    arguments = [
        "--trainer.callbacks+=lightning_gradhist.GradientHistogramMonitor",
        "--trainer.callbacks.every_n_steps=7",
        "--trainer.callbacks+=lightning_gradhist.OptimizerCalibration",
        "--trainer.callbacks.epsilon=1e-9",
        "--trainer.callbacks.reference_batch_size=128",
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
    ]
    cli = LightningCLI(BoringModel, args=arguments, run=False, save_config_callback=None, seed_everything_default=1)
    found = {type(callback).__name__: callback for callback in cli.trainer.callbacks}
    assert found["GradientHistogramMonitor"].every_n_steps == 7
    calibration = found["OptimizerCalibration"]
    assert (calibration.epsilon, calibration.reference_batch_size, calibration.apply) == (1e-9, 128, True)
