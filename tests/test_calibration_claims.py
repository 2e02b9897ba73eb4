"""What is measured beside the main grid: Theorem 3's formula, the claims on ALTO, and the side grids, in small."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import claims
import claims_section
import formula
import formula_section
import grid
import numpy as np
import pytest
import rows
import side_grids
import side_section
import torch
import transfer_section
from claims import Setting
from evidence import FORMULA, FORMULA_TABLE, collect
from page import Page
from test_calibration_tables import row_of
from torch import nn
from torch.utils.data import TensorDataset
from training import Run, loss_of
from workloads import WORKLOADS, Data

from lightning_gradhist import SurgeLaw

SIZES = (8, 32, 128)
TINY = Setting("mlp", 16, 6, optimizers=("ALTO", "AdamW"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setitem(WORKLOADS, "mlp", replace(WORKLOADS["mlp"], batch_sizes=SIZES, samples=2048))
    yield
    torch.set_num_threads(threads)


# --- Theorem 3's formula ----------------------------------------------------------------------------------------------


def logistic(samples: int) -> tuple[nn.Module, Data]:
    """Few parameters, so that their whole Hessian can be had, and digits."""
    data = WORKLOADS["mlp"].load(Path())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    return model, Data(TensorDataset(*(tensor[:samples] for tensor in data.train.tensors)), data.test)


def exact(model: nn.Module, data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of a sample's gradient, and the Hessian."""
    parameters = dict(model.named_parameters())

    def loss(flat: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        own = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        return loss_of(lambda x: torch.func.functional_call(model, own, x), data, indices)  # type: ignore[arg-type]

    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    everything = torch.arange(len(data.train))
    gradients = torch.stack([torch.func.grad(loss)(flat, i[None]) for i in everything])
    return gradients.mean(0), gradients.std(0), torch.func.jacrev(torch.func.grad(loss))(flat, everything)


def test_a_hessian_product_is_that_of_the_hessian_and_leaves_the_weights() -> None:
    model, data = logistic(100)
    _, _, hessian = exact(model, data)
    before = [parameter.clone() for parameter in model.parameters()]
    vector = torch.randn(650, generator=torch.Generator().manual_seed(0))
    probe = formula.Probe(model, data, 100, seed=0)
    assert torch.dist(probe.hessian_product(vector), hessian @ vector) < 0.01 * (hessian @ vector).norm()
    assert probe.passes == 2 and all(map(torch.equal, before, model.parameters()))


def test_the_interval_holds_the_formula_of_the_exact_moments() -> None:
    model, data = logistic(500)
    mean, deviation, hessian = exact(model, data)
    kept = deviation > 0  # a pixel may be white in no digit
    hessian = hessian[kept][:, kept]
    law = SurgeLaw.from_moments(mean[kept], deviation[kept], hessian.diag(), lambda v: hessian @ v)
    found = formula.measured(formula.Probe(model, data, 50, seed=0), torch.Generator().manual_seed(0))
    assert found["trace"] == pytest.approx(float(hessian.trace()), rel=0.1)
    assert found["lower"] < law.noise_scale < found["upper"] < 2 * found["lower"] and found["positive"] == 1


def test_where_a_sum_is_not_positive_there_is_no_noise_scale() -> None:
    assert formula.noise_scale(np.array([2.0, -1.0, 1.0]), np.array([1.0, 1.0, -1.0])).tolist() == pytest.approx(
        [math.pi, math.nan, math.nan], nan_ok=True
    )
    drawn = np.array([np.ones(100), np.where(np.arange(100) < 5, -1.0, 1.0)])
    unbounded = formula.summary(np.array([[1.0], [1.0]]), drawn)
    assert unbounded["upper"] == math.inf and unbounded["lower"] == unbounded["value"] == pytest.approx(math.pi / 2)
    assert unbounded["positive"] == 0.95 and math.isnan(formula.summary(np.array([[1.0], [-1.0]]), drawn)["lower"])


def grid_of_square_root(folder: Path) -> None:
    """A finished grid of the first stages, where the square root is the law."""
    table = grid.Table(folder / "mlp.csv")
    while (wanted := grid.next_run(["mlp"], ["rates", "refine", "seeds"], {"mlp": table}, [])) is not None:
        table.add(row_of(wanted[1], wanted[0]))


def test_the_formula_is_measured_along_the_best_runs_and_carries_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formula, "HALF", 4)
    grid_of_square_root(tmp_path)
    arguments = ["--workload", "mlp", "--grid", str(tmp_path), "--output", str(tmp_path / FORMULA_TABLE)]
    formula.main(arguments)
    measured = rows.read(tmp_path / FORMULA_TABLE)
    assert list(measured[0]) == formula.COLUMNS
    assert [(row["batch_size"], row["step"]) for row in measured if row["batch_size"] < 128] == [
        *((8, 0), (8, 25), (8, 128), (8, 230)),
        *((32, 0), (32, 6), (32, 32), (32, 57)),
    ]
    formula.main(arguments)
    assert repr(rows.read(tmp_path / FORMULA_TABLE)) == repr(measured)  # NaN is not NaN
    for row in measured:
        row |= {"value": 100.0 if row["step"] else math.nan, "upper": 200.0}
    rows.write(tmp_path / FORMULA_TABLE, formula.COLUMNS, measured)
    found = collect(tmp_path)
    assert found["mlp"].estimates[FORMULA].tolist() == [[pytest.approx(100)] * 3]
    page = Page(tmp_path / "out")
    methods = transfer_section.ranked(transfer_section.carried(found, "losses", 2))
    formula_section.formula(page, found, methods)
    page.write()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Of 12 moments 25.0% have no positive value, and 0.0% have one whose interval" in text
    assert "| saturating | Theorem 3 formula mean | 1 |" in text
    assert "Theorem 3's formula has no positive value at 25.0% of the moments." in page.bad


