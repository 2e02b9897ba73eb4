"""The critical rate of the first step of each batch size of the workloads, as the calibration's probe finds it.

``python benchmarks/calibration/critical.py`` (PYTHONPATH as in the Makefile; some minutes on one core).
"""

from __future__ import annotations

import itertools

import torch
from reporting import RESULTS, Row, machine, write_csv
from training import EPS, batches, data_of, loss_of
from workloads import FASHION_MNIST, WORKLOADS, Data, Workload

from lightning_gradhist.callbacks.probe.first_step import first_step, largest_factor

SEEDS, GRADIENTS, KEPT = 3, 16, 4  # gradients of the first half of a probe, and batches that a step is tried on
UNIT, LARGEST = 2**-8, 1.0  # rates: that of factor 1, and the first that is tried


def critical_rate(workload: Workload, data: Data, batch_size: int, seed: int) -> float:
    """The highest rate, of those half an octave apart, whose first step does not raise the loss; NaN where none is."""
    torch.manual_seed(seed)
    model = workload.make_model()
    weights = list(model.parameters())
    drawn = batches(len(data.train), batch_size, torch.Generator().manual_seed(seed))
    read = [next(drawn) for _ in range(GRADIENTS)]
    sums = [torch.zeros_like(weight) for weight in weights]
    for indices in read:
        for total, gradient in zip(sums, torch.autograd.grad(loss_of(model, data, indices), weights), strict=True):
            total.add_(gradient, alpha=1 / GRADIENTS)
    steps, before = (
        [first_step(mean, UNIT, EPS["Adam"]) for mean in sums],
        [weight.detach().clone() for weight in weights],
    )

    @torch.no_grad()
    def loss_at(factor: float) -> float:
        for weight, start, step in zip(weights, before, steps, strict=True):
            weight.copy_(start - factor * step)
        return sum(float(loss_of(model, data, indices)) for indices in read[-KEPT:])

    return UNIT * (largest_factor(loss_at, LARGEST / UNIT) or float("nan"))


def main() -> None:
    """Measure on all workloads."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    for workload in WORKLOADS.values():
        data = data_of(workload.name, FASHION_MNIST)
        for size, seed in itertools.product(workload.batch_sizes, range(SEEDS)):
            rate = critical_rate(workload, data, size, seed)
            rows.append({"workload": workload.name, "batch_size": size, "seed": seed, "critical_rate": rate})
            print(rows[-1], flush=True)
    described = machine()
    write_csv(RESULTS / "calibration" / "critical.csv", [*rows[0], *described], [{**row, **described} for row in rows])


if __name__ == "__main__":
    main()
