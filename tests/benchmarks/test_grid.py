"""The runs of the grids: one run, which runs are wanted, and that the driver goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import grid
import pytest
import torch
from grid import CLEAR, Setting, best, losses, missing, rate, read
from known_runs import claimed, row_of
from reporting import read_csv
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from training import EPS, Run, measure_noise, moments, samples_to, schedule, train
from workloads import CHARACTERS, CONTEXT, WORKLOADS, encode

TINY = Run("mlp", "Adam", 8, 2**-6, EPS["Adam"], seed=1, samples=163)
MEASURED = {"noise", "noise_scale", "noise_passes", "seconds"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def without(row: dict[str, Any], columns: set[str]) -> dict[str, Any]:
    return {column: value for column, value in row.items() if column not in columns}


def test_a_run_is_the_same_bit_for_bit_with_and_without_its_noise_measured() -> None:
    first, again, other = (train(replace(TINY, seed=seed)) for seed in (1, 1, 2))
    assert without(first, {"seconds"}) == without(again, {"seconds"})
    assert first["train_loss"] != other["train_loss"]
    assert first["steps"] == 20 and first["curve"][-1][0] == 160 and first["diverged"] == 0
    measured = train(replace(TINY, noise=True))
    assert without(measured, MEASURED) == without(first, MEASURED)
    assert measured["noise_passes"] == 32 * len(measured["noise_scale"]) == 32 * (len(moments(20)) - 1)
    for noise in measured["noise_scale"]:
        for name in ("simple", "adam"):
            assert noise[f"{name}_lower"] <= noise[name] <= noise[f"{name}_upper"]


@pytest.mark.parametrize("optimizer", ["Adam", "AdamE", "ALTO"])
def test_each_optimizer_learns(optimizer: str) -> None:
    row = train(replace(TINY, optimizer=optimizer, learning_rate=2**-5, eps=EPS[optimizer], samples=480))
    assert row["train_loss"] < 0.9 * row["curve"][0][1]


def test_a_run_that_blows_up_has_diverged() -> None:
    row = train(replace(TINY, learning_rate=1e30))
    assert row["diverged"] == 1 and row["train_loss"] == math.inf


def test_the_noise_scale_is_that_of_the_gradients() -> None:
    workload = WORKLOADS["mlp"]
    data = workload.load(Path())
    torch.manual_seed(0)
    model = workload.make_model()
    inputs, labels = (tensor[:500] for tensor in data.train.tensors)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, image[None]), label[None])

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, inputs, labels)
    per_sample = torch.cat([gradient.flatten(1) for gradient in gradients.values()], 1)
    noise, mean = per_sample.var(0).sum(), per_sample.mean(0)
    expected = float(noise / (mean.square().sum() - noise / 500))
    measured = measure_noise(model, TINY, data, torch.Generator().manual_seed(0))
    assert measured["simple_lower"] < expected < measured["simple_upper"] < 3 * expected


def test_schedule() -> None:
    shares = [schedule(step, 100) for step in range(100)]
    assert shares[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert shares[4:] == pytest.approx([(100 - step) / 96 for step in range(4, 100)])
    assert schedule(0, 1) == 1


def test_samples_to_target_between_two_moments() -> None:
    curve = [(0, 4.0), (99, 1.0), (9999, 0.25), (19999, 0.5)]
    assert samples_to(1.0, curve) == pytest.approx(99)
    assert samples_to(0.5, curve) == pytest.approx(999)
    assert samples_to(0.2, curve) is None


def test_text_is_encoded_by_character() -> None:
    assert encode("\n ~é".encode()).tolist() == [0, 1, len(CHARACTERS) - 1, *[len(CHARACTERS)] * 2]


@pytest.mark.parametrize("name", ["cnn", "gpt", "lstm"])
def test_models_map_inputs_to_logits(name: str) -> None:
    inputs = torch.zeros(3, 1, 28, 28) if name == "cnn" else torch.zeros(3, CONTEXT, dtype=torch.long)
    logits = WORKLOADS[name].make_model()(inputs)
    assert logits.shape == ((3, 10) if name == "cnn" else (3, CONTEXT, len(CHARACTERS) + 1))


def test_a_gpt_does_not_look_ahead() -> None:
    model = WORKLOADS["gpt"].make_model()
    characters = torch.arange(CONTEXT)[None]
    changed = characters.clone()
    changed[0, 10:] = 50
    same = torch.isclose(model(characters), model(changed)).all(-1)[0]
    assert same.tolist() == [True] * 10 + [False] * (CONTEXT - 10)


def test_resume_skips_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(WORKLOADS, "mlp", replace(WORKLOADS["mlp"], batch_sizes=(8, 32), samples=320))
    options = grid.parse(["--table", "mlp", "--stage", "rates", "--workers", "1", "--output", str(tmp_path)])
    path = tmp_path / "mlp.csv"

    def lines() -> list[str]:
        with ThreadPool(1) as pool:
            grid.make_runs(pool, options)
        return path.read_text().splitlines()

    first, table = lines(), read(path)
    for size in (8, 32):
        of_size = [run for run in table if run.batch_size == size]
        assert missing(losses(table, of_size[0]), 0) == []
    assert next(iter(table.values()))["curve"][-1][0] == 320
    path.write_text("\n".join([*first[:-1], ""]))
    again = lines()
    assert again[:-1] == first[:-1] and len(again) == len(first)
    assert without([*read(path).values()][-1], {"seconds"}) == without([*table.values()][-1], {"seconds"})
    assert lines() == again


def bowl(run: Run) -> float:
    """A loss that is lowest at the rate of the surge law with a noise scale of 300."""
    root = math.sqrt(run.batch_size / 300)
    return 1 + 0.2 * math.log2(run.learning_rate * (root + 1 / root) / 0.1) ** 2


def test_the_grid_is_finished_with_its_optima_interior() -> None:
    workload, table = WORKLOADS["gpt"], {}
    while wanted := grid.next_runs(grid.STAGES, {"gpt": table}):
        for stage, _, run in wanted:
            assert run not in table and len(table) < 1000
            table[run] = {"stage": stage, "train_loss": bowl(run), "diverged": run.learning_rate > 0.5}
    for size in workload.batch_sizes:
        at_size = [run for run in table if run.batch_size == size and run.optimizer == "Adam" and run.eps == 1e-8]
        like = next(run for run in at_size if run.samples == workload.samples)
        by_rate = losses(table, like)
        top = best(by_rate)
        assert top is not None and by_rate[top] == min(
            bowl(replace(like, learning_rate=rate(k))) for k in range(-30, 9)
        )
        assert max(loss for k, loss in by_rate.items() if k < top) > CLEAR * by_rate[top]
        assert max(loss for k, loss in by_rate.items() if k > top) > CLEAR * by_rate[top]
        assert {run.seed for run in at_size if run.noise} == {0, 1, 2}
        assert {run.learning_rate for run in at_size if run.noise} == {rate(top)}
        equal = grid.at_equal_steps(workload, like)
        at_top = replace(equal, learning_rate=rate(best(losses(table, equal))))
        assert all(replace(at_top, seed=seed) in table for seed in (0, 1, 2))
        carried = [best(losses(table, replace(like, batch_size=other))) for other in workload.batch_sizes]
        low, high = min(carried), max(carried)  # the rate is kept
        assert min(by_rate) <= low or by_rate[min(by_rate)] >= grid.FAR * by_rate[top]
        assert max(by_rate) >= high or by_rate[max(by_rate)] >= grid.FAR * by_rate[top]


def test_rates_are_lowered_where_all_diverge() -> None:
    assert missing({-4: math.inf, -6: math.inf}, 0) == [-8]
    assert missing({-4: math.inf, -6: 1.0, -8: 1.04}, 0) == [-10]


def test_all_workloads_go_through_a_stage_before_the_next_one() -> None:
    wanted = grid.next_runs(grid.STAGES, {"mlp": {}, "gpt": {}})
    assert [(stage, name) for stage, name, _ in wanted] == [("rates", "mlp")] * 15 + [("rates", "gpt")] * 15
    assert len({run for *_, run in wanted}) == 30


def made(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a table once the driver has nothing left to do."""
    asked = grid.parse(["--table", name, "--workers", "1", "--output", str(folder)])
    with ThreadPool(1) as pool:
        grid.make_runs(pool, asked)
    return read_csv(folder / f"{name}.csv")


