from __future__ import annotations

import json
import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import Batches, Net, TwoOptimizers, dataset, events, fit, loader, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradhist import ALTO, AdamE, GradientHistogramMonitor, OptimizerCalibration, SurgeLaw
from lightning_gradhist.report.record import RunRecord


def with_eps(eps: float, **options: Any) -> Any:
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-2, "eps": eps, **options})


def calibrated(folder: Any, calibration: OptimizerCalibration, **options: Any) -> tuple[Any, dict[str, Any]]:
    made = fit(folder, calibration, **options)
    return calibration.result, made.optimizers[0].param_groups[0]


def record_of_a_run(folder: Any, **options: Any) -> str:
    fit(folder, GradientHistogramMonitor(every_n_steps=1), **{"max_epochs": 4, **options})
    return str(folder / "calibration.json")


def warned(caught: Any) -> list[str]:
    return [str(w.message) for w in caught if "OptimizerCalibration" in str(w.message)]


# --- epsilon ---------------------------------------------------------------------------------------------------------


def test_an_epsilon_that_damps_is_lowered_to_the_lower_end(tmp_path) -> None:
    result, group = calibrated(
        tmp_path, OptimizerCalibration(learning_rate="keep"), module=Net(with_eps(1e-1)), data=loader(4)
    )
    assert group["eps"] == result.epsilon == result.epsilon_range.lower < 1e-1
    assert result.epsilon_range.damped_share(1e-1) > 0.25
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


# --- learning rate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("law", "expected"), [("sqrt", 2.0), ("linear", 4.0), ("keep", 1.0)])
def test_the_plain_laws(tmp_path, law: str, expected: float) -> None:
    calibration = OptimizerCalibration(reference_batch_size=4, learning_rate=law, epsilon="keep")
    result, group = calibrated(tmp_path, calibration, data=loader(16))
    assert result.ratio == pytest.approx(expected)
    assert group["lr"] == result.learning_rate == pytest.approx(1e-2 * expected)
    assert result.gradients == 0  # no probe was needed


@pytest.mark.parametrize(("reference", "low", "high"), [(1, 1.0, 4.0), (256, 0.25, 1.0)])
def test_a_probe_stays_between_one_and_the_square_root(tmp_path, reference: int, low: float, high: float) -> None:
    calibration = OptimizerCalibration(reference_batch_size=reference, probe_batches=8, confidence=0.5)
    result, group = calibrated(tmp_path, calibration, data=loader(16))
    assert low <= result.ratio <= high
    assert group["lr"] == pytest.approx(1e-2 * result.ratio)
    assert result.noise_source == "probe"


def test_a_record_gives_the_full_law(tmp_path) -> None:
    path = record_of_a_run(tmp_path / "run", data=loader(8, samples=512), module=Net(with_eps(1e-8, lr=4e-3)))
    result, group = calibrated(
        tmp_path / "next",
        OptimizerCalibration(reference=path, probe_batches=16),
        module=Net(with_eps(1e-8, lr=1.0)),
        data=loader(32, samples=512),
        max_epochs=1,
    )
    noise = RunRecord.load(path).optimizers[0].noise["adam"]
    law = SurgeLaw(noise.value, valid_until=math.pi / 2 * noise.value)
    assert result.law == "surge" and result.noise_source == "record"
    assert result.ratio == pytest.approx(law.ratio(32, 8))
    assert group["lr"] == pytest.approx(4e-3 * law.ratio(32, 8))  # the recorded rate, not the 1.0 in the code
    assert any("carried over from the recorded" in reason for reason in result.reasons)


