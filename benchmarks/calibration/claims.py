"""ALTO against Lamb, AdamW and AdamE at large batches, each with its rate tuned, over five seeds. ``drive.py`` makes the runs.

At each batch size of :data:`SETTINGS` every optimizer makes the same number of steps, with warm-up and linear decay as in
``training.py``. Its rates are a factor of two apart until the validation error of seed 0 is 5% above the best on both
sides; the rate with the lowest mean error then gets five seeds, and should they make another rate the best, that one, too.
The rate is chosen on the second half of the test data, and accuracy is told on the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter

from grid import has_lamb
from reporting import Row
from runs import Results, best, half_octaves, losses, missing, rate
from training import EPS, Run, data_of, evaluate, trained
from workloads import FASHION_MNIST

RESULTS = "steps validation_error test_accuracy train_loss diverged seconds".split()
SEEDS = 5
_TRAINED = 2048
"""Training samples at most that the final loss is over."""


@dataclass(frozen=True)
class Setting:
    """A workload at a batch size, for a number of steps.

    Attributes:
        workload: its name.
        batch_size: in samples.
        steps: of a run.
        optimizers: that are compared.
    """

    workload: str
    batch_size: int
    steps: int
    optimizers: tuple[str, ...] = ("ALTO", "Lamb", "AdamW", "AdamE")

    def run(self, optimizer: str) -> Run:
        """The run of an optimizer with seed 0 and the rate where the search begins."""
        start = 2**-4 if optimizer in ("ALTO", "Lamb") else 2**-6
        samples = self.steps * self.batch_size
        return Run(self.workload, optimizer, self.batch_size, start, EPS[optimizer], 0, samples)


SETTINGS = (
    Setting("mlp", 512, 200),
    Setting("mlp", 4096, 200),
    Setting("mlp", 16384, 200),
    Setting("cnn", 4096, 40, optimizers=("ALTO", "Lamb", "AdamW")),
    Setting("cnn", 512, 120),
)
"""In their order. On one core a run of ``cnn`` takes some 20 s at 512 and 60 s at 4,096, which is why it has few steps."""


def available() -> tuple[Setting, ...]:
    """The settings, without Lamb where timm is not installed."""
    without = [replace(s, optimizers=tuple(name for name in s.optimizers if name != "Lamb")) for s in SETTINGS]
    return SETTINGS if has_lamb() else tuple(without)


def wanted(settings: Sequence[Setting], results: Results) -> Iterator[Run]:
    """The runs that are not there yet, as far as is known by now."""
    for setting in settings:
        for name in setting.optimizers:
            like = setting.run(name)
            known = errors(results, like)
            runs = [replace(like, learning_rate=rate(k)) for k in missing(known, half_octaves(like.learning_rate))]
            if not runs and (top := best(known)) is not None:
                runs = [replace(like, learning_rate=rate(top), seed=seed) for seed in range(SEEDS)]
            yield from (run for run in runs if run not in results)


def errors(results: Results, like: Run) -> dict[int, float]:
    """Validation error by half octaves of the rate, averaged over seeds; infinite where a run diverged."""
    return losses(results, like, "validation_error")


def result(run: Run, folder: Path = FASHION_MNIST) -> Row:
    """Trains once, on one thread, and evaluates."""
    start, data = perf_counter(), data_of(run.workload, folder)
    model, curve, _ = trained(run, data)
    train_loss, _ = evaluate(model, data.train.tensors, _TRAINED)
    half = len(data.test) // 2
    _, accuracy = evaluate(model, data.test.tensors, half)
    _, validated = evaluate(model, [tensor[half:] for tensor in data.test.tensors], half)
    return {
        **asdict(run),
        "steps": run.steps,
        "validation_error": 1 - validated,
        "test_accuracy": accuracy,
        "train_loss": train_loss,
        "diverged": int(not train_loss <= curve[0][1]),
        "seconds": perf_counter() - start,
    }