def test_side_grids_are_finished_and_go_on_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = replace(grid.SIDE["surge_small"], batch_sizes=(8, 32), samples=2048)
    monkeypatch.setitem(grid.SIDE, "surge_small", workload)
    monkeypatch.setattr(grid, "train", lambda run, folder, for_claim: row_of(run, ""))
    rows = made(tmp_path, "surge_small")
    assert {row["seed"] for row in rows} == {0, 1, 2}
    assert {row["stage"] for row in rows} == set(grid.SIDE_STAGES)
    capsys.readouterr()
    assert made(tmp_path, "surge_small") == rows and capsys.readouterr().out == ""


COMPARED = Setting("mlp", 16, 6, optimizers=("ALTO", "AdamW"))


def test_every_optimizer_gets_five_seeds_at_an_interior_optimum() -> None:
    results: dict[Run, dict[str, Any]] = {}
    while (run := next(grid.claims((COMPARED,), results), None)) is not None:
        results[run] = claimed(run)
    for name in COMPARED.optimizers:
        known = losses(results, COMPARED.run(name), "validation_error")
        assert best(known) == -10 and min(known) <= -12 and max(known) >= -8
        at_best = [run.seed for run in results if run.optimizer == name and run.learning_rate == 2**-5]
        assert sorted(at_best) == list(range(grid.SEEDS))


def test_claims_run_and_go_on_where_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "SETTINGS", (COMPARED,))
    monkeypatch.setattr(grid, "missing", lambda known, start: [start] if not known else [])
    rows = made(tmp_path, "claims")
    assert list(rows[0]) == grid.CLAIMS_COLUMNS and len(rows) == 2 * grid.SEEDS
    assert {row["seed"] for row in rows} == set(range(grid.SEEDS))
    assert len({row["test_accuracy"] for row in rows}) > grid.SEEDS
    assert all(0 < row["test_accuracy"] < 1 and 0 < row["validation_error"] < 1 for row in rows)
    path = tmp_path / "claims.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    monkeypatch.setattr(grid, "train", lambda run, folder, for_claim: claimed(run))
    again = made(tmp_path, "claims")
    assert [{**row, "seconds": 1.0} for row in again[:-1]] == [{**row, "seconds": 1.0} for row in rows[:-1]]
    assert len(again) == len(rows) and sum(row["seconds"] == 1.0 for row in again) == 1


def test_the_tables_of_the_repository_are_read_back() -> None:
    found = {name: read(grid.FOLDER / f"{name}.csv") for name in grid.NAMES}
    assert {name: len(results) > 80 for name, results in found.items()} == dict.fromkeys(grid.NAMES, True)
    run, row = next((run, row) for run, row in found["mlp"].items() if run.noise)
    assert run.steps == row["steps"] and row["curve"][0][0] == 0 and row["noise_scale"][0]["adam"] > 0
    assert list(read_csv(grid.FOLDER / "mlp.csv")[0]) == grid.COLUMNS
    assert list(read_csv(grid.FOLDER / "claims.csv")[0]) == grid.CLAIMS_COLUMNS
