"""The kernels against the eager steps, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.interpreted import CASES

from lightning_gradhist.kernels import available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="Triton is not installed"),
    pytest.mark.xdist_group("interpreted kernels"),
]


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    # what is ignored is of the interpreter of Triton 3.6
    command = [sys.executable, "-W", "error", "-W", "ignore:Conversion of an array", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_case(case: str, results: dict[str, str]) -> None:
    assert not results[case], results[case]


def test_without_the_interpreter_cpu_tensors_are_refused() -> None:
    code = """if True:
        import torch
        from lightning_gradhist.kernels.adam_e import adam_e_step
        from lightning_gradhist.kernels import StepTensors
        from kernels.interpreted import PLAIN
        tensors = StepTensors(*([torch.zeros(3)] for _ in range(5)))
        try:
            adam_e_step(tensors, PLAIN, decoupled_weight_decay=True)
        except ValueError as error:
            print(error)
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "the kernels run on CUDA devices" in done.stdout


def test_a_histogram_is_counted_where_its_kernel_fails() -> None:
    code = """if True:
        import os, warnings
        import torch
        import lightning_gradhist.kernels.histogram  # compiled, not interpreted: refuses the CPU
        from lightning_gradhist.histogram import MagnitudeHistogram
        os.environ["TRITON_INTERPRET"] = "1"
        histogram = MagnitudeHistogram(["x"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                histogram.update({"x": torch.ones(3)})
        print(histogram.total().tolist(), *[warning.message for warning in caught])
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[6] ") and done.stdout.count("histograms are counted without") == 1


def test_importing_the_package_does_not_import_triton() -> None:
    code = "import sys, lightning_gradhist.kernels as k; k.available(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_histogram_is_counted_by_torch_where_its_kernel_counts_otherwise(dtype: str) -> None:
    code = f"""if True:
        import warnings
        import torch
        from lightning_gradhist.histogram import MagnitudeHistogram
        from lightning_gradhist.kernels import histogram as kernel

        right = kernel.add_magnitudes

        def wrong(table, rows, tensors):
            right(table, rows, tensors)
            if tensors[0].dtype == torch.{dtype}:
                table[1, 0] += 1  # one value of one tensor

        kernel.add_magnitudes = wrong
        histogram = MagnitudeHistogram(["x", "y"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", "Conversion of an array")  # Triton 3.6's own
            for _ in range(2):
                histogram.update({{"x": torch.ones(3), "y": torch.ones(3, dtype=torch.{dtype})}})
        print(histogram.total().tolist(), histogram.zeros.tolist(), *(one.message for one in caught))
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = f"histograms are counted without their Triton kernel, which counts torch.{dtype} otherwise than torch"
    assert done.stdout.strip() == f"[6, 6] [0, 0] {said}"
