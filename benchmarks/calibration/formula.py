"""The noise scale from Theorem 3's formula, at fixed weights along the runs at the best rates of the grid.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/formula.py``; it takes some minutes on one core, can be
stopped at any time and goes on where it was. Adam, seed 0, equal samples, before the first step and after a tenth, half
and nine tenths of the steps.

With ``mu`` and ``sigma`` the mean and standard deviation of a sample's gradient and ``H`` the Hessian, the formula is

    B_noise = pi * sum_i H_ii / (2 * sum_{i != j} s_i s_j H_ij),    s = mu / sigma.

A mean that is measured and squared counts noise as signal, so ``s`` comes from two disjoint halves of the gradients,
``s_A^T H s_B - sum_i s_Ai s_Bi H_ii``. Both sums are averages over pairs of gradients, one of each half, which is what the
gradients are drawn again from for the interval. Products with the Hessian are differences of gradients, its diagonal is
Hutchinson's; each takes samples of its own.

Columns, one row a moment: ``workload``, ``batch_size``, ``learning_rate``, ``step``, ``samples``; ``trace`` of the Hessian;
``off_diagonal``, the sum below the fraction; ``value``, ``lower`` and ``upper``, the noise scale in samples with its 95%
bootstrap interval, NaN where a sum is not positive; a draw counts as zero where the trace is not positive, and as infinite
where the other sum is not; ``positive``, the share of draws where both are; ``passes`` forward and backward that it took,
each of the workload's ``noise_batch_size``; ``seconds``; and the machine.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import rows
import torch
from evidence import FORMULA_TABLE, Evidence, collect
from grid import FOLDER
from measuring import machine
from rows import Row
from torch import Tensor, nn
from training import batches, loss_of, stepping
from workloads import FASHION_MNIST, WORKLOADS, Data

SHARES = (0.0, 0.1, 0.5, 0.9)
"""The moments, by the share of the steps."""
HALF = 32
"""Gradients in each half, and vectors of Hutchinson's."""
DRAWS = 1000
MOVE = 1e-3
"""The weights are moved by this share of their length, to both sides."""
MACHINE = "date cpu cores python torch".split()
COLUMNS = [
    *("workload", "batch_size", "learning_rate", "step", "samples", "trace", "off_diagonal", "value", "lower", "upper"),
    *("positive", "passes", "seconds", *MACHINE),
]


class Probe:
    """Gradients and products with the Hessian at fixed weights, as flat vectors, each over fresh samples.

    Args:
        model: whose weights are moved for a product, and moved back.
        data: that the samples come from.
        batch_size: samples of a gradient.
        seed: of the samples.
    """

    def __init__(self, model: nn.Module, data: Data, batch_size: int, seed: int) -> None:
        self.batch_size, self.passes = batch_size, 0
        self._model, self._data, self._parameters = model, data, list(model.parameters())
        self._samples = batches(len(data.train), batch_size, torch.Generator().manual_seed(seed))

    def gradient(self) -> Tensor:
        """Of the mean loss, ``[n]``."""
        return self._gradient(next(self._samples))

    def hessian_product(self, vector: Tensor) -> Tensor:
        """``(grad(theta + h v) - grad(theta - h v)) / 2h``, both over the same samples, ``[n]``."""
        weights = [parameter.detach().clone() for parameter in self._parameters]
        shift = MOVE * torch.cat([weight.flatten() for weight in weights]).norm() / vector.norm() * vector
        indices = next(self._samples)
        ends = []
        for sign in (1, -1):
            self._move(weights, sign * shift)
            ends.append(self._gradient(indices))
        self._move(weights, torch.zeros_like(shift))
        return (ends[0] - ends[1]) * (vector.norm() / (2 * shift.norm()))

    def _gradient(self, indices: Tensor) -> Tensor:
        self.passes += 1
        loss = loss_of(self._model, self._data, indices)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, self._parameters)])

    @torch.no_grad()
    def _move(self, weights: list[Tensor], shift: Tensor) -> None:
        parts = shift.split([weight.numel() for weight in weights])
        for parameter, weight, part in zip(self._parameters, weights, parts, strict=True):
            parameter.copy_(weight + part.view_as(weight))


