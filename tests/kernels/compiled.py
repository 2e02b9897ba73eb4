"""Compiles every kernel for GPUs that need not be there, as a launch on them would: run as a script, prints JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.kernels import StepScalars, StepTensors

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KERNELS = ("adam_e_kernel", "alto_moments_kernel", "alto_apply_kernel")
SIZES = (4096, 31)


def scalars(k: int = 3, lr: float = 0.01, beta1: float = 0.9, **changes: Any) -> StepScalars:
    corrections = 1.0 - beta1**k, 1.0 - 0.999**k
    numbers = StepScalars(lr, -0.05, 0.99, beta1, 0.999, float(k), *corrections, 1e-6, 0.1, maximize=False)
    return numbers._replace(**changes)


def on_device(numbers: StepScalars) -> StepScalars:
    """As with ``capturable``: what changes from step to step is on the device, and differs between tensors."""
    names = ("step", "bias_correction1", "bias_correction2")
    values = {name: [torch.tensor(getattr(numbers, name)) for _ in SIZES] for name in names}
    return numbers._replace(lr=torch.tensor(numbers.lr), **values)  # type: ignore[arg-type]


HOST = {"s": scalars(), "decoupled": True, "ratios": torch.ones(len(SIZES))}
DEVICE = {"s": on_device(scalars(maximize=True, weight_decay=0.0)), "decoupled": True, "ratios": None}


def variants() -> dict[str, tuple[str, str, str, dict[str, Any]]]:
    """Kernel, dtype, target and options by name."""
    chosen = {}
    for target in TARGETS:
        for kernel in KERNELS:
            for dtype in DTYPES if target == "sm_90" else ("fp32", "bf16"):
                chosen[f"{kernel}-{dtype}-{target}"] = (kernel, dtype, target, HOST)
        chosen[f"sum_chunks_kernel-fp32-{target}"] = ("sum_chunks_kernel", "fp32", target, HOST)
        for dtype in DTYPES if target == "sm_90" else ("fp32", "bf16"):
            chosen[f"count_kernel-{dtype}-{target}"] = ("count_kernel", dtype, target, {})
    for kernel in KERNELS:
        chosen[f"{kernel}-fp32-sm_90-device_scalars"] = (kernel, "fp32", "sm_90", DEVICE)
        chosen[f"{kernel}-bf16-sm_90-bf16_state"] = (kernel, "bf16", "sm_90", {**HOST, "state": torch.bfloat16})
    chosen["adam_e_kernel-fp32-sm_90-coupled"] = ("adam_e_kernel", "fp32", "sm_90", {**HOST, "decoupled": False})
    return chosen


class Gpus:
    """In the place of Triton's driver: tells it of a device, on which nothing can be launched."""

    def __init__(self) -> None:
        self.target = next(iter(TARGETS))

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])


