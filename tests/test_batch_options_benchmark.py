"""The comparison of what goes with the batch size, in small."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import batch_options
import pytest
import torch
from workloads import WORKLOADS


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_it_runs_and_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(batch_options.TRANSFERS, "mlp", ((8, 128),))
    monkeypatch.setattr(batch_options, "best", lambda by_rate: -14)
    monkeypatch.setitem(WORKLOADS, "mlp", replace(WORKLOADS["mlp"], samples=1920))
    path = tmp_path / "options.csv"
    arms = ["record", "record, betas", "probe", "probe, always"]
    call = [
        "--workload",
        "mlp",
        "--seeds",
        "1",
        "--grid",
        str(tmp_path),
        "--folder",
        str(tmp_path),
        "--output",
        str(path),
    ]
    batch_options.main([*call, "--arm", *arms[:2]])
    begun = path.read_text(encoding="utf-8")
    monkeypatch.setattr(batch_options, "best", lambda by_rate: -10)  # a transfer that was begun keeps its rate
    batch_options.main([*call, "--arm", *arms])
    assert path.read_text(encoding="utf-8").startswith(begun)
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = {row["arm"]: row for row in reader}
        assert reader.fieldnames == batch_options.COLUMNS
    assert list(rows) == arms
    for row in rows.values():
        assert (row["steps"], row["learning_rate"]) == ("15", str(2**-7)) and 0 < float(row["train_loss"]) < 2.5
    assert rows["record"]["train_loss"] != rows["record, betas"]["train_loss"]
    assert "record, betas" in capsys.readouterr().out


def test_differences_are_taken_seed_by_seed() -> None:
    transfer = {"workload": "mlp", "reference_batch_size": 8, "batch_size": 128, "ratio": 1.0, "last_ratio": 2.0}
    losses = {"record": (1.0, 2.0, 3.0), "record, betas": (1.1, 2.3, 3.2)}
    rows = [
        {**transfer, "arm": arm, "against": "record", "seed": seed, "train_loss": loss, "test_loss": 2 * loss}
        for arm, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]
    (found,) = batch_options.compared(rows)
    assert (found["arm"], found["difference"], found["error"]) == ("record, betas", "+0.2000", "0.0577")
    assert (found["of the test loss"], found["its error"]) == ("+0.4000", "0.1155")
    assert (found["loss against"], found["rate moved by"], found["seeds"]) == ("2.0000", "2.00", 3)
