"""The benchmark of the search for epsilon, in small."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import epsilon_search
import pytest
import torch
from workloads import WORKLOADS

from lightning_gradhist.callbacks import epsilon_search as callback


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_runs_and_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "mlp", replace(WORKLOADS["mlp"], samples=1280))
    monkeypatch.setattr(callback, "STEPS", 8)
    path = tmp_path / "epsilon_search.csv"
    epsilon_search.main(["--workload", "mlp", "--loss-scale", "1e-8", "--output", str(path)])
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        (row,) = list(reader)
        assert reader.fieldnames == epsilon_search.COLUMNS
    assert row["chosen"] == "search" and row["factor"] == "1.0"
    assert row["eps"] == row["auto_eps"] and float(row["eps"]) < 1e-9
    assert float(row["upper"]) < 0 and int(row["gradients"]) == 8 * int(row["forwards"]) // 4
    assert float(row["loss_search"]) == float(row["loss_auto"]) < float(row["loss_default"])
