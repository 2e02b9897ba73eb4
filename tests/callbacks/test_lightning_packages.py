"""``lightning`` and ``pytorch_lightning``: each alone, and both at once, whichever of them a project is written for."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks._lightning import MisconfigurationException

NAMES = ["lightning.pytorch", "pytorch_lightning"]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(params=NAMES)
def package(request: Any) -> Any:
    return pytest.importorskip(request.param)


def project(package: Any) -> tuple[type, type]:
    """A module and a data module with a hook that the probe has to call."""

    class Module(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-3)

    class Data(package.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(TensorDataset(torch.randn(64, 4)), 4)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0]

    return Module, Data


def test_a_data_module_of_either_is_probed_through_its_own_hooks(tmp_path, package) -> None:
    module, data = project(package)
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8)
    trainer = package.Trainer(max_steps=2, callbacks=[calibration], default_root_dir=tmp_path, **QUIET)
    trainer.fit(module(), data())
    assert calibration.result.gradients == 8 and not calibration.result.problems


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own use of jsonargparse
def test_the_command_line_of_either_takes_the_callbacks(monkeypatch, package) -> None:
    monkeypatch.setattr(sys, "argv", ["fit.py"])
    cli = importlib.import_module(f"{package.__name__}.cli").LightningCLI
    names = {"GradientHistogramMonitor", "OptimizerCalibration"}
    options = [f"--trainer.callbacks+=lightning_gradhist.{name}" for name in names]
    made = cli(project(package)[0], args=options, run=False, save_config_callback=None, seed_everything_default=1)
    assert {type(callback).__name__ for callback in made.trainer.callbacks} >= names


def test_they_are_callbacks_and_errors_of_either(package) -> None:
    assert isinstance(GradientHistogramMonitor(), package.Callback)
    assert issubclass(MisconfigurationException, package.utilities.exceptions.MisconfigurationException)


@pytest.mark.slow
@pytest.mark.parametrize("alone", NAMES)
def test_one_is_enough(tmp_path, alone: str) -> None:
    code = f"""
        import sys
        for name in { ({"lightning", "pytorch_lightning"} - {alone.partition(".")[0]})!r}:
            sys.modules[name] = None
        import torch, warnings
        import {alone} as package
        from torch.utils.data import DataLoader
        from lightning_gradhist import OptimizerCalibration

        class Module(package.LightningModule):
            def __init__(self):
                super().__init__()
                self.layer = torch.nn.Linear(4, 1)

            def training_step(self, batch, batch_idx):
                return self.layer(batch).square().mean()

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters(), 1e-3)

        calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8)
        options = {QUIET!r}
        trainer = package.Trainer(max_steps=2, callbacks=[calibration], default_root_dir={str(tmp_path)!r}, **options)
        trainer.fit(Module(), DataLoader(torch.randn(64, 4), 4))
        print(calibration.result.gradients)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "8"
