"""What is measured at fixed weights, beside the runs of the grid: search spaces of epsilon, critical rates, and coverage.

It takes seconds to minutes on one core, stands in tables, and is not measured again unless it is asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from evidence import Evidence
from reporting import Row, read_csv, write_csv
from torch import nn
from training import EPS, NOISE_GRADIENTS, batches, data_of, fit, gradients_of, loss_of, noise_scale
from workloads import Data, Workload

from lightning_gradhist import NoiseScale, SecondMoment, epsilon_range
from lightning_gradhist.callbacks.probe.first_step import first_step, largest_factor
from lightning_gradhist.epsilon import choose_epsilon

LOSS_SCALES = (1.0, 1e-8, 1e-4, 1e4)
EPOCH = 100  # gradients at most that the search space of epsilon is taken from
REPEATS, TIMES = 20, 10  # measurements whose intervals are compared with a measurement from that many times the data
SEEDS, BATCHES, KEPT = 3, 32, 4  # of a probe, at most; its first half gives the step, which is tried on the last ones
UNIT, LARGEST = 2**-8, 1.0  # critical rates: that of factor 1, and the first that is tried
METRICS = {"B_simple": NoiseScale.simple, "B_adam": NoiseScale.adam}
STATES = {"at the start": 0.0, "after a tenth": 0.1}
"""The weights that coverage is measured at, by the share of the samples that they were trained on."""


def epsilon_ranges(evidence: Evidence, folder: Path) -> list[Row]:
    """The search spaces at the initial weights, and what ``epsilon="auto"`` makes of 1e-8, by loss scale."""
    workload, size = evidence.workload, evidence.middle.batch_size
    data, model, moment = data_of(workload.name, folder), _initial(workload), SecondMoment()
    fresh = gradients_of(model, data, size, torch.Generator().manual_seed(1))
    for gradients in itertools.islice(fresh, min(EPOCH, len(data.train) // size)):
        moment.update(gradients)
    return [_space(workload.name, size, scale, moment) for scale in LOSS_SCALES]


def _space(workload: str, batch_size: int, scale: float, moment: SecondMoment) -> Row:
    space, default = epsilon_range({name: scale * rms for name, rms in moment.rms().items()}), EPS["Adam"]
    return {
        **{"workload": workload, "batch_size": batch_size, "loss_scale": scale},
        **{name: getattr(space, name) for name in ("lower", "upper", "pooled_lower", "pooled_upper")},
        **{"default": default, "damped_by_default": space.damped_share(default)},
        "auto": choose_epsilon(default, space),
    }


def coverage(evidence: Evidence, folder: Path) -> list[Row]:
    """Intervals of the noise scale, each beside the value from ten times the data at the same weights.

    The weights are the initial ones and those after a tenth of the samples at the middle batch size and its best rate.
    """
    workload, run = evidence.workload, evidence.middle
    data, rows = data_of(workload.name, folder), []
    for state, share in STATES.items():
        model = _initial(workload)
        if share:
            rate = 2 ** evidence.best_rates[run.batch_size]
            fit(model, replace(run, learning_rate=rate, samples=int(share * run.samples)), data)
        fresh = gradients_of(model, data, workload.noise_batch_size, torch.Generator().manual_seed(1))
        truth = noise_scale(fresh, run, TIMES * NOISE_GRADIENTS)
        for repeat in range(REPEATS):
            noise = noise_scale(fresh, run)
            for metric, of in METRICS.items():
                row = {"workload": workload.name, "state": state, "metric": metric, "repeat": repeat}
                row |= {end: getattr(of(noise), end) for end in ("value", "lower", "upper")}
                rows.append({**row, "from_ten_times_the_data": of(truth).value})
    return rows


def critical_rates(evidence: Evidence, folder: Path) -> list[Row]:
    """The critical rate of the first step of each batch size, as the calibration's probe finds it."""
    workload, data = evidence.workload, data_of(evidence.workload.name, folder)
    cases = [{"batch_size": size, "seed": seed} for size in workload.batch_sizes for seed in range(SEEDS)]
    return [{"workload": workload.name, **of, "critical_rate": _critical(workload, data, **of)} for of in cases]


def _critical(workload: Workload, data: Data, batch_size: int, seed: int) -> float:
    """The highest rate, of those half an octave apart, whose first step does not raise the loss; 0 where none is."""
    model = _initial(workload, seed)
    weights = list(model.parameters())
    drawn = batches(len(data.train), batch_size, torch.Generator().manual_seed(seed))
    read = [next(drawn) for _ in range(min(BATCHES, len(data.train) // batch_size))]
    half = read[: (len(read) + 1) // 2]
    sums = [torch.zeros_like(weight) for weight in weights]
    for indices in half:
        for total, gradient in zip(sums, torch.autograd.grad(loss_of(model, data, indices), weights), strict=True):
            total.add_(gradient, alpha=1 / len(half))
    steps = [first_step(mean, UNIT, EPS["Adam"]) for mean in sums]
    before = [weight.detach().clone() for weight in weights]

    @torch.no_grad()
    def loss_at(factor: float) -> float:
        for weight, start, step in zip(weights, before, steps, strict=True):
            weight.copy_(start - factor * step)
        return sum(float(loss_of(model, data, indices)) for indices in read[-KEPT:])

    factor = largest_factor(loss_at, LARGEST / UNIT)
    assert factor is not None  # losses are finite here
    return UNIT * factor


def _initial(workload: Workload, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return workload.make_model()


def kept(path: Path, found: Mapping[str, Evidence], measure: Any, folder: Path, again: bool = False) -> list[Row]:
    """The rows of a table; a workload that it lacks is measured and added, and all are where it is asked for ``again``."""
    rows = [] if again else read_csv(path)
    torch.set_num_threads(1)
    for evidence in (ev for name, ev in found.items() if name not in {row["workload"] for row in rows}):
        rows += measure(evidence, folder)
        write_csv(path, list(rows[0]), rows, digits=None)
    return [row for row in rows if row["workload"] in found]
