"""The callbacks in Lightning runs on a GPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from support import Net, events, loader, trainer
from torch import Tensor, nn

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks.monitor.fit import Guard

DEVICE = torch.device(os.environ.get("GRADHIST_DEVICE", "cuda"))
ACCELERATOR = {"accelerator": "gpu" if DEVICE.type == "cuda" else "cpu", "devices": 1}
PRECISIONS = ["32-true", "bf16-mixed", *(["16-mixed"] if DEVICE.type == "cuda" else [])]


def fit(folder: Path, *callbacks: L.Callback, **options: Any) -> tuple[L.Trainer, Net]:
    L.seed_everything(0, verbose=False)
    module = Net(lambda parameters: ALTO(parameters, lr=1e-2))
    run = trainer(folder, *callbacks, **{**ACCELERATOR, "log_every_n_steps": 1, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(module, loader(samples=64))
    return run, module


def weights(module: Net) -> list[torch.Tensor]:
    return [parameter.detach().cpu() for parameter in module.parameters()]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer_state", [False, True])
def test_the_monitor_logs_and_changes_nothing(tmp_path, precision: str, optimizer_state: bool) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=2, optimizer_state=optimizer_state)
    _, watched = fit(tmp_path / "watched", monitor, precision=precision, deterministic=True)
    _, plain = fit(tmp_path / "plain", precision=precision, deterministic=True)
    assert all(map(torch.equal, weights(watched), weights(plain)))
    assert "gradient_magnitude/all" in events(tmp_path / "watched").Tags()["histograms"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_probe_without_apply_leaves_the_same_bits(tmp_path, precision: str) -> None:
    calibration = OptimizerCalibration(reference_batch_size=8, apply=False)
    _, probed = fit(tmp_path / "probed", calibration, precision=precision, deterministic=True)
    _, plain = fit(tmp_path / "plain", precision=precision, deterministic=True)
    assert calibration.result is not None and calibration.result.epsilon_range is not None
    assert all(map(torch.equal, weights(probed), weights(plain)))


class Plain(L.LightningModule):
    """Asks no tensor for a number, and lets the halves of its batch be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return ALTO(self.parameters(), lr=1e-2)


def forbid_waiting(forbidden: bool) -> None:
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error" if forbidden else "default")


@pytest.mark.parametrize("optimizer_state", [False, True])
@pytest.mark.parametrize("every_n_steps", [10**9, 1], ids=["unlogged steps", "logged steps"])
def test_the_monitor_waits_for_no_device(
    tmp_path, monkeypatch: pytest.MonkeyPatch, every_n_steps: int, optimizer_state: bool
) -> None:
    class First(L.Callback):
        """From the fourth step on nothing may wait: by then kernels are compiled, and buffers made."""

        def on_train_batch_start(self, run: L.Trainer, *_: Any) -> None:
            forbid_waiting(run.global_step >= 3)

    class Last(L.Callback):
        """Lightning may wait between two batches."""

        def on_train_batch_end(self, *_: Any) -> None:
            forbid_waiting(False)

        def on_exception(self, *_: Any) -> None:
            forbid_waiting(False)

    def warn(_: Guard, task: str, error: Exception) -> None:
        raise AssertionError(f"the monitor could not {task}") from error

    monkeypatch.setattr(Guard, "warn", warn)
    monitor = GradientHistogramMonitor(every_n_steps=every_n_steps, optimizer_state=optimizer_state)
    run = trainer(tmp_path, First(), monitor, Last(), **ACCELERATOR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(Plain(), loader(64, samples=9 * 64))
    measured = [sample["noise_simple"] is not None for sample in monitor.noise_records[0].samples]
    assert all(measured) and len(measured) >= 4 or every_n_steps > 1


def two_ranks(folder: str) -> torch.Tensor:
    """A run on two ranks that share a device; the weights that it ends with."""
    from lightning.pytorch.strategies import DDPStrategy

    here = torch.device(DEVICE.type, 0) if DEVICE.type == "cuda" else DEVICE
    strategy = DDPStrategy(process_group_backend="gloo", parallel_devices=[here] * 2)
    _, module = fit(Path(folder), GradientHistogramMonitor(every_n_steps=1), strategy=strategy, max_steps=3)
    return torch.cat([weight.flatten() for weight in weights(module)])


def test_two_gloo_ranks_on_one_device(tmp_path) -> None:
    first, second = run_ranks(two_ranks, 2, str(tmp_path))
    assert torch.equal(first, second)
    assert "gradient_magnitude/all" in events(tmp_path).Tags()["histograms"]


def counts_on_ranks(device: str) -> torch.Tensor:
    """A histogram of two ranks' halves of known values."""
    from lightning_gradhist import MagnitudeHistogram

    rank = torch.distributed.get_rank()
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(device)
    histogram = MagnitudeHistogram(["x"], device)
    histogram.update({"x": values[500 * rank : 500 * (rank + 1)]})
    histogram.all_reduce()
    return histogram.table.cpu()


def test_two_ranks_add_their_bins(tmp_path) -> None:
    from lightning_gradhist import MagnitudeHistogram

    whole = MagnitudeHistogram(["x"])
    whole.update({"x": torch.randn(1000, generator=torch.Generator().manual_seed(0))})
    for table in run_ranks(counts_on_ranks, 2, f"{DEVICE.type}"):
        assert torch.equal(table, whole.table)
