"""What is measured beside the runs of the grid: search spaces of epsilon, critical rates, coverage, and recorded noise.

It takes seconds to minutes on one core, stands in tables, and is not measured again unless it is asked for.
"""

import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from capture_cost import trainer
from capture_variants import Training
from evidence import Evidence
from reporting import Row, read_csv, write_csv
from torch import nn
from torch.utils.data import DataLoader
from training import EPS, NOISE_GRADIENTS, batches, data_of, fit, gradients_of, loss_of, noise_of, noise_scale
from workloads import Data, Workload

from lightning_gradhist import GradientHistogramMonitor, NoiseScale, SecondMoment, epsilon_range
from lightning_gradhist.callbacks.monitor import halves
from lightning_gradhist.callbacks.probe.first_step import first_step, largest_factor
from lightning_gradhist.epsilon import choose_epsilon
from lightning_gradhist.learning_rate import SURGE, choose_ratio

LOSS_SCALES = (1.0, 1e-8, 1e-4, 1e4)
EPOCH = 100  # gradients at most that the search space of epsilon is taken from
REPEATS, TIMES = 20, 10  # measurements whose intervals are compared with a measurement from that many times the data
SEEDS, BATCHES, KEPT = 3, 32, 4  # of a probe, at most; its first half gives the step, which is tried on the last ones
UNIT, LARGEST = 2**-8, 1.0  # critical rates: that of factor 1, and the first that is tried
METRICS = {"B_simple": NoiseScale.simple, "B_adam": NoiseScale.adam}
STATES = {"at the start": 0.0, "after a tenth": 0.1}
"""The weights that coverage is measured at, by the share of the samples that they were trained on."""
STEPS, MOMENTS, GRADIENTS, FRESH = 100, range(5, 100, 10), 16, 256  # of a recorded run, and of each true value along it
WAYS = {"halves": halves._LEAST_SAMPLES, "pairs": 10**9}
"""How a monitor measures noise on one device, by the samples of a batch from which on its halves are."""


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


class Truth(L.Callback):
    """Noise scales at some moments, each from fresh gradients at the weights of the moment."""

    def __init__(self, data: Data, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size
        self.found: list[float] = []
        self._generator = torch.Generator().manual_seed(0)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Measure, without a trace: no gradient is left in the parameters."""
        if trainer.global_step in MOMENTS:
            fresh = gradients_of(pl_module.network[0], self.data, FRESH, self._generator)
            noise = noise_of(fresh, FRESH, 2 * GRADIENTS, EPS["Adam"], self.batch_size / FRESH)
            self.found.append(noise.adam().value)


def record_of(workload: Workload, data: Data, batch_size: int, others: list[L.Callback]) -> Any:
    """Trains for 100 steps; the record's estimate."""
    torch.manual_seed(0)
    rate = workload.learning_rate * (batch_size / workload.batch_sizes[0]) ** 0.4
    network = nn.Sequential(workload.make_model(), nn.Flatten(0, -2))
    module, monitor = Training(network, partial(torch.optim.Adam, lr=rate)), GradientHistogramMonitor(every_n_steps=1)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = DataLoader(data.train, batch_size, shuffle=True, drop_last=True)
        trainer(Path(folder), [monitor, *others], max_steps=STEPS).fit(module, loader)
    return monitor.noise_records[0].estimate("adam")


def recorded(evidence: Evidence, folder: Path) -> list[Row]:
    """What is recorded at the middle batch sizes in both ways, the true value, and whether a rate could be carried with it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    workload, rows = evidence.workload, []
    data = data_of(workload.name, folder)
    for size in workload.batch_sizes[1:4]:
        truth = Truth(data, size)
        row: Row = {"workload": workload.name, "batch_size": size}
        for way, least in WAYS.items():
            halves._LEAST_SAMPLES = least
            noise = record_of(workload, data, size, [truth] if way == "halves" else [])
            carried = choose_ratio(SURGE, 4 * size, size, noise, from_record=True)
            row |= {way: noise.value, f"{way}_lower": noise.lower, f"{way}_upper": noise.upper}
            row |= {f"{way}_usable": int(carried.law == SURGE), "truth": statistics.fmean(truth.found)}
        rows.append(row)
    return rows


def kept(path: Path, found: Mapping[str, Evidence], measure: Any, folder: Path, again: bool = False) -> list[Row]:
    """The rows of a table; a workload that it lacks is measured and added, and all are where it is asked for ``again``."""
    rows = [] if again else read_csv(path)
    torch.set_num_threads(1)
    for evidence in (ev for name, ev in found.items() if name not in {row["workload"] for row in rows}):
        rows += measure(evidence, folder)
        write_csv(path, list(rows[0]), rows, digits=None)
    return [row for row in rows if row["workload"] in found]
