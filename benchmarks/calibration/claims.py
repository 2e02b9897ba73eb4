"""ALTO against Lamb, AdamW and AdamE at large batches, each with its rate tuned, over five seeds.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/claims.py``; Lamb where timm is installed (``make peers``). It
can be stopped at any time and goes on where it was.

At each batch size of :data:`SETTINGS` every optimizer makes the same number of steps, with warm-up and linear decay as in
``training.py``. Its rates are a factor of two apart until the validation error of seed 0 is 5% above the best on both
sides; the rate with the lowest mean error then gets five seeds, and should they make another rate the best, that one, too.
The rate is chosen on the second half of the test data, and accuracy is told on the first.

Columns, one row a run: the fields of ``training.Run``, ``steps``, ``validation_error`` and ``test_accuracy`` (0 to 1),
``train_loss``, ``diverged``, ``seconds``, and the machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import rows
import torch
from grid import FIELDS, FOLDER, best, half_octaves, missing, rate
from grid import setting as setting_of
from measuring import installed_version, machine
from optim_implementations import LeftOut, timm_lamb
from training import EPS, Row, Run, evaluate, fit
from workloads import FASHION_MNIST, WORKLOADS, Data

TABLE = "claims.csv"
MACHINE = "date cpu cores python torch lightning_gradhist timm".split()
RESULTS = "steps validation_error test_accuracy train_loss diverged seconds".split()
COLUMNS = [*FIELDS, *RESULTS, *MACHINE]
SEEDS = 5
_TRAINED = 2048
"""Training samples at most that the final loss is over."""

Results = Mapping[Run, Row]


@dataclass(frozen=True)
class Setting:
    """A workload at a batch size, for a number of steps.

    Attributes:
        workload: its name.
        batch_size: in samples.
        steps: of a run.
        learning_rates: where the search begins, of the layer-wise optimizers and of the others.
        optimizers: that are compared.
    """

    workload: str
    batch_size: int
    steps: int
    learning_rates: tuple[float, float] = (2**-4, 2**-6)
    optimizers: tuple[str, ...] = ("ALTO", "Lamb", "AdamW", "AdamE")

    def run(self, optimizer: str) -> Run:
        """The run of an optimizer with seed 0 and the rate where the search begins."""
        start = self.learning_rates[optimizer not in ("ALTO", "Lamb")]
        return Run(
            self.workload, optimizer, self.batch_size, start, EPS[optimizer], 0, samples=self.steps * self.batch_size
        )


SETTINGS = (
    Setting("mlp", 512, 200),
    Setting("mlp", 4096, 200),
    Setting("mlp", 16384, 200),
    Setting("cnn", 4096, 40, optimizers=("ALTO", "Lamb", "AdamW")),
    Setting("cnn", 512, 120),
)
"""In their order. On one core a run of ``cnn`` takes some 20 s at 512 and 60 s at 4,096, which is why it has few steps."""


def wanted(settings: tuple[Setting, ...], results: Results) -> Iterator[Run]:
    """The runs that are not there yet, as far as is known by now."""
    for setting in settings:
        for name in setting.optimizers:
            like = setting.run(name)
            known = errors(results, like)
            runs = [replace(like, learning_rate=rate(k)) for k in missing(known, half_octaves(like.learning_rate))]
            if not runs:
                top = best(known)
                assert top is not None  # else a rate would be missing
                runs = [replace(like, learning_rate=rate(top), seed=seed) for seed in range(SEEDS)]
            yield from (run for run in runs if run not in results)


def errors(results: Results, like: Run) -> dict[int, float]:
    """Validation error by half octaves of the rate, averaged over seeds; infinite where a run diverged."""
    found: dict[int, list[float]] = defaultdict(list)
    for run, row in alike(results, like).items():
        found[half_octaves(run.learning_rate)].append(math.inf if row["diverged"] else row["validation_error"])
    return {k: sum(values) / len(values) for k, values in sorted(found.items())}


def alike(results: Results, like: Run) -> Results:
    """The runs that differ from one in rate and seed only."""
    return {run: row for run, row in results.items() if setting_of(run) == setting_of(like)}


def result(run: Run, data: Data) -> Row:
    """Trains once, on one thread, and evaluates."""
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = WORKLOADS[run.workload].make_model()
        curve, _ = fit(model, run, data)
    train_loss, _ = evaluate(model, data.train.tensors, _TRAINED)
    half = len(data.test) // 2
    _, accuracy = evaluate(model, data.test.tensors, half)
    _, validated = evaluate(model, [tensor[half:] for tensor in data.test.tensors], half)
    return {
        **asdict(run),
        "steps": run.steps,
        "validation_error": 1 - validated,
        "test_accuracy": accuracy,
        "train_loss": train_loss,
        "diverged": int(not train_loss <= curve[0][1]),
        "seconds": time.perf_counter() - start,
    }


def read(path: Path) -> dict[Run, Row]:
    """The runs of the table; none where there is no file."""
    return {Run(**{name: row[name] for name in FIELDS}): row for row in rows.read(path)}


def main(arguments: list[str] | None = None) -> None:
    """Makes the runs that are wanted, one after another."""
    options = parse(arguments)
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * options.minutes
    described = {**machine(torch.device("cpu")), "timm": installed_version("timm")}
    settings = tuple(setting for setting in chosen() if setting.workload in options.workload)
    data = {name: WORKLOADS[name].load(options.data_dir) for name in options.workload}
    results = read(options.output)
    while time.monotonic() < end and (run := next(wanted(settings, results), None)) is not None:
        row = {**result(run, data[run.workload]), **described}
        results[run] = row
        rows.write(options.output, COLUMNS, results.values())
        print(
            f"{run.workload} {run.optimizer:5} batch {run.batch_size:<5} rate {run.learning_rate:<9.3g} seed {run.seed}:"
            f" validation {1 - row['validation_error']:.4f} test {row['test_accuracy']:.4f} {row['seconds']:.1f} s",
            flush=True,
        )


def chosen() -> tuple[Setting, ...]:
    """The settings, without Lamb where timm is not installed."""
    try:
        timm_lamb()
    except LeftOut:
        return tuple(replace(s, optimizers=tuple(name for name in s.optimizers if name != "Lamb")) for s in SETTINGS)
    return SETTINGS


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = list(dict.fromkeys(setting.workload for setting in SETTINGS))
    parser.add_argument("--workload", nargs="+", choices=names, default=names)
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run is begun after that")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER / TABLE, help="file of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
