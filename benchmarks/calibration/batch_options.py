"""What ``adapt`` and ``scale_with_batch`` do to the final loss when the best rate is carried to another batch size.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/batch_options.py``. The best rate of Adam at one batch size,
from ``results/calibration``, is carried to one 16 times larger or smaller by ``OptimizerCalibration`` with its default law
in a real Trainer, with and without each option. Equal samples, warm-up over 5% of the steps and linear decay, two
micro-batches a step, one thread. It can be stopped at any time and goes on where it was; a transfer that was begun keeps its
rate. Columns, one row for each run:

- ``arm``: which option, and ``against``: the arm that it is compared with.
- ``batch_size``, ``reference_batch_size``, ``learning_rate``: the last is that of the reference.
- ``ratio``: of the rates, at the start of the run; ``last_ratio``: at its end.
- ``train_loss``, ``test_loss``: at the end of the run, as in ``results/calibration``.

``record`` arms take the noise scale from a run at the reference, ``probe`` arms from a probe at the start.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import rows as tables
import torch
from grid import FOLDER, best, losses, rate
from grid import read as read_grid
from measuring import machine, print_table
from torch import Tensor
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from training import EPS, Run, evaluate, schedule
from workloads import FASHION_MNIST, WORKLOADS, Workload

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration

COLUMNS = [
    *(
        "workload",
        "reference_batch_size",
        "batch_size",
        "arm",
        "against",
        "seed",
        "learning_rate",
        "ratio",
        "last_ratio",
    ),
    *("steps", "train_loss", "test_loss", "seconds", "date", "device", "cpu", "cores", "threads", "python", "torch"),
    "lightning_gradhist",
]
TRANSFERS = {
    "mlp": ((8, 128), (32, 512), (128, 8), (512, 32)),
    "gpt": ((16, 256), (256, 16)),
}
_EVALUATED = 2048
_MICRO_BATCHES = 2
_MEASUREMENTS = 2048


@dataclass(frozen=True)
class Arm:
    """One way to carry a rate.

    Attributes:
        against: name of the arm that differs by the option alone; its own name for those that have none.
        optimizer: what Adam, or with weight decay AdamW, is told beside the rate.
        calibration: what the calibration is told beside the reference.
        record: whether the reference is a recorded run, not only its batch size.
    """

    against: str
    optimizer: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    record: bool = True


_DECAY, _EPS = {"weight_decay": 0.1}, {"eps": 1e-4}
ARMS = {
    "record": Arm("record"),
    "record, betas": Arm("record", calibration={"scale_with_batch": ["betas"]}),
    "record, warmup": Arm("record", calibration={"adapt": "warmup"}),
    "record, always": Arm("record", calibration={"adapt": "always"}),
    "probe": Arm("record", record=False),
    "probe, warmup": Arm("probe", calibration={"adapt": "warmup"}, record=False),
    "probe, always": Arm("probe", calibration={"adapt": "always"}, record=False),
    "eps 1e-4": Arm("eps 1e-4", _EPS),
    "eps 1e-4, eps": Arm("eps 1e-4", _EPS, {"scale_with_batch": ["eps"]}),
    "decay 0.1": Arm("decay 0.1", _DECAY),
    "decay 0.1, weight_decay": Arm("decay 0.1", _DECAY, {"scale_with_batch": ["weight_decay"]}),
}


class Samples(Dataset):
    """Tensors from which a loader takes a whole batch at once.

    Args:
        tensors: inputs and classes, ``[n, ...]``.
    """

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        """Those of some samples."""
        return tuple(tensor[indices] for tensor in self.tensors)


class Module(L.LightningModule):
    """A workload's model under Adam, or AdamW where there is a decay.

    Args:
        workload: whose model is made, from torch's global random numbers.
        steps: of the run.
        learning_rate: at its highest.
        options: further ones of the optimizer.
    """

    def __init__(self, workload: Workload, steps: int, learning_rate: float, options: dict[str, float]) -> None:
        super().__init__()
        self.model = workload.make_model()
        self.steps, self.options = steps, {"lr": learning_rate, "eps": EPS["Adam"], **options}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Mean cross-entropy."""
        inputs, classes = batch
        return functional.cross_entropy(self.model(inputs).flatten(0, -2), classes.flatten())

    def configure_optimizers(self) -> Any:
        """With the grid's schedule."""
        kind = torch.optim.AdamW if "weight_decay" in self.options else torch.optim.Adam
        optimizer = kind(self.parameters(), **self.options)  # type: ignore[arg-type]
        scheduler = LambdaLR(optimizer, lambda step: schedule(step, self.steps) if step < self.steps else 0.0)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fit(
    workload: Workload, batch_size: int, seed: int, module_options: tuple[float, dict[str, float]], *callbacks: L.Callback,
    data_dir: Path, folder: Path,
) -> Module:  # fmt: skip
    """Trains a workload at equal samples."""
    L.seed_everything(seed, verbose=False)
    steps = workload.samples // batch_size
    module = Module(workload, steps, *module_options)
    micro_batch = batch_size // _MICRO_BATCHES
    samples = Samples(workload.load(data_dir).train.tensors)
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    made = L.Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_steps=steps, max_epochs=-1, default_root_dir=folder,
        accumulate_grad_batches=_MICRO_BATCHES, **quiet,
    )  # fmt: skip
    made.fit(module, DataLoader(samples, micro_batch, shuffle=True, drop_last=True, collate_fn=_as_it_is))
    return module


