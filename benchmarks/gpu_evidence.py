"""Two questions that are too large for a CPU, each resumable: ``python benchmarks/gpu_evidence.py rates|resnet``.

``rates``: a character GPT of 10 M parameters, AdamW, learning rates over batch sizes at equal samples and at equal steps,
with the noise scale along the run. ``resnet``: a ResNet-20 on Fashion-MNIST at the large batches of ALTO's paper, ALTO
beside Lamb, AdamW and AdamE, compared as the claims of the grid are. Every finished run is a row of the CSV, and is not run
again.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grid import CLAIMS_COLUMNS, COLUMNS, Results, Setting, claims, keep, read
from optim_implementations import BETAS, LeftOut, timm_lamb
from reporting import NOT_MEASURED, RESULTS, machine
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from training import EPS, OPTIMIZERS, UNCLIPPED, Run, train
from workloads import FASHION_MNIST, GPT, WORKLOADS, Data, Workload

from lightning_gradhist import ALTO, AdamE

PAIRS = [(-5.0, 0.99), (0.5, 0.01), (-2.0, 0.9), (-5.0, 0.96), (-50.0, 0.99), (-80.0, 0.99)]
"""alpha and explore_beta: the paper's for large and small batches, and four whose slow average weighs 0.2, 0.2, 0.5, 0.8."""


def resnet20(width: int = 16) -> nn.Module:
    """Three stages of three residual blocks, 16, 32 and 64 channels wide, batch norm."""
    widths = [width, *[width] * 3, *[2 * width] * 3, *[4 * width] * 3]
    blocks = [_Residual(before, after) for before, after in itertools.pairwise(widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    return nn.Sequential(_convolution(1, width, 1), nn.ReLU(), *blocks, *head)


class _Residual(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        stride = 2 if after > before else 1
        self.first, self.second = _convolution(before, after, stride), _convolution(after, after, 1)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.shortcut(x) + self.second(self.first(x).relu())).relu()


def _convolution(before: int, after: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after))


def decayed(params: Iterable[nn.Parameter], make: Callable[..., Any], **options: Any) -> torch.optim.Optimizer:
    """An optimizer whose weights decay, but for biases and norms."""
    every = list(params)
    kinds = {5e-4: [param for param in every if param.ndim > 1], 0.0: [param for param in every if param.ndim <= 1]}
    groups = [{"params": own, "weight_decay": decay} for decay, own in kinds.items()]
    return make(groups, betas=BETAS, **options)


def contestants(pairs: list[tuple[float, float]]) -> tuple[str, ...]:
    """The optimizers that are compared, made known to :mod:`training` by name."""
    found = {"AdamW decayed": partial(decayed, make=torch.optim.AdamW)}
    for (alpha, beta), ours in itertools.product(pairs, (ALTO, AdamE)):
        found[f"{ours.__name__} {alpha:g} {beta:g}"] = partial(decayed, make=ours, alpha=alpha, explore_beta=beta)
    try:
        found["Lamb decayed"] = partial(decayed, make=timm_lamb(), **UNCLIPPED)
    except LeftOut as reason:
        print(f"left out: Lamb: {reason}")
    OPTIMIZERS.update(found)
    EPS.update({name: EPS[name.split()[0]] for name in found})
    return tuple(found)


def rate_runs(results: Results, tiny: bool) -> Iterator[Run]:
    """Batch sizes a factor of four apart, rates a factor of two, at equal samples and at equal steps."""
    sizes, samples, steps = ((16, 64), 512, 8) if tiny else ((16, 64, 256, 1024, 4096), 98_304, 256)
    rates = (1e-3, 2e-3) if tiny else tuple(2.0**-power for power in range(13, 6, -1))
    for size, rate in itertools.product(reversed(sizes), rates):
        runs = (Run("rates", "AdamW", size, rate, EPS["AdamW"], 0, n, noise=True) for n in (samples, steps * size))
        yield from (run for run in dict.fromkeys(runs) if run not in results)


def of_size(workload: Workload, samples: int | None, device: torch.device, **more: Any) -> Workload:
    """A workload with another model, and so many samples of its data, in the memory of a device."""

    def load(folder: Path) -> Data:
        parts = (tuple(tensor[:samples].to(device) for tensor in part.tensors) for part in workload.load(folder))
        return Data(*(TensorDataset(*tensors) for tensors in parts))

    return replace(workload, load=load, **more)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Evidence that takes a GPU.")
    parser.add_argument("question", choices=["rates", "resnet"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="the four idx files of Fashion-MNIST")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    device, tiny = torch.device(args.device), args.tiny
    torch.set_float32_matmul_precision("high")  # TF32
    output = args.output or RESULTS / "gpu" / f"gpu_{args.question}.csv"
    if args.question == "rates":
        workload, columns = WORKLOADS["gpt"], COLUMNS[1:]
        model, wanted = partial(GPT, *((32, 1, 2) if tiny else (368, 6, 8))), partial(rate_runs, tiny=tiny)
    else:
        workload, columns = WORKLOADS["mlp" if tiny else "cnn"], CLAIMS_COLUMNS
        names, sizes = contestants(PAIRS[: 1 if tiny else None]), (64,) if tiny else (16_384, 4096)
        settings = [Setting("resnet", size, 2 if tiny else 6_000_000 // size, names) for size in sizes]
        model, wanted = partial(resnet20, 4 if tiny else 16), partial(claims, settings)
    WORKLOADS[args.question] = of_size(workload, 128 if tiny else None, device, make_model=model)
    results = read(output)
    try:
        while runs := list(wanted(results=results)):
            for run in runs:
                row = train(run, args.data_dir, device, for_claim=args.question == "resnet")
                keep(output, [*columns, "device", "gpu"], results, {**row, **machine(device, "timm")}, args.question)
            if tiny:
                break
    except FileNotFoundError as error:
        print(f"no data: {error}")
        sys.exit(NOT_MEASURED)


if __name__ == "__main__":
    main()
