"""What all benchmarks report alike: the machine and the versions, tables as CSV and in print, and targets."""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lightning_gradhist

RESULTS, TARGETS = (Path(__file__).parent / name for name in ("results", "targets.csv"))
CPU = torch.device("cpu")
NOT_MEASURED = 77  # the exit status of a script that lacks what it needs, as automake has it
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
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def peer_version(distribution: str) -> str:
    """Empty for ours and torch's, which have columns of their own."""
    own = ("", "torch", "lightning-gradhist")
    return "" if distribution in own else f"{distribution} {installed_version(distribution)}"


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
    """Write columns of rows beside the old table and put it in its place.

    Floats have that many significant digits; with None each cell is text or JSON, which :func:`read_csv` gives back as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    with beside.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _cell(value, digits) for key, value in row.items()} for row in rows)
    beside.replace(path)


def _cell(value: Any, digits: int | None = 4) -> Any:
    if digits is None:
        return value if isinstance(value, str) else json.dumps(value)
    return f"{value:.{digits}g}" if isinstance(value, float) else value


def parser(description: str, models: Sequence[str], names: Sequence[str], output: str) -> argparse.ArgumentParser:
    """The options of the benchmarks that compare ``names`` on models."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    kept = f"{', '.join(models)}; the rows of others that the output has are kept"
    options.add_argument("--models", nargs="+", choices=models, default=models, metavar="NAME", help=kept)
    options.add_argument("--only", nargs="+", choices=names, metavar="NAME", help="; ".join(names))
    options.add_argument("--output", type=Path, help=f"default: benchmarks/results/{output}_<device>.csv")
    return options


def quartiles(column: str, values: Sequence[float]) -> Row:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {column: middle, f"{column}_q25": low, f"{column}_q75": high}


def report(args: argparse.Namespace, name: str, columns: list[str], models: Iterable[list[Row]], *of: str) -> list[Row]:
    """Write the rows of a benchmark model after model, with the machine and the versions of distributions ``of`` it.

    The last rows that come of a model stand beside those of others that the table has; returned is what was measured.
    """
    path = args.output or RESULTS / f"{name}_{args.device}.csv"
    described = machine(torch.device(args.device), *of)
    print("  ".join(f"{what}: {value}" for what, value in described.items() if value), flush=True)
    measured: dict[str, list[Row]] = {}
    for of_model in models:
        measured[of_model[0]["model"]] = [{**row, **described} for row in of_model]
        others = [row for row in read_csv(path) if row["model"] not in measured]
        write_csv(path, columns, [*others, *chain(*measured.values())])
    return [*chain(*measured.values())]


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    lines = [list(columns), *([str(_cell(row.get(name, ""))) for name in columns] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_verdicts(benchmark: str, rows: Sequence[Row], names: str, measured_on: str) -> None:
    """Print how far the targets of ``targets.csv`` are met on both devices; the column ``names`` has a target's name."""
    targets = [target for target in read_csv(TARGETS) if target["benchmark"] == benchmark]
    for device in ("cpu", "cuda"):
        for target in (target for target in targets if target[device] != ""):
            mine = [row for row in rows if row[names] == target["name"] and target["model"] in ("", row["model"])]
            sign = ">=" if target["at_least"] else "<="
            missing = {**target, "note": f"python benchmarks/{benchmark}.py --device {device}"}
            for row in (mine if device == measured_on else []) or [missing]:
                name = ", ".join(filter(None, (row["model"], target["name"])))
                wanted = f"{target['column']} {sign} {target[device]:g}"
                print(f"  {device:4}  {name}  {wanted}: {_judged(row, target, device)}")


def _judged(row: Row, target: Row, device: str) -> str:
    value, limit = row.get(target["column"]), target[device]
    if value is None:
        return f"not measured: {row.get('note') or 'the row of its peer is missing'}"
    return f"{value:.4g}, {'met' if (value >= limit if target['at_least'] else value <= limit) else 'NOT MET'}"
