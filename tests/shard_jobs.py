"""What runs on every rank in the tests of sharded optimizers."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import StateSpy, collectives, final_state, fit, loader
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_gradhist import ALTO, AdamE, EAdaptor, GradientHistogramMonitor, NoiseScale, OptimizerCalibration
from lightning_gradhist._dtensor import local
from lightning_gradhist.callbacks.gradients import local_gradient
from lightning_gradhist.callbacks.monitor import observer
from lightning_gradhist.callbacks.probe import copies
from lightning_gradhist.callbacks.probe.probe import Probe, pool
from lightning_gradhist.callbacks.probe.restore import no_trace
from lightning_gradhist.callbacks.strategies import replicas

OPTIMIZERS: dict[str, Any] = {
    "ALTO": lambda p: ALTO(p, lr=0.02, alpha=-5.0, explore_beta=0.99),
    "ALTO plain": lambda p: ALTO(p, lr=0.02, layerwise=False),
    "AdamE": lambda p: AdamE(p, lr=0.02, weight_decay=0.1),
    "EAdaptor": lambda p: EAdaptor(torch.optim.AdamW(p, lr=0.02), alpha=-5.0, explore_beta=0.9),
}
PARTLY = ("EAdaptor",)  # with layers that are not sharded among the others


def shard(module: nn.Module, mesh: Any, **options: Any) -> None:
    """``fully_shard``, with gradients that are averaged: FSDP2 of torch 2.8 asks gloo for averages and gets sums."""
    fully_shard(module, mesh=mesh, **options)
    if torch.__version__ < (2, 9):
        module.set_force_sum_reduction_for_comms(True)  # and divides them itself


def model() -> nn.Module:
    """Sizes that no number of ranks divides, and layers smaller than the number of ranks."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 2))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs, targets = torch.randn(16, 5, generator=generator), torch.randn(16, 2, generator=generator)
        optimizer.zero_grad()
        (module(inputs) - targets).square().mean().backward()
        optimizer.step()


def sharded(make: Any, partly: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = model()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in module:
        if isinstance(layer, nn.Linear) and not (partly and layer.in_features == 7):
            shard(layer, mesh)
    if not partly:
        shard(module, mesh)
    return module, make(module.parameters())


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in module.named_parameters()
    }


def trajectories(folder: Path) -> Any:
    """Weights after some steps, the collectives of one optimizer step, and the placements of the state."""
    found = {}
    for name, make in OPTIMIZERS.items():
        module, optimizer = sharded(make, name in PARTLY)
        train(module, optimizer, range(12))
        calls = sums_of(optimizer)
        states = [state["exp_avg_grad"] for state in optimizer.state.values()]
        empty = sum(local(state).numel() == 0 for state in states)
        same_placement = all(
            getattr(state, "placements", None) == getattr(param, "placements", None)
            for param, state in zip(optimizer.state, states, strict=True)
        )
        found[name] = (whole(module), calls, same_placement, empty)
    return found


def sums_of(optimizer: torch.optim.Optimizer) -> list[int]:
    """The sizes of the tables that a step adds up over ranks."""
    return [size for size, _ in collectives(optimizer.step)[1]]


def unused(folder: Path) -> Any:
    """A step in which a rank, and only that rank, has no gradient for a layer: the collective must still meet."""
    module, optimizer = sharded(OPTIMIZERS["ALTO"])
    train(module, optimizer, range(1))
    if torch.distributed.get_rank() == 0:
        module[2].bias.grad = None
    optimizer.step()
    return True


