"""All that the grids have measured so far, as the sections of the page want it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import rows
from curves import Measured, by_batch_size, noise_runs
from estimates import METRICS, OF_A_RUN, Moments, mean_of_positive, samples_to_target, tradeoff_fit
from grid import Results, at_equal_steps, middle, read, references
from rows import Row
from theorem5 import Needed, common
from training import Run
from transfers import Bench
from workloads import WORKLOADS, Workload

FIT = "Theorem 5 fit"
MEAN = f"{METRICS['adam']} mean"
FORMULA = "Theorem 3 formula mean"
FORMULA_TABLE = "formula.csv"


@dataclass(frozen=True)
class Evidence:
    """The runs of one workload, and what follows from them at once.

    Attributes:
        workload: whose they are.
        results: its table.
        formula: what Theorem 3's formula gave at moments of runs, as ``formula.py`` describes it.
    """

    workload: Workload
    results: Results
    formula: Sequence[Row] = ()

    @cached_property
    def references(self) -> list[Run]:
        """A run of Adam at equal samples for each batch size."""
        return references(self.workload)

    @cached_property
    def losses(self) -> dict[int, Measured]:
        """Adam's losses at equal samples, by batch size."""
        return by_batch_size(self.results, self.references)

    @property
    def losses_without_largest(self) -> dict[int, Measured]:
        """Adam's losses at equal samples, but for the largest batch size."""
        return dict(list(self.losses.items())[:-1])

    @cached_property
    def losses_at_equal_steps(self) -> dict[int, Measured]:
        """Adam's losses at equal steps, by batch size; none until every batch size has some."""
        losses = by_batch_size(self.results, [at_equal_steps(self.workload, like) for like in self.references])
        return losses if len(losses) == len(self.references) else {}

    @cached_property
    def best_rates(self) -> dict[int, float]:
        """Log2 of the best rate at equal samples, by batch size."""
        curves = {size: losses.curve() for size, losses in self.losses.items()}
        return {size: curve.best_rate for size, curve in curves.items() if curve is not None}

    @cached_property
    def noise(self) -> dict[int, list[tuple[Run, Moments]]]:
        """The runs that measured the noise scale, by batch size."""
        return noise_runs(self.results, self.workload, self.best_rates)

    @cached_property
    def needed(self) -> Needed:
        """Samples to each target by batch size."""
        return samples_to_target(self.results, self.references)

    @cached_property
    def common(self) -> dict[float, np.ndarray]:
        """Samples at each batch size to the targets that all of them reach."""
        return common(self.needed, list(self.losses))

    @cached_property
    def fits(self) -> dict[float, float]:
        """Theorem 5's noise scale by target; NaN where the line has the wrong slope."""
        return {target: tradeoff_fit(by_size)[0] for target, by_size in self.needed.items()}

    @cached_property
    def fitted_noise(self) -> float:
        """The geometric mean of the fits to the targets that all batch sizes reach; NaN of none."""
        fits = [math.log(self.fits[t]) for t in self.common if not math.isnan(self.fits[t])]
        return math.exp(sum(fits) / len(fits)) if fits else math.nan

    @cached_property
    def estimates(self) -> dict[str, np.ndarray]:
        """Noise scales by name of the estimate, ``[runs, batch sizes]``; NaN where there is none."""
        found = {}
        runs = max(map(len, self.noise.values()), default=0)
        for metric, called in METRICS.items() if runs else ():
            for name, estimate in OF_A_RUN.items():
                values = np.full((runs, len(self.losses)), math.nan)
                for column, size in enumerate(self.losses):
                    for row, (run, moments) in enumerate(self.noise.get(size, [])):
                        values[row, column] = estimate(moments, metric, run.samples)
                found[f"{called} {name}"] = values
        if self.formula:
            of_size = {size: [row for row in self.formula if row["batch_size"] == size] for size in self.losses}
            means = [mean_of_positive(moments, self.workload.samples) for moments in of_size.values()]
            found[FORMULA] = np.array([means])
        return found

    def bench(self, losses: Mapping[int, Measured]) -> Bench:
        """What transfers need: losses, and the noise scales that the runs at equal samples gave."""
        columns = [list(self.losses).index(size) for size in losses]
        noise = {name: values[:, columns] for name, values in self.estimates.items()}
        if not math.isnan(self.fitted_noise):
            noise[FIT] = np.full((1, len(losses)), self.fitted_noise)
        return Bench(losses, noise)

    @property
    def middle(self) -> Run:
        """The run at equal samples at the middle batch size."""
        return next(run for run in self.references if run.batch_size == middle(self.workload))


def collect(folder: Path) -> dict[str, Evidence]:
    """By name the workloads that have a batch size with a finished run."""
    formula = rows.read(folder / FORMULA_TABLE)
    found = {
        name: Evidence(workload, read(folder / f"{name}.csv"), [row for row in formula if row["workload"] == name])
        for name, workload in WORKLOADS.items()
    }
    return {name: evidence for name, evidence in found.items() if evidence.losses}
