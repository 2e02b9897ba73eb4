"""The page of the evidence, drawn from grids whose losses follow a known law, and from what is measured at fixed weights."""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import evidence
import grid
import numpy as np
import optimizer_section
import page as pages
import pytest
import run_sections
import tables
import torch
import transfers
from evidence import CAP, Curve, Evidence, Measured, collect
from grid import Setting, rate, read
from known_runs import claimed, row_of
from page import Page
from probes import coverage, epsilon_ranges, kept
from reporting import read_csv, write_csv
from training import EPS, Run, warm_up
from transfers import (
    ACROSS,
    BEFORE,
    FREE,
    LAWS,
    LENGTH,
    NOW,
    OTHERS,
    SAMPLES,
    STEPS,
    Cell,
    Transfers,
    fitted,
    mixed,
    within,
)
from workloads import WORKLOADS

SIZES = (8, 32, 128)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    for name in ("mlp", "gpt"):
        monkeypatch.setitem(WORKLOADS, name, replace(WORKLOADS[name], batch_sizes=SIZES, samples=2048, steps=32))
    yield
    torch.set_num_threads(threads)


def bowl(best: float, rates: np.ndarray) -> Measured:
    """Losses of two seeds, lowest at a rate in log2."""
    losses = np.exp(0.1 * rates**2)
    return Measured(best + rates, np.stack([losses, 1.1 * losses], 1))


