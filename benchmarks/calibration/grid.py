"""The runs of the calibration's evidence: their tables, and which are wanted, stage by stage. ``drive.py`` makes them.

Each stage is finished over all workloads before the next one. Runs are of Adam at equal samples where nothing else is
said. The best rate of a batch size is the one with the lowest final training loss, averaged over the seeds that there
are; so a stage may want a few runs more once a later one has moved it. Learning rates are counted in half octaves:
``rate(k) = 2 ** (k / 2)``.

Beside the main grid ``SIDE`` has small ones, in tables of their own and only of the stages ``rates``, ``refine`` and
``seeds``: the batch sizes of the surge law's paper, and Adam without momentum. And ``CLAIMS`` has ALTO against Lamb, AdamW
and AdamE at large batches: every optimizer makes the same number of steps, its rates are a factor of two apart until the
validation error of seed 0 is 5% above the best on both sides, and the rate with the lowest mean error gets five seeds,
should they make another rate the best, that one, too.
"""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from optim_implementations import LeftOut, timm_lamb
from reporting import RESULTS, Row, read_csv
from training import EPS, Run
from workloads import WORKLOADS, Workload

from lightning_gradhist.learning_rate import PLAIN_LAWS, plain_law

FOLDER = RESULTS / "calibration"
FIELDS = [field.name for field in fields(Run)]
MACHINE = "date cpu cores python torch lightning_gradhist timm".split()
_MEASURED = "steps train_loss test_loss test_accuracy diverged seconds noise_passes".split()
COLUMNS = ["stage", *FIELDS, *_MEASURED, "curve", "samples_to_target", "noise_scale", *MACHINE]
_CLAIMED = "steps validation_error test_accuracy train_loss diverged seconds".split()
CLAIMS_COLUMNS = [*FIELDS, *_CLAIMED, *MACHINE]
CLEAR = 1.05
"""An optimum is interior where the loss is this many times higher on both sides."""
FAR = 2.0
"""Beyond a rate with this many times the best loss there is nothing to learn."""

Results = Mapping[Run, Row]


class Table(dict[Run, Row]):
    """Runs, and their file, of which a last line that was not written to its end is cut off."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(text[: text.rfind("\n") + 1] or ",".join(columns) + "\n", encoding="utf-8")
        super().__init__(read(path))

    def add(self, row: Row) -> None:
        """Adds a row, and writes it."""
        self[_run(row)] = row
        with self.path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_written(row[column]) for column in self.columns])


def _written(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else json.dumps(value) if isinstance(value, list) else value


def read(path: Path) -> dict[Run, Row]:
    """The runs of a table; none where there is no file."""
    return {_run(row): row for row in read_csv(path)}


def _run(row: Row) -> Run:
    return Run(**{name: row[name] for name in FIELDS})


def rate(k: int) -> float:
    """The learning rate of a number of half octaves."""
    return 2.0 ** (k / 2)


def half_octaves(learning_rate: float) -> int:
    """The number of half octaves nearest to a learning rate."""
    return round(2 * math.log2(learning_rate))


def alike(results: Results, like: Run) -> Results:
    """The runs that differ from one in rate and seed only."""

    def setting(run: Run) -> tuple[Any, ...]:
        return run.workload, run.optimizer, run.batch_size, run.eps, run.samples, run.loss_scale, run.noise

    wanted = setting(like)
    return {run: row for run, row in results.items() if setting(run) == wanted}


def losses(results: Results, like: Run, column: str = "train_loss") -> dict[int, float]:
    """Final loss by half octaves of the rate, averaged over seeds, of runs that differ from one in rate and seed only."""
    found: dict[int, list[float]] = defaultdict(list)
    for run, row in alike(results, like).items():
        found[half_octaves(run.learning_rate)].append(math.inf if row["diverged"] else row[column])
    return {k: sum(values) / len(values) for k, values in sorted(found.items())}


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
    # four times the samples, so that its shortest run has 39 steps
    "surge_large": replace(_MLP, batch_sizes=_LARGE, samples=46_080, learning_rate=2**-6),
    "no_momentum": replace(_MLP, optimizer="Adam without momentum"),
    # a quarter of the samples, for time
    "surge_small": replace(_MLP, batch_sizes=(1, 2, 3, 4, 6, 8, 12), samples=2880),
}
"""By the name of their table."""

Stage = Callable[[Workload, Results], Iterator[Run]]


def middle(workload: Workload) -> int:
    """The middle batch size."""
    return workload.batch_sizes[len(workload.batch_sizes) // 2]


def references(workload: Workload) -> list[Run]:
    """A run at equal samples for each batch size, of Adam in the main grid; the rate and the seed do not matter."""
    name, eps = workload.optimizer, EPS[workload.optimizer]
    return [Run(workload.name, name, size, 1.0, eps, 0, workload.samples) for size in workload.batch_sizes]


def at_equal_steps(workload: Workload, like: Run) -> Run:
    """A run with the workload's number of steps in place of its number of samples."""
    return replace(like, samples=workload.steps * like.batch_size)


def _at(like: Run, k: int, seed: int = 0) -> Run:
    return replace(like, learning_rate=rate(k), seed=seed)


def _optima(workload: Workload, results: Results) -> list[tuple[Run, int]]:
    optima = ((like, best(losses(results, like))) for like in references(workload))
    return [(like, k) for like, k in optima if k is not None]


def _around(optima: list[tuple[Run, int]], seeds: tuple[int, ...], steps: tuple[int, ...]) -> Iterator[Run]:
    yield from (_at(like, k + step, seed) for seed in seeds for like, k in optima for step in steps)