def test_another_class_takes_the_ratio_for_its_own_rate(tmp_path) -> None:
    path = record_of_a_run(tmp_path / "run", data=loader(8, samples=512))
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
    assert first["eps"] == calibration.result.epsilon_range.lower
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
    whole = fit(tmp_path / "a", calibration, module=net(), data=loader(4), max_epochs=2)
    half = fit(
        tmp_path / "b", OptimizerCalibration(reference_batch_size=1, learning_rate="sqrt"), module=net(), data=loader(4)
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
    calibration.load_state_dict({"report": "done"})
    assert calibration.state_dict() == {"report": "done"}


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

    with pytest.warns(UserWarning, match="could not log its report, training goes on.*disk full"):
        _, group = calibrated(
            tmp_path, OptimizerCalibration(learning_rate="keep"), module=Net(with_eps(1e-1)), data=loader(4),
            logger=Broken(tmp_path), max_steps=2,
        )  # fmt: skip
    assert group["eps"] < 1e-1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"reference_batch_size": 0}, "reference_batch_size must be a positive", id="reference_batch_size"),
        pytest.param({"batch_size": -1}, "batch_size must be a positive", id="batch_size"),
        pytest.param({"reference_batch_size": 8, "reference": "x"}, "contradict each other", id="two references"),
        pytest.param({"epsilon": "best"}, "epsilon must be 'auto', 'keep' or a number", id="epsilon"),
        pytest.param({"epsilon": -1.0}, "epsilon must be .* got -1.0", id="negative epsilon"),
        pytest.param({"epsilon": math.nan}, "epsilon must be .* got nan", id="epsilon nan"),
        pytest.param({"learning_rate": "cubic"}, "learning_rate must be one of .*surge", id="law"),
        pytest.param({"fallback": "surge"}, "fallback must be 'keep', 'sqrt' or 'linear'", id="fallback"),
        pytest.param({"probe_batches": 1}, "probe_batches must be at least 4, got 1", id="probe"),
        pytest.param({"confidence": 1.0}, "confidence must lie between 0 and 1", id="confidence"),
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


CASES = [
    pytest.param(
        {}, {}, "learning_rate='surge' needs a rate that is trusted.*pass reference_batch_size", id="no reference"
    ),
    pytest.param(
        {"reference_batch_size": 4, "probe_batches": 8},
        {"data": lambda: Batches(8)},
        r"batch size cannot be read from the training loader.*OptimizerCalibration\(batch_size=\.\.\.\)",
        id="unknown batch size",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"module": lambda: Net(lambda p: torch.optim.SGD(p, 0.1))},
        "SGD has no epsilon of Adam's kind in group 0.*epsilon='keep'",
        id="optimizer without eps",
    ),
    pytest.param(
        {"learning_rate": "keep", "probe_batches": 32},
        {},
        "probe_batches=32, but the loader has 16 batches.*pass probe_batches=16",
        id="fewer batches",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"data": lambda: loader(64)},
        "no probe: the loader has 2 batches, and a probe needs 4",
        id="far too few batches",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"data": lambda: DataLoader(Endless(3), batch_size=None)},
        "finite gradients, and were left out|left out",
        id="shorter than it said",
    ),
    pytest.param(
        {"learning_rate": "keep"},
        {"module": TwoOptimizers},
        "changes nothing: it handles one optimizer",
        id="two optimizers",
    ),
    pytest.param(
        {"learning_rate": "keep"}, {"fast_dev_run": True}, "no probe: the loader has 1 batches", id="fast_dev_run"
    ),
]


@pytest.mark.parametrize(("options", "run", "message"), CASES)
def test_what_cannot_be_done_is_said_once_and_loses_nothing(tmp_path, options, run, message) -> None:
    run = {name: value() if callable(value) else value for name, value in run.items()}
    with pytest.warns(UserWarning, match=message) as caught:
        made = fit(tmp_path, OptimizerCalibration(**options), max_epochs=1, **run)
    assert len(warned(caught)) == 1
    assert made.global_step > 0


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
        pytest.param("some", "4 of 16 batches of the probe gave no finite gradient", True, id="some not finite"),
        pytest.param("all", "0 finite gradients from 16 batches.*detect_anomaly", False, id="none finite"),
        pytest.param(
            "none", "0 finite gradients from 16 batches.*no parameter has a gradient", False, id="no gradient"
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

    calibration = OptimizerCalibration(reference_batch_size=2, learning_rate="sqrt")
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
