"""Other people's projects: each has its example, and the docs' table is that of the last run."""

from __future__ import annotations

from ecosystem.projects import PROJECTS
from ecosystem.run import END, PAGE, START, table
from reporting import RESULTS, read_csv


def test_the_table_is_that_of_the_results() -> None:
    shown = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert shown == table(read_csv(RESULTS / "ecosystem.csv")), "python benchmarks/ecosystem/run.py"


def test_each_project_of_the_results_has_its_example() -> None:
    assert {*PROJECTS} == {row["project"] for row in read_csv(RESULTS / "ecosystem.csv")}
