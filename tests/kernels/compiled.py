"""Compiles every kernel for GPUs that need not be there: run as a script, prints JSON."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from typing import Any

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = {"fp32": ("float32", "float32"), "bf16": ("bfloat16", "bfloat16"), "fp16": ("float16", "float16")}
KERNELS = ("adam_e_kernel", "alto_moments_kernel", "alto_apply_kernel")
POINTERS = {
    "chunks": "*i32",
    "extents": "*i64",
    "pointers": "*i64",
    "sums": "*fp32",
    "ratios": "*fp32",
    "squared_norms": "*fp32",
}
HOST = {
    "LR_ON_DEVICE": False,
    "STEPS_ON_DEVICE": False,
    "STEP_ON_DEVICE": False,
    "HAS_RATIOS": True,
    "MAXIMIZE": False,
    "DECAY": 2,
}
DEVICE = {
    "LR_ON_DEVICE": True,
    "STEPS_ON_DEVICE": True,
    "STEP_ON_DEVICE": True,
    "HAS_RATIOS": False,
    "MAXIMIZE": True,
    "DECAY": 0,
}


COUNTED = (("fp32", 8), ("bf16", 8), ("fp32", 128))
"""Dtype and bins an octave of the histograms."""


def variants() -> dict[str, tuple[str, str, str, dict[str, Any]]]:
    """Kernel, dtype, target and options by name."""
    chosen = {}
    for target in TARGETS:
        for kernel in KERNELS:
            for dtype in DTYPES if target == "sm_90" else ("fp32", "bf16"):
                chosen[f"{kernel}-{dtype}-{target}"] = (kernel, dtype, target, HOST)
        chosen[f"sum_chunks_kernel-fp32-{target}"] = ("sum_chunks_kernel", "fp32", target, HOST)
        for dtype, bins in COUNTED:
            chosen[f"count_kernel-{dtype}-{target}-{bins}"] = ("count_kernel", dtype, target, {"BINS_PER_OCTAVE": bins})
    chosen["count_kernel-fp16-sm_90-1"] = ("count_kernel", "fp16", "sm_90", {"BINS_PER_OCTAVE": 1})
    for kernel in KERNELS:
        chosen[f"{kernel}-fp32-sm_90-device_scalars"] = (kernel, "fp32", "sm_90", DEVICE)
        chosen[f"{kernel}-bf16-sm_90-bf16_state"] = (kernel, "bf16", "sm_90", {**HOST, "STATE": "bfloat16"})
    chosen["adam_e_kernel-fp32-sm_90-coupled"] = ("adam_e_kernel", "fp32", "sm_90", {**HOST, "DECAY": 1})
    return chosen


def compiled(name: str, dtype: str, target: str, options: dict[str, Any]) -> dict[str, Any]:
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lightning_gradhist.kernels import _launch, _tables, adam_e, alto, histogram

    kernel = next(getattr(module, name) for module in (adam_e, alto, histogram) if hasattr(module, name))
    param, grad = (getattr(tl, each) for each in DTYPES[dtype])
    sizes = {"ALIGNMENT": _tables.ALIGNMENT, "CHUNK": _tables.CHUNK, "BLOCK": _launch.BLOCK}
    state = getattr(tl, options.get("STATE", "float32"))
    warps = _launch.OPTIONS["num_warps"]
    if name == "count_kernel":
        sizes, warps = histogram.sizes(options["BINS_PER_OCTAVE"]), histogram.WARPS
    constants = {**options, **sizes, "PARAM": param, "GRAD": grad, "STATE": state, "DTYPE": grad}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    pointers = dict(POINTERS)
    if options.get("LR_ON_DEVICE"):
        pointers |= {"lr": "*fp32", "unbias1": "*fp32", "unbias2": "*fp32"}
    signature = {key: "constexpr" if key in constants else pointers.get(key, "fp32") for key in kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, key in enumerate(kernel.arg_names) if key in POINTERS}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    launch = {**_launch.OPTIONS, "num_warps": warps // 2 if target == "gfx942" else warps}
    result = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=launch)
    if "ptx" in result.asm:
        of_target = {**_of_cubin(result.asm["cubin"], triton), **_of_ptx(result.asm["ptx"])}
    else:
        of_target = _of_amdgcn(result.asm["amdgcn"])
    return {**of_target, "shared_bytes": result.metadata.shared}


def _of_cubin(cubin: bytes, triton: Any) -> dict[str, int]:
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
    print(json.dumps({name: compiled(*variant) for name, variant in variants().items()}))
