from __future__ import annotations

import csv
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import capture_cost
import capture_scale
import capture_variants
import numpy as np
import pytest
import torch
from capture_variants import Task, Variant
from reporting import write_csv
from torch import nn

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """One thread, as threads that wait for a busy core cost more than they do; and Lightning may talk afterwards."""
    threads, lightning = torch.get_num_threads(), logging.getLogger("lightning.pytorch")
    level = lightning.level
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    lightning.setLevel(level)


def tiny(name: str = "CNN") -> Task:
    return next(task for task in capture_variants.tasks(1e-3) if task.name == name)


def variant(name: str) -> Variant:
    return next(one for one in capture_variants.variants() if one.name == name)


@pytest.mark.slow
def test_capture_cost_runs_and_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["monitor", "monitor, every step", "add_histogram"]
    output = tmp_path / "results.csv"
    options = "--scale 1e-3 --rounds 1 --output".split()
    earlier = [{"model": "CNN", "variant": "another model"}, {"model": "small tensors", "variant": "measured anew"}]
    write_csv(output, capture_cost.COLUMNS, earlier)
    capture_cost.main([*options, str(output), "--models", "small tensors", "--only", *names])
    with output.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = {row["variant"]: row for row in reader}
        assert reader.fieldnames == capture_cost.COLUMNS
    by_itself = {capture_variants.NO_NOISE, capture_cost.ALONE, capture_cost.PROBE}
    assert set(rows) == {"another model", "none", *names, *by_itself}
    none, ours, by_hand = (rows[name] for name in ("none", "monitor, every step", "add_histogram"))
    assert float(none["step_ms_q25"]) <= float(none["step_ms"]) <= float(none["step_ms_q75"]) and none["added_ms"] == ""
    for row in (ours, by_hand):
        assert float(row["added_ms_q25"]) == float(row["added_ms"]) == float(row["added_ms_q75"])
        assert row["tensors"] == "8" and row["batch"] == "128 x 32" and row["torch"] == torch.__version__
        share = float(row["added_ms"]) / float(none["step_ms"])
        assert float(row["added_share"]) == pytest.approx(share, rel=1e-2)
    share = float(ours["added_ms"]) / float(by_hand["added_ms"])
    assert (
        float(ours["share_of_add_histogram"]) == pytest.approx(share, rel=1e-2) and ours["share_of_wandb_watch"] == ""
    )
    logged = float(ours["log_bytes_in_10000_steps"])
    assert logged > 1e4 * 8 * 500 and none["log_bytes_in_10000_steps"] == ""
    assert float(rows["monitor"]["log_bytes_in_10000_steps"]) == pytest.approx(logged / 50, rel=1e-2)
    assert float(rows[capture_cost.PROBE]["probe_in_steps"]) > 0
    alone = rows[capture_cost.ALONE]
    assert 0 < float(alone["share_of_read_bandwidth"]) and 0 < float(alone["work_of_one_rank_in_two"])
    printed = capsys.readouterr().out
    assert "correct: small tensors" in printed and "off-steps" in printed and "not measured: the row" in printed
    assert "cuda  monitor, every step  added_share <= 0.03: not measured: python benchmarks/capture_cost.py" in printed


def one_value_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MagnitudeHistogram.update

    def update(self: MagnitudeHistogram, *values: Any) -> None:
        right(self, *values)
        self.table[0] += self.table[0].cumsum(0) == 1

    monkeypatch.setattr(MagnitudeHistogram, "update", update)


def next_bin(monkeypatch: pytest.MonkeyPatch) -> None:
    right = MagnitudeHistogram.update

    def update(self: MagnitudeHistogram, *values: Any) -> None:
        right(self, *values)
        self.table[0, 1:-2] = self.table[0, 1:-2].roll(1)

    monkeypatch.setattr(MagnitudeHistogram, "update", update)


