"""What runs on every rank in the tests of DeepSpeed, on the host: a subclass that passes a CPU where Lightning wants a GPU."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"  # before DeepSpeed is imported, which asks once

import fsdp1_jobs
import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import StateSeen, collectives, dataset, fit
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks._deepspeed import grouped_parameters, unwrapped, zero_slots

STAGES = (1, 2, 3)
try:
    from deepspeed.accelerator import get_accelerator

    FP16 = ["fp16"] if get_accelerator().is_fp16_supported() else []  # by few processors, as DeepSpeed has it
except ImportError:  # doctests are looked for here without it, too
    FP16 = []


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
        import deepspeed

        # It would be compiled for inference, behind a lock that a killed run leaves for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class Layers(fsdp1_jobs.Layers):
    """With a parameter of one value, a frozen layer, and two groups."""

    def __init__(self) -> None:
        super().__init__()
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


class Noisy(Layers):
    """With dropout, a loss that is missing in one batch of a probe, and one that is not finite in another."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step((nn.functional.dropout(batch[0], 0.1), batch[1]), batch_idx)
        if type(self.logger).__name__ == "SilentLogger" and self.global_rank == 0:
            return {3: loss * float("inf"), 7: None}.get(batch_idx, loss)
        return loss


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
        gradients = {name: safe_get_full_grad(parameter).float() for name, parameter in _trained(pl_module)}
        self.gradients.append({name: gradient / optimizer.loss_scale for name, gradient in gradients.items()})
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


