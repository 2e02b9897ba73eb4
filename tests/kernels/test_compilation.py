"""The kernels compiled ahead of time: for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kernels.compiled import TARGETS, variants

from lightning_gradhist.kernels import available

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="Triton is not installed"),
    pytest.mark.xdist_group("compiled kernels"),
]

# Of a full chunk, by kernel: loads and stores of 128 bits where the parameters are fp32; of fp16 and bf16 they are 64.
WIDE = {"adam_e_kernel": (5, 4), "alto_moments_kernel": (5, 3), "alto_apply_kernel": (3, 1)}
HALF = {"adam_e_kernel": (2, 1), "alto_moments_kernel": (2, 0), "alto_apply_kernel": (1, 1)}
REGISTERS = 80  # of 65,536: six programs of 128 threads on a multiprocessor, 60 kB of loads in flight
COUNT_REGISTERS = {2048: 64, 256: 128}
"""By the window: two programs of 512 threads count at a time, or one where Triton counts by ballots, and 256 bins."""
ACCESSES = {
    "cuda": ("ld.global.v4.b32", "st.global.v4.b32", "ld.global.v2.b32", "st.global.v2.b32"),
    "hip": ("buffer_load_dwordx4", "buffer_store_dwordx4", "buffer_load_dwordx2", "buffer_store_dwordx2"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", str(Path(__file__).with_name("compiled.py"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results(found: dict[str, Any]) -> dict[str, Any]:
    for name, result in found["variants"].items():
        print(f"{name}: {result['registers']} registers, {result['local_bytes']} bytes spilled")
    return found["variants"]


@pytest.mark.parametrize("variant", variants())
def test_no_spills(variant: str, results: dict[str, Any]) -> None:
    result = results[variant]
    assert result["local_bytes"] == 0
    limit = COUNT_REGISTERS[result["window"]] if variant.startswith("count") else REGISTERS
    assert result["registers"] <= limit


@pytest.mark.parametrize("variant", [name for name in variants() if not name.startswith(("sum_chunks", "count"))])
def test_full_chunks_are_read_and_written_in_wide_accesses(variant: str, results: dict[str, Any]) -> None:
    kernel, dtype, target = variant.split("-")[:3]
    narrow = (0, 0) if dtype == "fp32" else WIDE[kernel] if variant.endswith("bf16_state") else HALF[kernel]
    wide = tuple(all_of - of_half for all_of, of_half in zip(WIDE[kernel], narrow, strict=True))
    names = ACCESSES[TARGETS[target][0]]
    accesses = results[variant]["accesses"]
    found = [accesses.get(name, 0) for name in names]
    unrolled = max(1, sum(found) // sum((*wide, *narrow)))  # where the compiler makes all blocks of a chunk at once
    assert found == [unrolled * count for count in (*wide, *narrow)]


@pytest.mark.parametrize("variant", [name for name in variants() if "-sm_" in name])
def test_nothing_is_fused(variant: str, results: dict[str, Any]) -> None:
    """Products and sums are rounded one by one, as in the eager step, whatever Triton's default is."""
    assert results[variant]["fused"] == 0


@pytest.mark.parametrize("kernel", ["adam_e_kernel", "alto_apply_kernel"])
def test_parameters_in_bf16_are_rounded_to_the_nearest(kernel: str, results: dict[str, Any]) -> None:
    assert results[f"{kernel}-bf16-sm_90"]["rounded_to_bf16"]


COUNTS = [name for name in variants() if name.startswith("count")]


@pytest.mark.parametrize("variant", COUNTS)
def test_a_full_chunk_is_counted_from_loads_of_128_bits(variant: str, results: dict[str, Any]) -> None:
    _, dtype, target = variant.split("-")
    name = ACCESSES[TARGETS[target][0]][0]
    assert results[variant]["accesses"][name] % (8 if dtype == "fp32" else 4) == 0  # 32 elements a thread


@pytest.mark.parametrize("variant", COUNTS)
def test_counts_are_private_to_a_program(variant: str, results: dict[str, Any]) -> None:
    result = results[variant]
    assert result["shared_bytes"] == 4 * result["window"]
    if result["window"] == 2048:  # the compiler may give full and other chunks one count
        assert result["shared_atomics"] in (32, 64) and result["global_atomics"] == result["shared_atomics"] // 8


def test_numbers_that_change_with_the_step_do_not_compile_again(found: dict[str, Any]) -> None:
    """Nor do those that a scheduler or a user changes: on the host, and with ``capturable`` on the device."""
    counts = found["compilations"]
    assert {f"{kernel}-{where}" for kernel in WIDE for where in ("host", "device")} <= counts.keys()
    assert not any(counts.values()), counts
