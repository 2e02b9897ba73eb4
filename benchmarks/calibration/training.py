"""One training run as a function of its settings: the same settings give the same numbers, bit for bit."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from optim_implementations import BETAS, EXPLORE, timm_lamb
from reporting import CPU, Row
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from workloads import FASHION_MNIST, WORKLOADS, Data

from lightning_gradhist import ALTO, AdamE, NoiseScale

NOISE_GRADIENTS = 32
"""Independent gradients of one measurement of the noise scale, half of them in each of its halves."""
_WARM_UP, _MOMENTS = 0.05, 12
_EVALUATED, _EVALUATED_ON_THE_WAY, _AT_ONCE = 2048, 512, 512
# Without weight decay, but for AdamW's 0.01. ALTO and Lamb share their moments, as Adam and AdamE do, so that each pair
# differs by E alone. timm's Lamb clips and leaves out the trust ratio where nothing decays; both are turned off.
_LAYERWISE: dict[str, Any] = {"betas": BETAS, "weight_decay": 0.0}
UNCLIPPED: dict[str, Any] = {"always_adapt": True, "max_grad_norm": None}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "Adam": lambda params, **options: torch.optim.Adam(params, fused=True, **options),
    "AdamW": lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
    "AdamE": lambda params, **options: AdamE(params, betas=(0.9, 0.999), **EXPLORE, **options),
    "ALTO": lambda params, **options: ALTO(params, **_LAYERWISE, **EXPLORE, **options),
    "Lamb": lambda params, **options: timm_lamb()(params, **UNCLIPPED, **_LAYERWISE, **options),
}
EPS = {"Adam": 1e-8, "AdamW": 1e-8, "AdamE": 1e-8, "ALTO": 1e-6, "Lamb": 1e-6}
"""What each takes if it is told nothing, but for AdamE, which takes Adam's."""

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """What a training run depends on. The rate rises linearly over the first 5% of the steps and then falls to zero."""

    workload: str
    optimizer: str
    batch_size: int
    learning_rate: float  # at its highest
    eps: float
    seed: int  # of the weights and of the order of the samples
    samples: int  # how many are trained on, rounded down to whole steps
    loss_scale: float = 1.0  # what the loss is multiplied by before the backward pass
    noise: bool = False  # whether the noise scale is measured on the way, which does not change the training

    @property
    def steps(self) -> int:
        return self.samples // self.batch_size


def train(run: Run, folder: Path = FASHION_MNIST, device: torch.device = CPU, *, for_claim: bool = False) -> Row:
    """Trains once, on one thread of the host; losses are the mean cross-entropy per prediction in evaluation mode.

    Returns:
        The settings and ``steps``, ``train_loss`` (over a fixed subset of the training data, so that batch sizes compare),
        ``test_loss``, ``test_accuracy`` (0 to 1), ``diverged`` (1 where a loss is not finite, or the final one is above the
        first; else 0), ``seconds``, ``curve`` (``[samples, loss]`` on the way, over a quarter of the subset),
        ``samples_to_target`` (``[target, samples]``, None where it is not reached), ``noise_scale`` (one entry for each
        moment of the curve but the last, see :func:`measure_noise`) and ``noise_passes`` (gradients that it took).
        For a claim the accuracy is on the first half of the test data, and ``validation_error`` on the second.
    """
    torch.set_num_threads(1)
    workload, data, start = WORKLOADS[run.workload], data_of(run.workload, folder), perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = workload.make_model().to(device)
        curve, noise = fit(model, run, data)
    train_loss, _ = evaluate(model, data.train.tensors, _EVALUATED)
    row = {"steps": run.steps, "train_loss": train_loss, "diverged": int(not train_loss <= curve[0][1])}
    reached = [(target, samples_to(target, curve)) for target in workload.targets]
    row |= {"noise_scale": noise, "noise_passes": NOISE_GRADIENTS * len(noise)}
    row |= {"seconds": perf_counter() - start, "curve": curve, "samples_to_target": reached}
    half, tests = len(data.test) // 2, data.test.tensors
    if for_claim:
        row["validation_error"] = 1 - evaluate(model, [tensor[half:] for tensor in tests], half)[1]
    row["test_loss"], row["test_accuracy"] = evaluate(model, tests, half if for_claim else _EVALUATED)
    return {**asdict(run), **row}


def evaluate(model: nn.Module, tensors: Sequence[Tensor], samples: int) -> tuple[float, float]:
    """Loss and accuracy over the first ``samples``, in evaluation mode; infinite and zero where weights are not finite."""
    inputs, classes = (tensor[:samples].split(_AT_ONCE) for tensor in tensors)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(part).flatten(0, -2) for part in inputs])
    model.train()
    labels = torch.cat(classes).flatten()
    loss = float(functional.cross_entropy(logits, labels))
    if not math.isfinite(loss):
        return math.inf, 0.0
    return loss, float((logits.argmax(-1) == labels).double().mean())


