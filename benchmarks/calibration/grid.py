"""The runs of the calibration's evidence: which are wanted, stage by stage, their tables, and what makes them.

``make evidence-full`` can be stopped at any time and goes on where it was: a run that is in its table is not made again, and
only runs in progress are lost. One process at a time may write to a table. Runs are of Adam at equal samples where nothing
else is said. Learning rates are counted in half octaves: ``rate(k) = 2 ** (k / 2)``. ``benchmarks/README.md`` says more.
"""

import argparse
import itertools
import math
import multiprocessing
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

from reporting import CPU, RESULTS, Row, machine, read_csv, write_csv
from training import EPS, Run, train
from workloads import FASHION_MNIST, WORKLOADS, Workload

from lightning_gradhist.learning_rate import PLAIN_LAWS, plain_ratio

FOLDER = RESULTS / "calibration"
FIELDS = [field.name for field in fields(Run)]
MACHINE = "date cpu cores python torch lightning_gradhist timm".split()
_MEASURED = "steps train_loss test_loss test_accuracy diverged seconds noise_passes curve samples_to_target noise_scale"
COLUMNS = ["stage", *FIELDS, *_MEASURED.split(), *MACHINE]
CLAIMS_COLUMNS = [*FIELDS, *"steps validation_error test_accuracy train_loss diverged seconds".split(), *MACHINE]
CLEAR = 1.05  # an optimum is interior where the loss is this many times higher on both sides
FAR = 2.0  # beyond a rate with this many times the best loss there is nothing to learn

Results = Mapping[Run, Row]


def read(path: Path) -> dict[Run, Row]:
    """The runs of a table; none where there is no file."""
    return {_run(row): row for row in read_csv(path)}


def _run(row: Row) -> Run:
    return Run(**{name: row[name] for name in FIELDS})


def keep(path: Path, columns: Sequence[str], results: dict[Run, Row], row: Row, told: str) -> None:
    """Adds the row of a run to its table, and says so after some words on where it belongs."""
    results[_run(row)] = row
    write_csv(path, columns, results.values(), digits=None)
    names = ("optimizer", "batch_size", "learning_rate", "eps", "seed", "train_loss", "test_accuracy", "seconds")
    print(told, "  ".join(f"{key} {row[key]}" for key in names), flush=True)


def rate(k: int) -> float:
    return 2.0 ** (k / 2)


def half_octaves(learning_rate: float) -> int:
    return round(2 * math.log2(learning_rate))


def alike(results: Results, like: Run) -> Results:
    """The runs that differ from one in rate and seed only."""

    def setting(run: Run) -> tuple[Any, ...]:
        return run.workload, run.optimizer, run.batch_size, run.eps, run.samples, run.loss_scale, run.noise

    wanted = setting(like)
    return {run: row for run, row in results.items() if setting(run) == wanted}


def by_seed(results: Results, like: Run, column: str = "train_loss") -> dict[int, dict[int, float]]:
    """Final losses by half octaves of the rate and by seed, of runs that differ from one in these only."""
    found: dict[int, dict[int, float]] = defaultdict(dict)
    for run, row in alike(results, like).items():
        found[half_octaves(run.learning_rate)][run.seed] = math.inf if row["diverged"] else row[column]
    return dict(sorted(found.items()))


def losses(results: Results, like: Run, column: str = "train_loss") -> dict[int, float]:
    """As :func:`by_seed`, averaged over seeds."""
    return {k: sum(of.values()) / len(of) for k, of in by_seed(results, like, column).items()}


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


_MLP = WORKLOADS["mlp"]
_LARGE = (64, 91, 128, 181, 256, 362, 512, 724, 1024, 1164)
SIDE = {
    "surge_large": replace(_MLP, batch_sizes=_LARGE, samples=46_080, learning_rate=2**-6),
    "surge_small": replace(_MLP, batch_sizes=(1, 2, 3, 4, 6, 8, 12), samples=2880),
}
"""By the name of their table: four times the samples, so that the shortest run has 39 steps, and a quarter, for time."""

Stage = Callable[[Workload, Results], Iterator[Run]]


def middle(workload: Workload) -> int:
    return workload.batch_sizes[len(workload.batch_sizes) // 2]


def references(workload: Workload) -> list[Run]:
    """A run at equal samples for each batch size, of Adam in the main grid; the rate and the seed do not matter."""
    return [Run(workload.name, "Adam", size, 1.0, EPS["Adam"], 0, workload.samples) for size in workload.batch_sizes]


def at_equal_steps(workload: Workload, like: Run) -> Run:
    """A run with the workload's number of steps in place of its number of samples."""
    return replace(like, samples=workload.steps * like.batch_size)


def _at(like: Run, k: int, seed: int = 0) -> Run:
    return replace(like, learning_rate=rate(k), seed=seed)


def _optima(results: Results, likes: Iterable[Run]) -> list[tuple[Run, int]]:
    return [(like, k) for like in likes if (k := best(losses(results, like))) is not None]


def _around(optima: Iterable[tuple[Run, int]], seeds: Iterable[int], steps: Iterable[int]) -> Iterator[Run]:
    return (_at(like, k + step, seed) for seed, (like, k), step in itertools.product(seeds, optima, steps))


def rates(workload: Workload, results: Results) -> Iterator[Run]:
    """For each batch size rates an octave apart, seed 0, until the loss is 5% above the best on both sides."""
    first = half_octaves(workload.learning_rate)
    for number, like in enumerate(references(workload)):
        start = first + 2 * ((number + 1) // 2)
        yield from (_at(like, k) for k in missing(losses(results, like), start))


def around(seeds: tuple[int, ...], steps: tuple[int, ...]) -> Stage:
    """The stage of some seeds at rates so many half octaves from the best ones."""
    return lambda workload, results: _around(_optima(results, references(workload)), seeds, steps)


def noise(workload: Workload, results: Results) -> Iterator[Run]:
    """The best rate again, seeds 0 to 2, with the noise scale measured on the way."""
    return (replace(run, noise=True) for run in around((0, 1, 2), (0,))(workload, results))


def cover(workload: Workload, results: Results) -> Iterator[Run]:
    """The rates on both sides of those that plain laws carry from other batch sizes, to where the loss is twice the best."""
    optima = _optima(results, references(workload))
    for like, k in optima:
        carried = [
            2 * math.log2(rate(origin) * plain_ratio(law, like.batch_size, other.batch_size))
            for other, origin in optima
            for law in PLAIN_LAWS
        ]
        known = losses(results, like)
        for low, step in ((math.floor(min(carried)), -2), (math.ceil(max(carried)), 2)):
            end = k
            while (end - low) * step < 0 and known.get(end, 0.0) < FAR * known[k]:
                end += step
                yield _at(like, end)
                if end not in known:
                    break


def epsilon(workload: Workload, results: Results) -> Iterator[Run]:
    """At the middle batch size the loss times 1e-8, 1e-4 and 1e4, and epsilon from 1e-1 to 1e-12, each at three rates."""
    at_middle = [like for like in references(workload) if like.batch_size == middle(workload)]
    for run in _around(_optima(results, at_middle), (0,), (0, 2, -2)):
        yield from (replace(run, loss_scale=scale) for scale in (1e-8, 1e-4, 1e4))
        yield from (replace(run, eps=10.0**power) for power in range(-1, -13, -1))


def optimizers(workload: Workload, results: Results) -> Iterator[Run]:
    """ALTO, Lamb and AdamE at the two largest batch sizes: as ``rates``, then seeds 1 and 2 within an octave of the best."""
    for name in ("ALTO", "Lamb", "AdamE"):
        for like, adam in _optima(results, references(workload))[-2:]:
            other = replace(like, optimizer=name, eps=EPS[name])
            known = losses(results, other)
            wanted = missing(known, adam if name == "AdamE" else half_octaves(1 / 16))
            yield from (_at(other, k) for k in wanted)
            if not wanted and (top := best(known)) is not None:
                yield from _around([(other, top)], (1, 2), (0, -2, 2))


def steps(workload: Workload, results: Results) -> Iterator[Run]:
    """As ``rates``, at equal steps in place of equal samples."""
    for like, k in _optima(results, references(workload)):
        equal = at_equal_steps(workload, like)
        yield from (_at(equal, k) for k in missing(losses(results, equal), k))


def steps_seeds(workload: Workload, results: Results) -> Iterator[Run]:
    """At equal steps seeds 1 and 2 at the best rate and an octave from it."""
    equals = (at_equal_steps(workload, like) for like in references(workload))
    return _around(_optima(results, equals), (1, 2), (0, -2, 2))


STAGES: dict[str, Stage] = {
    "rates": rates,
    "refine": around((0,), (-1, 1)),
    "seeds": around((1, 2), (0, -1, 1, -2, 2)),
    **{"noise": noise, "cover": cover, "more_seeds": around((3, 4), (0, -1, 1)), "epsilon": epsilon},
    **{"optimizers": optimizers, "steps": steps, "steps_seeds": steps_seeds},
}
"""In their order."""
SIDE_STAGES = ("rates", "refine", "seeds")
CLAIMS = "claims"  # the stage and the table of ALTO against the others
NAMES = [*WORKLOADS, *SIDE, CLAIMS]  # of the tables
SEEDS = 5


class Setting(NamedTuple):
    workload: str
    batch_size: int
    steps: int
    optimizers: tuple[str, ...] = ("ALTO", "Lamb", "AdamW", "AdamE")

    def run(self, optimizer: str) -> Run:
        """The run of an optimizer with seed 0 and the rate where the search begins."""
        start = 2**-4 if optimizer.split()[0] in ("ALTO", "Lamb") else 2**-6
        samples = self.steps * self.batch_size
        return Run(self.workload, optimizer, self.batch_size, start, EPS[optimizer], 0, samples)


SETTINGS = (
    Setting("mlp", 512, 200),
    Setting("mlp", 4096, 200),
    Setting("mlp", 16384, 200),
    Setting("cnn", 4096, 40, optimizers=("ALTO", "Lamb", "AdamW")),
    Setting("cnn", 512, 120),
)
"""In their order. On one core a run of ``cnn`` takes some 20 s at 512 and 60 s at 4,096, which is why it has few steps."""


def claims(settings: Sequence[Setting], results: Results) -> Iterator[Run]:
    """The runs with their rates tuned that are not there yet, as far as is known by now."""
    for setting in settings:
        for name in setting.optimizers:
            like = setting.run(name)
            known = losses(results, like, "validation_error")
            runs = [replace(like, learning_rate=rate(k)) for k in missing(known, half_octaves(like.learning_rate))]
            if not runs and (top := best(known)) is not None:
                runs = [replace(like, learning_rate=rate(top), seed=seed) for seed in range(SEEDS)]
            yield from (run for run in runs if run not in results)


def wanted(stage: str, name: str, results: Results) -> Iterable[Run]:
    """The runs of a stage that a table is to have, as far as is known by now."""
    if CLAIMS in (stage, name):
        return claims(SETTINGS, results) if stage == name else ()
    if name in SIDE and stage not in SIDE_STAGES:
        return ()
    return STAGES[stage](SIDE.get(name) or WORKLOADS[name], results)


def next_runs(stages: Collection[str], tables: Mapping[str, Results]) -> list[tuple[str, str, Run]]:
    """The runs that the first stage with any wants by now, each with the stage and the table."""
    for stage in (stage for stage in (*STAGES, CLAIMS) if stage in stages):
        runs = [(stage, name, run) for name, table in tables.items() for run in wanted(stage, name, table)]
        if lacking := [(stage, name, run) for stage, name, run in dict.fromkeys(runs) if run not in tables[name]]:
            return lacking
    return []


def made(folder: Path, wanted: tuple[str, str, Run]) -> tuple[str, Row]:
    stage, name, run = wanted
    return name, {**train(run, folder, for_claim=name == CLAIMS), **machine(CPU, "timm"), "stage": stage}


def make_runs(pool: Pool, options: argparse.Namespace) -> None:
    """Gives the pool all runs that are wanted by now, and writes each row as it comes, until nothing is wanted."""
    tables = {name: read(options.output / f"{name}.csv") for name in options.table}
    while runs := next_runs(options.stage, tables):
        for name, row in pool.imap_unordered(partial(made, options.data_dir), runs):
            columns = CLAIMS_COLUMNS if name == CLAIMS else COLUMNS
            keep(options.output / f"{name}.csv", columns, tables[name], row, f"{name} {row['stage']}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--stage", nargs="+", choices=[*STAGES, CLAIMS], default=[*STAGES, CLAIMS])
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the tables")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the workers are stopped, too
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        make_runs(pool, options)


if __name__ == "__main__":
    main()
