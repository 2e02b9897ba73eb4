from __future__ import annotations

import math
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
        ("fabric_loop", "noise scale"),
        ("adam_e_without_lightning", "accuracy on held-out digits 0.9"),
    ],
)
def test_examples_run(tmp_path, monkeypatch, capsys, name: str, printed: str) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert printed in capsys.readouterr().out
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 40, "one screen"


@pytest.mark.filterwarnings("ignore")
def test_epsilon_is_tuned_within_its_search_space(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_epsilon.py", "--trials", "9", "--epochs", "1"])
    runpy.run_path(str(EXAMPLES / "tune_epsilon.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(index for index, line in enumerate(lines) if line[:1] == ["epsilon"])
    chosen = next(index for index, line in enumerate(lines) if line[:1] == ["best:"])
    epsilons, trials, pruned, accuracies, rates = zip(*lines[header + 1 : chosen], strict=True)
    decades = [round(math.log10(float(eps))) for eps in epsilons]
    assert decades[0] == -8  # AdamW's own
    assert len(decades) > 2 and decades[1:] == list(range(decades[1], decades[-1] + 1))
    assert min(map(int, trials)) >= 1 and sum(map(int, trials)) == 9
    assert 0 < sum(map(int, pruned)) <= 9 - len(decades)
    best = max(range(len(decades)), key=lambda index: float(accuracies[index]))
    assert lines[chosen] == ["best:", "eps", f"{epsilons[best]},", "lr", rates[best]]


@pytest.mark.slow
def test_the_demo_does_both_things(tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "demo.py")], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    frozen, rescued = next(line for line in lines if line[:1] == ["1e-08"])[1:3]
    assert float(frozen.strip("%")) < 20 and float(rescued.strip("%,")) > 90
    rates = {
        name: float(line[-3])
        for name in ("keep", "from the record", "square root", "linear", "best of 9")
        for line in lines
        if line[: len(name.split())] == name.split() and len(line) == len(name.split()) + 3
    }
    assert len(rates) == 5 and rates["keep"] < rates["from the record"] < rates["square root"] < rates["linear"]
    logs = tmp_path / "demo_logs"
    assert all((logs / picture).stat().st_size > 10_000 for picture in ("epsilon.png", "rate.png"))
    assert "gradient_magnitude_by_layer" in events(logs / "loss_times_1e-08").Tags()["images"]
    assert "calibration/epsilon_search_space" in events(logs / "loss_times_1e-08_calibrated").Tags()["images"]
    assert "noise_scale/adam" in events(logs / "batch_8").Tags()["scalars"]
    assert "noise scale (record)" in done.stderr