def a_weight_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    right = GradientHistogramMonitor.on_train_end

    def move(self: Any, trainer: Any, pl_module: Any) -> None:
        right(self, trainer, pl_module)  # which ends its threads
        with torch.no_grad():
            next(pl_module.parameters()).view(-1)[0] += 1e-6

    monkeypatch.setattr(GradientHistogramMonitor, "on_train_end", move)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        pytest.param(one_value_twice, "counts differ from numpy's", id="a value too many"),
        pytest.param(next_bin, "counts differ from numpy's", id="the next bin"),
        pytest.param(a_weight_moves, "the monitor has changed", id="a weight"),
    ],
)
def test_a_wrong_monitor_ends_the_benchmark_before_anything_is_timed(
    mistake: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mistake(monkeypatch)
    options = "--scale 1e-3 --rounds 1 --models CNN --output".split()
    with pytest.raises(AssertionError, match=message):
        capture_cost.main([*options, str(tmp_path / "results.csv")])
    assert not list(tmp_path.iterdir())


def test_the_gate_takes_the_transformer() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    capture_cost.check(tiny("transformer"), CPU)


@pytest.mark.parametrize(("name", "reports"), [("monitor", 200), ("monitor, every step", 10_000)])
@pytest.mark.parametrize("steps", [32, 128])
def test_logged_steps_and_heatmaps_are_told_apart_and_weigh_as_often_as_they_come(
    name: str, reports: int, steps: int
) -> None:
    one = variant(name)
    seconds = [1.0] * (steps + 1)
    for number, step in enumerate(range(0, steps, one.every_n_steps_in_turn), 1):
        draws = number in (4, 16, 64)
        seconds[step] += 0.5 + 4 * draws
        seconds[step + 1] += 0.25  # its writing reaches into the next one
    seconds[0] = 1e6
    found = capture_cost.added(one, seconds[:-1], [1e6, 1e6, 1e6, *[1.0] * 20])
    draws = {200: 3, 10_000: 6}[reports]
    assert found == pytest.approx((0.75 * reports + 4 * draws) / 10_000)


def test_noise_weighs_as_often_as_a_run_measures_it() -> None:
    none, with_noise, without = ([step] * 33 for step in (1.0, 6.0, 2.0))
    names = (capture_variants.NONE, capture_variants.EVERY_STEP, capture_variants.NO_NOISE, "monitor")
    steps = (none, with_noise, without, with_noise)
    turns = {name: np.array([seconds, seconds]) for name, seconds in zip(names, steps, strict=True)}
    every_step = capture_cost.added_in_round(turns, variant("monitor, every step"))
    assert every_step == pytest.approx(1.0 + 4.0 * (0.1 + 0.9 * 2 / 10))
    assert capture_cost.added_in_round(turns, variant("monitor")) == pytest.approx(
        2 * 5.0 / 50
    )  # a turn logs every second step


def test_what_draws_nothing_adds_the_mean_of_its_later_half() -> None:
    found = capture_cost.added(variant("monitor, off-steps"), [9.0, 9.0, 9.0, 3.0, 5.0, 4.0], [7.0, 7.0, 7.0, 1.0, 1.0])
    assert found == 3.0


def test_what_cannot_be_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    good, left_out = capture_cost.split(tiny(), ["wandb.watch"])
    assert [one.name for one in good] == ["none"]
    [row] = left_out
    assert row["note"].startswith("left out: wandb") and "make peers" in row["note"]
    assert row["note"].removeprefix("left out: ") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [("CNN", 12, 1.1e6), ("MLP", 6, 2.1e6), ("transformer", 76, 25e6), ("small tensors", 2000, 1.06e6)],
)
def test_full_size_models(name: str, tensors: int, parameters: float) -> None:
    task = next(task for task in capture_variants.tasks() if task.name == name)
    with torch.device("meta"):
        sizes = [p.numel() for p in task.network().parameters()]
    assert len(sizes) == tensors and sum(sizes) == pytest.approx(parameters, rel=0.02)


def test_variants_train_the_same_module() -> None:
    first, second = (capture_variants.made(tiny(), 2) for _ in range(2))
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert isinstance(one, nn.Parameter) and torch.equal(one, other)
    batches = [list(loader) for _, loader in (first, second)]
    assert len(batches[0]) == 2 and torch.equal(batches[0][0][0], batches[1][1][0]) and len(batches[0][0][0]) == 128


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [pytest.param(1, id="one rank"), pytest.param(2, id="two ranks")])
def test_the_model_of_bytes_equals_what_is_measured(ranks: int) -> None:
    row = capture_scale.check(ranks, steps=3)
    for what in capture_scale.MEASURED:
        assert row[f"{what}_bytes"] == row[f"{what}_bytes_measured"], what
    counts, noise = 2 * (12 * (254 * 8 + 3) + 2) * 8, (2 * 12 + 1) * 8  # two logged steps, twelve tensors, checksums
    assert row["all_reduced_bytes"] == (ranks > 1) * (counts + noise)
    assert row["ring_bytes_a_rank"] == row["all_reduced_bytes"] * 2 * (ranks - 1) // ranks


def test_a_wrong_model_of_bytes_is_noticed() -> None:
    capture_scale.compare({"kept_bytes": 80, "calls": 3}, {"kept_bytes": 80}, ranks=2)
    with pytest.raises(AssertionError, match="kept_bytes on 2 ranks: measured 88, predicted 80"):
        capture_scale.compare({"kept_bytes": 88}, {"kept_bytes": 80}, ranks=2)


def test_seventy_billion_parameters() -> None:
    default = capture_scale.large_rows(steps=100)[0]  # two of them logged
    assert default["tensors"] == 723 and default["parameters"] == pytest.approx(70.6e9, rel=1e-3)
    assert default["all_reduced_bytes"] == 2 * (723 * (254 * 8 + 3) + 2) * 8 + (2 * (10 + default["ranks"]) + 1) * 8
    assert 8 * 2**18 < default["held_bytes_a_rank"] < 1.2 * 8 * 2**18  # of some small shards all
    assert 64 * 16 * 724 * 2 < default["logged_histograms_bytes"] < 1.15 * 64 * 16 * 724 * 2


def test_the_results_in_the_repository_are_whole() -> None:
    with (Path(capture_scale.__file__).parent / "results" / "capture_scale_cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == capture_scale.COLUMNS
    measured = [row for row in rows if row["case"] == "measured"]
    assert [row["ranks"] for row in measured] == ["1", "2", "4", "8"]
    for row in measured:
        assert all(row[f"{what}_bytes"] == row[f"{what}_bytes_measured"] for what in capture_scale.MEASURED)


def test_work_of_other_threads_counts() -> None:
    clock = capture_cost.Clock(CPU)
    clock.on_train_batch_start()
    worker = Thread(target=lambda: sorted(range(3_000_000), key=lambda i: -i))
    worker.start()
    worker.join()
    clock.on_train_batch_start()
    assert clock.seconds()[0] > 0.05


@pytest.mark.slow
def test_the_monitor_has_a_whole_turn_also_where_batches_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture_cost, "SMALL_BATCH", None)  # as on CUDA
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    some = [variant("none"), variant("monitor")]
    (one,) = capture_cost.take_rounds(tiny(), some, 1, CPU)
    assert one[1]["monitor"].shape == (2, tiny().steps)
    row = capture_cost.of_rounds([one], variant("monitor"))
    assert np.isfinite([row["added_ms"], row["added_clock_ms"]]).all()
