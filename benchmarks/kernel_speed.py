"""Time on the device of the Triton kernels alone, without the host's part of a step: ``python benchmarks/kernel_speed.py``.

Counting is held against a read of as many bytes (``Tensor.sum``) and checked against torch's ``bincount``; the steps against a
copy that moves as many bytes, and torch's fused AdamW.
"""

import argparse
import os
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from measuring import seconds_per_call
from optim_implementations import implementations
from optim_step import GRADIENT, LR, Model, copy, transformer_shapes
from reporting import RESULTS, Row, machine, print_table, write_csv
from torch import Tensor

from lightning_gradhist.histogram import COLUMNS, _columns
from lightning_gradhist.kernels import StepScalars, StepTensors

SHOWN = "kernel dtype data microseconds floor_bytes share_of_read share_of_copy ratio_to_adamw_fused".split()
COLUMNS_OF_CSV = [*SHOWN, *"date device gpu torch triton lightning_gradhist note".split()]
CALLS, ROUNDS = {"cpu": 1, "cuda": 10}, {"cpu": 1, "cuda": 5}
SIZE, PARAMETERS = {"cpu": 2**26, "cuda": 2**29}, {"cpu": 100e6, "cuda": 400e6}
"""So many on a GPU that the host, which takes up to 0.3 ms for a call, is not what is measured."""
SCALARS = StepScalars(LR, -0.05, 0.99, 0.9, 0.999, 3.0, 0.271, 0.002997, 1e-6, 0.01, maximize=False)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """The fastest of some rounds of calls, the first of which warms up."""
    kind = device.type
    return min(seconds_per_call(function, CALLS[kind], device) for _ in range(ROUNDS[kind]))


def data(name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Values to count: as gradients are, half of them zero, all of one magnitude, or any bits at all."""
    generator = torch.Generator(device).manual_seed(0)
    if name == "any bits":
        bits = torch.randint(-(2**31), 2**31, (size,), generator=generator, device=device)
        return bits.to(torch.int32).view(torch.float32).to(dtype)
    values = 1e-4 * torch.randn(size, generator=generator, device=device)
    if name == "half zeros":
        values[::2] = 0
    if name == "one magnitude":
        values.fill_(3e-5)
    return values.to(dtype)


def counting(size: int, device: torch.device) -> Iterator[Row]:
    from lightning_gradhist.kernels.histogram import add_magnitudes

    for dtype in (torch.float32, torch.bfloat16):
        for name in ("normal", "half zeros", "one magnitude", "any bits"):
            values = data(name, size, dtype, device)
            table = torch.zeros(1, COLUMNS, dtype=torch.int64, device=device)
            count = partial(add_magnitudes, table, [0], [values])
            count()
            expected = torch.bincount(_columns(values).long(), minlength=COLUMNS)
            assert torch.equal(table[0], expected), f"{dtype}, {name}: the counts differ from torch's"
            mine = seconds(count, device)
            of_kernel = {"kernel": "count", "dtype": str(dtype)[6:], "data": name, "floor_bytes": values.nbytes}
            yield {**of_kernel, "microseconds": 1e6 * mine, "share_of_read": seconds(values.sum, device) / mine}


def stepping(size: float, device: torch.device) -> Iterator[Row]:
    """The kernels of AdamE and ALTO; AdamW is torch's."""
    from lightning_gradhist.kernels.adam_e import adam_e_step
    from lightning_gradhist.kernels.alto import alto_apply, alto_moments

    shapes = transformer_shapes(size)[: None if device.type == "cuda" else 12]  # the interpreter takes its time
    fused = next(one for one in implementations() if one.name == "AdamW fused")
    for dtype in (torch.float32, torch.bfloat16):
        model = Model("transformer", shapes, device, dtype)
        params = model.params
        adamw = seconds(model.build(fused).step, device)
        e, m, v = ([GRADIENT * torch.randn(p.shape, device=device) for p in params] for _ in range(3))
        tensors = StepTensors([p.detach() for p in params], model.grads, e, m, [tensor.square() for tensor in v])
        ratios = torch.ones(len(params), device=device)

        def alto(tensors: StepTensors = tensors, ratios: Tensor = ratios) -> None:
            alto_moments(tensors, SCALARS)
            alto_apply(tensors, SCALARS, ratios)

        adam_e = partial(adam_e_step, tensors, SCALARS, decoupled_weight_decay=True)
        for name, step, floor in (("AdamE", adam_e, 3 * dtype.itemsize + 24), ("ALTO", alto, 4 * dtype.itemsize + 32)):
            step()
            mine, copied = seconds(step, device), seconds(copy(params, LR, floor).step, device)
            of_kernel = {"kernel": name, "dtype": str(dtype)[6:], "floor_bytes": floor * sum(p.numel() for p in params)}
            shares = {"share_of_copy": copied / mine, "ratio_to_adamw_fused": mine / adamw}
            yield {**of_kernel, "microseconds": 1e6 * mine, **shares}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time on the device of the Triton kernels alone.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--size", type=int, help="values that are counted (default: 2**26, on a GPU 2**29)")
    parser.add_argument("--parameters", type=float, help="that are stepped (default: 100e6, on a GPU 400e6)")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu" / "kernels.csv")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # which shows that it runs, and measures nothing
    rows: list[Row] = []
    measured = counting(args.size or SIZE[args.device], device)
    for row in chain(measured, stepping(args.parameters or PARAMETERS[args.device], device)):
        rows.append({**row, **machine(device, "triton")})
        write_csv(args.output, COLUMNS_OF_CSV, rows)
    print_table(rows, SHOWN)


if __name__ == "__main__":
    main()