def measured(probe: Probe, generator: torch.Generator) -> Row:
    """The two sums and the noise scale, with its interval.

    Args:
        probe: at the weights.
        generator: of Hutchinson's vectors and of the draws.
    """
    halves = [torch.stack([probe.gradient() for _ in range(HALF)]) for _ in range(2)]
    deviation = ((halves[0].var(0) + halves[1].var(0)) / 2 * probe.batch_size).sqrt()
    first, second = (torch.where(deviation > 0, half / deviation, 0.0) for half in halves)
    products = torch.stack([probe.hessian_product(s) for s in second])
    signs = torch.randint(0, 2, first.shape, generator=generator) * 2.0 - 1.0
    diagonals = torch.stack([sign * probe.hessian_product(sign) for sign in signs])
    whole = first @ products.T  # of each pair of gradients
    on_diagonal = torch.stack([(first * diagonal) @ second.T for diagonal in diagonals])
    drawn = torch.randint(0, HALF, (3, DRAWS, HALF), generator=generator)
    weights = torch.nn.functional.one_hot(drawn, HALF).double().mean(2)  # of each gradient and vector in each draw
    plain = torch.full((3, 1, HALF), 1 / HALF, dtype=torch.float64)
    sums = [_sums(w, whole.double(), on_diagonal.double(), diagonals.sum(1).double()) for w in (plain, weights)]
    return summary(*(np.stack([part.numpy() for part in of]) for of in sums))


def _sums(weights: Tensor, whole: Tensor, on_diagonal: Tensor, traces: Tensor) -> tuple[Tensor, Tensor]:
    """Trace and sum off the diagonal in each draw, from the weights ``[3, draws, HALF]`` of halves and vectors."""
    first, second, vectors = weights
    pairs = torch.einsum("dk,dl->dkl", first, second)
    off = (pairs * whole).sum((1, 2)) - torch.einsum("dkl,dj,jkl->d", pairs, vectors, on_diagonal)
    return vectors @ traces, off


def summary(found: np.ndarray, drawn: np.ndarray) -> Row:
    """The columns from ``trace`` to ``positive``, of trace and sum off the diagonal, ``[2, 1]`` and ``[2, draws]``."""
    value, values = (noise_scale(*of) for of in (found, drawn))
    limits = np.where(drawn[1] > 0, 0.0, math.inf)  # of the formula as the sum goes to zero
    lower, upper = np.quantile(np.where(np.isnan(values), limits, values), [0.025, 0.975], method="inverted_cdf")
    there = not math.isnan(value[0])
    return {
        "trace": float(found[0, 0]),
        "off_diagonal": float(found[1, 0]),
        "value": float(value[0]),
        "lower": float(lower) if there else math.nan,
        "upper": float(upper) if there else math.nan,
        "positive": float((~np.isnan(values)).mean()),
    }


def noise_scale(trace: np.ndarray, off_diagonal: np.ndarray) -> np.ndarray:
    """Theorem 3's formula; NaN where one of the two is not positive."""
    positive = (trace > 0) & (off_diagonal > 0)
    return np.divide(math.pi * trace, 2 * off_diagonal, out=np.full(trace.shape, math.nan), where=positive)


def along(evidence: Evidence, size: int, data: Data) -> Iterator[Row]:
    """The moments of the run at the best rate of a batch size."""
    workload = evidence.workload
    like = next(run for run in evidence.references if run.batch_size == size)
    run = replace(like, learning_rate=2 ** evidence.best_rates[size])
    looked_at = [int(share * run.steps) for share in SHARES]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = workload.make_model()
    for step in stepping(model, run, data):
        if step not in looked_at:
            continue
        start, probe = time.perf_counter(), Probe(model, data, workload.noise_batch_size, seed=step + 1)
        yield {
            "workload": workload.name,
            "batch_size": size,
            "learning_rate": run.learning_rate,
            "step": step,
            "samples": step * size,
            **measured(probe, torch.Generator().manual_seed(step + 1)),
            "passes": probe.passes,
            "seconds": time.perf_counter() - start,
        }


def main(arguments: list[str] | None = None) -> None:
    """Measures where the table has nothing yet."""
    options = parse(arguments)
    torch.set_num_threads(1)
    described = machine(torch.device("cpu"))
    table = rows.read(options.output)
    for name, evidence in collect(options.grid).items():
        if name not in options.workload:
            continue
        data = evidence.workload.load(options.data_dir)
        there = {row["batch_size"] for row in table if row["workload"] == name}
        for size in (size for size in evidence.best_rates if size not in there):
            found = list(along(evidence, size, data))
            table += [{**row, **described} for row in found]
            rows.write(options.output, COLUMNS, table)
            print(
                name,
                size,
                *(f"{row['value']:.3g} ({row['lower']:.3g} to {row['upper']:.3g})" for row in found),
                flush=True,
            )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--grid", type=Path, default=FOLDER, help="folder of the grid's tables, for the best rates")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--output", type=Path, default=FOLDER / FORMULA_TABLE, help="file of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
