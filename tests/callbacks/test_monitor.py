from __future__ import annotations

import json
import warnings
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import (
    Batches,
    GradientSpy,
    Net,
    TwoOptimizers,
    events,
    expected_counts,
    final_state,
    fit,
    loader,
    logged_counts,
    trainer,
)
from torch import nn

from lightning_gradhist import GradientHistogramMonitor
from lightning_gradhist.report.record import RunRecord


def assert_counts(folder, spy: GradientSpy, every: int, steps: list[int]) -> None:
    for step in steps:
        gradients = spy.seen[step]
        for name, gradient in gradients.items():
            if gradient.any():
                assert logged_counts(folder, f"gradient_magnitude/{name}", step) == expected_counts(gradient), (
                    name,
                    step,
                )
        pooled = torch.cat([gradient.flatten() for gradient in gradients.values()])
        assert logged_counts(folder, "gradient_magnitude/all", step) == expected_counts(pooled)
    assert [event.step for event in events(folder).Histograms("gradient_magnitude/all")] == steps


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 3}, id="accumulation with a short last window"),
        pytest.param({"gradient_clip_val": 1e-3}, id="clipping"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"precision": "bf16-true"}, id="bf16-true"),
    ],
)
def test_counts_are_those_of_the_gradient_before_clipping(tmp_path, options: dict[str, Any]) -> None:
    spy = GradientSpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_clip_val.*")
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=3), spy, **options)
    assert len(spy.seen) == made.global_step
    assert_counts(tmp_path, spy, 3, list(range(0, made.global_step, 3)))


class _ScaleSpy(L.Callback):
    """The gradients as they are, divided by the scale of the moment if the optimizer has to do that itself."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = trainer.precision_plugin.scaler.get_scale() if scaled else 1.0
        self.seen.append({n: p.grad.clone() / scale for n, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("fused", [pytest.param(False, id="unscaled by Lightning"), pytest.param(True, id="fused")])
def test_a_loss_scale_is_taken_off(tmp_path, fused: bool) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    assert getattr(optimizer([nn.Parameter(torch.zeros(1))]), "_step_supports_amp_scaling", False) == fused
    spy = _ScaleSpy()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    made = fit(
        tmp_path,
        GradientHistogramMonitor(every_n_steps=4),
        spy,
        module=Net(optimizer),
        plugins=[precision],
        max_steps=9,
    )
    assert made.global_step == 9
    assert_counts(tmp_path, spy, 4, [0, 4, 8])  # type: ignore[arg-type]


def test_a_step_that_the_scaler_skips_is_counted_as_not_finite_and_measures_nothing(tmp_path) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, monitor, plugins=[precision], max_steps=6)
    shares = events(tmp_path).Scalars("gradient_nonfinite_share/all")
    assert shares[0].value > 0
    first = monitor.noise_records[0].samples[0]
    assert first["noise_simple"] is None
    assert json.loads((tmp_path / "calibration.json").read_text())


def test_training_is_the_same_with_and_without(tmp_path) -> None:
    without = final_state(fit(tmp_path / "a"))
    with_monitor = final_state(fit(tmp_path / "b", GradientHistogramMonitor(every_n_steps=1)))
    assert without["losses"] == with_monitor["losses"]
    torch.testing.assert_close(without["weights"], with_monitor["weights"], rtol=0, atol=0)
    assert torch.equal(without["rng"], with_monitor["rng"])


class Partial(Net):
    """One frozen layer, and one that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.body[0].requires_grad_(False)


def test_frozen_and_unused_layers_are_left_out(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=5), module=Partial())
    tags = events(tmp_path).Tags()["histograms"]
    assert "gradient_magnitude/head.weight" in tags
    assert not [tag for tag in tags if "unused" in tag or "body.0" in tag]


def test_two_optimizers_are_told_apart(tmp_path) -> None:
    spy = GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=4)
    fit(tmp_path, monitor, spy, module=TwoOptimizers())
    histograms = events(tmp_path).Histograms
    assert len(histograms("gradient_magnitude/one.weight")) == 4  # 16 steps
    assert len(histograms("gradient_magnitude/two.weight")) == 2  # 8 steps
    first = histograms("gradient_magnitude/two.weight")[0]
    assert first.histogram_value.num == spy.seen[1]["two.weight"].numel()
    record = RunRecord.load(tmp_path / "calibration.json")
    assert [entry.name for entry in record.optimizers] == ["AdamW", "SGD"]
    assert record.optimizers[0].noise["adam"].measurements == 3  # the first pair came before there was a second moment
    assert record.optimizers[1].noise["adam"].measurements == 0  # SGD has none
    assert record.optimizers[1].noise["simple"].measurements == 2


def test_noise_is_measured_from_successive_gradients(tmp_path) -> None:
    spy = GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=4)
    fit(tmp_path, monitor, spy, data=loader(batch_size=16))
    samples = monitor.noise_records[0].samples
    assert [sample["step"] for sample in samples] == [0, 4]
    for sample in samples:
        one, two = (torch.cat([g.flatten() for g in spy.seen[sample["step"] + i].values()]).double() for i in (0, 1))
        assert sample["batch_size"] == 16
        assert sample["noise_simple"] == pytest.approx(float((one - two).square().sum()) / 2, rel=1e-5)
        assert sample["signal_simple"] == pytest.approx(float(one @ two), rel=1e-4, abs=1e-6)