def run(folder: Path, *callbacks: L.Callback, strategy: Any, **options: Any) -> L.Trainer:
    """A run on all ranks: each has its part of every batch that :func:`alone` has."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    strategy = OnHost(**strategy) if isinstance(strategy, dict) else strategy
    mine = [index for index in range(128) if index % 8 // (8 // ranks) == rank]
    options = {"devices": ranks, "strategy": strategy, "max_steps": 5, "module": Layers, **options}
    data = DataLoader(Subset(dataset(), mine), 8 // ranks)
    return fit(folder, *callbacks, data=data, use_distributed_sampler=False, **options)


def alone(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    """The same run in one process."""
    options = {"devices": 1, "max_steps": 5, "module": Layers, **options}
    return fit(folder, *callbacks, data=DataLoader(dataset(), 8), **options)


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
            run(place / "fifth", layerwise, GradientHistogramMonitor(), module=WithALTO, strategy=strategy, max_steps=2)
        found[stage] = {
            "ratio": known.result.ratio,
            "groups": [{"lr": g["lr"], "eps": g["eps"]} for g in unwrapped(made.optimizers[0]).param_groups],
            "rates": (before.rates, spy.rates),
            "problems": unknown.result.problems,
            "layerwise": [str(one.message) for one in caught if "ALTO(" in str(one.message)],
        }
    return found


def probed(folder: Path) -> dict[str, Any]:
    """Calibrations with a probe in stages 1 and 2, and what runs with and without one end in."""
    found: dict[str, Any] = {}
    for way in ("stage 1", "stage 2", "bf16", *FP16, "offloaded", "noisy"):
        calibrations, ends = [OptimizerCalibration(2, probe_batches=8, apply=apply) for apply in (False, True)], []
        strategy = {"stage": 1 if way == "stage 1" else 2, "offload_optimizer": way == "offloaded"}
        options: dict[str, Any] = {"strategy": strategy, "max_steps": 3, "module": Noisy if way == "noisy" else Layers}
        options["precision"] = {"bf16": "bf16-mixed", "fp16": "16-mixed"}.get(way, "32-true")
        for callbacks in ([calibrations[0]], [], [calibrations[1]]):
            made = run(folder / way / str(len(ends)), *callbacks, **options)
            ends.append(_own_state(made))
        groups = [group["eps"] for group in unwrapped(made.optimizers[0]).param_groups]
        found[way] = {"ends": ends[:2], "result": calibrations[0].result, "epsilon": calibrations[1].result.epsilon}
        found[way]["groups"] = groups
    refused = OptimizerCalibration(2)
    run(folder / "accumulated", refused, strategy={"stage": 2}, accumulate_grad_batches=2, max_steps=1)
    plain = OptimizerCalibration(2, probe_batches=8, apply=False)
    run(folder / "ddp", plain, strategy="ddp", max_steps=1)
    return {**found, "accumulated": refused.result.problems, "ddp": plain.result}


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "accumulated over the end of an epoch": ({"stage": 2}, {"accumulate_grad_batches": 2, "limit_train_batches": 5}),
    "accumulated in stage 1": ({"stage": 1}, {"accumulate_grad_batches": 2}),
    "accumulated in stage 3": ({"stage": 3}, {"accumulate_grad_batches": 2}),
    "clipped": ({"stage": 2}, {"gradient_clip_val": 0.1}),
    "clipped in stage 3": ({"stage": 3}, {"gradient_clip_val": 0.1}),
    **{f"bf16 in stage {stage}": ({"stage": stage}, {"precision": "bf16-mixed"}) for stage in STAGES},
    "bf16-true": ({"stage": 2}, {"precision": "bf16-true"}),
    **{
        f"{fp16} in stage {stage}": ({"stage": stage, "initial_scale_power": 18}, {"precision": "16-mixed"})
        for fp16 in FP16
        for stage in STAGES
    },
    "offloaded": ({"stage": 2, "offload_optimizer": True}, {}),
    "offloaded in stage 3": ({"stage": 3, "offload_optimizer": True}, {}),
    "small sub groups": ({"stage": 3, "sub_group_size": 10}, {}),
}


def ways(folder: Path) -> dict[str, Any]:
    """Whole gradients, without the loss scale, and the steps that DeepSpeed made and left out."""
    found = {}
    for name, (strategy, options) in WAYS.items():
        spy, monitor = WholeSpy(), GradientHistogramMonitor(every_n_steps=1, optimizer_state=True)
        options = {"max_epochs": 3, "max_steps": 6, **options}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made = run(folder / name, monitor, spy, strategy=strategy, **options)
        engine: Any = made.strategy.model
        found[name] = {
            "gradients": spy.gradients,
            "steps": (engine.global_steps, engine.skipped_steps),
            "samples": monitor.noise_records[0].samples,
            "warned": [str(one.message) for one in caught if "could not" in str(one.message)],
        }
    return found


class Made(Layers):
    """Layers that stage 3 cuts up as they are made."""

    def __init__(self) -> None:
        L.LightningModule.__init__(self)

    def configure_model(self) -> None:
        for name, part in [*Layers().named_children(), ("scale", nn.Parameter(torch.ones(1)))]:
            setattr(self, name, part)


class Manual(Layers):
    """Two steps a batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for _ in range(2):
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class Unused(Layers):
    """A layer that no loss comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def modules(folder: Path) -> dict[str, Any]:
    """Gradients of unusual modules in each stage."""
    found = {}
    for stage in STAGES:
        for module in (Made, Manual, Unused):
            spy, monitor = WholeSpy(), GradientHistogramMonitor(every_n_steps=1, optimizer_state=True, batch_size=8)
            run(folder / f"{module.__name__}{stage}", monitor, spy, strategy={"stage": stage}, module=module)
            found[f"{module.__name__}{stage}"] = spy.gradients
    return found


def refused(folder: Path) -> dict[str, str]:
    """What is said of what cannot be had."""
    found = {}
    for name, monitor, stage in (
        ("stage 0", GradientHistogramMonitor(), 0),
        ("local", GradientHistogramMonitor(when="local"), 2),
        ("after_clip", GradientHistogramMonitor(when="after_clip"), 2),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                run(folder / name, monitor, strategy={"stage": stage})
                found[name] = "".join(str(one.message) for one in caught if "is off" in str(one.message))
            except MisconfigurationException as error:
                found[name] = str(error)
    return found
