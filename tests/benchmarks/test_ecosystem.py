"""The docs' table of other people's projects is that of the last run."""

from __future__ import annotations

from ecosystem.table import END, PAGE, START, table
from reporting import RESULTS, read_csv


def test_the_table_is_that_of_the_results() -> None:
    shown = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert shown == table(read_csv(RESULTS / "ecosystem.csv")), "python benchmarks/ecosystem/table.py"
