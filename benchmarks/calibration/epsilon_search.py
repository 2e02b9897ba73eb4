"""What ``OptimizerCalibration(epsilon="search")`` chooses, and what the whole run makes of it.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/epsilon_search.py``. Adam at eps 1e-8, one thread. Columns, one
row for each workload, learning rate and factor of the loss:

- ``learning_rate``: the best of the grid in ``results/calibration`` at this batch size, and Adam's default.
- ``chosen``: ``search`` where the search replaces 1e-8, ``kept`` where it does not, or why there was none.
- ``eps``, ``factor``: what it hands off; ``difference``, ``lower``, ``upper``: loss after the short runs, minus that of 1e-8, of
  the chosen one. ``control``, ``control_difference``: the other rate at which 1e-8 does best, and by how much.
- ``first_eps``, ``first_factor``: the epsilon with the lowest loss after the short runs of those that are better than 1e-8 at
  its rate, with confidence: what a search without the runs at other rates would choose. Empty where there is none.
- ``gradients``, ``forwards``, ``seconds``: what calibration took, the seconds with those of its probe.
- ``loss_default``, ``loss_auto``, ``loss_search``, ``loss_first``: final training loss of a whole run, with warm-up and linear
  decay, with 1e-8, with what ``"auto"`` chooses (``auto_eps``), with what the search hands off, and with ``first_eps``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from greedy import Module, quiet_trainer
from grid import FOLDER, Table, best, losses, rate
from measuring import machine
from torch.utils.data import DataLoader
from training import EPS, Run, train
from workloads import FASHION_MNIST, WORKLOADS, Workload

from lightning_gradhist import OptimizerCalibration
from lightning_gradhist.epsilon_search import EpsilonTrial
from lightning_gradhist.report.result import CalibrationResult

COLUMNS = [
    *("workload", "batch_size", "learning_rate", "loss_scale", "seed", "chosen", "eps", "factor"),
    *("difference", "lower", "upper", "control", "control_difference", "first_eps", "first_factor"),
    *("gradients", "forwards", "seconds", "auto_eps", "loss_default", "loss_auto", "loss_search", "loss_first"),
    *("date", "cpu", "cores", "python", "torch"),
]
_LOSS_SCALES = (1.0, 1e-8, 1e4)
_SEED = 0


class Scaled(Module):
    """A workload's model under Adam, the loss times a factor.

    Args:
        workload: whose model is made.
        learning_rate: of Adam.
        loss_scale: the factor.
    """

    def __init__(self, workload: Workload, learning_rate: float, loss_scale: float) -> None:
        super().__init__(workload)
        self.lr, self.loss_scale = learning_rate, loss_scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Mean cross-entropy times the factor."""
        return super().training_step(batch, batch_idx) * self.loss_scale


def calibrate(run: Run, epsilon: str, folder: Path) -> tuple[CalibrationResult, float]:
    """What a calibration at the start of a run finds, and its seconds."""
    workload = WORKLOADS[run.workload]
    L.seed_everything(run.seed, verbose=False)
    module = Scaled(workload, run.learning_rate, run.loss_scale)
    loader = DataLoader(workload.load(folder).train, run.batch_size, shuffle=True, drop_last=True)
    calibration = OptimizerCalibration(epsilon=epsilon, learning_rate="keep")
    trainer = quiet_trainer(calibration, max_steps=1)
    start = perf_counter()
    trainer.fit(module, loader)
    assert calibration.result is not None
    return calibration.result, perf_counter() - start


def measure(run: Run, folder: Path) -> dict[str, Any]:
    """One row: the search, and the whole runs."""
    auto, _ = calibrate(run, "auto", folder)
    result, seconds = calibrate(run, "search", folder)
    search = result.epsilon_search
    chosen = search.chosen if search else None
    ahead = [trial for trial in search.trials if trial.to_present.upper < 0] if search else []
    first = min(ahead, key=lambda trial: trial.to_present.value, default=None)
    row = {
        **{name: getattr(run, name) for name in ("workload", "batch_size", "learning_rate", "loss_scale", "seed")},
        **{"eps": result.epsilon, "auto_eps": auto.epsilon, "seconds": seconds},
        "chosen": ("search" if chosen else "kept") if search else "; ".join(result.problems),
        "loss_default": _final_loss(run, folder),
        "loss_auto": _final_loss(replace(run, eps=auto.epsilon), folder),
        "loss_search": _final_loss(replace(run, eps=result.epsilon, learning_rate=result.learning_rate), folder),
    }
    if search:
        row |= {"gradients": search.gradients, "forwards": search.forwards, "control": search.control}
        row["control_difference"] = search.control_to_present.value
    if chosen:
        difference = chosen.to_present
        row |= {"factor": chosen.factor, "difference": difference.value, "lower": difference.lower}
        row["upper"] = difference.upper
    if first:
        row |= {"first_eps": first.candidate.eps, "first_factor": first.factor}
        row["loss_first"] = _final_loss(_handed(run, first), folder)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=["mlp", "gpt", "lstm"])
    parser.add_argument("--loss-scale", nargs="+", type=float, default=_LOSS_SCALES)
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "epsilon_search.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    described = machine(torch.device("cpu"))
    with options.output.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for workload in (WORKLOADS[name] for name in options.workload):
            batch_size = workload.batch_sizes[len(workload.batch_sizes) // 2]
            run = Run(workload.name, "Adam", batch_size, 1e-3, EPS["Adam"], _SEED, workload.samples)
            top = best(losses(Table(FOLDER / f"{workload.name}.csv"), run))
            for learning_rate in (*([] if top is None else [rate(top)]), 1e-3):
                for scale in options.loss_scale:
                    row = measure(replace(run, learning_rate=learning_rate, loss_scale=scale), options.data_dir)
                    writer.writerow(described | row)
                    file.flush()
                    print("  ".join(f"{name} {_short(row.get(name))}" for name in COLUMNS[:-5]), flush=True)


def _handed(run: Run, trial: EpsilonTrial) -> Run:
    return replace(run, eps=trial.candidate.eps, learning_rate=run.learning_rate * trial.factor)


@cache
def _final_loss(run: Run, folder: Path) -> float:
    return float(train(run, folder)["train_loss"])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    main()
