"""The script for a GPU, on the host: every part runs, and a kill loses nothing that was found."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest
from gpu import COLUMNS, Part, results
from reporting import read_csv

pytestmark = pytest.mark.slow
RATES, RESNET = "rates of a character GPT", "ResNet-20 at large batches"


def started(out: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, gpu.__file__, "--device", "cpu", "--tiny", "--output", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_its_parts_run(tmp_path) -> None:
    every = [part.name for part in gpu.parts("cpu", tmp_path, tiny=True)]
    elsewhere = ("capture", "large step", RATES, RESNET)  # whose scripts other tests run
    wanted = [name for name in every if not name.startswith(elsewhere)]
    process = started(tmp_path, "--only", *wanted)
    printed, _ = process.communicate(timeout=900)
    rows = {row["part"]: row for row in read_csv(tmp_path / "gpu_parts.csv")}
    assert process.returncode == 0, printed + (tmp_path / "log.txt").read_text()[-3000:]
    assert list(rows) == wanted
    assert {row["status"] for name, row in rows.items() if name != "sanitizer"} == {"passed"}
    assert all((tmp_path / name).exists() for name in ("optim_step_cpu.csv", "kernels.csv"))
    assert "skipped" in rows["correctness"]["last_line"] and "failed" not in rows["correctness"]["last_line"]


def test_a_kill_in_mid_run_loses_nothing_and_finished_runs_are_not_made_again(tmp_path) -> None:
    process = started(tmp_path, "--only", RATES, RESNET)
    table = tmp_path / "gpu_rates.csv"
    deadline = time.monotonic() + 120
    while len(read_csv(table)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=60)
    before = read_csv(table)
    assert 2 <= len(before) < 6
    process = started(tmp_path, "--only", RATES)
    process.communicate(timeout=120)
    after = read_csv(table)
    assert process.returncode == 0 and len(after) == 6 and after[: len(before)] == before


def test_a_part_that_takes_too_long_or_fails_is_named_and_the_next_one_runs(tmp_path) -> None:
    wanted = [
        Part("endless", ["-c", "import time; print('begun', flush=True); time.sleep(99)"], 2),
        Part("wrong", ["-c", "raise SystemExit('no luck')"], 20),
        Part("absent", [], 20, program="a-program-that-nobody-has"),
        Part("right", ["-c", "print('done')"], 20),
    ]
    rows = list(results(wanted, 60, tmp_path / "log.txt", "cpu"))
    assert [row["status"] for row in rows] == ["out of time", "failed", "not measured", "passed"]
    assert [row["last_line"] for row in rows] == [
        "begun",
        "no luck",
        "a-program-that-nobody-has is not installed",
        "done",
    ]
    assert set(rows[0]) <= set(COLUMNS)
    (late,) = results(wanted[3:], 0.5, tmp_path / "log.txt", "cpu")
    assert late["status"] == "not measured" and late["last_line"] == "no time was left"


def test_what_lacks_its_data_is_not_measured(tmp_path) -> None:
    found = gpu.parts("cpu", tmp_path, tiny=False, data_dir=tmp_path / "nowhere")
    (row,) = results([part for part in found if part.name == RESNET], 60, tmp_path / "log.txt", "cpu")
    assert row["status"] == "not measured" and row["last_line"].startswith("no data: ")
    assert "nowhere" in row["last_line"] and not (tmp_path / "gpu_resnet.csv").exists()


def test_a_bare_machine_needs_no_installation(tmp_path) -> None:
    """Without what an editable installation puts on the path."""
    bare = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(pytest.__file__))}
    command = [
        sys.executable,
        "-S",
        gpu.__file__,
        "--device",
        "cpu",
        "--tiny",
        "--output",
        str(tmp_path),
        "--only",
        RESNET,
    ]
    done = subprocess.run(command, env=bare, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0 and f"{RESNET}: passed" in done.stdout, done.stdout + done.stderr[-3000:]


def test_the_limits_leave_time_for_all_but_the_evidence(tmp_path) -> None:
    found = gpu.parts("cuda", tmp_path, tiny=False)
    assert [part.name for part in found][:4] == ["correctness", "sanitizer", "step", "step, small tensors"]
    assert sum(part.seconds for part in found if part.name not in (RATES, RESNET)) <= gpu.WHOLE