class Compiler:
    """Lets the launchers take tensors on the CPU and compile for a GPU, and keeps what they have compiled."""

    def __init__(self) -> None:
        from triton import JITFunction
        from triton.runtime import driver

        from lightning_gradhist.kernels import _chunks, _launch, histogram

        self.gpus, self.kernels = Gpus(), {}
        self.options, self.histogram, self.window = (_launch.OPTIONS, histogram.LAUNCH), histogram, histogram.WINDOW
        self.warps = [options["num_warps"] for options in self.options]
        driver.set_active(self.gpus)
        _launch.DEVICE_TYPE = histogram.DEVICE_TYPE = "cpu"  # what tells the launchers where they are
        assert not _chunks.INTERPRETED
        JITFunction.__getitem__ = lambda kernel, grid: partial(self.compile, kernel, grid)

    def compile(self, kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        self.kernels[kernel.__name__] = kernel, kernel.run(*args, grid=grid, warmup=True, **options)

    def to(self, target: str) -> None:
        self.gpus.target = target
        for options, warps in zip(self.options, self.warps, strict=True):
            options["num_warps"] = warps // 2 if target == "gfx942" else warps  # as on a machine with such a GPU
        self.histogram.WINDOW = 256 if target == "gfx942" else self.window


def launch(dtype: str, s: StepScalars, decoupled: bool, ratios: Tensor | None, state: Any = torch.float32) -> None:
    from lightning_gradhist.kernels.adam_e import adam_e_step
    from lightning_gradhist.kernels.alto import alto_apply, alto_moments

    dtypes = (DTYPES[dtype], DTYPES[dtype], state, state, state)
    tensors = StepTensors(*([torch.zeros(size, dtype=each) for size in SIZES] for each in dtypes))
    adam_e_step(tensors, s, decoupled_weight_decay=decoupled)
    alto_moments(tensors, s)
    alto_apply(tensors, s, ratios)


def launch_histogram(dtype: str) -> None:
    from lightning_gradhist.histogram import COLUMNS
    from lightning_gradhist.kernels.histogram import add_magnitudes

    add_magnitudes(torch.zeros(3, COLUMNS, dtype=torch.int64), [1], [torch.zeros(SIZES[0], dtype=DTYPES[dtype])])


def compiled(compiler: Compiler, name: str, dtype: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    compiler.to(target)
    if name == "count_kernel":
        launch_histogram(dtype)
    else:
        launch(dtype, **options)
    _, result = compiler.kernels[name]
    if "ptx" in result.asm:
        of_target = {**_of_cubin(result.asm["cubin"]), **_of_ptx(result.asm["ptx"])}
    else:
        of_target = _of_amdgcn(result.asm["amdgcn"])
    return {**of_target, "shared_bytes": result.metadata.shared, "window": compiler.histogram.WINDOW}


def compilations(compiler: Compiler) -> dict[str, int]:
    """How often each kernel is compiled for steps whose numbers change, on the host and on the device."""

    def added(launch_all: Callable[[], None]) -> dict[str, int]:
        before = {name: _compiled_for(kernel, compiler.gpus) for name, (kernel, _) in compiler.kernels.items()}
        launch_all()
        after = {name: _compiled_for(kernel, compiler.gpus) for name, (kernel, _) in compiler.kernels.items()}
        return {name: count - before[name] for name, count in after.items()}

    def steps(make: Callable[[StepScalars], StepScalars]) -> None:
        for k, lr, beta1 in ((1, 0.01, 0.9), (2, 1.0, 0.5), (16, 2.0, 0.0), (17, 16.0, 0.99)):
            for changes in ({}, {"mix": 1.0}, {"mix": 0.0}, {"eps": 1.0}, {"explore_beta": 0.0}, {"weight_decay": 1.0}):
                s = scalars(k, lr, beta1, **changes)
                launch("fp32", make(s), True, torch.ones(len(SIZES)))

    compiler.to("sm_90")
    launch("fp32", scalars(), True, torch.ones(len(SIZES)))
    launch("fp32", on_device(scalars()), True, torch.ones(len(SIZES)))
    counts = {"host": added(lambda: steps(lambda s: s)), "device": added(lambda: steps(on_device))}
    return {f"{name}-{where}": count for where, found in counts.items() for name, count in found.items()}


def _compiled_for(kernel: Any, gpus: Gpus) -> int:
    return len(kernel.device_caches[gpus.get_current_device()][0])


def _of_cubin(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": usage["REG"], "local_bytes": usage["STACK"] + usage["LOCAL"]}


def _of_ptx(ptx: str) -> dict[str, Any]:
    accesses: dict[str, int] = {}
    for access in re.findall(r"(?:ld|st)\.global[\w.:]*", ptx):
        accesses[access] = accesses.get(access, 0) + 1
    return {
        "accesses": accesses,
        "fused": len(re.findall(r"\bfma\.rn", ptx)),
        "rounded_to_bf16": "cvt.rn.bf16" in ptx,
        "shared_atomics": len(re.findall(r"(?:atom|red)\.[\w.]*shared[\w.]*add\.u32", ptx)),
        "global_atomics": len(re.findall(r"(?:atom|red)\.global[\w.]*add\.u64", ptx)),
    }


def _of_amdgcn(text: str) -> dict[str, Any]:
    """What the assembler notes at the end, and how memory is accessed."""
    spilled = sum(int(n) for n in re.findall(r"\.vgpr_spill_count:\s+(\d+)", text))  # scalars spill to registers
    registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s+(\d+)", text))
    private = max(int(n) for n in re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text))
    accesses: dict[str, int] = {}
    for access in re.findall(r"(?:buffer|global|flat)_(?:load|store)_\w+", text):  # not those of scalars, s_load
        accesses[access] = accesses.get(access, 0) + 1
    return {"registers": registers, "local_bytes": private + spilled, "accesses": accesses}


if __name__ == "__main__":
    the_compiler = Compiler()
    found = {name: compiled(the_compiler, *variant) for name, variant in variants().items()}
    print(json.dumps({"variants": found, "compilations": compilations(the_compiler)}))
