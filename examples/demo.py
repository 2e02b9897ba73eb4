"""The main job, end to end: watch a reference run on two ranks, then calibrate a larger batch from its record.

``python examples/demo.py`` trains on scikit-learn's handwritten digits; with ``--data-dir`` and the four idx files of
Fashion-MNIST on those.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import lightning as L
import torch
from digits import Classifier, Digits
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration

RANKS = 2
REFERENCE_BATCH = 64


def train(name: str, module: L.LightningModule, data: Digits, epochs: int, callbacks: list[L.Callback]) -> L.Trainer:
    """Trains with DDP on two CPU processes, and logs to ``demo_logs/<name>``."""
    trainer = L.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=TensorBoardLogger("demo_logs", name=name),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return trainer


def accuracy(trainer: L.Trainer) -> float:
    """Validation accuracy after the last epoch, over both ranks."""
    return float(trainer.callback_metrics["val_accuracy"])


def main(data_dir: str | None, large_batch: int, epochs: int, every: int) -> None:
    """Runs the reference, then the large batch from its record, and prints what was found."""
    if "LOCAL_RANK" not in os.environ:  # Lightning sets it for the second process, which runs this file too
        shutil.rmtree("demo_logs", ignore_errors=True)
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    reference = train(
        "reference",
        Classifier(torch.optim.AdamW, lr=3e-3),
        Digits(REFERENCE_BATCH // RANKS, data_dir),
        epochs,
        [GradientHistogramMonitor(every_n_steps=every)],
    )
    record = Path(reference.log_dir) / "calibration.json"

    L.seed_everything(0, verbose=False)
    data = Digits(large_batch // RANKS, data_dir)
    probe_batches = min(32, len(data.train) // large_batch)
    calibration = OptimizerCalibration(reference=str(record), probe_batches=probe_batches)
    large = train(
        "large_batch",
        Classifier(ALTO, lr=0.03),
        data,
        epochs,
        [calibration, GradientHistogramMonitor(every_n_steps=every)],
    )
    if large.is_global_zero:
        print(f"\n{calibration.result.to_text()}\n")
        rows = [("AdamW", REFERENCE_BATCH, reference), ("ALTO, calibrated", large_batch, large)]
        print(f"{'optimizer':<18}{'samples a step':>15}{'steps':>8}{'validation accuracy':>21}")
        for name, batch, trainer in rows:
            print(f"{name:<18}{batch:>15}{trainer.global_step:>8}{accuracy(trainer):>21.4f}")
        print(
            "\nThe large batch took fewer steps over the same data; its learning rate was set from the record, not tuned."
        )
        print("Look at the gradients:  tensorboard --logdir demo_logs")
    torch.distributed.destroy_process_group()  # else a thread of gloo may still run at exit, and torch then aborts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="folder with the four idx files of Fashion-MNIST")
    arguments = parser.parse_args()
    if arguments.data_dir:
        main(arguments.data_dir, large_batch=1024, epochs=2, every=10)
    else:
        main(None, large_batch=256, epochs=15, every=5)
