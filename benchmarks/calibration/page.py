"""The page in Markdown: text and columns of tables from ``page.md``, what fills them from the sections' functions."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from reporting import Row, write_csv

TEXT = Path(__file__).parent / "page.md"
NOT_MEASURED = "Not measured yet."
_SECTION = re.compile(r"^<!-- (\w+) -->\n", re.MULTILINE)
_FIELD = re.compile(r"\{(\w+)((?: \| [^|{}]+)*)\}")
_COLUMN = re.compile(r"(?P<key>[^%=]+)(?P<percent>%*)(?:=(?P<heading>.+))?")


class Page:
    """Sections to be filled, in a folder, with tables as CSV files and figures as PNG files in its folder ``tables``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bad: list[str] = []  # sentences on what turned out badly, from all sections
        self._filled: dict[str, Row] = {}
        (folder / "tables").mkdir(parents=True, exist_ok=True)

    def fill(self, section: str, **values: Any) -> None:
        """What the fields of a section hold: text, or the rows of a table, which shows the columns that they have."""
        self._filled[section] = values

    def keep(self, name: str, rows: Sequence[Row]) -> Sequence[Row]:
        """Rows as ``tables/<name>.csv``, a value with its interval in three columns; returns them."""
        flat = [_flat(row) for row in rows]
        write_csv(self.folder / "tables" / f"{name}.csv", list(flat[0]), flat, digits=6)
        return rows

    def tell(self, what: str, where: Sequence[str]) -> None:
        """What turned out badly, and where, if it did anywhere."""
        if where:
            self.bad.append(f"{what}: {listed(where)}.")

    def draw(self, name: str, figure: Figure) -> None:
        figure.savefig(self.folder / "tables" / f"{name}.png", metadata={"Software": None})

    def write(self) -> None:
        """Writes the page; a section that nothing has filled says so."""
        before, *parts = _SECTION.split(TEXT.read_text(encoding="utf-8"))
        sections = [before, *map(self._section, parts[::2], parts[1::2])]
        (self.folder / "README.md").write_text("\n\n".join(map(str.strip, sections)) + "\n", encoding="utf-8")

    def _section(self, name: str, section: str) -> str:
        values = self._filled.get(name)
        if values is None:
            return f"{section.splitlines()[0]}\n\n{NOT_MEASURED}"
        return _FIELD.sub(lambda field: _shown(values[field[1]], field[2].split(" | ")[1:]), section)


def _shown(value: Any, columns: Sequence[str]) -> str:
    if not columns:
        return str(value)
    matches = [match for match in map(_COLUMN.fullmatch, columns) if match and match["key"] in value[0]]
    head = [match["heading"] or match["key"].replace("_", " ") for match in matches]
    cells = [[cell(row[match["key"]], len(match["percent"])) for match in matches] for row in value]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *cells))


def cell(value: Any, decimals: int = 0) -> str:
    """Text, truth, a number, or one and the ends of its interval as the page shows it; with decimals it is a share in percent."""
    if isinstance(value, tuple):
        middle, low, high = value
        ends = f"{cell(low, decimals)} to {cell(high, decimals)}".replace("%", "")
        return cell(middle, decimals) if math.isnan(low) else f"{cell(middle, decimals)} ({ends})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{100 * value:.{decimals}f}%" if decimals and not math.isnan(value) else number(value)


def number(value: float) -> str:
    """Three significant digits, no exponent for sizes of batches; a dash for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def percent(value: float) -> str:
    return cell(value, 1)


def listed(names: Sequence[str], by: str = ", ") -> str:
    return by.join(names) if names else "none"


def _flat(row: Row) -> Row:
    flat: Row = {}
    for key, value in row.items():
        ends = (f"{key}_lower", f"{key}_upper")
        flat |= dict(zip((key, *ends), value, strict=True)) if isinstance(value, tuple) else {key: value}
    return flat
