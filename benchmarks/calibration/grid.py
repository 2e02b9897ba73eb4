"""The grids of the calibration's evidence: which runs are wanted, and a driver that makes them, in order of their use.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/grid.py``. It can be stopped at any time (SIGSTOP and
SIGCONT, SIGTERM) and goes on where it was: a run that is in the table is not made again, and only runs in progress are
lost. One driver at a time may write to a table.

Stages, each over all workloads before the next one, at Adam and equal samples where nothing else is said:

- ``rates``: for each batch size learning rates a factor of two apart, seed 0, until the final training loss is 5% above
  the best on both sides.
- ``refine``: the two rates a factor of sqrt(2) from the best.
- ``seeds``: seeds 1 and 2 at the best rate, and a factor of sqrt(2) and of 2 from it.
- ``noise``: the best rate again, seeds 0 to 2, with the noise scale measured on the way.
- ``cover``: the rates on both sides of those that a law (keep, fourth root, square root, linear) carries from the best rate
  of each other batch size, as far as the loss there is less than twice the best.
- ``more_seeds``: seeds 3 and 4 at the best rate and a factor of sqrt(2) from it.
- ``epsilon``: at the middle batch size 1e-12 to 1e-1 by decades, at the best rate, half and twice of it; and the default with the
  loss multiplied by 1e-8, 1e-4 and 1e4, at the same rates.
- ``optimizers``: ALTO, Lamb (where timm is installed: ``make peers``) and AdamE at the two largest batch sizes: rates as in
  the first stage, and seeds 1 and 2 at the best and a factor of two from it.
- ``steps``: as ``rates``, at equal steps instead of equal samples.
- ``steps_seeds``: there seeds 1 and 2 at the best rate and a factor of two from it.

The best rate of a batch size is the one with the lowest final training loss, averaged over the seeds that there are;
so a stage may want a few runs more once a later one has moved it.

Columns of a table, one row a run: ``stage``, in which it was first wanted; the fields of ``training.Run``; the results, as
``training.train`` describes them, where ``curve``, ``samples_to_target`` and ``noise_scale`` are JSON (with ``Infinity``);
and the machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import multiprocessing
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, replace
from multiprocessing.pool import AsyncResult, Pool
from pathlib import Path
from typing import Any

import torch
from measuring import installed_version, machine
from optim_implementations import LeftOut, timm_lamb
from training import EPS, Row, Run, train
from workloads import FASHION_MNIST, WORKLOADS, Workload

from lightning_gradhist.surge import PowerLaw

FOLDER = Path(__file__).parent.parent / "results" / "calibration"
FIELDS = {field.name: field.type for field in fields(Run)}
NUMBERS = "steps train_loss test_loss test_accuracy diverged seconds noise_passes".split()
JSON = "curve samples_to_target noise_scale".split()
MACHINE = "date cpu cores python torch lightning_gradhist timm".split()
COLUMNS = ["stage", *FIELDS, *NUMBERS, *JSON, *MACHINE]

CLEAR = 1.05
"""An optimum is interior where the loss is this many times higher on both sides."""
FAR = 2.0
"""Beyond a rate with this many times the best loss there is nothing to learn."""
_EXPONENTS = (0.0, 0.25, 0.5, 1.0)
_READ: dict[Any, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": lambda text: text == "1"}

Results = Mapping[Run, Row]
Stage = Callable[[Workload, Results], Iterator[Run]]


# --- learning rates, counted in half octaves: rate(k) = 2**(k / 2) ----------------------------------------------------


def rate(k: int) -> float:
    """The learning rate of a number of half octaves."""
    return 2.0 ** (k / 2)


def half_octaves(learning_rate: float) -> int:
    """The number of half octaves nearest to a learning rate."""
    return round(2 * math.log2(learning_rate))


def losses(results: Results, like: Run) -> dict[int, float]:
    """Final training loss by half octaves, averaged over seeds, of runs that differ from one in rate and seed only."""
    found: dict[int, list[float]] = defaultdict(list)
    for run, row in results.items():
        if setting(run) == setting(like):
            found[half_octaves(run.learning_rate)].append(math.inf if row["diverged"] else row["train_loss"])
    return {k: sum(values) / len(values) for k, values in sorted(found.items())}


def setting(run: Run) -> tuple[Any, ...]:
    """All of a run but its rate and seed."""
    return run.workload, run.optimizer, run.batch_size, run.eps, run.samples, run.loss_scale, run.noise


def best(by_rate: Mapping[int, float]) -> int | None:
    """Half octaves of the rate with the lowest loss; None where all diverged."""
    k = min(by_rate, key=lambda k: by_rate[k], default=None)
    return None if k is None or math.isinf(by_rate[k]) else k


def missing(by_rate: Mapping[int, float], start: int) -> list[int]:
    """Rates, an octave from those that there are, that it takes for the optimum to be interior; around ``start`` if none."""
    if not by_rate:
        return [start, start - 2, start + 2]
    top = best(by_rate)
    if top is None:
        return [min(by_rate) - 2]
    clear = CLEAR * by_rate[top]
    below = any(loss > clear for k, loss in by_rate.items() if k < top)
    above = any(loss > clear for k, loss in by_rate.items() if k > top)
    return [min(by_rate) - 2] * (not below) + [max(by_rate) + 2] * (not above)


# --- stages -----------------------------------------------------------------------------------------------------------


def middle(workload: Workload) -> int:
    """The middle batch size."""
    return workload.batch_sizes[len(workload.batch_sizes) // 2]


def _at(like: Run, k: int, seed: int = 0) -> Run:
    return replace(like, learning_rate=rate(k), seed=seed)


def references(workload: Workload) -> list[Run]:
    """A run at equal samples for each batch size, of Adam in the main grid; the rate and the seed do not matter."""
    name, eps = workload.optimizer, EPS[workload.optimizer]
    return [Run(workload.name, name, size, 1.0, eps, 0, workload.samples) for size in workload.batch_sizes]


def _optima(workload: Workload, results: Results) -> list[tuple[Run, int]]:
    optima = ((like, best(losses(results, like))) for like in references(workload))
    return [(like, k) for like, k in optima if k is not None]


def rates(workload: Workload, results: Results) -> Iterator[Run]:
    """An octave apart until the optimum is interior."""
    first = half_octaves(workload.learning_rate)
    for number, like in enumerate(references(workload)):
        start = first + 2 * ((number + 1) // 2)
        yield from (_at(like, k) for k in missing(losses(results, like), start))


def refine(workload: Workload, results: Results) -> Iterator[Run]:
    """Half an octave around the optimum."""
    yield from (_at(like, k + step) for like, k in _optima(workload, results) for step in (-1, 1))


def seeds(workload: Workload, results: Results) -> Iterator[Run]:
    """Seeds 1 and 2 within an octave of the optimum."""
    optima = _optima(workload, results)
    yield from (_at(like, k + step, seed) for seed in (1, 2) for like, k in optima for step in (0, -1, 1, -2, 2))


def noise(workload: Workload, results: Results) -> Iterator[Run]:
    """The noise scale along the best runs."""
    optima = _optima(workload, results)
    yield from (replace(_at(like, k, seed), noise=True) for seed in range(3) for like, k in optima)


def cover(workload: Workload, results: Results) -> Iterator[Run]:
    """The rates on both sides of those that laws carry from one batch size to another, to where the loss is twice the best."""
    optima = _optima(workload, results)
    for like, k in optima:
        carried = [
            2 * math.log2(rate(origin) * PowerLaw(exponent).ratio(like.batch_size, other.batch_size))
            for other, origin in optima
            for exponent in _EXPONENTS
        ]
        known = losses(results, like)
        for low, step in ((math.floor(min(carried)), -2), (math.ceil(max(carried)), 2)):
            end = k
            while (end - low) * step < 0 and known.get(end, 0.0) < FAR * known[k]:
                end += step
                yield _at(like, end)
                if end not in known:
                    break


def more_seeds(workload: Workload, results: Results) -> Iterator[Run]:
    """Seeds 3 and 4 within half an octave of the optimum."""
    optima = _optima(workload, results)
    yield from (_at(like, k + step, seed) for seed in (3, 4) for like, k in optima for step in (0, -1, 1))


def epsilon(workload: Workload, results: Results) -> Iterator[Run]:
    """Epsilon by decades, and the loss scaled, at the middle batch size."""
    for like, k in _optima(workload, results):
        if like.batch_size != middle(workload):
            continue
        for step in (0, 2, -2):
            yield from (replace(_at(like, k + step), loss_scale=scale) for scale in (1e-8, 1e-4, 1e4))
            yield from (replace(_at(like, k + step), eps=10.0**power) for power in range(-1, -13, -1))


def optimizers(workload: Workload, results: Results) -> Iterator[Run]:
    """The optimizers for large batches at the two largest ones."""
    for name in ("ALTO", "Lamb", "AdamE"):
        if name == "Lamb" and not _has_lamb():
            continue
        for like, adam in _optima(workload, results)[-2:]:
            other = replace(like, optimizer=name, eps=EPS[name])
            known = losses(results, other)
            wanted = missing(known, adam if name == "AdamE" else half_octaves(1 / 16))
            yield from (_at(other, k) for k in wanted)
            if not wanted:
                top = best(known)
                yield from (_at(other, top + step, seed) for seed in (1, 2) for step in (0, -2, 2))


def at_equal_steps(workload: Workload, like: Run) -> Run:
    """A run with the workload's number of steps in place of its number of samples."""
    return replace(like, samples=workload.steps * like.batch_size)


