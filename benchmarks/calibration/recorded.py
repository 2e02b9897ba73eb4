"""The noise scale that a monitor records in 100 steps on one device, beside that of fresh gradients at the same weights.

``python benchmarks/calibration/recorded.py`` (PYTHONPATH as in the Makefile; some five minutes on one core).
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from reporting import RESULTS, Row, machine, print_table, write_csv
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from training import EPS, gradients_of
from workloads import FASHION_MNIST, WORKLOADS, Data, Workload

from lightning_gradhist import GradientHistogramMonitor, NoiseScale
from lightning_gradhist.callbacks.monitor import halves
from lightning_gradhist.learning_rate import SURGE, choose_ratio

STEPS, MOMENTS, GRADIENTS, FRESH = 100, range(5, 100, 10), 16, 256
WAYS = {"halves": halves._LEAST_SAMPLES, "pairs": 10**9}
"""How noise is measured, by the samples of a batch from which on its halves are."""


class Module(L.LightningModule):
    """A workload under Adam."""

    def __init__(self, workload: Workload, batch_size: int) -> None:
        super().__init__()
        self.net, self.workload = workload.make_model(), workload
        self.rate = workload.learning_rate * (batch_size / workload.batch_sizes[0]) ** 0.4

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        return functional.cross_entropy(self.net(batch[0]).flatten(0, -2), batch[1].flatten())

    def configure_optimizers(self) -> Any:
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
        noise = NoiseScale(dict(pl_module.net.named_parameters()), FRESH)
        fresh = gradients_of(pl_module.net, self.data, FRESH, self._generator)
        for number, gradients in enumerate(itertools.islice(fresh, 2 * GRADIENTS)):
            if number == GRADIENTS:
                noise.split(EPS["Adam"], self.batch_size / FRESH)
            noise.update(gradients)
        self.found.append(noise.adam().value)


def run(workload: Workload, data: Data, batch_size: int, seed: int, folder: Path, truth: bool = False) -> Any:
    """Train for 100 steps; the record's estimate, and the truth's mean."""
    torch.manual_seed(seed)
    module, monitor = Module(workload, batch_size), GradientHistogramMonitor(every_n_steps=1)
    true = Truth(data, batch_size)
    quiet = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger"), False)
    callbacks = [monitor, true] if truth else [monitor]
    trainer = L.Trainer(max_steps=STEPS, accelerator="cpu", callbacks=callbacks, default_root_dir=folder, **quiet)
    trainer.fit(module, DataLoader(data.train, batch_size, shuffle=True, drop_last=True))
    return monitor.noise_records[0].estimate("adam"), statistics.fmean(true.found) if truth else None


def measure(workload: Workload, data: Data, batch_size: int, seed: int, folder: Path) -> Row:
    """A row of the table."""
    row: Row = {"workload": workload.name, "batch_size": batch_size, "seed": seed}
    for way, least in WAYS.items():
        halves._LEAST_SAMPLES = least
        noise, true = run(workload, data, batch_size, seed, folder, truth=way == "halves")
        row |= {"truth": true} if true is not None else {}
        row |= {way: noise.value, f"{way}_lower": noise.lower, f"{way}_upper": noise.upper}
        carried = choose_ratio(SURGE, 4 * batch_size, batch_size, noise, from_record=True)
        row[f"{way}_usable"] = int(carried.law == SURGE)
    return row


def main() -> None:
    """Measure on all workloads."""
    parser = argparse.ArgumentParser(description="Noise scales that runs of 100 steps record, and true ones.")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "calibration" / "recorded.csv")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for workload in WORKLOADS.values():
            data = workload.load(FASHION_MNIST)
            for size, seed in itertools.product(workload.batch_sizes[1:4], range(args.seeds)):
                rows.append(measure(workload, data, size, seed, Path(folder)))
                print(rows[-1], flush=True)
    described = machine()
    write_csv(args.output, [*rows[0], *described], [{**row, **described} for row in rows])
    print_table(rows, list(rows[0]))
    for way in WAYS:
        usable = [row for row in rows if row[f"{way}_usable"]]
        factors = sorted(max(row[way] / row["truth"], row["truth"] / row[way]) for row in usable)
        typical, worst = (statistics.median(factors), factors[-1]) if factors else (float("nan"),) * 2
        print(
            f"{way}: usable {len(usable)} of {len(rows)}; off by a factor of {typical:.2g} typically, {worst:.2g} at worst"
        )


if __name__ == "__main__":
    main()
