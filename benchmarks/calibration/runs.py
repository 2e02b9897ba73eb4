"""Tables of training runs, one row a run, and what learning rates they have."""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from reporting import RESULTS, Row, read_csv
from training import Run

FOLDER = RESULTS / "calibration"
FIELDS = [field.name for field in fields(Run)]
MACHINE = "date cpu cores python torch lightning_gradhist timm".split()
CLEAR = 1.05
"""An optimum is interior where the loss is this many times higher on both sides."""

Results = Mapping[Run, Row]


class Table(dict[Run, Row]):
    """Runs, and their file.

    Args:
        path: of the CSV; a last line that was not written to its end is cut off.
        columns: of the file.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
        super().__init__(read(path))
        if not text:
            self._write(columns)

    def add(self, row: Row) -> None:
        """Adds a row, and writes it."""
        self[_run(row)] = row
        self._write([_written(row[column]) for column in self.columns])

    def _write(self, values: Sequence[Any]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(values)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line.getvalue())


def read(path: Path) -> dict[Run, Row]:
    """The runs of a table; none where there is no file."""
    return {_run(row): row for row in read_csv(path)}


def _run(row: Row) -> Run:
    return Run(**{name: row[name] for name in FIELDS})


def _written(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else json.dumps(value) if isinstance(value, list) else value


def rate(k: int) -> float:
    """The learning rate of a number of half octaves."""
    return 2.0 ** (k / 2)


def half_octaves(learning_rate: float) -> int:
    """The number of half octaves nearest to a learning rate."""
    return round(2 * math.log2(learning_rate))


def setting(run: Run) -> tuple[Any, ...]:
    """All of a run but its rate and seed."""
    return run.workload, run.optimizer, run.batch_size, run.eps, run.samples, run.loss_scale, run.noise


def alike(results: Results, like: Run) -> Results:
    """The runs that differ from one in rate and seed only."""
    return {run: row for run, row in results.items() if setting(run) == setting(like)}


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
