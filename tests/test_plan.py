"""What the record of a run says of other batch sizes, in Python and on the console."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lightning_gradhist import NoiseEstimate, batch_size_tradeoff, critical_batch_size
from lightning_gradhist.__main__ import main
from lightning_gradhist.learning_rate import choose_ratio
from lightning_gradhist.noise.run_record import OptimizerRecord, RunRecord
from lightning_gradhist.plan import plan

NOISE = NoiseEstimate(value=1000.0, lower=800.0, upper=1300.0, confidence=0.95, measurements=200)
UNBOUNDED = NoiseEstimate(value=1000.0, lower=10.0, upper=math.inf, confidence=0.95, measurements=5)


def record(noise: NoiseEstimate | None = NOISE, optimizers: int = 1) -> RunRecord:
    entry = OptimizerRecord("AdamW", [1e-3, 1e-2], 64.0, {} if noise is None else {"adam": noise}, [], ["w"])
    return RunRecord({"w": [3]}, 10_000, [entry] * optimizers)


def test_rows_are_the_law_and_the_tradeoff() -> None:
    (found,) = plan(record(), [32, 64, 256])
    assert [row.batch_size for row in found.rows] == [32, 64, 256]
    for row in found.rows:
        ratio = choose_ratio("surge", row.batch_size, 64, NOISE, from_record=True)
        assert row.ratio == ratio and row.learning_rates == (1e-3 * ratio.value, 1e-2 * ratio.value)
        (needs,) = batch_size_tradeoff(critical_batch_size(NOISE), 64, [row.batch_size / 64])
        assert row.steps is not None and row.samples is not None
        assert row.steps.value == pytest.approx(10_000 * needs.steps.value)
        assert row.samples.upper == pytest.approx(640_000 * needs.samples.upper)
        assert row.samples.value == pytest.approx(row.steps.value * row.batch_size)
    same = found.rows[1]
    assert same.ratio.value == 1 and same.steps is not None and same.steps.lower == same.steps.upper == 10_000


def test_steps_are_those_of_the_run_that_is_planned() -> None:
    (short,), (long,) = plan(record(), [256], steps=100), plan(record(), [256], steps=1000)
    assert short.rows[0].steps is not None and long.rows[0].steps is not None
    assert long.rows[0].steps.value == pytest.approx(10 * short.rows[0].steps.value)
    assert short.rows[0].learning_rates == long.rows[0].learning_rates


@pytest.mark.parametrize("noise", [None, UNBOUNDED], ids=["no noise scale", "no upper bound"])
def test_what_the_record_does_not_support_is_refused_with_the_reason(noise: NoiseEstimate | None) -> None:
    (found,) = plan(record(noise), [256])
    (row,) = found.rows
    assert row.learning_rates == (1e-3, 1e-2) and row.ratio.law == "keep" and "refused" in row.ratio.reasons[0]
    assert row.steps is row.samples is found.critical is None and row.is_refused
    assert "refused" in found.to_text().splitlines()[-4] and "  - 256 samples: surge law refused" in found.to_text()
    assert "steps and samples are not known" in found.to_text() and "not known" in found.to_text().splitlines()[-4]


@pytest.mark.parametrize(
    ("batch_sizes", "steps", "named"),
    [([], None, "batch_sizes"), ([0], None, "batch_sizes"), ([math.inf], None, "batch_sizes"), ([8], 0, "steps")],
)
def test_values_out_of_range_are_named(batch_sizes: list[float], steps: int | None, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} must"):
        plan(record(), batch_sizes, steps)


def test_the_command_prints_a_table_json_and_a_figure(tmp_path, capsys) -> None:
    path = tmp_path / "calibration.json"
    record(optimizers=2).save(path)
    assert main(["plan", str(path), "--batch-size", "256", "2048", "--save", str(tmp_path / "plan.png")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("AdamW, recorded at 64 samples a step") == 2 and "2,048" in printed
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    assert main(["plan", str(path), "--batch-size", "256", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    (expected, _) = plan(RunRecord.load(path), [256])
    assert content[0] == expected.to_json() and content[0]["rows"][0]["learning_rates"] == list(
        expected.rows[0].learning_rates
    )


def test_json_has_no_infinity() -> None:
    (found,) = plan(record(UNBOUNDED), [256])
    text = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(text)["noise"]["upper"] is None


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.json", "--batch-size", "8"], "does not exist"),
        (["calibration.json", "--batch-size", "-8"], "batch_sizes must be positive, got -8"),
        (["calibration.json", "--batch-size", "8", "--save", "plan.nonsense"], "nonsense"),
        (["none.json", "--batch-size", "8"], "the record is of a run without a step; give steps"),
    ],
)
def test_bad_input_ends_with_a_message_and_status_2(tmp_path, monkeypatch, capsys, arguments, says) -> None:
    monkeypatch.chdir(tmp_path)
    record().save("calibration.json")
    replace(record(), steps=0).save("none.json")
    assert main(["plan", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path) -> None:
    record().save(tmp_path / "calibration.json")
    command = [sys.executable, "-m", "lightning_gradhist", "plan", "calibration.json", "--batch-size", "256"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "noise scale 1,000 samples, 95%: 800 to 1,300" in done.stdout, done.stderr


def test_who_reads_its_output_may_stop(tmp_path) -> None:
    record().save(tmp_path / "calibration.json")
    command = [sys.executable, "-m", "lightning_gradhist", "plan", "calibration.json", "--batch-size", "256"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
