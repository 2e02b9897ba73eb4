"""Two questions that are too large for a CPU, each resumable: ``python benchmarks/gpu_evidence.py rates|resnet``.

``rates``: a character GPT of 10 M parameters, AdamW, learning rates over batch sizes at equal samples and at equal steps,
with the noise scale along the run. ``resnet``: a ResNet-20 on Fashion-MNIST at the large batches of ALTO's paper, ALTO
beside LAMB, AdamW and AdamE, rates tuned on one seed. Every finished run is a row of the CSV, and is not run again.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from optim_implementations import LeftOut, timm_lamb
from reporting import NOT_MEASURED, RESULTS, Row, machine, read_csv, write_csv
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from training import batches, evaluate, schedule
from workloads import CONTEXT, FASHION_MNIST, GPT, WORKLOADS, Data

from lightning_gradhist import ALTO, AdamE, no_decay_groups
from lightning_gradhist.callbacks.optimizers import metric_weights
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.step import measure_part, noise_and_signal

NOISE = ["noise_scale", "noise_lower", "noise_upper"]
PAIRS = [(-5.0, 0.99), (0.5, 0.01), (-2.0, 0.9), (-5.0, 0.96), (-50.0, 0.99), (-80.0, 0.99)]
"""alpha and explore_beta: the paper's for large and small batches, and four whose slow average weighs 0.2, 0.2, 0.5, 0.8."""
_EVERY = 10  # steps between two measurements of the noise scale


@dataclass(frozen=True)
class Run:
    """What a run depends on."""

    question: str
    optimizer: str
    learning_rate: float
    batch_size: int
    steps: int
    alpha: float = 0.0
    explore_beta: float = 0.0
    seed: int = 0


SETTINGS = [field.name for field in fields(Run)]
COLUMNS = [*SETTINGS, "loss", "accuracy", *NOISE, *"date device gpu torch lightning_gradhist".split()]
Results = dict[Run, Row]


class ResNet20(nn.Module):
    """Three stages of three residual blocks, 16, 32 and 64 channels wide, batch norm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, *[width] * 3, *[2 * width] * 3, *[4 * width] * 3]
        self.stem = _convolution(1, width, 1)
        self.blocks = nn.Sequential(*(_Residual(before, after) for before, after in itertools.pairwise(widths)))
        self.head = nn.Linear(4 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, 10]`` of images ``[n, 1, height, width]``."""
        return self.head(self.blocks(self.stem(images).relu()).mean((2, 3)))


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


