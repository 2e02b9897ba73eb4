"""The length of the run: recorded, asked of the next Trainer, and told in its report."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Net, fit, loader, trainer
from torch.optim.lr_scheduler import LinearLR

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.learning_rate import surge_ratio
from lightning_gradhist.noise.run_record import RunRecord
from lightning_gradhist.plan import plan


def warm_up(steps: int) -> Any:
    return lambda: Net(
        lambda parameters: torch.optim.AdamW(parameters, lr=4e-3), lambda o: LinearLR(o, 0.25, total_iters=steps)
    )


def recorded(folder: Path, module: Any = None, **options: Any) -> str:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GradientHistogramMonitor has no logger")
        fit(folder, GradientHistogramMonitor(every_n_steps=1), module=module or warm_up(16), logger=False, **options)
    return str(folder / "calibration.json")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The record of a run of 256 steps of 8 samples, by which the noise scale is known well enough."""
    return recorded(tmp_path_factory.mktemp("run"), data=loader(8, samples=512), max_epochs=4)


def calibrated(folder: Path, reference: str, module: Any = None, **options: Any) -> Any:
    calibration = OptimizerCalibration(reference=reference, epsilon="keep")
    fit(folder, calibration, module=module, data=loader(32, samples=512), **options)
    return calibration.result


def ratio(path: str, share: float) -> float:
    noise = RunRecord.load(path).optimizers[0].noise["adam"]
    return surge_ratio(noise.value, 32, 8, True, share)


def test_a_record_knows_the_length_and_the_schedule_of_its_run(path: str) -> None:
    run = RunRecord.load(path)
    length = run.optimizers[0].length
    assert (run.steps, length.planned, length.warm_up) == (256, 256, 16)
    assert length.schedule == pytest.approx([0.25] + [1.0] * 16)


class Two(Net):
    """One optimizer makes two steps in the time of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in (self.optimizers()[0], *self.optimizers()):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make_optimizer(part.parameters()) for part in (self.body, self.head)]


def test_a_plan_is_for_the_steps_of_each_optimizer(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1, batch_size=8), module=Two, max_epochs=3)
    run = RunRecord.load(tmp_path / "calibration.json")
    assert run.steps == 3 * 48 and [one.steps for one in plan(run, [64])] == [96, 48]
    assert [one.steps for one in plan(run, [64], steps=7)] == [7, 7]


def test_a_run_that_was_cut_short_knows_what_was_planned(tmp_path) -> None:
    class Stops(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = self.trainer.global_step >= 12

    run = RunRecord.load(recorded(tmp_path, Stops, max_epochs=4))
    assert run.steps < 64 == run.optimizers[0].length.planned


def test_a_run_that_goes_on_keeps_its_warm_up_and_learns_its_new_length(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GradientHistogramMonitor has no logger")
        made = fit(tmp_path, monitor, module=warm_up(4), logger=False)
        made.save_checkpoint(tmp_path / "half.ckpt")
        again = trainer(tmp_path / "on", GradientHistogramMonitor(every_n_steps=1), max_epochs=3, logger=False)
        again.fit(warm_up(4)(), loader(), ckpt_path=tmp_path / "half.ckpt")
    (entry,) = RunRecord.load(tmp_path / "on" / "calibration.json").optimizers
    assert (again.global_step, entry.length.planned, entry.length.warm_up) == (48, 48, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "share", "said"),
    [
        pytest.param(
            {"max_epochs": 4}, 1.0, "64 steps, and the recorded one was to make 256: as at equal samples", id="samples"
        ),
        pytest.param({"max_epochs": 16}, 0.0, "256 steps, .* 256: as at equal steps", id="steps"),
        pytest.param(
            {"max_epochs": 64, "max_steps": 128}, 0.5, "128 steps, .* 50% equal samples", id="max_steps on purpose"
        ),
        pytest.param({"max_epochs": -1, "max_steps": 256}, 0.0, "as at equal steps", id="max_steps alone"),
    ],
)
def test_the_next_run_is_as_long_as_its_trainer_says(
    tmp_path, path: str, options: dict[str, Any], share: float, said: str
) -> None:
    result = calibrated(tmp_path, path, **options)
    assert result.law == "surge" and result.equal_samples_share == pytest.approx(share)
    assert result.ratio == pytest.approx(ratio(path, share))
    (reason,) = [reason for reason in result.reasons if "is to make" in reason]
    assert re.search(said, reason)


def test_a_recorded_run_that_ended_before_its_plan_is_told_of(tmp_path, path: str) -> None:
    content = json.loads(Path(path).read_text())
    content["optimizers"][0]["length"]["made"] = 100
    (tmp_path / "ended.json").write_text(json.dumps(content))
    told = (
        "the recorded one was to make 256 and made 100 (what was planned counts, as by Trainer(max_steps=...)): as at"
    )
    assert told in calibrated(tmp_path, str(tmp_path / "ended.json"), max_epochs=4).to_text()
    assert "and made" not in calibrated(tmp_path, path, max_epochs=4).to_text()


def test_a_record_of_an_older_release_takes_equal_samples_and_says_so(tmp_path, path: str) -> None:
    content = json.loads(Path(path).read_text())
    del content["optimizers"][0]["length"]
    (tmp_path / "old.json").write_text(json.dumps(content))
    result = calibrated(tmp_path, str(tmp_path / "old.json"), max_epochs=16)
    assert result.ratio == pytest.approx(ratio(path, 1.0))
    assert any("the record does not tell the length of its run" in reason for reason in result.reasons)


def test_reference_batch_size_alone_takes_equal_samples_and_says_so(tmp_path) -> None:
    calibration = OptimizerCalibration(reference_batch_size=4, probe_batches=8)
    fit(tmp_path, calibration, data=loader(16))
    assert calibration.result.law == "surge"
    assert "- this run is taken to see as many samples as that of the reference" in calibration.result.to_text()


def test_a_short_run_and_a_warm_up_that_does_not_end_are_named(tmp_path, path: str) -> None:
    text = calibrated(tmp_path, path, warm_up(1000), max_epochs=1).to_text()
    assert "this run has 16 steps: below some 50" in text and "the recorded run" not in text
    assert "the warm-up of this run does not end within its 16 steps" in text


def test_the_monitor_changes_nothing_by_asking(tmp_path) -> None:
    def trained(*callbacks: Any) -> tuple[float, list[torch.Tensor]]:
        made = fit(tmp_path, *callbacks, module=warm_up(32))
        return made.optimizers[0].param_groups[0]["lr"], [*made.lightning_module.parameters()]

    plain, watched = trained(), trained(GradientHistogramMonitor(every_n_steps=4))
    assert plain[0] == watched[0] and all(map(torch.equal, plain[1], watched[1]))
    assert RunRecord.load(tmp_path / "calibration.json").optimizers[0].length.planned == 16