def samples_to(target: float, curve: Curve) -> float | None:
    """Samples after which a loss first reaches a target: between two moments, log loss is linear in log samples."""
    for (samples, loss), (later, lower) in zip(curve[:-1], curve[1:], strict=True):
        if loss > target >= lower:
            share = math.log(loss / target) / math.log(loss / lower)
            return (samples + 1) * ((later + 1) / (samples + 1)) ** share - 1
    return None


def moments(steps: int) -> list[int]:
    """Numbers of steps at which a run is looked at: none, all, and some in between, evenly and log-spaced."""
    shares = [i / (_MOMENTS // 2) for i in range(1, _MOMENTS // 2)]
    return sorted({0, steps, *(round(steps * share) for share in shares), *(round(steps**share) for share in shares)})


def warm_up(steps: int) -> int:
    return max(1, round(_WARM_UP * steps))


def schedule(step: int, steps: int) -> float:
    """Learning rate of a step, counted from zero, as a share of the highest."""
    return min((step + 1) / warm_up(steps), (steps - step) / (steps - warm_up(steps) + 1))


def measure_noise(model: nn.Module, run: Run, data: Data, generator: torch.Generator) -> dict[str, float]:
    """The noise scale at the present weights: ``simple`` and ``adam`` in samples, ``_lower`` and ``_upper`` of 95% intervals."""
    fresh = gradients_of(model, data, WORKLOADS[run.workload].noise_batch_size, generator)
    noise, found = noise_scale(fresh, run), {}
    for name, of in (("simple", noise.simple()), ("adam", noise.adam())):
        found |= {name: of.value, f"{name}_lower": of.lower, f"{name}_upper": of.upper}
    return found


def noise_scale(gradients: Iterator[Mapping[str, Tensor]], run: Run, number: int = NOISE_GRADIENTS) -> NoiseScale:
    """The noise scale from the next gradients, with the metric of a batch of the run's size, and of its epsilon."""
    batch_size = WORKLOADS[run.workload].noise_batch_size
    scaled = ({name: values * run.loss_scale for name, values in gradient.items()} for gradient in gradients)
    return noise_of(scaled, batch_size, number, run.eps, run.batch_size / batch_size)


def noise_of(
    gradients: Iterator[Mapping[str, Tensor]], batch_size: int, number: int, eps: float, ratio: float
) -> NoiseScale:
    """The noise scale from the next gradients of a batch size, with the metric of a batch so many times as large."""
    for index, gradient in enumerate(itertools.islice(gradients, number)):
        if index == 0:
            noise = NoiseScale(gradient, batch_size)
        if index == number // 2:
            noise.split(eps, ratio)
        noise.update(gradient)
    return noise


def fit(model: nn.Module, run: Run, data: Data) -> tuple[Curve, list[dict[str, float]]]:
    """Trains a model in place; returns ``curve`` and ``noise_scale`` as :func:`train` describes them."""
    optimizer = OPTIMIZERS[run.optimizer](model.parameters(), lr=run.learning_rate, eps=run.eps)
    scheduler = LambdaLR(optimizer, lambda step: schedule(step, run.steps))
    samples_of_step = batches(len(data.train), run.batch_size, torch.Generator().manual_seed(2 * run.seed))
    fresh = torch.Generator().manual_seed(2 * run.seed + 1)
    curve, noise, looked_at = [], [], moments(run.steps)
    for step in range(run.steps + 1):
        if step in looked_at:
            samples, loss_now = step * run.batch_size, evaluate(model, data.train.tensors, _EVALUATED_ON_THE_WAY)[0]
            curve.append((samples, loss_now))
            if step == run.steps or math.isinf(loss_now):
                break
            if run.noise:
                noise.append({"samples": samples, "loss": loss_now, **measure_noise(model, run, data, fresh)})
        loss = loss_of(model, data, next(samples_of_step))
        optimizer.zero_grad()
        (loss * run.loss_scale).backward()
        optimizer.step()
        scheduler.step()
    return curve, noise


def loss_of(model: nn.Module, data: Data, indices: Tensor) -> Tensor:
    inputs, classes = (tensor[indices] for tensor in data.train.tensors)
    return functional.cross_entropy(model(inputs).flatten(0, -2), classes.flatten())


def gradients_of(
    model: nn.Module, data: Data, batch_size: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Gradients of the mean loss by name of the parameter, each over samples of its own."""
    parameters = dict(model.named_parameters())
    for indices in batches(len(data.train), batch_size, generator):
        gradients = torch.autograd.grad(loss_of(model, data, indices), list(parameters.values()))
        yield dict(zip(parameters, gradients, strict=True))


def batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of samples, whole batches, from ever new permutations of ``size``."""
    if batch_size > size:
        raise ValueError(f"batch_size must be at most the {size} samples of the training data, got {batch_size}")
    while True:
        order = torch.randperm(size, generator=generator, device=generator.device)
        yield from order.split(batch_size)[: size // batch_size]


@cache
def data_of(workload: str, folder: Path) -> Data:
    return WORKLOADS[workload].load(folder)
