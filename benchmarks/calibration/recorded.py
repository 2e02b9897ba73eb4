"""The noise scale that a monitor records in 100 steps on one device, beside that of fresh gradients at the same weights."""

from __future__ import annotations

import itertools
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from capture_variants import Training
from evidence import Evidence
from reporting import Row
from torch import nn
from torch.utils.data import DataLoader
from training import EPS, data_of, gradients_of
from workloads import Data, Workload

from lightning_gradhist import GradientHistogramMonitor, NoiseScale
from lightning_gradhist.callbacks.monitor import halves
from lightning_gradhist.learning_rate import SURGE, choose_ratio

STEPS, MOMENTS, GRADIENTS, FRESH = 100, range(5, 100, 10), 16, 256
WAYS = {"halves": halves._LEAST_SAMPLES, "pairs": 10**9}
"""How noise is measured, by the samples of a batch from which on its halves are."""


class Module(Training):
    """A workload under Adam."""

    def __init__(self, workload: Workload, batch_size: int) -> None:
        super().__init__(nn.Sequential(workload.make_model(), nn.Flatten(0, -2)))
        self.rate = workload.learning_rate * (batch_size / workload.batch_sizes[0]) ** 0.4

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.rate)


class Truth(L.Callback):
    """Noise scales at some moments, each from fresh gradients at the weights of the moment."""

    def __init__(self, data: Data, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size
        self.found: list[float] = []
        self._generator = torch.Generator().manual_seed(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Measure, without a trace: no gradient is left in the parameters."""
        if trainer.global_step not in MOMENTS:
            return
        model = pl_module.network[0]
        noise = NoiseScale(dict(model.named_parameters()), FRESH)
        fresh = gradients_of(model, self.data, FRESH, self._generator)
        for number, gradients in enumerate(itertools.islice(fresh, 2 * GRADIENTS)):
            if number == GRADIENTS:
                noise.split(EPS["Adam"], self.batch_size / FRESH)
            noise.update(gradients)
        self.found.append(noise.adam().value)


def train(workload: Workload, data: Data, batch_size: int, others: list[L.Callback]) -> Any:
    """Train for 100 steps; the record's estimate."""
    torch.manual_seed(0)
    module, monitor = Module(workload, batch_size), GradientHistogramMonitor(every_n_steps=1)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"max_steps": STEPS, "accelerator": "cpu", "default_root_dir": folder, **quiet}
        loader = DataLoader(data.train, batch_size, shuffle=True, drop_last=True)
        L.Trainer(callbacks=[monitor, *others], **options).fit(module, loader)
    return monitor.noise_records[0].estimate("adam")


def recorded(evidence: Evidence, folder: Path) -> list[Row]:
    """What is recorded at the middle batch sizes in both ways, the true value, and whether a rate could be carried with it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    workload, rows = evidence.workload, []
    data = data_of(workload.name, folder)
    for size in workload.batch_sizes[1:4]:
        truth = Truth(data, size)
        row: Row = {"workload": workload.name, "batch_size": size}
        for way, least in WAYS.items():
            halves._LEAST_SAMPLES = least
            noise = train(workload, data, size, [truth] if way == "halves" else [])
            carried = choose_ratio(SURGE, 4 * size, size, noise, from_record=True)
            row |= {way: noise.value, f"{way}_lower": noise.lower, f"{way}_upper": noise.upper}
            row |= {f"{way}_usable": int(carried.law == SURGE), "truth": statistics.fmean(truth.found)}
        rows.append(row)
    return rows
