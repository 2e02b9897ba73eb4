"""What runs on every rank in the tests of DeepSpeed, on the host: a subclass that passes a CPU where Lightning wants a GPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which asks once

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from support import StateSeen, dataset, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks._deepspeed import grouped_parameters, unwrapped, zero_slots

STAGES = (1, 2, 3)


class OnHost(DeepSpeedStrategy):
    """DeepSpeedStrategy with gloo."""

    def __init__(self, **options: Any) -> None:
        super().__init__(process_group_backend="gloo", **options)
        self.config["zero_force_ds_cpu_optimizer"] = False  # which has to be compiled

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)  # DeepSpeed wants an index

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Layers(L.LightningModule):
    """Sizes that no number of ranks divides, a parameter of one value, a frozen layer, and two groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
        self.head = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(3, 3).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = self.frozen(self.body(batch[0]))
        return nn.functional.cross_entropy(self.head(inputs * self.scale), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [{"params": list(self.body.parameters())}, {"params": [*self.head.parameters(), self.scale]}]
        return torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)


class Scheduled(Layers):
    """A rate that falls from step to step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class WithALTO(Layers):
    """An optimizer that needs the norm of each layer."""

    def configure_optimizers(self) -> Any:
        return ALTO(self.parameters(), lr=1e-2)


class RateSpy(L.Callback):
    """The rate of each group at each step that ZeRO makes."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizer = unwrapped(trainer.optimizers[0])
        optimizer.register_step_pre_hook(lambda one, *_: self.rates.append([g["lr"] for g in one.param_groups]))


class WholeSpy(L.Callback):
    """Gradients and weights in whole, as DeepSpeed's own functions put them together, and Adam's second moment of them.

    That of DeepSpeed itself cannot be asked for where there are several groups: it knows the first group's alone.
    """

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.seen = StateSeen()
        self._moments: dict[str, Tensor] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not trainer.strategy.model.is_gradient_accumulation_boundary():
            return
        from deepspeed.utils import safe_get_full_grad

        self._look(pl_module)
        self.gradients.append({n: safe_get_full_grad(p).clone() for n, p in _trained(pl_module)})
        for name, gradient in self.gradients[-1].items():
            before = self._moments.get(name, torch.zeros_like(gradient))
            self._moments[name] = before.mul(0.999).addcmul(gradient, gradient, value=1 - 0.999)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._look(pl_module)

    def _look(self, module: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param

        correction = 1 - 0.999 ** len(self.gradients)
        self.seen.weights.append({n: safe_get_full_fp32_param(p).clone().double() for n, p in _trained(module)})
        self.seen.roots.append({n: (v / correction).sqrt() for n, v in self._moments.items()})


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def run(folder: Path, *callbacks: L.Callback, strategy: dict[str, Any], **options: Any) -> L.Trainer:
    """A run on all ranks: each has its part of every batch that :func:`alone` has."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = [index for index in range(128) if index % 8 // (8 // ranks) == rank]
    options = {"devices": ranks, "strategy": OnHost(**strategy), "max_steps": 5, "module": Layers, **options}
    data = DataLoader(Subset(dataset(), mine), 8 // ranks)
    return fit(folder, *callbacks, data=data, use_distributed_sampler=False, **options)


def alone(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """The same run in one process."""
    options = {"devices": 1, "max_steps": 5, "module": Layers, **options}
    return fit(folder, *callbacks, data=DataLoader(dataset(), 8), **options)


def collectives(job: Any) -> tuple[Any, list[tuple[int, str]]]:
    """What a job returns, and the sums over ranks that it asked for."""
    original, asked = torch.distributed.all_reduce, []

    def all_reduce(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        asked.append((tensor.numel(), str(tensor.dtype)))
        return original(tensor, *rest, **options)

    torch.distributed.all_reduce = all_reduce
    try:
        return job(), asked
    finally:
        torch.distributed.all_reduce = original


def watched(folder: Path) -> dict[int, Any]:
    """What DeepSpeed has, the noise that the monitor has measured, and the collectives, by stage."""
    found = {}
    for stage in STAGES:
        spy, monitor = WholeSpy(), GradientHistogramMonitor(every_n_steps=2, optimizer_state=True)
        one = lambda: run(folder / str(stage), monitor, spy, strategy={"stage": stage})  # noqa: B023, E731
        made, asked = collectives(one)
        names = [p for group in grouped_parameters(made.optimizers[0]) for p in group]
        found[stage] = {
            "gradients": spy.gradients,
            "state": spy.seen,
            "samples": monitor.noise_records[0].samples,
            "collectives": asked,
            "parameters": len(names),
        }
    return found


def _own_state(made: L.Trainer) -> list[Tensor]:
    """Weights and state of this rank, without what DeepSpeed has padded, which it leaves as the memory was."""
    optimizer: Any = made.optimizers[0]
    found = []
    for slot in zero_slots(optimizer, dict(_trained(made.lightning_module))).values():
        state = unwrapped(optimizer).state[slot.flat]
        found += [slot.of(tensor).clone() for tensor in (slot.flat, state["exp_avg"], state["exp_avg_sq"])]
    return found


def invisible(folder: Path) -> dict[int, Any]:
    """What this rank ends with, with the monitor and without it, by stage."""
    found = {}
    for stage in STAGES:
        monitor = GradientHistogramMonitor(every_n_steps=1, optimizer_state=True)
        made = [run(folder / f"{stage}{len(c)}", *c, strategy={"stage": stage}) for c in ([monitor], [])]
        found[stage] = [_own_state(one) for one in made]
    return found


def calibrated(folder: Path) -> dict[int, Any]:
    """Rates from the record of a run under ZeRO and of one in one process, and what a calibration without one says."""
    found = {}
    for stage in STAGES:
        strategy, place = {"stage": stage}, folder / str(stage)
        run(place / "first", GradientHistogramMonitor(every_n_steps=1), strategy=strategy, max_epochs=3, max_steps=-1)
        record = str(place / "first" / "calibration.json")
        known = OptimizerCalibration(reference=record, learning_rate="sqrt", epsilon=1e-7)
        options: dict[str, Any] = {"strategy": strategy, "max_steps": 3, "accumulate_grad_batches": 4}
        before, made = RateSpy(), run(place / "second", known, module=Scheduled, **options)
        spy = RateSpy()
        run(
            place / "third",
            OptimizerCalibration(reference=record, learning_rate="sqrt"),
            spy,
            module=Scheduled,
            **options,
        )
        run(place / "plain", before, module=Scheduled, **options)
        unknown, layerwise = OptimizerCalibration(reference_batch_size=8), OptimizerCalibration(reference=record)
        run(place / "fourth", unknown, strategy=strategy, max_steps=2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(place / "fifth", layerwise, module=WithALTO, strategy=strategy, max_steps=2)
        found[stage] = {
            "ratio": known.result.ratio,
            "groups": [{"lr": g["lr"], "eps": g["eps"]} for g in unwrapped(made.optimizers[0]).param_groups],
            "rates": (before.rates, spy.rates),
            "problems": unknown.result.problems,
            "layerwise": [str(one.message) for one in caught if "OptimizerCalibration" in str(one.message)],
        }
    return found