def measure(
    workload: Workload, sizes: tuple[int, int], arm: str, seed: int, learning_rate: float, record: Path, data_dir: Path
) -> dict[str, Any]:
    """One run, as a row."""
    start, (reference, batch_size), chosen = perf_counter(), sizes, ARMS[arm]
    given: dict[str, Any] = {"reference": str(record)} if chosen.record else {"reference_batch_size": reference}
    calibration = OptimizerCalibration(epsilon="keep", **given, **chosen.calibration)
    callbacks: list[L.Callback] = [calibration]
    if "adapt" in chosen.calibration:
        every = max(1, workload.samples // batch_size // _MEASUREMENTS)
        callbacks.append(GradientHistogramMonitor(every_n_steps=every, group_by=lambda name: "model"))
    options = (learning_rate, chosen.optimizer)
    module = fit(workload, batch_size, seed, options, *callbacks, data_dir=data_dir, folder=record.parent / "run")
    assert calibration.result is not None
    adapted, data = calibration.state_dict()["adapted"], workload.load(data_dir)
    return {
        **{"workload": workload.name, "reference_batch_size": reference, "batch_size": batch_size, "arm": arm},
        **{"against": chosen.against, "seed": seed, "learning_rate": learning_rate, "ratio": calibration.result.ratio},
        "last_ratio": adapted["value"] if adapted else calibration.result.ratio,
        "steps": workload.samples // batch_size,
        "train_loss": evaluate(module.model, data.train.tensors, _EVALUATED)[0],
        "test_loss": evaluate(module.model, data.test.tensors, _EVALUATED)[0],
        "seconds": round(perf_counter() - start, 2),
    }


def recorded(workload: Workload, batch_size: int, learning_rate: float, folder: Path, data_dir: Path) -> Path:
    """The record of a run at the reference, of a seed that no other run has."""
    every = max(1, workload.samples // batch_size // _MEASUREMENTS)
    monitor = GradientHistogramMonitor(every_n_steps=every, group_by=lambda name: "model")
    fit(workload, batch_size, 1000, (learning_rate, {}), monitor, data_dir=data_dir, folder=folder)
    return folder / "calibration.json"


def compared(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each option and transfer the mean difference of the final loss, seed by seed, and its standard error."""
    by = {(r["workload"], r["reference_batch_size"], r["batch_size"], r["arm"], r["seed"]): r for r in rows}
    found: dict[tuple[Any, ...], list[tuple[float, ...]]] = {}
    for (*transfer, arm, seed), row in by.items():
        base = by.get((*transfer, row["against"], seed))
        if arm != row["against"] and base is not None:
            train, test = (row[name] - base[name] for name in ("train_loss", "test_loss"))
            found.setdefault((*transfer, arm, row["against"]), []).append(
                (base["train_loss"], train, test, row["last_ratio"] / row["ratio"])
            )
    table = []
    for (workload, reference, batch_size, arm, against), values in found.items():
        base, train, test, moved = (statistics.fmean(column) for column in zip(*values, strict=True))
        train_error, test_error = (_standard_error([value[column] for value in values]) for column in (1, 2))
        table.append(
            {
                **{"workload": workload, "from": reference, "to": batch_size, "arm": arm, "against": against},
                **{"loss against": f"{base:.4f}", "difference": f"{train:+.4f}", "error": f"{train_error:.4f}"},
                **{"of the test loss": f"{test:+.4f}", "its error": f"{test_error:.4f}"},
                **{"rate moved by": f"{moved:.2f}", "seeds": len(values)},
            }
        )
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measures, writes after every run, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", nargs="+", choices=list(TRANSFERS), default=list(TRANSFERS))
    parser.add_argument("--arm", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--grid", type=Path, default=FOLDER, help="folder of the grid's tables")
    parser.add_argument("--folder", type=Path, default=Path("lightning_logs"), help="where the records go")
    parser.add_argument("--output", type=Path, default=FOLDER.parent / "batch_options.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows = tables.read(options.output)
    for workload in (WORKLOADS[name] for name in options.workload):
        for sizes in TRANSFERS[workload.name]:
            begun = {(r["arm"], r["seed"]): r for r in rows if _transfer(r) == (workload.name, *sizes)}
            missing = [(arm, seed) for seed in range(options.seeds) for arm in options.arm if (arm, seed) not in begun]
            if not missing:
                continue
            learning_rate = next((r["learning_rate"] for r in begun.values()), None) or _best_rate(
                workload, sizes[0], options.grid
            )
            folder = options.folder / f"{workload.name}_{sizes[0]}"
            record = recorded(workload, sizes[0], learning_rate, folder, options.data_dir)
            for arm, seed in missing:
                row = measure(workload, sizes, arm, seed, learning_rate, record, options.data_dir)
                rows.append({**row, **machine(torch.device("cpu"))})
                tables.write(options.output, COLUMNS, rows)
    found = compared(rows)
    print_table(found, list(found[0]) if found else [])


def _transfer(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["workload"], row["reference_batch_size"], row["batch_size"]


def _best_rate(workload: Workload, batch_size: int, grid: Path) -> float:
    """That of the grid's runs of Adam at equal samples."""
    like = Run(workload.name, "Adam", batch_size, 1.0, EPS["Adam"], 0, workload.samples)
    top = best(losses(read_grid(grid / f"{workload.name}.csv"), like))
    if top is None:
        raise SystemExit(f"{grid} has no run of {workload.name} at batch size {batch_size}; make the grid first")
    return rate(top)


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _as_it_is(batch: Any) -> Any:
    return batch


if __name__ == "__main__":
    main()
