"""Two things in under a minute: one line that rescues a frozen run, and a learning rate for 32 times the batch.

``python examples/demo.py`` trains on scikit-learn's handwritten digits, on two ranks; with ``--data-dir`` and the four idx
files of Fashion-MNIST on those.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
from pathlib import Path
from statistics import mean, stdev

import lightning as L
import torch
from demo_figures import epsilon_figure, rate_figure
from digits import Classifier, Digits, NoisyDigits
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration

RANKS = 2
LOGS = Path("demo_logs")
UNITS = (1e-6, 1e-8)
SMALL, LARGE, TRUSTED_RATE = 8, 256, 0.006
SEEDS = 3
EVIDENCE = "benchmarks/results/calibration/README.md"


class Mlp(Classifier):
    """Three linear layers."""

    def __init__(self, pixels: int, lr: float) -> None:
        super().__init__(lr=lr)
        self.body, self.head = nn.Flatten(), mlp(pixels)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, 10]`` of images ``[n, 1, height, width]``."""
        return self.head(self.body(images))


def mlp(pixels: int) -> nn.Sequential:
    """The network of the second part."""
    return nn.Sequential(nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))


def train(name: str, module: L.LightningModule, data: Digits, epochs: int, *callbacks: L.Callback) -> L.Trainer:
    """Trains with DDP on two CPU processes, and logs to ``demo_logs/<name>``."""
    L.seed_everything(0, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(LOGS, name=name, version=""),
        log_every_n_steps=5,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return trainer


def accuracy(trainer: L.Trainer) -> float:
    """Validation accuracy after the last epoch, over both ranks."""
    return float(trainer.callback_metrics["val_accuracy"])


def rescue(data_dir: str | None, epochs: int) -> tuple[list[tuple[float, float, float, float]], OptimizerCalibration]:
    """The loss in other units: accuracy with AdamW's epsilon and with a calibrated one, and that epsilon."""
    found = []
    calibration = OptimizerCalibration()
    for unit in UNITS:
        data = Digits(64 // RANKS, data_dir)
        L.seed_everything(0, verbose=False)
        frozen = train(
            f"loss_times_{unit:g}",
            Classifier(unit=unit, lr=3e-3),
            data,
            epochs,
            GradientHistogramMonitor(every_n_steps=10),
        )
        calibration = OptimizerCalibration()
        L.seed_everything(0, verbose=False)
        rescued = train(f"loss_times_{unit:g}_calibrated", Classifier(unit=unit, lr=3e-3), data, epochs, calibration)
        found.append((unit, accuracy(frozen), accuracy(rescued), calibration.result.epsilon or 0.0))
    return found, calibration


def recorded_rate(data: NoisyDigits) -> tuple[float, int]:
    """The learning rate at the large batch that the record of a run at the small one gives, and the small one's steps."""
    pixels = data.train.tensors[0][0].numel()
    data.batch_size = SMALL // RANKS
    small = train(f"batch_{SMALL}", Mlp(pixels, TRUSTED_RATE), data, 1, GradientHistogramMonitor(every_n_steps=2))
    calibration = OptimizerCalibration(reference=str(LOGS / f"batch_{SMALL}" / "calibration.json"))
    data.batch_size = LARGE // RANKS
    train(f"batch_{LARGE}", Mlp(pixels, TRUSTED_RATE), data, 1, calibration)
    return calibration.result.learning_rate or TRUSTED_RATE, small.global_step


def final_loss(data: NoisyDigits, rate: float, seed: int) -> float:
    """Mean loss over the training data after one epoch at the large batch, in one process."""
    torch.manual_seed(seed)
    images, labels = data.train.tensors
    images = images.flatten(1)
    model = mlp(images.shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    batches = torch.randperm(len(labels)).split(LARGE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


def losses(data: NoisyDigits, rates: list[float]) -> list[list[float]]:
    """Final losses of every rate and seed; the ranks share the work."""
    jobs = [(rate, seed) for rate in rates for seed in range(SEEDS)]
    mine = [final_loss(data, *job) for job in jobs[torch.distributed.get_rank() :: RANKS]]
    parts: list[list[float]] = [[]] * RANKS
    torch.distributed.all_gather_object(parts, mine)
    flat = [parts[index % RANKS][index // RANKS] for index in range(len(jobs))]
    return [flat[start : start + SEEDS] for start in range(0, len(flat), SEEDS)]


def main(data_dir: str | None, epochs: int) -> None:
    """Runs both parts, prints what they gave, and draws it."""
    if "LOCAL_RANK" not in os.environ:  # Lightning sets it for the second process, which runs this file too
        shutil.rmtree(LOGS, ignore_errors=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    units, calibration = rescue(data_dir, epochs)
    data = NoisyDigits(SMALL, data_dir)
    recorded, small_steps = recorded_rate(data)
    factor = LARGE / SMALL
    rules = {
        "keep": TRUSTED_RATE,
        "fourth root": TRUSTED_RATE * factor**0.25,
        "square root": TRUSTED_RATE * factor**0.5,
        "linear": TRUSTED_RATE * factor,
        "from the record": recorded,
    }
    grid = [TRUSTED_RATE * factor ** ((step - 2) / 6) for step in range(9)]
    found = losses(data, [*rules.values(), *grid])
    by_rule, by_rate = dict(zip(rules, found, strict=False)), found[len(rules) :]
    if torch.distributed.get_rank() == 0:
        print(report(units, rules, by_rule, dict(zip(grid, by_rate, strict=True)), small_steps))
        epsilon_figure(calibration.result.epsilon_range.histogram, units[-1]).savefig(LOGS / "epsilon.png")
        rate_figure(f"From {SMALL} to {LARGE} samples a step", grid, by_rate, rules, by_rule).savefig(LOGS / "rate.png")
    torch.distributed.destroy_process_group()  # else a thread of gloo may still run at exit, and torch then aborts


def report(
    units: list[tuple[float, float, float, float]],
    rules: dict[str, float],
    by_rule: dict[str, list[float]],
    by_rate: dict[float, list[float]],
    small_steps: int,
) -> str:
    """What is printed at the end."""
    large_steps = small_steps * SMALL // LARGE
    lines = [
        "",
        "1. The loss in other units: accuracy of AdamW",
        f"   {'loss times':<12}{'epsilon 1e-08':>15}{'with OptimizerCalibration()':>32}",
        *(
            f"   {unit:<12g}{frozen:>15.1%}{f'{rescued:.1%}, epsilon {eps:g}':>32}"
            for unit, frozen, rescued, eps in units
        ),
        "",
        f"2. From {SMALL} to {LARGE} samples a step: {large_steps} steps in place of {small_steps:,}, loss of {SEEDS} seeds",
        f"   {'learning rate':<26}{'':>10}{'loss':>10}{'+-':>8}",
    ]
    best = min(by_rate, key=lambda rate: mean(by_rate[rate]))
    rows = [(name, rules[name], by_rule[name]) for name in rules] + [(f"best of {len(by_rate)}", best, by_rate[best])]
    rows.sort(key=lambda row: mean(row[2]))
    lines += [f"   {name:<26}{rate:>10.3g}{mean(loss):>10.3f}{stdev(loss):>8.3f}" for name, rate, loss in rows]
    ranked = [(name, mean(loss), stdev(loss)) for name, _, loss in rows if name in rules]
    _, least, spread = ranked[0]
    alike = [name for name, value, own in ranked if value - own <= least + spread]
    return "\n".join(
        [
            *lines,
            f"   The seeds do not tell these apart: {', '.join(alike)}." if len(alike) > 1 else f"   {alike[0]} won.",
            f"   That is one workload. The square root lost far more on another, the CNN in {EVIDENCE}",
            "",
            f"Pictures: {LOGS}/epsilon.png, {LOGS}/rate.png. Then `tensorboard --logdir {LOGS}`, and look first at",
            f"   images   gradient_magnitude_by_layer       of loss_times_{UNITS[-1]:g}: every layer's gradients",
            f"   images   calibration/epsilon_search_space  of loss_times_{UNITS[-1]:g}_calibrated: epsilon among them",
            f"   scalars  noise_scale/adam                  of batch_{SMALL}: what the larger rate was made from",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder with the four idx files of Fashion-MNIST")
    arguments = parser.parse_args()
    main(arguments.data_dir, epochs=1 if arguments.data_dir else 6)
