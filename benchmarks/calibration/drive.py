"""Makes the runs that the evidence lacks, in order of their use: ``make evidence-full``.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/drive.py``. It can be stopped at any time (SIGSTOP and
SIGCONT, SIGTERM) and goes on where it was: a run that is in its table is not made again, and only runs in progress are
lost. One driver at a time may write to a table.

Columns of a table, one row a run: in those of the grids ``stage``, in which it was first wanted; the fields of
``training.Run``; the results, as ``training.train`` describes them, where ``curve``, ``samples_to_target`` and
``noise_scale`` are JSON (with ``Infinity``), or those of ``training.train_for_claim``; and the machine.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import signal
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path

import grid
from grid import CLAIMS_COLUMNS, COLUMNS, FOLDER, SIDE, SIDE_STAGES, STAGES, Results, Table
from reporting import CPU, Row, machine
from training import Run, train, train_for_claim
from workloads import FASHION_MNIST, WORKLOADS

CLAIMS = "claims"
NAMES = [*WORKLOADS, *SIDE, CLAIMS]
"""Of the tables."""


def wanted(stage: str, name: str, results: Results) -> Iterable[Run]:
    """The runs of a stage that a table is to have, as far as is known by now."""
    if name == CLAIMS:
        return grid.wanted(grid.available(), results) if stage == CLAIMS else ()
    if stage == CLAIMS or (name in SIDE and stage not in SIDE_STAGES):
        return ()
    return STAGES[stage](SIDE.get(name) or WORKLOADS[name], results)


def next_run(
    names: Collection[str], stages: Collection[str], tables: Mapping[str, Results], running: Collection[Run]
) -> tuple[str, str, Run] | None:
    """The stage, the table and the run that is wanted most.

    A table waits for its runs of a stage before it goes on to the next one, since that depends on them; another one
    takes its place meanwhile.

    Args:
        names: of the tables.
        stages: that may be run.
        tables: what there is.
        running: what is being run.
    """
    waiting = set()
    for stage in (stage for stage in (*STAGES, CLAIMS) if stage in stages):
        for name in (name for name in names if name not in waiting):
            for run in wanted(stage, name, tables[name]):
                if run in running:
                    waiting.add(name)
                elif run not in tables[name]:
                    return stage, name, run
    return None


def make_runs(pool: Pool, options: argparse.Namespace) -> None:
    """Gives the pool run after run, and writes each row as it comes, until nothing is wanted or the time is over."""
    tables = {n: Table(options.output / f"{n}.csv", CLAIMS_COLUMNS if n == CLAIMS else COLUMNS) for n in options.table}
    end, described = time.monotonic() + 60 * options.minutes, machine(CPU, "timm")
    running: dict[Run, tuple[str, str, AsyncResult[Row]]] = {}
    while True:
        while len(running) < options.workers and time.monotonic() < end:
            found = next_run(options.table, options.stage, tables, running)
            if found is None:
                break
            stage, name, run = found
            make = train_for_claim if name == CLAIMS else train
            running[run] = (stage, name, pool.apply_async(make, (run, options.data_dir)))
        if not running:
            return
        done = _wait(running)
        stage, name, result = running.pop(done)
        row = {**result.get(), **described, "stage": stage}
        tables[name].add(row)
        print(
            f"{time.strftime('%H:%M:%S')} {name:11} {stage:10} {done.optimizer:5} batch {done.batch_size:<5} rate"
            f" {done.learning_rate:<9.3g} eps {done.eps:<5g} seed {done.seed}: loss {row['train_loss']:<8.4g} accuracy"
            f" {row['test_accuracy']:.3f} {'diverged ' * row['diverged']}{row['seconds']:.1f} s",
            flush=True,
        )


def _wait(running: Mapping[Run, tuple[str, str, AsyncResult[Row]]]) -> Run:
    while True:
        for run, (_, _, result) in running.items():
            if result.ready():
                return run
        time.sleep(0.02)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, CLAIMS], default=[*STAGES, CLAIMS])
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is begun after that")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Makes the runs that are wanted, in processes of one thread each."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the workers are stopped, too
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        make_runs(pool, options)


if __name__ == "__main__":
    main()
