"""What all benchmarks report alike: the machine and the versions, tables as CSV and in print, and targets."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

import lightning_gradhist

RESULTS = Path(__file__).parent / "results"
CPU = torch.device("cpu")
Row = dict[str, Any]


def machine(device: torch.device = CPU, *distributions: str) -> dict[str, str]:
    """Describe the machine and the software, without names of hosts, users or folders; and versions of distributions."""
    file = Path("/proc/cpuinfo")
    info = file.read_text().splitlines() if file.exists() else []
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device.type,
        "cpu": next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor()),
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
    """Write columns of rows beside the old table and put it in its place; floats with that many significant digits, or all."""
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


class Target(NamedTuple):
    """What the cells of a column should be, in the rows that hold some values; None where there is no limit on a device."""

    where: Mapping[str, str]
    column: str
    cpu: float | None
    cuda: float | None
    at_least: bool = False

    def found(self, row: Row, limit: float) -> str:
        """What a row has, and whether that meets a limit."""
        value = row.get(self.column)
        if value is None:
            return f"not measured: {row.get('note') or 'the row of its peer is missing'}"
        return f"{value:.4g}, {'met' if (value >= limit if self.at_least else value <= limit) else 'NOT MET'}"


def print_verdicts(targets: Sequence[Target], rows: Sequence[Row], measured_on: str, script: str) -> None:
    """Print how far the targets of both devices are met, a line a row."""
    for device in ("cpu", "cuda"):
        for target in (target for target in targets if getattr(target, device) is not None):
            limit, sign = getattr(target, device), ">=" if target.at_least else "<="
            mine = [row for row in rows if row.items() >= target.where.items()] if device == measured_on else []
            for row in mine or [{**target.where, "note": f"python benchmarks/{script} --device {device}"}]:
                name = ", ".join(dict.fromkeys(filter(None, [row.get("model"), *target.where.values()])))
                print(f"  {device:4}  {name}  {target.column} {sign} {limit:g}: {target.found(row, limit)}")