def rates(workload: Workload, results: Results) -> Iterator[Run]:
    """For each batch size rates an octave apart, seed 0, until the loss is 5% above the best on both sides."""
    first = half_octaves(workload.learning_rate)
    for number, like in enumerate(references(workload)):
        start = first + 2 * ((number + 1) // 2)
        yield from (_at(like, k) for k in missing(losses(results, like), start))


def refine(workload: Workload, results: Results) -> Iterator[Run]:
    """The two rates half an octave from the best."""
    return _around(_optima(workload, results), (0,), (-1, 1))


def seeds(workload: Workload, results: Results) -> Iterator[Run]:
    """Seeds 1 and 2 at the best rate, and half an octave and an octave from it."""
    return _around(_optima(workload, results), (1, 2), (0, -1, 1, -2, 2))


def noise(workload: Workload, results: Results) -> Iterator[Run]:
    """The best rate again, seeds 0 to 2, with the noise scale measured on the way."""
    return (replace(run, noise=True) for run in _around(_optima(workload, results), (0, 1, 2), (0,)))


def cover(workload: Workload, results: Results) -> Iterator[Run]:
    """The rates on both sides of those that plain laws carry from other batch sizes, to where the loss is twice the best."""
    optima = _optima(workload, results)
    laws = [plain_law(name) for name in PLAIN_LAWS]
    for like, k in optima:
        carried = [
            2 * math.log2(rate(origin) * law.ratio(like.batch_size, other.batch_size))
            for other, origin in optima
            for law in laws
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
    """Seeds 3 and 4 at the best rate and half an octave from it."""
    return _around(_optima(workload, results), (3, 4), (0, -1, 1))


def epsilon(workload: Workload, results: Results) -> Iterator[Run]:
    """At the middle batch size the loss times 1e-8, 1e-4 and 1e4, and epsilon from 1e-1 to 1e-12, each at three rates."""
    for like, k in _optima(workload, results):
        if like.batch_size != middle(workload):
            continue
        for step in (0, 2, -2):
            yield from (replace(_at(like, k + step), loss_scale=scale) for scale in (1e-8, 1e-4, 1e4))
            yield from (replace(_at(like, k + step), eps=10.0**power) for power in range(-1, -13, -1))


def optimizers(workload: Workload, results: Results) -> Iterator[Run]:
    """ALTO, Lamb and AdamE at the two largest batch sizes: as ``rates``, then seeds 1 and 2 within an octave of the best."""
    for name in ("ALTO", *["Lamb"] * has_lamb(), "AdamE"):
        for like, adam in _optima(workload, results)[-2:]:
            other = replace(like, optimizer=name, eps=EPS[name])
            known = losses(results, other)
            wanted = missing(known, adam if name == "AdamE" else half_octaves(1 / 16))
            yield from (_at(other, k) for k in wanted)
            if not wanted and (top := best(known)) is not None:
                yield from _around([(other, top)], (1, 2), (0, -2, 2))


def steps(workload: Workload, results: Results) -> Iterator[Run]:
    """As ``rates``, at equal steps in place of equal samples."""
    for like, k in _optima(workload, results):
        equal = at_equal_steps(workload, like)
        yield from (_at(equal, k) for k in missing(losses(results, equal), k))


def steps_seeds(workload: Workload, results: Results) -> Iterator[Run]:
    """At equal steps seeds 1 and 2 at the best rate and an octave from it."""
    equals = [at_equal_steps(workload, like) for like in references(workload)]
    optima = [(equal, k) for equal in equals if (k := best(losses(results, equal))) is not None]
    for equal in optima:
        yield from _around([equal], (1, 2), (0, -2, 2))


def has_lamb() -> bool:
    """Whether timm is installed."""
    try:
        timm_lamb()
    except LeftOut:
        return False
    return True


STAGES: dict[str, Stage] = {
    stage.__name__: stage
    for stage in (rates, refine, seeds, noise, cover, more_seeds, epsilon, optimizers, steps, steps_seeds)
}
"""In their order."""
SIDE_STAGES = ("rates", "refine", "seeds")


SEEDS = 5


class Setting(NamedTuple):
    """A workload at a batch size, for a number of steps."""

    workload: str
    batch_size: int
    steps: int
    optimizers: tuple[str, ...] = ("ALTO", "Lamb", "AdamW", "AdamE")

    def run(self, optimizer: str) -> Run:
        """The run of an optimizer with seed 0 and the rate where the search begins."""
        start = 2**-4 if optimizer in ("ALTO", "Lamb") else 2**-6
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


def available() -> tuple[Setting, ...]:
    """The settings, without Lamb where timm is not installed."""
    without = [replace(s, optimizers=tuple(name for name in s.optimizers if name != "Lamb")) for s in SETTINGS]
    return SETTINGS if has_lamb() else tuple(without)


def wanted(settings: Sequence[Setting], results: Results) -> Iterator[Run]:
    """The runs that are not there yet, as far as is known by now."""
    for setting in settings:
        for name in setting.optimizers:
            like = setting.run(name)
            known = losses(results, like, "validation_error")
            runs = [replace(like, learning_rate=rate(k)) for k in missing(known, half_octaves(like.learning_rate))]
            if not runs and (top := best(known)) is not None:
                runs = [replace(like, learning_rate=rate(top), seed=seed) for seed in range(SEEDS)]
            yield from (run for run in runs if run not in results)
