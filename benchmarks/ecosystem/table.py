"""Writes the table of ``results/ecosystem.csv`` into ``docs/support.md``: ``python table.py``; ``run.py`` does it at its end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from reporting import RESULTS, Row, read_csv  # noqa: E402

PAGE = HERE.parents[1] / "docs" / "support.md"
START, END = "<!-- made by benchmarks/ecosystem/table.py -->\n", "<!-- end -->"
HEAD = ("Project", "Monitor", "`apply=False`", "`apply=True`", "Record, 4 x batch", "ALTO")


def why(note: str) -> str:
    """Of what a calibration said, why a rate was kept."""
    refused = re.search(r"surge law refused: ([^:;]*)", note)
    return refused[1].strip() if refused else note.split(". ", 1)[1].split(";")[0]


def cell(row: Row | None) -> str:
    """What a way came to, in a few words."""
    if row is None:
        return "not run"
    status, note = row["status"], row["note"]
    if status not in ("ran", "same bits"):
        return f"{status}: {note}" if note else status
    if row["way"] == "record x4" and note.startswith("eps"):
        ratio = re.search(r"times (\S+) \((\w+)\)", note)
        return f"rate kept: {why(note)}" if ratio is None or ratio[2] == "keep" else f"rate times {ratio[1]}"
    if row["way"] in ("record x4", "ALTO") and note:
        return note
    done = "same bits" if status == "same bits" else "trains"
    unprobed = re.search(r"no probe: (.*?)(?:, which|\. What|;|$)", note)
    return f"{done}; no probe: {unprobed[1]}" if unprobed else done


def table(rows: list[Row]) -> str:
    """One line a project, with the versions and the days of the runs below."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for name in dict.fromkeys(row["project"] for row in rows):
        mine = {row["way"]: row for row in rows if row["project"] == name}
        if "install" in mine:
            lines.append((name, *[cell(mine["install"])] * (len(HEAD) - 1)))
            continue
        title = f"`{name}`, {mine['plain']['version']}"
        ways = ("monitor", "apply=False", "apply=True", "record x4", "ALTO")
        lines.append((title, *(cell(mine.get(way)) for way in ways)))
    days = sorted({row["date"] for row in rows})
    with_what = sorted(
        {f"Python {row['python']}, torch {row['torch']}, {row['lightning']}" for row in rows if row["torch"]}
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\nRun from {days[0]} to {days[-1]} with {'; '.join(with_what)}.\n"


def write(rows: list[Row], page: Path = PAGE) -> None:
    """Puts the table in its place."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    page.write_text(before + START + table(rows) + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    write(read_csv(RESULTS / "ecosystem.csv"))
