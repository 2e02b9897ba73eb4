"""The greedy learning rate against Lightning's LearningRateFinder and the best rate of the grid.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/greedy.py``. Adam, one thread. Columns, one row for each
workload, batch size, seed and moment:

- ``step``: optimizer steps before, at Adam's default rate: none, and a tenth of those of the grid's runs, at least ten.
- ``greedy``, ``lower``, ``upper``: the rate at which the next step lowers the loss most, from the optimizer's state at that
  step, and its 95% interval; empty where it is refused, and ``why_none`` says why.
- ``gradients``, ``forwards``: what it took.
- ``finder``: suggestion of the real ``Tuner(...).lr_find`` with its default settings, from the same weights of the start.
- ``best``: learning rate with the lowest final training loss in ``results/calibration``, empty where there is none: the
  highest of a run with warm-up and linear decay, to which neither of the two lays claim.
- ``greedy_excess``, ``finder_excess``: by how much the final loss at the nearest rate of the grid is above the best, as a
  share of it; ``inf`` beyond the ends of the grid and where it diverged.
"""

from __future__ import annotations

import argparse
import csv
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from grid import FOLDER, Table, best, half_octaves, losses, rate
from lightning.pytorch.tuner import Tuner
from measuring import machine
from torch.nn import functional
from torch.utils.data import DataLoader
from training import EPS, Run
from workloads import FASHION_MNIST, WORKLOADS, Workload

from lightning_gradhist.callbacks.greedy import GreedyProbe

COLUMNS = [
    *("workload", "batch_size", "seed", "step", "greedy", "lower", "upper", "why_none", "gradients", "forwards"),
    *("finder", "best", "greedy_excess", "finder_excess", "date", "cpu", "cores", "python", "torch"),
]
_PROBE_BATCHES, _CONFIDENCE = 32, 0.95
_LEAST_STEPS = 10
_OF_RATE = {"greedy": "value", "lower": "lower", "upper": "upper"}
_LEARNING_RATE = 1e-3  # Adam's default: nobody knows a better one yet


class Module(L.LightningModule):
    """A workload's model under Adam.

    Args:
        workload: whose model is made, from torch's global random numbers.
    """

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.model = workload.make_model()
        self.lr = _LEARNING_RATE

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Mean cross-entropy."""
        inputs, classes = batch
        return functional.cross_entropy(self.model(inputs).flatten(0, -2), classes.flatten())

    def configure_optimizers(self) -> Any:
        """Adam at ``lr``."""
        return torch.optim.Adam(self.parameters(), self.lr)


class Greedy(L.Callback):
    """Probes before some steps.

    Args:
        steps: numbers of steps before.
    """

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps
        self.found: dict[int, GreedyProbe] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Probes, and leaves no trace."""
        if trainer.global_step in self.steps:
            probe = self.found[trainer.global_step] = GreedyProbe(trainer, pl_module, ())
            probe.run(_PROBE_BATCHES, _CONFIDENCE)


def measure(workload: Workload, batch_size: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """The rates at both moments, one row each.

    Args:
        workload: to be trained.
        batch_size: in samples.
        seed: of the weights and of the order of the samples.
        folder: of Fashion-MNIST.
    """
    train = workload.load(folder).train

    def module_and_loader() -> tuple[Module, DataLoader]:
        L.seed_everything(seed, verbose=False)
        return Module(workload), DataLoader(train, batch_size, shuffle=True, drop_last=True)

    greedy = Greedy((0, max(_LEAST_STEPS, workload.samples // batch_size // 10)))
    quiet_trainer(greedy, max_steps=greedy.steps[-1] + 1).fit(*module_and_loader())
    tuner = Tuner(quiet_trainer(max_epochs=-1))
    finder = tuner.lr_find(*module_and_loader(), update_attr=False)
    suggested = finder.suggestion() if finder is not None else None
    return [
        {
            **{"workload": workload.name, "batch_size": batch_size, "seed": seed, "step": step, "finder": suggested},
            **{name: getattr(probe.rate, field, None) for name, field in _OF_RATE.items()},
            **{name: getattr(probe, name) for name in ("why_none", "gradients", "forwards")},
        }
        for step, probe in greedy.found.items()
    ]


def against_grid(row: dict[str, Any], by_rate: dict[int, float]) -> dict[str, Any]:
    """The best rate of the grid, and the excess loss at those of a row.

    Args:
        row: with ``greedy`` and ``finder``, either of them None.
        by_rate: final loss by half octaves of the learning rate.
    """
    top = best(by_rate)
    if top is None:
        return {"best": None, "greedy_excess": None, "finder_excess": None}

    def excess(learning_rate: float | None) -> float | None:
        if learning_rate is None:
            return None
        nearest = min(by_rate, key=lambda k: abs(k - half_octaves(learning_rate)))
        if abs(nearest - half_octaves(learning_rate)) > 1:
            return math.inf
        return by_rate[nearest] / by_rate[top] - 1

    return {"best": rate(top), "greedy_excess": excess(row["greedy"]), "finder_excess": excess(row["finder"])}


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--batch-size", nargs="+", type=int, help="those of the grid if it is not given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--grid", type=Path, default=FOLDER, help="folder of the grid's tables")
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "greedy.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    described = machine(torch.device("cpu"))
    with options.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for workload in (WORKLOADS[name] for name in options.workload):
            path = options.grid / f"{workload.name}.csv"
            table = Table(path) if path.exists() else {}
            for batch_size in options.batch_size or workload.batch_sizes:
                like = Run(workload.name, "Adam", batch_size, 1.0, EPS["Adam"], 0, workload.samples)
                by_rate = losses(table, like)
                for seed in range(options.seeds):
                    for row in measure(workload, batch_size, seed, options.data_dir):
                        row |= against_grid(row, by_rate)
                        writer.writerow(described | row)
                        file.flush()
                        print(_line(row), flush=True)


def quiet_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    """A Trainer on the CPU that shows and leaves nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **quiet, **options)


def _line(row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3g}"

    greedy = f"{number(row['greedy'])} ({number(row['lower'])} to {number(row['upper'])})"
    return (
        f"{row['workload']:4} batch {row['batch_size']:<5} seed {row['seed']} step {row['step']:<4} greedy {greedy:24}"
        f" finder {number(row['finder']):8} best {number(row['best']):8} excess loss {number(row['greedy_excess'])},"
        f" {number(row['finder_excess'])} {row['why_none'] or ''}"
    )


if __name__ == "__main__":
    main()
