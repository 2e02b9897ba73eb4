from __future__ import annotations

import csv
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optim_implementations
import optim_step
import pytest
import reporting
import torch
from measuring import extra_peak_bytes
from optim_implementations import LAMB, Implementation, LeftOut
from reporting import read_csv

from lightning_gradhist.optim import ALTO, AdamE, EAdaptor

CPU = torch.device("cpu")
FOLDER = Path(optim_step.__file__).parent


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for a busy core cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_optim_step_runs_and_writes_what_it_measured(tmp_path: Path) -> None:
    pytest.importorskip("ALTO")
    names = ["AdamW", "AdamW fused", "authors' ALTO", "AdamE", "ALTO"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "optim_step.py"), "--parameters", "2e5", "--repeats", "1"]
        + ["--output", "results.csv", "--only", *names],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (tmp_path / "results.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = {(row["model"], row["implementation"]): row for row in reader}
        assert reader.fieldnames == optim_step.COLUMNS
    copies = ["copy 28", "copy 36", "copy 48"]
    assert set(rows) == {(m, n) for m in ("transformer", "small tensors") for n in [*copies, *names]}
    state = {"AdamW": 8, "AdamW fused": 8, "authors' ALTO": 24, "AdamE": 12, "ALTO": 12}
    for (model, name), row in rows.items():
        assert float(row["seconds_q25"]) <= float(row["seconds"]) <= float(row["seconds_q75"]), (model, name)
        assert float(row["seconds"]) > 0 and row["tensors"] == ("150" if model == "transformer" else "20")
        assert float(row["state_bytes_per_parameter"]) == pytest.approx(state.get(name, 0), rel=1e-3)
        assert row["torch"] == torch.__version__ and row["gpu"] == "" and row["device"] == "cpu"
    for model in ("transformer", "small tensors"):
        for column, baseline in optim_step.BASELINES.items():
            assert float(rows[model, baseline][column]) == 1
        ours, copy = rows[model, "AdamE"], rows[model, "copy 36"]
        share = float(copy["seconds"]) / float(ours["seconds"])
        assert float(ours["share_of_copy_bandwidth"]) == pytest.approx(share, rel=1e-2)
    assert "cpu   transformer, AdamE  state_bytes_per_parameter <= 12: 12, met" in done.stdout
    assert "not measured: python benchmarks/optim_step.py --device cuda" in done.stdout


def one_percent_longer(optimizer: Any, step: Callable[[], Any]) -> None:
    befores = [param.detach().clone() for group in optimizer.param_groups for param in group["params"]]
    step()
    with torch.no_grad():
        params = [param for group in optimizer.param_groups for param in group["params"]]
        for param, before in zip(params, befores, strict=True):
            param.add_(param - before, alpha=0.01)


def without_memory_of_e(optimizer: Any, step: Callable[[], Any]) -> None:
    step()
    for state in optimizer.state.values():
        state["exp_avg_grad"].zero_()


@pytest.mark.parametrize("mistake", [one_percent_longer, without_memory_of_e])
@pytest.mark.parametrize(("cls", "name"), [(AdamE, "AdamE"), (EAdaptor, "EAdaptor(AdamW)")])
def test_a_wrong_step_ends_the_benchmark_before_anything_is_timed(
    mistake: Callable[..., None], cls: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = cls.step
    monkeypatch.setattr(cls, "step", lambda self: mistake(self, partial(right, self)))
    with pytest.raises(AssertionError, match="differs from the float64 reference"):
        optim_step.main(["--parameters", "1e4", "--only", name, "--output", str(tmp_path / "results.csv")])
    assert not list(tmp_path.iterdir())


def test_alpha_zero_is_held_against_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = next(one for one in optim_implementations.implementations() if one.name == "AdamE")
    optim_implementations.check(checked, CPU, torch.float32)
    monkeypatch.setattr(optim_implementations, "adamw", lambda params, lr: torch.optim.AdamW(params, lr))
    with pytest.raises(AssertionError, match="AdamE at alpha=0 differs from torch's AdamW"):
        optim_implementations.check(checked, CPU, torch.float32)


@pytest.mark.parametrize("name", ["AdamE", "ALTO"])
def test_the_gate_takes_bfloat16(name: str) -> None:
    checked = next(one for one in optim_implementations.implementations() if one.name == name)
    optim_implementations.check(checked, CPU, torch.bfloat16)


def test_what_cannot_be_built_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def make(params: Any, lr: float) -> Any:
        raise LeftOut("no such package")

    monkeypatch.setattr(optim_step, "implementations", lambda: [Implementation("peer", "peer", LAMB, make)])
    output = tmp_path / "results.csv"
    for model in ("transformer", "small tensors"):  # the rows of one are kept where the other is measured
        optim_step.main(["--parameters", "1e4", "--repeats", "1", "--models", model, "--output", str(output)])
    assert [(row["model"], row["note"]) for row in read_csv(output)] == [
        ("transformer", "left out: no such package"),
        ("small tensors", "left out: no such package"),
    ]
    assert "left out: peer (no such package)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "fp32", "bf16"),
    [
        ("AdamW fused", 28, 14),
        ("AdamE fused", 36, 30),
        ("EAdaptor(AdamW)", 36, 22),
        ("timm Lamb", 40, 20),
        ("ALTO fused", 48, 40),
        ("authors' ALTO", 48, 24),
    ],
)
def test_byte_floors(name: str, fp32: int, bf16: int) -> None:
    found = next(one for one in optim_implementations.implementations() if one.name == name)
    assert found.bytes_per_parameter(torch.float32) == fp32
    assert found.bytes_per_parameter(torch.bfloat16) == bf16


@pytest.mark.parametrize("floor", [14, 28, 48])
def test_a_copy_moves_the_bytes_of_its_name(floor: int) -> None:
    [copy] = optim_step.copies({floor})
    copied = copy.make([torch.nn.Parameter(torch.empty(1000))], 0.0)
    assert copied.source.nbytes + copied.target.nbytes == 1000 * floor
    assert copy.bytes_per_parameter(torch.bfloat16) == floor


def test_full_size_models() -> None:
    shapes = optim_step.transformer_shapes(100e6)
    assert len(shapes) == 150 and sum(torch.Size(s).numel() for s in shapes) == pytest.approx(100e6, rel=0.01)
    assert len(optim_step.small_shapes(100e6)) == 10_000


def about(size: int) -> Any:
    return pytest.approx(size, abs=100)  # a number that is added is a tensor for a moment


def test_extra_peak_counts_what_lives_at_once() -> None:
    start = torch.ones(10_000)
    assert extra_peak_bytes(lambda: start.add(1).mul(2).add(3), CPU) == about(80_000)  # two of three at a time
    assert extra_peak_bytes(lambda: start.mul_(1), CPU) == about(0)


def test_extra_peak_of_state_that_is_replaced() -> None:
    held = {"state": torch.ones(10_000), "other": torch.ones(10_000)}

    def replace() -> None:
        for name in held:
            held[name] = held[name] + 1

    assert extra_peak_bytes(replace, CPU) == about(40_000)  # each old one goes when its new one has come


@pytest.mark.parametrize("optimizer_class", [AdamE, ALTO])
def test_a_step_of_ours_needs_little_more_memory_than_it_holds(optimizer_class: Any) -> None:
    params = [torch.ones(3000, 1000), *(torch.ones(1000) for _ in range(200))]
    for param in params:
        param.requires_grad_().grad = torch.ones_like(param)
    optimizer = optimizer_class(params)
    optimizer.step()
    four_lists_of_a_piece = 4 * 4 * 2**19  # the parameters are 12.8 MB, and all temporaries of all at once 38 MB
    assert extra_peak_bytes(optimizer.step, CPU) < four_lists_of_a_piece


def test_rows_are_there_as_soon_as_they_are_measured() -> None:
    model = optim_step.Model("small tensors", [(8,)] * 3, CPU, torch.float32)
    wanted = [one for one in optim_implementations.implementations() if one.name in ("AdamW foreach", "AdamE")]
    contestants = [*optim_step.copies({28, 36}), *wanted]
    steps = list(optim_step.measure_model(model, contestants, repeats=2))
    assert [len(rows) for rows in steps] == [1, 2, 3, 4, 4, 4, 4, 4]
    assert [row["rounds"] for row in steps[4]] == [2, 1, 1, 1] and [row["rounds"] for row in steps[-1]] == [2] * 4


@pytest.mark.parametrize("name", ["AdamE", "ALTO"])
def test_the_row_of_the_eager_step_has_no_kernel(name: str) -> None:
    made = next(one for one in optim_implementations.implementations() if one.name == name)
    assert made.make([torch.nn.Parameter(torch.ones(2))], 0.1).param_groups[0]["fused"] is False


def test_rows_of_a_model_take_the_place_of_those_before(tmp_path: Path) -> None:
    table, columns = tmp_path / "table.csv", ["model", "name", "date"]
    reporting.write_csv(table, columns, [{"model": "a", "name": "old"}, {"model": "b", "name": "kept"}])
    rows = [{"model": "a", "name": "first"}], [{"model": "a", "name": "first"}, {"model": "a", "name": "second"}]
    assert len(reporting.report(Namespace(output=table, device="cpu"), "table", columns, rows)) == 2
    assert [row["name"] for row in reporting.read_csv(table)] == ["kept", "first", "second"]