# --- claims -----------------------------------------------------------------------------------------------------------


def accuracy(run: Run) -> float:
    """Highest at a rate of 2**-5, where ALTO gains two points."""
    return 0.8 + 0.02 * (run.optimizer == "ALTO") - 0.02 * (math.log2(run.learning_rate) + 5) ** 2 + 0.001 * run.seed


def row(run: Run) -> dict[str, Any]:
    measured = accuracy(run)
    return {
        **{name: getattr(run, name) for name in grid.FIELDS},
        "steps": run.steps,
        "validation_error": 1 - measured,
        "test_accuracy": measured + 0.01 * (run.seed % 2) * (run.optimizer == "ALTO"),
        "train_loss": 0.5,
        "diverged": 0,
        "seconds": 1.0,
    }


def finished(settings: tuple[Setting, ...]) -> dict[Run, dict[str, Any]]:
    results: dict[Run, dict[str, Any]] = {}
    while (run := next(claims.wanted(settings, results), None)) is not None:
        results[run] = row(run)
    return results


def test_every_optimizer_gets_five_seeds_at_an_interior_optimum() -> None:
    results = finished((TINY,))
    for name in TINY.optimizers:
        known = claims.errors(results, TINY.run(name))
        assert grid.best(known) == -10 and min(known) <= -12 and max(known) >= -8
        at_best = [run.seed for run in results if run.optimizer == name and run.learning_rate == 2**-5]
        assert sorted(at_best) == list(range(claims.SEEDS))


def test_claims_run_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SETTINGS", (TINY,))
    monkeypatch.setattr(claims, "missing", lambda known, start: [start] if not known else [])
    path = tmp_path / "claims.csv"
    claims.main(["--workload", "mlp", "--output", str(path)])
    results = claims.read(path)
    assert list(rows.read(path)[0]) == claims.COLUMNS and len(results) == 2 * claims.SEEDS
    assert {run.seed for run in results} == set(range(claims.SEEDS))
    assert len({row["test_accuracy"] for row in results.values()}) > claims.SEEDS
    assert all(0 < row["test_accuracy"] < 1 and 0 < row["validation_error"] < 1 for row in results.values())
    torn = "\n".join(path.read_text().splitlines()[:-1]) + "\n"
    path.write_text(torn)
    monkeypatch.setattr(claims, "result", lambda run, data: row(run))
    claims.main(["--workload", "mlp", "--output", str(path)])
    again = claims.read(path)
    assert again.keys() == results.keys() and sum(row["seconds"] == 1.0 for row in again.values()) == 1


def test_the_claim_is_judged_on_the_difference_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = (
        Setting("mlp", 4096, 6, optimizers=("ALTO", "Lamb")),
        Setting("mlp", 512, 6, optimizers=("ALTO", "Lamb")),
    )
    monkeypatch.setattr(claims_section, "SETTINGS", settings)
    page = Page(tmp_path)
    claims_section.claims(page, finished(settings))
    page.write()
    text = (tmp_path / "README.md").read_text()
    # 2 points, and 1 more at two of five seeds: 2.4 +- 2.776 * 0.548 / sqrt(5)
    assert "- mlp at 4,096: ALTO's test accuracy less Lamb's is +2.40 (+1.72 to +3.08) points; the goal" in text
    assert text.count("is met") == 1 and "mlp at 512: " not in text and page.bad == []
    assert "| mlp | 4,096 | 6 | Lamb | 0.0312 | yes | 5 | 80.20% | 0.07% | 0.5 |" in text


# --- side grids -------------------------------------------------------------------------------------------------------


def test_side_grids_are_finished_and_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(side_grids, "train", lambda run, folder: row_of(run, ""))
    side_grids.main(["--grid", "no_momentum", "--output", str(tmp_path)])
    results = grid.read(tmp_path / "no_momentum.csv")
    assert {run.optimizer for run in results} == {"Adam without momentum"}
    assert {run.seed for run in results} == set(range(3))
    assert side_grids.next_run("no_momentum", results) is None
    capsys.readouterr()
    side_grids.main(["--grid", "no_momentum", "--output", str(tmp_path)])
    assert capsys.readouterr().out == ""


def test_the_page_tells_the_peak_and_what_momentum_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid_of_square_root(tmp_path)
    for name in side_grids.GRIDS:
        sizes = SIZES if name == "no_momentum" else (16, 64, 256)
        monkeypatch.setitem(side_grids.GRIDS, name, replace(side_grids.GRIDS[name], batch_sizes=sizes, samples=2048))
        table = grid.Table(tmp_path / f"{name}.csv")
        while (wanted := side_grids.next_run(name, table)) is not None:
            table.add(row_of(wanted[1], wanted[0]))
    side = side_section.collect(tmp_path)
    page = Page(tmp_path / "out")
    side_section.surge(page, side, 3)
    side_section.momentum(page, collect(tmp_path), side, 3)
    page.write()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- 16 to 256: the highest best rate is that of 256 first, and of 256 last; in 0.0% of the draws" in text
    assert "The best rate goes with the batch size to the power of 0.5" in text
    assert "| beta1 | best rate at 8 | best rate at 32 | best rate at 128 |" in text
    assert (
        "is 1 to 1 times that with it, not 19 times. Laws where it is larger and the intervals are apart: none." in text
    )
    with (tmp_path / "out" / "tables" / "momentum.csv").open() as file:
        assert [row["ratio"] for row in csv.DictReader(file)] == ["1", "1", "1"]