def cells(law: str, noise: float, *steps: int, off: float = 1.0) -> list[Cell]:
    """At equal samples and at equal steps, best at what a law says of the first; the noise scale is measured too small."""
    made = [Cell(SAMPLES, size, steps[0] // size, bowl(0, np.arange(1)), [noise / off]) for size in SIZES]
    made += [Cell(STEPS, size, steps[1], bowl(0, np.arange(1)), [noise / off]) for size in SIZES if len(steps) > 1]
    best = [math.log2(LAWS[law](noise, to, made[0])) for to in made]
    return [replace(cell, measured=bowl(at, np.arange(-6, 6.5, 0.5))) for cell, at in zip(made, best, strict=True)]


@pytest.mark.parametrize("name", [*LAWS])
def test_an_exact_law_costs_nothing(name: str) -> None:
    of = Transfers(cells(name, 64.0, 2048))
    excess, octaves = of.arrive(name, of.shifts(LAWS[name]))
    assert len(excess) == 6 == of.kinds[SAMPLES].sum() and excess == pytest.approx(0, abs=2e-3)
    assert octaves == pytest.approx(0, abs=0.02)
    (mean,) = {
        tuple(means) for (_, kind), means in of.means({name: of.shifts(LAWS[name])}, 3).items() if kind == SAMPLES
    }
    assert len(mean) == 4 and max(mean) < 2e-3


def test_no_rate_goes_beyond_the_first_step_unless_the_known_run_began_as_it_does() -> None:
    made = cells(FREE, 64.0, 2048)
    known, to = made[0], replace(made[-1], critical=[-9.0])
    of, free = Transfers([known, to]), LAWS[FREE](64.0, made[-1], known)
    assert [warm_up(cell.steps) for cell in (known, to)] == [13, 1] and free > 1.5
    shift = of.shifts(LAWS[FREE])
    assert of.arrive(FREE, shift)[1] == pytest.approx(0, abs=0.02)
    bound = known.measured.mean().vertex - math.log2(13)  # where its first step is that of the known run
    assert of.arrive(NOW, shift)[1][0] == pytest.approx(math.log2(free) - bound, abs=0.02)
    assert of.arrive(NOW, shift)[1][1] == pytest.approx(0, abs=0.02)  # the other way nothing is known


@pytest.mark.parametrize("name", ["surge", "falling"])
def test_the_noise_scale_of_a_law_is_found(name: str) -> None:
    assert fitted(cells(name, 64.0, 2048, off=8), LAWS[name]) == pytest.approx(64, rel=0.2)


def test_transfers_are_told_apart_by_batch_size_and_steps() -> None:
    of = Transfers(cells(BEFORE, 64.0, 2048, 64))
    # 8, 32 and 128 samples make 256, 64 and 16 steps, and 64 each; 32 and 64 are there twice
    counts = {kind: int(mask.sum()) for kind, mask in of.kinds.items()}
    assert counts == {SAMPLES: 6, STEPS: 10, ACROSS: 14, LENGTH: 6, "samples, long": 2, "across, long": 8}


def test_at_equal_steps_the_law_stays_within_the_fourth_root() -> None:
    small, large, long, back = (
        Cell(SAMPLES, size, steps, bowl(0, np.arange(1))) for size, steps in ((8, 64), (32, 16), (32, 64), (8, 16))
    )
    before, now = LAWS[BEFORE], LAWS[NOW]
    by_hand = mixed(before, within(before, 0.25))
    assert all(
        now(n, *two) == pytest.approx(by_hand(n, *two)) for n in (1, 64) for two in ((large, small), (back, long))
    )
    assert now(64.0, large, small) == before(64.0, large, small)  # at equal samples
    assert now(64.0, long, small) == pytest.approx(4**0.25) and now(64.0, back, large) == pytest.approx(4**-0.25)
    assert now(1.0, long, small) == now(64.0, long, large) == 1  # far beyond the noise scale, and at one batch size
    assert now(64.0, replace(large, steps=32), small) == pytest.approx(math.sqrt(4**0.25 * before(64.0, large, small)))


def test_the_vertex_of_a_curve() -> None:
    rates = np.array([-4.0, -3.0, -1.0, 0.0])
    assert Curve(rates, np.exp((rates + 2.2) ** 2)).vertex == pytest.approx(-2.2)
    for losses in ([1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 1.0, math.inf]):  # at the edge, and beside a rate that diverged
        curve = Curve(rates, np.array(losses))
        assert curve.vertex == curve.best_rate


def test_the_public_grids_are_read_and_what_was_found_is_kept(tmp_path: Path) -> None:
    page = Page(tmp_path / "out")
    transfers.public(page, None)
    assert "public" not in page._filled
    for name in ("dense", "moe"):
        lines = ["N,lr,bs,ti,D,smooth loss"]
        for tokens, size, k in itertools.product((2**20, 2**22), SIZES, range(-3, 4)):
            rate = 2 ** (k / 2 - 8) * size**0.5
            lines.append(f"7,{rate},{size},{tokens // size},{tokens},{math.exp(0.01 * k**2)}")
        (tmp_path / f"step_law_{name}.csv").write_text("\n".join(lines) + "\n")
    transfers.public(page, tmp_path)
    again = Page(tmp_path / "out")
    transfers.public(again, None)
    rows = {(row["grid"], row["law"]): row for row in again._filled["public"]["public"]}
    root, fourth = rows["moe", "sqrt"], rows["moe", "fourth_root"]
    assert root[SAMPLES] < 1e-3 < fourth[SAMPLES]
    assert fourth["samples_octaves"] == pytest.approx(2 / 3, abs=0.01)
    assert (root["samples_number"], root["steps_number"], root["length_number"]) == (12, 4, 6)


def test_a_curve_between_and_beyond_its_rates() -> None:
    curve = Curve(np.array([-3.0, -2.0, -1.0, 0.0]), np.array([1.5, 1.0, 1.21, math.inf]))
    rates = np.array([-4.0, -3.0, -2.0, -1.5, -0.6, -0.4, 9.0])
    assert curve.excess(rates) == pytest.approx([0.5, 0.5, 0.0, 0.1, 0.21, CAP, CAP])
    assert curve.diverges(rates).tolist() == [False] * 5 + [True] * 2
    assert curve.interior and not Curve(curve.rates[1:3], curve.losses[1:3]).interior


def test_estimates_of_a_run() -> None:
    values = [(0, 1.0, 2.0), (100, 10.0, 20.0), (200, 1000.0, math.inf), (300, 20.0, 30.0)]
    moments = [{"samples": s, "adam": v, "adam_lower": v / 2, "adam_upper": high} for s, v, high in values]
    found = evidence.of_a_run(moments, "adam", 1000)
    weights = [50, 100, 750]  # the third has no bound; the last stands for all to the end
    mean = sum(w * v for w, v in zip(weights, (1, 10, 20), strict=True)) / sum(weights)
    assert found == {"start": 1.0, "after warm-up": 10.0, "mean": pytest.approx(mean), "median": 20.0}


def test_the_fit_of_theorem_5() -> None:
    samples = {size: 700 * (1 + size / 50) for size in SIZES}
    assert evidence.tradeoff_fit(samples) == pytest.approx((50, 700 / 50))
    assert math.isnan(evidence.tradeoff_fit({size: 700 / size for size in SIZES})[0])


def write(folder: Path, stages: Collection[str], names: Collection[str] = ("mlp", "gpt")) -> None:
    """The tables of a grid that has made the runs of some stages."""
    written: dict[str, dict[Run, dict[str, Any]]] = {name: {} for name in names}
    while wanted := grid.next_runs(stages, written):
        for stage, name, run in wanted:
            written[name][run] = row_of(run, stage)
    for name, table in written.items():
        lamb = [row_of(replace(run, optimizer="Lamb"), "optimizers") for run in table if run.optimizer == "ALTO"]
        write_csv(folder / f"{name}.csv", grid.COLUMNS, [*table.values(), *lamb], digits=None)


@pytest.mark.slow
def test_the_page_of_a_whole_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, ["rates", "seeds", "noise", "cover", "epsilon", "optimizers", "steps"])
    monkeypatch.setattr("probes.kept", lambda path, *_: read_csv(path))  # nothing is measured
    (tmp_path / "out" / "tables").mkdir(parents=True)
    with (tmp_path / "out" / "tables" / "epsilon_range.csv").open("w") as file:
        columns = "workload,batch_size,loss_scale,lower,upper,pooled_lower,pooled_upper,default,damped_by_default,auto"
        file.write(f"{columns}\n")
        for name, pooled in (("mlp", 1e-5), ("gpt", 1e5)):
            for scale in (1.0, 1e-8, 1e-4, 1e4):
                ends = ",".join(str(end * scale) for end in (1e-6, 1e-2, pooled, 100 * pooled))
                file.write(f"{name},32,{scale},{ends},1e-8,0,{min(1e-8, 1e-6 * scale)}\n")
    tables.main(["--results", str(tmp_path), "--output", str(tmp_path / "out"), "--draws", "3"])
    page = (tmp_path / "out" / "README.md").read_text()
    by_method = {}
    with (tmp_path / "out" / "tables" / "transfers.csv").open() as file:
        for row in csv.DictReader(file):
            by_method[row["kind"], row["law"]] = row
    for name in ("mlp", "gpt", "mlp, all lengths"):
        assert float(by_method[SAMPLES, "sqrt"][name]) == pytest.approx(0, abs=1e-3)
        assert float(by_method[SAMPLES, "keep"][name]) > 0.02
    assert by_method[SAMPLES, NOW]["worse"] == "none" and (STEPS, OTHERS) in by_method
    assert "| mlp | 32 | 2.00% |\n| mlp | 128 | 2.00% |\n| gpt | 32 | 2.00% |\n| gpt | 128 | 2.00% |" in page
    # how many hold one of the plateau, and the best one; how wide, what 16 decades are to that, and the goals
    assert "| authors | 2 | 0 | 4 | 4 | 4 | yes |\n| pooled | 1 | 0 | 2 | 2 | 8 | no |" in page
    assert "Against the goals: samples " in page
    assert "Search spaces (pooled) without an epsilon of the plateau: gpt." in page
    assert "`auto` is within the tolerance in 6 of 6 cases" in page
    assert "| mlp | Theorem 5 fit | 1 | 1 |" in page
    assert "Optima at the edge of the grid: none." in page
    assert page.count("Not measured yet.") == 4  # the public grids, the coverage, the side grids and the claims
    assert not pages._FIELD.search(page)
    for figure in ("loss_curves", "transfers", "noise_scale"):
        assert 2_000 < (tmp_path / "out" / "tables" / f"{figure}.png").stat().st_size < 150_000


def test_what_is_missing_and_an_optimum_at_the_edge_are_said(tmp_path: Path) -> None:
    rates = [(size, k) for size in SIZES for k in (range(-17, -4, 2) if size == 32 else (-8, -7, -6))]
    runs = [Run("mlp", "Adam", size, rate(k), EPS["Adam"], 0, 2048) for size, k in rates]
    write_csv(tmp_path / "mlp.csv", grid.COLUMNS, [row_of(run, "rates") for run in runs], digits=None)
    found = collect(tmp_path)
    assert list(found) == ["mlp"]
    page = Page(tmp_path / "out")
    run_sections.runs(page, found)
    run_sections.best_rates(page, found, 2)
    transfers.carrying(page, found, {}, 2)
    run_sections.growth(page, found)
    page.write()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Optima at the edge of the grid: mlp at 8, mlp at 128." in text
    assert "The optimum is at the edge of what was measured: mlp at 8, mlp at 128." in page.bad
    for section in ("## Carrying a learning rate", "## Growth of the noise scale along a run", "## Epsilon"):
        assert f"{section}\n\nNot measured yet." in text
    assert "noise (mlp), cover (mlp)" in text


def of_one_rate(folder: Path) -> Evidence:
    """A grid with a single rate at each batch size."""
    runs = [Run("mlp", "Adam", size, 2**-6, EPS["Adam"], 0, 2048) for size in SIZES]
    write_csv(folder / "mlp.csv", grid.COLUMNS, [row_of(run, "rates") for run in runs], digits=None)
    return Evidence(WORKLOADS["mlp"], read(folder / "mlp.csv"))


def test_what_is_measured_at_fixed_weights_is_kept(tmp_path: Path) -> None:
    found, path = {"mlp": of_one_rate(tmp_path)}, tmp_path / "tables" / "epsilon_range.csv"
    rows = kept(path, found, epsilon_ranges, Path())
    unscaled, by_scale = rows[0], {row["loss_scale"]: row for row in rows}
    assert (
        unscaled["auto"] == EPS["Adam"] < unscaled["lower"] <= unscaled["pooled_lower"] < unscaled["pooled_upper"] < 1
    )
    assert by_scale[1e-8]["upper"] == pytest.approx(1e-8 * unscaled["upper"]) and by_scale[1e-8]["auto"] < 1e-8
    measured = [{**row, "auto": 0.5} for row in rows]
    assert kept(path, found, lambda evidence, folder: measured, Path()) == rows
    assert kept(path, found, lambda evidence, folder: measured, Path(), again=True) == measured
    assert kept(path, found, epsilon_ranges, Path()) == measured


def test_intervals_are_compared_with_ten_times_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probes.REPEATS", 3)
    rows = coverage(of_one_rate(tmp_path), Path())
    assert len(rows) == 2 * 3 * 2
    assert len({row["value"] for row in rows}) == len(rows)
    assert len({row["from_ten_times_the_data"] for row in rows}) == 4
    assert all(0 <= row["lower"] <= row["value"] <= row["upper"] for row in rows)
    assert sum(row["lower"] <= row["from_ten_times_the_data"] <= row["upper"] for row in rows) >= 9
    page = Page(tmp_path / "out")
    run_sections.coverage(page, rows)
    page.write()
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.count("| all | at the start | B_adam |") == text.count("| all | after a tenth | B_simple |") == 1


def test_the_claim_is_judged_on_the_difference_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [Setting("mlp", size, 6, optimizers=("ALTO", "Lamb")) for size in (4096, 512)]
    monkeypatch.setattr(optimizer_section, "SETTINGS", settings)
    results: dict[Run, dict[str, Any]] = {}
    while (run := next(grid.claims(settings, results), None)) is not None:
        results[run] = claimed(run)
    page = Page(tmp_path)
    optimizer_section.claims(page, results)
    page.write()
    text = (tmp_path / "README.md").read_text()
    # 2 points, and 1 more at two of five seeds: 2.4 +- 2.776 * 0.548 / sqrt(5)
    assert "| mlp | 4,096 | ALTO - Lamb | 5 | 2.40% (1.72 to 3.08) |" in text
    assert "at batch sizes of 4,096 and more, is met in 1 of 1 cases" in text and page.bad == []
    assert "| mlp | 4,096 | 6 | Lamb | 0.0312 | yes | 5 | 80.20% | 0.07% | 0.5 |" in text


def test_the_page_tells_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, workload in grid.SIDE.items():
        monkeypatch.setitem(grid.SIDE, name, replace(workload, batch_sizes=(16, 64, 256), samples=2048))
    write(tmp_path, grid.SIDE_STAGES, ["mlp", *grid.SIDE])
    side = collect(tmp_path, side=True)
    page = Page(tmp_path / "out")
    run_sections.surge(page, side, 3)
    page.write()
    text = (tmp_path / "out" / "README.md").read_text()
    # highest at 256 first and last, in no draw a lower one, no cost, and a power of a half
    assert text.count("| 16 to 256 | 2,048 | 8 | 256 | 256 | 0.0% | 0.0% | 0.5 |") == 2


@pytest.mark.parametrize(
    ("value", "decimals", "shown"),
    [
        pytest.param(True, 0, "yes", id="truth"),
        pytest.param(12_345.6, 0, "12,346", id="large"),
        pytest.param(0.012345, 0, "0.0123", id="small"),
        pytest.param(0.0123, 1, "1.2%", id="share"),
        pytest.param(math.nan, 2, "–", id="none"),
        pytest.param((0.5, 0.25, 1.0), 0, "0.5 (0.25 to 1)", id="interval"),
        pytest.param((0.024, -0.0172, 0.0308), 2, "2.40% (-1.72 to 3.08)", id="share with interval"),
        pytest.param((1.5, math.nan, math.nan), 0, "1.5", id="without interval"),
    ],
)
def test_cells(value: Any, decimals: int, shown: str) -> None:
    assert pages.cell(value, decimals) == shown
