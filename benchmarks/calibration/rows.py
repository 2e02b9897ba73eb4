"""Small tables: numbers and texts in a CSV that is there whole or not at all."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a table, a cell that reads as a number as one; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(cell) for name, cell in line.items()} for line in csv.DictReader(file)]


def write(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Writes the columns of a whole table beside the old one, and puts it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {name: int(value) if isinstance(value, bool) else value for name, value in row.items()} for row in rows
        )
    beside.replace(path)


def _value(cell: str) -> Any:
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell
