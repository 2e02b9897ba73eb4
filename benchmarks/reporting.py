"""What all benchmarks report alike: the machine and the versions, tables as CSV and in print, and targets."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import lightning_gradhist

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
Row = dict[str, Any]


def machine(device: torch.device = CPU, *distributions: str) -> dict[str, str]:
    """Describe the machine and the software, without names of hosts, users or folders.

    Args:
        device: where the work is done.
        *distributions: whose versions are wanted beside Python's, torch's and ours.
    """
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning_gradhist": lightning_gradhist.__version__,
        **{name: installed_version(name) for name in distributions},
    }


def installed_version(distribution: str) -> str:
    """Look up the version of a distribution; empty if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def read_csv(path: Path) -> list[Row]:
    """The rows of a table, a cell that reads as a number or as JSON as what it says; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(cell) for name, cell in line.items()} for line in csv.DictReader(file)]


def _value(cell: str) -> Any:
    for read in (json.loads, float):
        try:
            return read(cell)
        except ValueError:
            pass
    return cell


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Row], digits: int | None = 4) -> None:
    """Write a whole table beside the old one, and put it in its place; the cell of a column that a row lacks is empty.

    Args:
        path: of the file, in a folder that is made where it is missing.
        columns: that are written, in their order.
        rows: of which other keys are left out.
        digits: significant digits of floats; None for all of them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _rounded(value, digits) for key, value in row.items()} for row in rows)
    beside.replace(path)


def _rounded(value: Any, digits: int | None) -> Any:
    return f"{value:.{digits}g}" if digits and isinstance(value, float) else value


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Print some columns of rows, one below the other."""
    lines = [list(columns), *([str(_rounded(row.get(name, ""), 4)) for name in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@dataclass(frozen=True)
class Target:
    """What the cells of a column should be.

    Attributes:
        where: what the rows are known by, by column.
        column: that is judged.
        cpu: the limit on a CPU; None where there is none.
        cuda: the limit on a GPU.
        at_least: whether more is better.
    """

    where: Mapping[str, str]
    column: str
    cpu: float | None
    cuda: float | None
    at_least: bool = False

    def verdicts(self, rows: Sequence[Row], device: str, measured_on: str, command: str) -> list[str]:
        """Compare with what was measured, a line a row; nothing where there is no target for ``device``."""
        limit = getattr(self, device)
        if limit is None:
            return []
        wanted = f"{self.column} {'>=' if self.at_least else '<='} {limit:g}"
        if device != measured_on:
            return [f"{', '.join(self.where.values())}  {wanted}: not measured: {command} --device {device}"]
        mine = [row for row in rows if row.items() >= self.where.items()] or [dict(self.where)]
        names = (", ".join(dict.fromkeys([*filter(None, [row.get("model")]), *self.where.values()])) for row in mine)
        return [f"{name}  {wanted}: {self._found(row, limit)}" for name, row in zip(names, mine, strict=True)]

    def _found(self, row: Row, limit: float) -> str:
        value = row.get(self.column, "")
        if value == "":
            return f"not measured: {row.get('note') or 'the row or that of its peer is missing'}"
        met = value >= limit if self.at_least else value <= limit
        return f"{value:.4g}, {'met' if met else 'NOT MET'}"


def print_verdicts(targets: Sequence[Target], rows: Sequence[Row], measured_on: str, script: str) -> None:
    """Print how far the targets of both devices are met."""
    for device in ("cpu", "cuda"):
        for target in targets:
            for line in target.verdicts(rows, device, measured_on, f"python benchmarks/{script}"):
                print(f"  {device:4}  {line}")