def steps(workload: Workload, results: Results) -> Iterator[Run]:
    """As ``rates``, at equal steps."""
    for like, k in _optima(workload, results):
        equal = at_equal_steps(workload, like)
        yield from (_at(equal, k) for k in missing(losses(results, equal), k))


def steps_seeds(workload: Workload, results: Results) -> Iterator[Run]:
    """Seeds 1 and 2 within an octave of the optimum at equal steps."""
    equals = [at_equal_steps(workload, like) for like in references(workload)]
    optima = ((equal, best(losses(results, equal))) for equal in equals)
    for equal, k in optima:
        if k is not None:
            yield from (_at(equal, k + step, seed) for seed in (1, 2) for step in (0, -2, 2))


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (rates, refine, seeds, noise, cover, more_seeds, epsilon, optimizers, steps, steps_seeds)
}
"""In their order."""


def _has_lamb() -> bool:
    try:
        timm_lamb()
    except LeftOut:
        return False
    return True


def next_run(
    names: Collection[str], stages: Collection[str], tables: Mapping[str, Results], running: Collection[Run]
) -> tuple[str, Run] | None:
    """The stage and the run that is wanted most.

    A workload waits for its runs of a stage before it goes on to the next one, since that depends on them; another
    workload takes its place meanwhile.

    Args:
        names: of the workloads.
        stages: that may be run.
        tables: what there is of each workload.
        running: what is being run.
    """
    waiting = set()
    for stage in (stage for stage in STAGES if stage in stages):
        for name in (name for name in names if name not in waiting):
            for run in STAGES[stage](WORKLOADS[name], tables[name]):
                if run in running:
                    waiting.add(name)
                elif run not in tables[name]:
                    return stage, run
    return None


# --- tables -----------------------------------------------------------------------------------------------------------


class Table(dict[Run, Row]):
    """The runs of a workload, and their file.

    Args:
        path: of the CSV; a last line that was not written to its end is cut off.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(read(path))
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_whole(_text(path)), encoding="utf-8")
        if not _text(path):
            self._write(COLUMNS)

    def add(self, row: Row) -> None:
        """Adds a row, and writes it."""
        self[_run(row)] = row
        written = {**row, **{column: json.dumps(row[column]) for column in JSON}, "noise": int(row["noise"])}
        self._write([written[column] for column in COLUMNS])

    def _write(self, values: list[Any]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line.getvalue())


def read(path: Path) -> dict[Run, Row]:
    """The runs of a table; none where there is no file, and without a last line that was not written to its end."""
    rows = map(_parsed, csv.DictReader(io.StringIO(_whole(_text(path)))))
    return {_run(row): row for row in rows}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _whole(text: str) -> str:
    return text[: text.rfind("\n") + 1]


def _parsed(line: dict[str, str]) -> Row:
    row: Row = dict(line)
    row |= {name: _READ[kind](line[name]) for name, kind in FIELDS.items()}
    row |= {name: float(line[name]) for name in NUMBERS}
    return row | {name: json.loads(line[name]) for name in JSON}


def _run(row: Row) -> Run:
    return Run(**{name: row[name] for name in FIELDS})


# --- driver -----------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Makes the runs that are wanted, in processes of one thread each."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the workers are stopped, too
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        make_runs(pool, options)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is begun after that")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    return parser.parse_args(arguments)


def make_runs(pool: Pool, options: argparse.Namespace) -> None:
    """Gives the pool run after run, and writes each row as it comes, until nothing is wanted or the time is over."""
    tables = {name: Table(options.output / f"{name}.csv") for name in options.workload}
    end = time.monotonic() + 60 * options.minutes
    described = {**machine(torch.device("cpu")), "timm": installed_version("timm")}
    running: dict[Run, tuple[str, AsyncResult[Row]]] = {}
    while True:
        while len(running) < options.workers and time.monotonic() < end:
            wanted = next_run(options.workload, options.stage, tables, running)
            if wanted is None:
                break
            stage, run = wanted
            running[run] = (stage, pool.apply_async(train, (run, options.data_dir)))
        if not running:
            return
        done = _wait(running)
        stage, result = running.pop(done)
        row = {"stage": stage, **result.get(), **{column: described[column] for column in MACHINE}}
        tables[done.workload].add(row)
        print(
            f"{time.strftime('%H:%M:%S')} {stage:10} {done.workload:4} {done.optimizer:5} batch {done.batch_size:<5}"
            f" rate {done.learning_rate:<9.3g} eps {done.eps:<5g} seed {done.seed}: loss {row['train_loss']:<8.4g}"
            f" accuracy {row['test_accuracy']:.3f} {'diverged ' * row['diverged']}{row['seconds']:.1f} s",
            flush=True,
        )


def _wait(running: Mapping[Run, tuple[str, AsyncResult[Row]]]) -> Run:
    while True:
        for run, (_, result) in running.items():
            if result.ready():
                return run
        time.sleep(0.02)


if __name__ == "__main__":
    main()