def test_the_record_knows_the_run(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=2)
    schedule = {"scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=40)}
    made = fit(tmp_path, monitor, module=Net(**schedule), max_epochs=2, accumulate_grad_batches=2)
    record = RunRecord.load(tmp_path / "calibration.json")
    assert record.steps == made.global_step == 16
    assert record.model == {name: list(p.shape) for name, p in made.lightning_module.named_parameters()}
    (entry,) = record.optimizers
    assert (entry.name, entry.batch_size, entry.learning_rates) == ("AdamW", 16, [pytest.approx(0.03)])
    assert entry.noise["simple"].measurements == len(entry.samples) == 8


def test_resume_goes_on_where_it_was(tmp_path) -> None:
    whole = GradientHistogramMonitor(every_n_steps=3)
    fit(tmp_path / "whole", whole, max_epochs=2)

    first = GradientHistogramMonitor(every_n_steps=3)
    made = fit(tmp_path / "first", first, max_epochs=1)
    made.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)  # nothing in it that needs trust

    second = GradientHistogramMonitor(every_n_steps=3)
    made = trainer(tmp_path / "second", second, max_epochs=2)
    made.fit(Net(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [e.step for e in events(tmp_path / "second").Histograms("gradient_magnitude/all")] == [18, 21, 24, 27, 30]
    steps = [sample["step"] for sample in second.noise_records[0].samples]
    assert steps == [0, 3, 6, 9, 12, 18, 21, 24, 27, 30]  # the pair of steps 15 and 16 spans the checkpoint
    assert [sample["step"] for sample in whole.noise_records[0].samples] == [*steps[:5], 15, *steps[5:]]


def test_state_survives_a_round_trip() -> None:
    monitor = GradientHistogramMonitor()
    state = {"optimizers": [{"steps": 9, "logged": 2, "samples": [{"step": 0}], "learning_rates": [0.1]}]}
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state


def test_instances_have_keys_of_their_own() -> None:
    keys = {GradientHistogramMonitor(every_n_steps=n).state_key for n in (1, 2, 50)}
    assert len(keys) == 3


def test_the_heatmap_comes_at_doubling_distances_and_at_the_end(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), max_steps=11)
    images = events(tmp_path).Images("gradient_magnitude_by_layer")
    assert [image.step for image in images] == [0, 1, 3, 7, 10]


def test_no_tag_is_used_for_two_kinds_of_data(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=4))
    tags = events(tmp_path).Tags()
    names = [name for kind in ("scalars", "histograms", "images", "tensors") for name in tags[kind]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"every_n_steps": 0}, "every_n_steps must be an integer from 1 up, got 0", id="zero"),
        pytest.param({"every_n_steps": -5}, "every_n_steps must be .* got -5", id="negative"),
        pytest.param({"every_n_steps": 2.5}, "every_n_steps must be .* got 2.5", id="fraction"),
        pytest.param({"bins_per_octave": 3}, "bins_per_octave must be a power of two", id="bins"),
        pytest.param({"batch_size": 0}, "batch_size must be a positive", id="batch size"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        GradientHistogramMonitor(**options)


def test_without_a_logger_it_warns_once_and_keeps_the_record(tmp_path) -> None:
    with pytest.warns(UserWarning, match="has no logger to write histograms to; use Trainer") as caught:
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), logger=False)
    assert len([w for w in caught if "GradientHistogramMonitor" in str(w.message)]) == 1
    assert RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples


def test_fast_dev_run_writes_nothing(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), fast_dev_run=3)
    assert not list(tmp_path.rglob("*"))


def test_an_unknown_batch_size_is_said_and_can_be_given(tmp_path) -> None:
    batches = Batches(8)
    with pytest.warns(UserWarning, match=r"GradientHistogramMonitor\(batch_size=\.\.\.\)"):
        fit(tmp_path / "a", GradientHistogramMonitor(every_n_steps=1), data=batches)
    assert not (tmp_path / "a" / "calibration.json").exists()
    fit(tmp_path / "b", GradientHistogramMonitor(every_n_steps=1, batch_size=8), data=batches)
    assert RunRecord.load(tmp_path / "b" / "calibration.json").optimizers[0].batch_size == 8


def test_a_logger_that_fails_costs_one_warning(tmp_path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("gradient_") for name in metrics):
                raise OSError(28, "No space left on device")
            super().log_metrics(metrics, step)

    with pytest.warns(UserWarning, match="could not log, training goes on.*No space left") as caught:
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), logger=Broken(tmp_path), max_steps=6)
    assert made.global_step == 6
    assert len([w for w in caught if "could not log" in str(w.message)]) == 1


def test_other_loggers_get_the_scalars(tmp_path) -> None:
    made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), logger=CSVLogger(tmp_path))
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert "gradient_median/head.weight" in header and "gradient_zero_share/all" in header
    assert made.global_step == 16


def test_an_interrupted_run_leaves_its_record(tmp_path) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 9:
                raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=2), Interrupt())
    assert len(RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples) == 4
