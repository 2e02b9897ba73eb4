"""What is measured at fixed weights, beside the runs of the grid: the search space of epsilon, and intervals' coverage.

The former takes seconds on one core, the latter minutes, so what stands in its tables is not measured again.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from evidence import Evidence
from page import Row
from torch import Tensor, nn
from training import EPS, NOISE_GRADIENTS, batches, fit, loss_of
from workloads import Data, Workload

from lightning_gradhist import NoiseScale, epsilon_range
from lightning_gradhist.epsilon import choose_epsilon
from lightning_gradhist.second_moment import SecondMoment

LOSS_SCALES = (1.0, 1e-8, 1e-4, 1e4)
EPOCH = 100
"""Gradients at most that the search space of epsilon is taken from."""
REPEATS, TIMES = 20, 10
"""Measurements whose intervals are compared with a measurement from that many times the data."""
DRAWS = 100
"""Draws of a bootstrap interval."""
METRICS = {"B_simple": NoiseScale.simple, "B_adam": NoiseScale.adam}
STATES = {"at the start": 0.0, "after a tenth": 0.1}
"""The weights that coverage is measured at, by the share of the samples that they were trained on."""

Gradients = Iterator[dict[str, Tensor]]


def epsilon_ranges(evidence: Evidence, folder: Path) -> list[Row]:
    """The search spaces at the initial weights, and what ``epsilon="auto"`` makes of 1e-8, by loss scale."""
    workload, size = evidence.workload, evidence.middle.batch_size
    data, model = workload.load(folder), _initial(workload)
    moment = SecondMoment()
    for gradients in itertools.islice(_gradients(model, data, size), min(EPOCH, len(data.train) // size)):
        moment.update(gradients)
    rows = []
    for scale in LOSS_SCALES:
        space = epsilon_range({name: scale * r for name, r in moment.rms().items()})
        rows.append(
            {
                "workload": workload.name,
                "batch_size": size,
                "loss_scale": scale,
                "lower": space.lower,
                "upper": space.upper,
                "pooled_lower": space.pooled_lower,
                "pooled_upper": space.pooled_upper,
                "default": EPS["Adam"],
                "damped_by_default": space.damped_share(EPS["Adam"]),
                "auto": choose_epsilon(EPS["Adam"], space),
            }
        )
    return rows


def coverage(evidence: Evidence, folder: Path) -> list[Row]:
    """Intervals of the noise scale, each beside the value from ten times the data at the same weights.

    The weights are the initial ones and those after a tenth of the samples at the middle batch size and its best rate.
    """
    workload, like = evidence.workload, evidence.middle
    data, size = workload.load(folder), like.batch_size
    rows = []
    for state, share in STATES.items():
        model = _initial(workload)
        if share:
            rate = 2 ** evidence.best_rates[size]
            fit(model, replace(like, learning_rate=rate, samples=int(share * like.samples)), data)
        gradients = _gradients(model, data, workload.noise_batch_size)
        truth = _measured(itertools.islice(gradients, TIMES * NOISE_GRADIENTS), workload, size, TIMES)
        for repeat in range(REPEATS):
            own = list(itertools.islice(gradients, NOISE_GRADIENTS))
            noise, ends = _measured(own, workload, size), bootstrapped(own, workload, size, seed=repeat)
            for metric, of in METRICS.items():
                estimate, (lower, upper) = of(noise), ends[metric]
                rows.append(
                    {
                        "workload": workload.name,
                        "state": state,
                        "metric": metric,
                        "repeat": repeat,
                        "value": estimate.value,
                        "lower": estimate.lower,
                        "upper": estimate.upper,
                        "bootstrap_lower": lower,
                        "bootstrap_upper": upper,
                        "from_ten_times_the_data": of(truth).value,
                    }
                )
    return rows


def bootstrapped(
    gradients: list[dict[str, Tensor]], workload: Workload, size: int, seed: int
) -> dict[str, tuple[float, float]]:
    """The 95% percentile interval of the noise scale by metric, the gradients of each half drawn again."""
    generator, half = torch.Generator().manual_seed(seed), len(gradients) // 2
    flat = [{"all": torch.cat([part.flatten() for part in gradient.values()])} for gradient in gradients]
    values: dict[str, list[float]] = {metric: [] for metric in METRICS}
    for _ in range(DRAWS):
        first, second = torch.randint(half, (2, half), generator=generator).tolist()
        noise = _measured([flat[i] for i in first] + [flat[half + i] for i in second], workload, size)
        for metric, of in METRICS.items():
            values[metric].append(of(noise).value)
    ends = {metric: np.quantile(of, [0.025, 0.975], method="inverted_cdf") for metric, of in values.items()}
    return {metric: (float(lower), float(upper)) for metric, (lower, upper) in ends.items()}


def _initial(workload: Workload) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return workload.make_model()


def _gradients(model: nn.Module, data: Data, batch_size: int) -> Gradients:
    parameters = dict(model.named_parameters())
    for indices in batches(len(data.train), batch_size, torch.Generator().manual_seed(1)):
        gradients = torch.autograd.grad(loss_of(model, data, indices), list(parameters.values()))
        yield dict(zip(parameters, gradients, strict=True))


def _measured(gradients: Iterable[dict[str, Tensor]], workload: Workload, size: int, times: int = 1) -> NoiseScale:
    """The noise scale from ``times`` as many gradients as a measurement takes."""
    coming = iter(gradients)
    first = next(coming)
    noise = NoiseScale(first, workload.noise_batch_size)
    for number, gradient in enumerate(itertools.chain([first], coming)):
        if number == times * NOISE_GRADIENTS // 2:
            noise.split(EPS["Adam"], size / workload.noise_batch_size)
        noise.update(gradient)
    return noise


def kept(path: Path, workload: str, measure: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a workload in a table, measured and added to it if there are none; numbers as text where they are read."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows: list[Row] = [row for row in csv.DictReader(text.splitlines()) if row["workload"] == workload]
    if rows:
        return rows
    torch.set_num_threads(1)
    rows = measure()
    if not rows:
        return []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if not text:
            writer.writeheader()
        writer.writerows(rows)
    return rows