def make_optimizer(run: Run, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run."""
    groups, options = no_decay_groups(module, 5e-4), {"lr": run.learning_rate, "betas": (0.9, 0.99)}
    if run.optimizer == "LAMB":
        return timm_lamb()(groups, **options, eps=1e-6, always_adapt=True, max_grad_norm=None)
    if run.optimizer == "AdamW":
        return torch.optim.AdamW(groups, **options)
    ours = {"ALTO": ALTO, "AdamE": AdamE}[run.optimizer]
    return ours(groups, **options, alpha=run.alpha, explore_beta=run.explore_beta)


def train(run: Run, make_model: Callable[[], nn.Module], data: Data, device: torch.device) -> Row:
    """Trains once: warm-up over a twentieth, linear decay; and what came of it."""
    torch.manual_seed(run.seed)
    module = make_model().to(device)
    optimizer = make_optimizer(run, module)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, run.steps))
    inputs, labels = data.train.tensors
    record, generator = NoiseRecord(), torch.Generator(device).manual_seed(run.seed)
    for number, batch in enumerate(itertools.islice(batches(len(inputs), run.batch_size, generator), run.steps)):
        halves = batch.chunk(2) if number % _EVERY == 0 and run.question == "rates" else [batch]
        gradients = []
        for half in halves:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = module(inputs[half])
            loss = functional.cross_entropy(logits.float().flatten(0, -2), labels[half].flatten())
            gradients.append(torch.autograd.grad(loss, list(module.parameters())))
        for parameter, *parts in zip(module.parameters(), *gradients, strict=True):
            parameter.grad = sum(parts) / len(parts)
        if len(halves) == 2:
            record.add(number, run.batch_size, _measured(module, optimizer, gradients[0], run.batch_size))
        optimizer.step()
        scheduler.step()
    estimate = record.estimate("adam")
    noise = (estimate.value, estimate.lower, estimate.upper) if estimate.measurements else ()
    loss, accuracy = evaluate(module, data.test.tensors, len(data.test))
    return {**asdict(run), "loss": loss, "accuracy": accuracy, **dict(zip(NOISE, noise, strict=False))}


def _measured(module: nn.Module, optimizer: torch.optim.Optimizer, half: Sequence[Tensor], size: int) -> Tensor:
    """Noise and signal, from the gradient of half a batch of ``size`` samples against that of the whole."""
    parameters = dict(module.named_parameters())
    whole = {name: parameter.grad for name, parameter in parameters.items()}
    part = dict(zip(parameters, half, strict=True))
    sums = measure_part(part, whole, metric_weights(optimizer, parameters))
    return noise_and_signal(sums, 1 / size, 1 / size, size)


def rate_runs(tiny: bool) -> Iterator[Run]:
    """Batch sizes a factor of four apart, rates a factor of two, at equal samples and at equal steps."""
    sizes, samples, steps = ((16, 64), 512, 8) if tiny else ((16, 64, 256, 1024, 4096), 98_304, 256)
    rates = (1e-3, 2e-3) if tiny else tuple(2.0**-power for power in range(13, 6, -1))
    for size, rate in itertools.product(reversed(sizes), rates):
        for length in dict.fromkeys((max(1, samples // size), steps)):
            yield Run("rates", "AdamW", rate, size, length)


def resnet_runs(tiny: bool, results: Results) -> Iterator[Run]:
    """At each batch size: every optimizer at its rates with one seed, then its best one with two more."""
    sizes, samples = ((64,), 128) if tiny else ((16_384, 4096), 100 * 60_000)
    layerwise, plain = ((0.02,), (3e-3,)) if tiny else ((0.01, 0.02, 0.04, 0.08), (2e-3, 4e-3, 8e-3, 1.6e-2))
    ours = itertools.product(PAIRS[:1] if tiny else PAIRS, ("ALTO", "AdamE"))
    contestants = [("LAMB", 0.0, 0.0), ("AdamW", 0.0, 0.0), *((name, *pair) for pair, name in ours)]
    for size, (name, *pair) in itertools.product(sizes, contestants):
        rates = layerwise if name in ("LAMB", "ALTO") else plain
        tuned = [Run("resnet", name, rate, size, max(1, samples // size), *pair) for rate in rates]
        yield from tuned
        done = [run for run in tuned if run in results]
        if done:
            best = max(done, key=lambda run: results[run]["accuracy"])
            yield from (replace(best, seed=seed) for seed in (1, 2))


def run_all(wanted: Iterable[Run], results: Results, train_one: Callable[[Run], Row], output: Path, extra: Row) -> None:
    """Makes the runs that the table lacks, and writes it after each."""
    for run in (one for one in wanted if one not in results):
        try:
            results[run] = {**train_one(run), **extra}
        except LeftOut as reason:
            print(f"left out: {run.optimizer}: {reason}")
            continue
        write_csv(output, COLUMNS, results.values(), digits=None)
        print("  ".join(f"{key} {results[run][key]}" for key in (*SETTINGS[1:], "loss", "accuracy")), flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Makes the runs of one question."""
    parser = argparse.ArgumentParser(description="Evidence that takes a GPU.")
    parser.add_argument("question", choices=["rates", "resnet"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="the four idx files of Fashion-MNIST")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    output = args.output or RESULTS / "gpu" / f"gpu_{args.question}.csv"
    workload = WORKLOADS[{"rates": "gpt", "resnet": "mlp" if args.tiny else "cnn"}[args.question]]
    try:
        loaded = workload.load(args.data_dir)
    except FileNotFoundError as error:
        print(f"no data: {error}")
        sys.exit(NOT_MEASURED)
    data = on_device(loaded, device, 128 if args.tiny else None)
    results = {Run(*(row[name] for name in SETTINGS)): row for row in read_csv(output)}
    if args.question == "rates":
        make_model, wanted = partial(GPT, *((32, 1, 2) if args.tiny else (368, 6, 8))), rate_runs(args.tiny)
    else:
        make_model, wanted = partial(ResNet20, 4 if args.tiny else 16), resnet_runs(args.tiny, results)
    print(f"{args.question}: {sum(p.numel() for p in make_model().parameters()):,} parameters, context {CONTEXT}")
    run_all(wanted, results, lambda run: train(run, make_model, data, device), output, machine(device))


def on_device(data: Data, device: torch.device, samples: int | None) -> Data:
    """The data, or so many samples of it, in the memory of a device."""
    parts = (tuple(tensor[:samples].to(device) for tensor in part.tensors) for part in data)
    return Data(*(torch.utils.data.TensorDataset(*tensors) for tensors in parts))


if __name__ == "__main__":
    main()
