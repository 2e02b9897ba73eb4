"""A page in Markdown with its tables and figures beside it."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Heading and format of a column, by its key in the rows."""
NOT_MEASURED = "Not measured yet."


class Page:
    """Blocks of text in their order; tables go to CSV files, too, figures to PNG files.

    Args:
        folder: of the page; tables and figures go to its folder ``tables``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bad: list[str] = []
        """Sentences on what turned out badly, from all sections."""
        self._blocks: list[str] = []
        (folder / "tables").mkdir(parents=True, exist_ok=True)

    def heading(self, text: str, level: int = 2) -> None:
        """Begins a section."""
        self._blocks.append(f"{'#' * level} {text}")

    def say(self, text: str) -> None:
        """A paragraph, or a list."""
        self._blocks.append(text)

    def keep(self, name: str, rows: Sequence[Row]) -> None:
        """Rows as ``tables/<name>.csv``; a value with its interval in three columns."""
        rows = [_flat(row) for row in rows]
        with (self.folder / "tables" / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        self.say(f"All columns: [tables/{name}.csv](tables/{name}.csv).")

    def table(self, name: str, rows: Sequence[Row], columns: Columns) -> None:
        """The columns that are named on the page, and all of them as ``tables/<name>.csv``."""
        self.show(rows, columns)
        self.keep(name, rows)

    def show(self, rows: Sequence[Row], columns: Columns) -> None:
        """The columns that are named, on the page only."""
        head = [heading for heading, _ in columns.values()]
        cells = [[form(row[key]) for key, (_, form) in columns.items()] for row in rows]
        lines = [head, ["---"] * len(head), *cells]
        self._blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))

    def figure(self, name: str, figure: Figure, text: str) -> None:
        """A figure as ``tables/<name>.png``, with what it shows."""
        figure.savefig(self.folder / "tables" / f"{name}.png", metadata={"Software": None})
        self._blocks.append(f"![{text}](tables/{name}.png)\n\n{text}")

    def write(self) -> None:
        """Writes the page."""
        (self.folder / "README.md").write_text("\n\n".join(self._blocks) + "\n", encoding="utf-8")


def text(value: Any) -> str:
    """As it is."""
    return str(value)


def number(value: float) -> str:
    """Three significant digits, no exponent for sizes of batches; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def percent(value: float) -> str:
    """A share in percent; a dash for NaN."""
    return "–" if math.isnan(value) else f"{100 * value:.1f}%"


def between(ends: tuple[float, float], form: Callable[[float], str] = number) -> str:
    """An interval."""
    return f"{form(ends[0])} to {form(ends[1])}"


def yes(value: bool) -> str:
    """Yes or no."""
    return "yes" if value else "no"


def listed(names: Sequence[str]) -> str:
    """Names in a sentence."""
    return ", ".join(names) if names else "none"


def count(value: int, noun: str) -> str:
    """A number of things."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def verdict(what: str, met: bool, goal: str) -> str:
    """Whether a goal is met."""
    return f"- {what}; the goal, {goal}, is {'met' if met else '**not** met'}."


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        if isinstance(value, tuple):
            flat |= {key: _plain(value[0]), f"{key}_lower": _plain(value[1]), f"{key}_upper": _plain(value[2])}
        else:
            flat[key] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value
