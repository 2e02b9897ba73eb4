"""What runs on every rank in the tests of FSDP1, on the host: a subclass that passes a CPU where Lightning wants a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import FSDPStrategy
from shard_jobs import ProbeSpy, Whole
from support import final_state, fit, loader
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration

WAYS: dict[str, dict[str, Any]] = {
    "FULL_SHARD": {},
    "SHARD_GRAD_OP": {"sharding_strategy": "SHARD_GRAD_OP"},
    "NO_SHARD": {"sharding_strategy": "NO_SHARD"},
    "one unit": {"auto_wrap_policy": None},
    "flat": {"use_orig_params": False},
}


class OnHost(FSDPStrategy):
    """FSDPStrategy with gloo."""

    def __init__(self, **options: Any) -> None:
        super().__init__(process_group_backend="gloo", **{"auto_wrap_policy": {nn.Linear}, **options})

    def _setup_model(self, model: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision

        mixed = self.mixed_precision_config
        if mixed is not None:
            mixed = MixedPrecision(mixed.param_dtype, mixed.reduce_dtype, mixed.buffer_dtype)
        options = {**self.kwargs, "sharding_strategy": self.sharding_strategy, "mixed_precision": mixed}
        if str(self.sharding_strategy).endswith("HYBRID_SHARD"):  # as on two nodes
            options["device_mesh"] = init_device_mesh("cpu", (2, self.world_size // 2))
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


class Layers(L.LightningModule):
    """Sizes that no number of ranks divides, and a layer smaller than it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3))
        self.head = nn.Linear(3, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class PieceSpy(L.Callback):
    """This rank's pieces of the gradients, by name."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = {n.replace("_fsdp_wrapped_module.", ""): p for n, p in pl_module.named_parameters()}
        self.seen.append({n: p.grad.clone() if p.grad is not None else torch.zeros(0) for n, p in named.items()})


def run(folder: Path, *callbacks: L.Callback, way: dict[str, Any], **options: Any) -> L.Trainer:
    ranks, strategy = torch.distributed.get_world_size(), OnHost(**way)
    options = {"devices": ranks, "strategy": strategy, "max_steps": 5, "module": Layers, **options}
    return fit(folder, *callbacks, data=loader(4), **options)


def watched(folder: Path) -> dict[str, Any]:
    """Pieces of every way's gradients, and the noise that the monitor has measured."""
    found = {}
    for way in WAYS:
        spy, monitor = PieceSpy(), GradientHistogramMonitor(every_n_steps=2, optimizer_state=True)
        run(folder / way, monitor, spy, way=WAYS[way])
        found[way] = (spy.seen, monitor.noise_records[0].samples)
    spy = PieceSpy()
    accumulate = {"accumulate_grad_batches": 2, "precision": "bf16-mixed", "max_steps": 4}
    run(folder / "accumulated", GradientHistogramMonitor(every_n_steps=2), spy, way={}, **accumulate)
    found["accumulated"] = (spy.seen, [])
    return found


def hybrid(folder: Path) -> Any:
    """Pieces that two ranks of four hold each, and what probes find there and where each rank has its own."""
    spy = PieceSpy()
    run(folder, GradientHistogramMonitor(every_n_steps=2), spy, way={"sharding_strategy": "HYBRID_SHARD"}, max_steps=2)
    results = []
    for way in ("HYBRID_SHARD", "FULL_SHARD"):
        calibration = OptimizerCalibration(2, probe_batches=8)
        options: dict[str, Any] = {"module": lambda: Probed("hybrid"), "max_steps": 3}
        made = run(folder / way, calibration, way={"sharding_strategy": way}, **options)
        results.append((calibration.result, [p.detach().clone() for p in made.lightning_module.parameters()]))
    return spy.seen, results


class Probed(Whole):
    """With a buffer that mixed precision narrows; where it is noisy, without a loss in one batch and a bad one in another."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.register_buffer("shift", torch.full((8,), 1 / 3))

    def logits(self, inputs: Tensor) -> Tensor:
        return super().logits(inputs + self.shift)

    def configure_model(self) -> None:
        """FSDPStrategy cuts it up."""

    def configure_optimizers(self) -> Any:
        # FSDP1 gives what is not used gradients of zeros, which a decay would step
        return ALTO(self.parameters(), lr=1e-2, weight_decay=0.0, alpha=0.5, explore_beta=0.01)


PROBED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{way: (options, {}) for way, options in WAYS.items() if way != "flat"},
    **{f"noisy {way}": (WAYS[way], {}) for way in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD")},
    "noisy bf16": ({}, {"precision": "bf16-mixed"}),
}


def probed(folder: Path) -> dict[str, Any]:
    """Calibrations with a probe: what they find, and what runs with and without one end in."""
    found = {}
    for way, (options, more) in PROBED.items():
        calibration, spy = OptimizerCalibration(2, probe_batches=8, apply=False), ProbeSpy()
        module = lambda w=way: Probed(w.split()[0])  # noqa: E731
        more = {"accumulate_grad_batches": 2, "max_steps": 3, **more}
        ends = []
        for some in ((calibration, spy), ()):
            made = run(folder / way / str(len(some)), *some, way=options, **{**more, "module": module})
            pieces = [p.detach().clone() for p in made.lightning_module.parameters()]
            ends.append({**final_state(made), "pieces": pieces})
        seen = {name: getattr(spy, name) for name in ("batches", "parts", "noise", "left")}
        found[way] = (calibration.result, ends, seen)
    flat = OptimizerCalibration()
    run(folder / "flat", flat, way=WAYS["flat"], max_steps=1)
    return {**found, "flat": flat.result.problems}


def calibrated(folder: Path) -> dict[str, Any]:
    """A calibration from the record of a run under FSDP1."""
    monitor = GradientHistogramMonitor(every_n_steps=1)
    run(folder / "first", monitor, way={}, max_epochs=3, max_steps=-1)
    record = folder / "first" / "calibration.json"
    known = OptimizerCalibration(reference=str(record), learning_rate="sqrt")
    second = run(folder / "second", known, way={}, accumulate_grad_batches=4, max_steps=2)
    rate = second.optimizers[0].param_groups[0]["lr"]
    return {"rate": rate, "ratio": known.result.ratio}