def saved(folder: Path) -> Any:
    module, optimizer = sharded(OPTIMIZERS["ALTO"])
    train(module, optimizer, range(6))
    weights, state = get_state_dict(module, optimizer)
    dcp.save({"module": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    train(module, optimizer, range(6, 12))
    return whole(module)


def loaded(folder: Path) -> Any:
    module, optimizer = sharded(OPTIMIZERS["ALTO"])
    weights, state = get_state_dict(module, optimizer)
    dcp.load({"module": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(module, optimizer, range(6, 12))
    return whole(module)


def flat(folder: Path) -> Any:
    """ALTO on what FSDP1 makes of the parameters, before it and after it: the weights, the collectives of a step, the pieces."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    os.environ.setdefault("LOCAL_RANK", "0")
    found: dict[str, Any] = {}
    for how in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "before"):
        module, optimizer = model(), None
        if how == "before":
            optimizer = OPTIMIZERS["ALTO"](module.parameters())
        strategy = ShardingStrategy["FULL_SHARD" if how == "before" else how]
        options = {"use_orig_params": True, "device_id": torch.device("cpu"), "sharding_strategy": strategy}
        policy = ModuleWrapPolicy({nn.Linear})
        wrapped = FSDP(module, auto_wrap_policy=policy, **options)
        optimizer = optimizer or OPTIMIZERS["ALTO"](wrapped.parameters())
        train(wrapped, optimizer, range(12))
        calls, sizes = sums_of(optimizer), [p.numel() for p in wrapped.parameters()]
        with FSDP.summon_full_params(wrapped):
            weights = {
                n.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for n, p in wrapped.named_parameters()
            }
        found[how] = (weights, calls, sizes)
    module = FSDP(model(), use_orig_params=False, device_id=torch.device("cpu"))
    try:
        ALTO(module.parameters())
    except TypeError as error:
        found["refused"] = str(error)
    AdamE(module.parameters())
    ALTO(module.parameters(), layerwise=False)
    return found


class Sharded(L.LightningModule):
    """Sizes that no number of ranks divides, layers smaller than it, and a layer that is not sharded."""

    def __init__(self, replicated: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 1), nn.Tanh())
        self.head = nn.Linear(1, 3)
        self.replicated = replicated

    def configure_model(self) -> None:
        mesh = self.device_mesh if self.replicated else self.device_mesh["data_parallel"]
        for layer in (self.body[0], self.body[2], self):
            shard(layer, mesh, ignored_params=set(self.head.parameters()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])

    def on_after_backward(self) -> None:
        for p in self.head.parameters():
            torch.distributed.all_reduce(p.grad)

    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        for p in self.parameters():  # torch's own clipping takes no mixture of sharded and whole tensors
            p.grad.clamp_(-1e-2, 1e-2)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class WholeSpy(L.Callback):
    """Gradients and second moments in whole, whatever holds them."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.moments: list[dict[str, Tensor]] = []
        self.shards: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        self.gradients.append({name: _whole(p.grad) for name, p in parameters.items()})
        states = {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}
        self.moments.append(
            {name: _whole(s["exp_avg_sq"]) / (1 - 0.999 ** float(_whole(s["step"]))) for name, s in states.items()}
        )
        self.shards = {n: p.grad.to_local().numel() for n, p in parameters.items() if isinstance(p, DTensor)}


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def monitored(folder: Path) -> Any:
    """Whole gradients and second moments of each step, beside what the monitor makes of shards."""
    ranks = torch.distributed.get_world_size()
    found = {}
    for name, replicated in (("sharded", False), ("replicated", True)):
        spy, state, monitor = WholeSpy(), StateSpy(), GradientHistogramMonitor(every_n_steps=2, optimizer_state=True)
        clipped = GradientHistogramMonitor(every_n_steps=2, noise_scale=False, when="after_clip", group_by=1)
        strategy = ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
        options = {"devices": ranks, "strategy": strategy, "max_steps": 6}
        callbacks = (monitor, clipped, spy, state)
        fit(folder / name, *callbacks, module=lambda r=replicated: Sharded(r), data=loader(4), **options)
        found[name] = (spy.gradients, spy.moments, monitor.noise_records[0].samples, spy.shards, state.seen)
    try:
        local, strategy = GradientHistogramMonitor(when="local"), ModelParallelStrategy(ranks, 1)
        fit(folder / "local", local, module=lambda: Sharded(False), data=loader(4), devices=ranks, strategy=strategy)
    except MisconfigurationException as error:
        found["local"] = str(error)
    mesh = init_device_mesh("cpu", (ranks,))
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(5), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(5), mesh, [Partial()])
    found["partial"] = local_gradient(parameter).tolist()
    return found


class Unreduced(Sharded):
    """Gradients that are still to be summed over the ranks, as those of some tensor-parallel layers."""

    def on_after_backward(self) -> None:
        super().on_after_backward()
        ranks = torch.distributed.get_world_size()
        for p in self.body.parameters():
            p.grad = DTensor.from_local(p.grad.full_tensor() / ranks, p.device_mesh, [Partial()])

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        for p in self.body.parameters():  # the optimizer takes them no other way
            p.grad = p.grad.redistribute(placements=p.placements)


def unreduced(folder: Path) -> Any:
    """Counts of such gradients, one rank having no memory to lay them out anew at one logged step."""
    ranks, original, spy = torch.distributed.get_world_size(), observer.local, WholeSpy()

    def fails(tensor: Tensor) -> Tensor:
        if torch.distributed.get_rank() == 1 and len(spy.gradients) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(tensor)

    observer.local = fails
    monitor = GradientHistogramMonitor(every_n_steps=2, noise_scale=False)
    strategy = ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
    options = {"devices": ranks, "strategy": strategy, "max_steps": 5, "module": lambda: Unreduced(False)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(folder / "unreduced", monitor, spy, data=loader(4), **options)
    observer.local = original
    return spy.gradients, [str(one.message) for one in caught if "could not" in str(one.message)]


class Whole(Sharded):
    """All of it sharded; noisy: BatchNorm, dropout, a large buffer, and on one rank a batch without a loss and one that fails."""

    def __init__(self, how: str) -> None:
        super().__init__(replicated=how == "replicated")
        self.noisy = how == "noisy"
        self.dropout, self.norm = nn.Dropout(0.1), nn.BatchNorm1d(3)
        self.register_buffer("bank", torch.zeros(copies.LARGE if self.noisy else 1))
        self.batches: list[Any] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh if self.replicated else self.device_mesh["data_parallel"]
        for layer in (self.body[0], self.body[2], self.head, self.norm):
            shard(layer, mesh)

    def logits(self, inputs: Tensor) -> Tensor:
        logits = self.head(self.body(inputs))
        return self.norm(self.dropout(logits)) if self.noisy else logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch)
        self.bank[0] += 1
        loss = nn.functional.cross_entropy(self.logits(batch[0]), batch[1])
        if self.noisy and self.global_rank == 0 and type(self.logger).__name__ == "SilentLogger":
            return {3: loss * float("inf"), 7: None}.get(batch_idx, loss)  # the last of the probe is no step
        return loss

    def on_after_backward(self) -> None:
        """Nothing is left to be averaged by hand."""

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is clipped."""


class ProbeSpy(L.Callback):
    """What a probe gives this rank of each gradient, and the batches; whether it left the module as it was."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        parameters = dict(pl_module.named_parameters())
        with no_trace(trainer, pl_module) as apart:
            probe = Probe(apart, lambda batch: float(len(batch[0])))
            self.parts = list(probe.gradients(8))
            self.batches, self.samples = list(pl_module.batches), probe.samples
            noise = NoiseScale(probe.parameters, batch_size=8)
            for index, gradients in enumerate(self.parts):
                if index == len(self.parts) // 2:
                    noise.split(eps=1e-3)
                noise.update(gradients)
            pool(noise, trainer)
        self.noise = noise.adam()
        self.weights = whole(pl_module)
        after = dict(pl_module.named_parameters())
        self.left = all(after[name] is p and p.grad is None for name, p in parameters.items())


def calibrated(folder: Path) -> Any:
    """Calibrations of a sharded model: what they find, and the weights of runs with and without one."""
    ranks = torch.distributed.get_world_size()
    found: dict[str, Any] = {}

    def run(name: str, module: Any, *callbacks: L.Callback) -> L.Trainer:
        strategy = ModelParallelStrategy(ranks, 1, process_group_backend="gloo")
        options = {"devices": ranks, "strategy": strategy, "max_steps": 2, "accumulate_grad_batches": 2}
        return fit(folder / name, *callbacks, module=module, data=loader(4), **options)

    for how in ("sharded", "replicated", "noisy"):
        calibration = OptimizerCalibration(ranks, probe_batches=8, apply=False)
        spy = ProbeSpy()
        states = [
            final_state(run(f"{how}/{len(callbacks)}", lambda h=how: Whole(h), *callbacks))["weights"]
            for callbacks in ((calibration, spy), ())
        ]
        states = [{n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in state.items()} for state in states]
        seen = {name: getattr(spy, name) for name in ("weights", "batches", "parts", "noise", "left")}
        found[how] = (calibration.result, states, seen)
    partly = OptimizerCalibration(learning_rate="keep")
    run("partly", lambda: Sharded(False), partly)
    found["partly"] = partly.result.problems
    return found


class Crossed(L.LightningModule):
    """Layers on both dimensions of a mesh, a norm and a head on the one of the data alone, and one on the other alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
        self.norm, self.narrow, self.head = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 3)
        self.batches: list[Any] = []

    def configure_model(self) -> None:
        mesh = self.device_mesh
        plan = {"body.0": ColwiseParallel(), "body.2": RowwiseParallel()}
        plan["narrow"] = ColwiseParallel(output_layouts=Replicate())
        parallelize_module(self, mesh["tensor_parallel"], plan)
        for layer in (self.body[0], self.body[2], self.norm, self.head):
            shard(layer, mesh["data_parallel"])

    def logits(self, inputs: Tensor) -> Tensor:
        return self.head(self.narrow(self.norm(self.body(inputs))))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches.append(batch)
        return nn.functional.cross_entropy(self.logits(batch[0]), batch[1])

    def on_after_backward(self) -> None:
        data = self.device_mesh["data_parallel"]
        for p in self.narrow.parameters():
            torch.distributed.all_reduce(local(p.grad), group=data.get_group())
            local(p.grad).div_(data.size())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, foreach=False)


class Tidy(Crossed):
    """Without the layer that FSDP2 does not have, whose gradients only the module can average."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.head = nn.Identity(), nn.Linear(5, 3)

    def configure_model(self) -> None:
        mesh = self.device_mesh
        parallelize_module(self.body, mesh["tensor_parallel"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        for layer in (self.body[0], self.body[2], self.norm, self.head):
            shard(layer, mesh["data_parallel"])

    def on_after_backward(self) -> None:
        """Nothing is left to be averaged."""


class Known(L.Callback):
    """How the ranks hold the gradients, as far as it is known."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = replicas(trainer)


def crossed(folder: Path) -> Any:
    """What the monitor makes of a mesh of two dimensions, and what a probe gives each rank."""
    options = {"devices": 4, "max_steps": 4}

    def run(name: str, module: Any, *callbacks: L.Callback) -> L.Trainer:
        strategy = ModelParallelStrategy(2, 2, process_group_backend="gloo")
        return fit(folder / name, *callbacks, module=module, data=loader(4), strategy=strategy, **options)

    spy, state, probe = WholeSpy(), StateSpy(), ProbeSpy()
    monitor = GradientHistogramMonitor(every_n_steps=2, optimizer_state=True)
    run("monitored", Tidy, monitor, spy, state)
    run("probed", Tidy, probe)
    known = Known()
    run("averaged by the module", Crossed, known)
    assert known.found is None
    seen = {name: getattr(probe, name) for name in ("weights", "batches", "parts", "noise", "samples", "left")}
    return spy.gradients, monitor.noise_records[0].samples, state.seen, seen


def trained(folder: Path) -> Any:
    """What needs nothing but processes, in the same ones."""
    return {"trajectories": trajectories(folder), "monitored": monitored(folder), "calibrated": calibrated(folder)}
