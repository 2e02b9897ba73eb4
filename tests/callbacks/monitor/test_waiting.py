"""The training thread asks no tensor for numbers that a GPU may not have yet; tests/gpu has the same on a GPU."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from support import events, fit, loader
from torch import Tensor, nn

from lightning_gradhist import ALTO, GradientHistogramMonitor
from lightning_gradhist.callbacks.monitor.fit import Guard
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.run_record import RunRecord
from lightning_gradhist.tensors import HostTensor

ASKS = ("item", "tolist", "__float__", "new_tensor")


class Plain(L.LightningModule):
    """Asks for nothing itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return ALTO(self.parameters(), 1e-2)


class Within(L.Callback):
    """Knows whether a step is being made."""

    def __init__(self) -> None:
        self.step = False

    def on_train_batch_start(self, *_: Any) -> None:
        self.step = True

    def on_train_batch_end(self, *_: Any) -> None:
        self.step = False


def is_ours() -> bool:
    """Whether the monitor asks, or what it calls; numbers of steps, and the report before, lie on the host."""
    path = Path(sys._getframe(2).f_code.co_filename).as_posix()
    return "lightning_gradhist/" in path and "/optim" not in path and not path.endswith("/epsilon.py")


@pytest.mark.parametrize("optimizer_state", [False, True])
@pytest.mark.parametrize("batch_size", [64, 8], ids=["halves", "pairs"])
def test_a_logged_step_asks_for_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_size: int, optimizer_state: bool
) -> None:
    within, training, asked = Within(), threading.current_thread(), []

    def forbidden(name: str) -> Any:
        original = getattr(Tensor, name)

        def ask(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
            watched = within.step and threading.current_thread() is training and tensor.is_floating_point()
            if watched and is_ours():  # of others the host alone has made some
                asked.append(name)
                raise AssertionError(f"Tensor.{name} waits for the device")
            return original(tensor, *arguments, **options)

        return ask

    def warn(_: Guard, task: str, error: Exception) -> None:
        raise error

    for name in ASKS:
        monkeypatch.setattr(Tensor, name, forbidden(name))
    monkeypatch.setattr(HostTensor, "has_arrived", property(lambda _: not within.step))
    monkeypatch.setattr(Guard, "warn", warn)
    monitor = GradientHistogramMonitor(every_n_steps=1, optimizer_state=optimizer_state)
    fit(tmp_path, within, monitor, module=Plain, data=loader(batch_size, samples=9 * batch_size))
    assert not asked and len(monitor.noise_records[0]) >= 4
    assert len(RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples) == len(monitor.noise_records[0])
    assert "gradient_magnitude/all" in events(tmp_path).Tags()["histograms"]


def test_a_snapshot_is_not_added_to_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    record = NoiseRecord()
    record.add(0, 8, torch.ones(4, dtype=torch.float64))
    with monkeypatch.context() as patched:
        patched.setattr(HostTensor, "__call__", lambda _: pytest.fail("it waits"))
        patched.setattr(HostTensor, "has_arrived", property(lambda _: False))
        copied = record.snapshot()
        record.add(1, torch.tensor(8.0, dtype=torch.float64), torch.full((4,), torch.nan, dtype=torch.float64))
        assert record.estimate("adam", wait=False).measurements == 0 and len(copied) == 1
    assert [sample["step"] for sample in copied.samples] == [0]
    assert record.samples[1] == {"step": 1, "batch_size": 8.0, **dict.fromkeys([*record.samples[0]][2:])}
