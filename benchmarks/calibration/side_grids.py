"""Small grids beside the main one: the batch sizes of the surge law's paper, and Adam without momentum. All of ``mlp``.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/side_grids.py``; a quarter of an hour on one core. It can be
stopped at any time and goes on where it was. Each grid has a table of its own, with the columns of ``grid.py``'s; its stages
are that module's ``rates``, ``refine`` and ``seeds``: rates a factor of sqrt(2) apart, three seeds.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from grid import FOLDER, MACHINE, STAGES, Results, Table
from measuring import installed_version, machine
from training import Run, train
from workloads import FASHION_MNIST, WORKLOADS

_MLP = WORKLOADS["mlp"]
GRIDS = {
    "surge_large": replace(
        _MLP, batch_sizes=(64, 91, 128, 181, 256, 362, 512, 724, 1024, 1164), samples=46_080, learning_rate=2**-6
    ),
    "no_momentum": replace(_MLP, optimizer="Adam without momentum"),
    "surge_small": replace(_MLP, batch_sizes=(1, 2, 3, 4, 6, 8, 12), samples=2880),
}
"""By the name of their table. ``surge_large`` makes four times the samples, so that its shortest run has 39 steps, and
``surge_small`` a quarter of them, for time."""
MADE = ("rates", "refine", "seeds")


def next_run(name: str, results: Results) -> tuple[str, Run] | None:
    """The stage and the run that a grid wants next; None where it is finished."""
    wanted = ((stage, run) for stage in MADE for run in STAGES[stage](GRIDS[name], results))
    return next(((stage, run) for stage, run in wanted if run not in results), None)


def main(arguments: list[str] | None = None) -> None:
    """Makes the runs that are wanted, one after another."""
    options = parse(arguments)
    end = time.monotonic() + 60 * options.minutes
    described = {**machine(torch.device("cpu")), "timm": installed_version("timm")}
    for name in options.grid:
        table = Table(options.output / f"{name}.csv")
        while time.monotonic() < end and (wanted := next_run(name, table)) is not None:
            stage, run = wanted
            row = train(run, options.data_dir)
            table.add({"stage": stage, **row, **{column: described[column] for column in MACHINE}})
            print(
                f"{name} {stage:10} batch {run.batch_size:<5} rate {run.learning_rate:<9.3g} seed {run.seed}:"
                f" loss {row['train_loss']:.4g} {row['seconds']:.1f} s",
                flush=True,
            )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--grid", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is begun after that")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
