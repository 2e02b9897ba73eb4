"""The comparison of the greedy rate, in small."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import greedy
import pytest
import torch
from workloads import WORKLOADS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_runs_and_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "mlp", replace(WORKLOADS["mlp"], samples=1280))
    path = tmp_path / "greedy.csv"
    greedy.main(["--workload", "mlp", "--batch-size", "128", "--seeds", "1", "--grid", str(tmp_path)]
                + ["--output", str(path)])  # fmt: skip
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert reader.fieldnames == greedy.COLUMNS
    assert [row["step"] for row in rows] == ["0", "10"]
    for row in rows:
        assert float(row["lower"]) < float(row["greedy"]) < float(row["upper"]) < 2 * float(row["lower"])
        assert 0 < float(row["finder"]) < 1 and row["best"] == row["why_none"] == ""
        assert row["gradients"] == "16" and int(row["forwards"]) > 50
    assert rows[0]["finder"] == rows[1]["finder"] and rows[0]["greedy"] != rows[1]["greedy"]


def test_the_excess_is_that_of_the_nearest_rate_of_the_grid() -> None:
    by_rate = {-14: 1.2, -12: 1.0, -10: math.inf}
    row = greedy.against_grid({"greedy": 2**-6.9, "finder": 2**-5.0}, by_rate)
    assert row == {"best": 2**-6, "greedy_excess": pytest.approx(0.2), "finder_excess": math.inf}
    assert greedy.against_grid({"greedy": 1.0, "finder": None}, by_rate)["greedy_excess"] == math.inf
    assert greedy.against_grid({"greedy": None, "finder": 1.0}, {})["best"] is None
