"""Tune epsilon where it matters: the calibration's probe finds the search space, Optuna tries it.

``python examples/tune_epsilon.py --trials 16 --epochs 5``. Each trial has a learning rate of its own, since a larger epsilon
shortens the step. Lightning's logged validation accuracy prunes trials, and tells which one was best.
"""

from __future__ import annotations

import argparse
import logging
import math

import lightning as L
import optuna
import torch
from digits import Classifier, Digits
from optuna_integration import PyTorchLightningPruningCallback

from lightning_gradhist import OptimizerCalibration

LEARNING_RATE = 3e-3
METRIC = "val_accuracy"


def fit(callback: L.Callback, data: Digits, lr: float = LEARNING_RATE, eps: float = 1e-8, **length: int) -> L.Trainer:
    """Trains from the same weights, on the same batches."""
    L.seed_everything(0, verbose=False)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], **quiet, **length)
    trainer.fit(Classifier(torch.optim.AdamW, lr=lr, eps=eps), data)
    return trainer


def choices(data: Digits) -> list[float]:
    """The present epsilon, and the powers of ten between which the optimizer feels another."""
    probe = OptimizerCalibration(probe_batches=len(data.train) // data.batch_size, apply=False)
    trainer = fit(probe, data, max_steps=1)
    space = probe.result.epsilon_range
    ends = [round(math.log10(end)) for end in (space.pooled_lower, space.pooled_upper)]
    present = trainer.optimizers[0].param_groups[0]["eps"]
    return sorted({present, *(float(f"1e{power}") for power in range(ends[0], ends[1] + 1))})


def tune(data: Digits, epsilons: list[float], trials: int, epochs: int) -> optuna.Study:
    """Tries each epsilon at the present learning rate, then the pairs that look best."""

    def objective(trial: optuna.Trial) -> float:
        eps = trial.suggest_categorical("eps", epsilons)
        lr = trial.suggest_float("lr", LEARNING_RATE / 10, LEARNING_RATE * 10, log=True)
        pruning = PyTorchLightningPruningCallback(trial, monitor=METRIC)
        return float(fit(pruning, data, lr, eps, max_epochs=epochs).callback_metrics[METRIC])

    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=len(epsilons), n_warmup_steps=epochs // 2),
    )
    for eps in epsilons:
        study.enqueue_trial({"eps": eps, "lr": LEARNING_RATE})
    study.optimize(objective, n_trials=trials)
    return study


def table(study: optuna.Study, epsilons: list[float]) -> str:
    """What each epsilon gave, at its best learning rate."""
    lines = [f"{'epsilon':>8}{'trials':>8}{'pruned':>8}{METRIC:>14}{'learning rate':>15}"]
    for eps in epsilons:
        tried = [trial for trial in study.trials if trial.params["eps"] == eps]
        whole = [trial for trial in tried if trial.state == optuna.trial.TrialState.COMPLETE]
        best = max(whole, key=lambda trial: trial.value, default=None)
        found = f"{best.value:>14.4f}{best.params['lr']:>15.3g}" if best else f"{'-':>14}{'-':>15}"
        lines.append(f"{eps:>8g}{len(tried):>8}{len(tried) - len(whole):>8}{found}")
    return "\n".join(lines)


def main(trials: int, epochs: int) -> None:
    """Finds the search space, tries it, and prints what was found."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    data = Digits(batch_size=64)
    epsilons = choices(data)
    study = tune(data, epsilons, trials, epochs)
    print(table(study, epsilons))
    print(f"best: eps {study.best_params['eps']:g}, lr {study.best_params['lr']:.3g}")
    print("Less of a difference than another seed makes is none.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=16, help="trainings; the first ones try each epsilon once")
    parser.add_argument("--epochs", type=int, default=5, help="of each trial that is not pruned")
    arguments = parser.parse_args()
    main(arguments.trials, arguments.epochs)
