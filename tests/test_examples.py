from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support import events

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.filterwarnings("ignore")  # examples show what users see; Lightning's hints are a part of it
@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("histograms", "tensorboard --logdir"),
        ("calibration", "noise scale"),
        ("recorded_run", "times the recorded one"),
        ("adam_e_without_lightning", "accuracy on held-out digits 0.9"),
    ],
)
def test_examples_run(tmp_path, monkeypatch, capsys, name: str, printed: str) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40, "one screen"


def test_the_demo_does_its_whole_job(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "noise scale (record)" in done.stdout and "tensorboard --logdir demo_logs" in done.stdout
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("AdamW", "ALTO"))]
    accuracies = [float(row[-1]) for row in rows]
    assert len(accuracies) == 2 and min(accuracies) > 0.9
    for run in ("reference", "large_batch"):
        tags = events(tmp_path / "demo_logs" / run / "version_0").Tags()
        assert "gradient_magnitude/all" in tags["histograms"]
        assert "gradient_magnitude_by_layer" in tags["images"]
    assert "calibration/report/text_summary" in tags["tensors"]
