"""What runs on every rank in the tests of sharded optimizers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_gradhist import ALTO, AdamE

OPTIMIZERS: dict[str, Any] = {
    "ALTO": lambda p: ALTO(p, lr=0.02, alpha=-5.0, explore_beta=0.99),
    "ALTO plain": lambda p: ALTO(p, lr=0.02, layerwise=False),
    "AdamE": lambda p: AdamE(p, lr=0.02, weight_decay=0.1),
}


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


def sharded(make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = model()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in module:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
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
        module, optimizer = sharded(make)
        train(module, optimizer, range(12))
        calls: list[int] = []
        original = torch.distributed.all_reduce
        torch.distributed.all_reduce = lambda table, *a, **k: (calls.append(table.numel()), original(table, *a, **k))[1]  # noqa: B023
        try:
            optimizer.step()
        finally:
            torch.distributed.all_reduce = original
        states = [state["exp_avg_grad"] for state in optimizer.state.values()]
        empty = sum(state.to_local().numel() == 0 for state in states)
        same_placement = all(
            isinstance(state, DTensor) and state.placements == param.placements
            for param, state in zip(optimizer.state, states, strict=True)
        )
        found[name] = (whole(module), calls, same_placement, empty)
    return found


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
    """What FSDP1 makes of the parameters, with and without the original ones."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    os.environ.setdefault("LOCAL_RANK", "0")
    found = {}
    for use_orig_params in (True, False):
        module = FullyShardedDataParallel(model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        try:
            ALTO(module.parameters())
            found[use_orig_params] = "accepted"
        except TypeError as error:
            found[use_orig_params] = str(error)
        AdamE(module.parameters())
        ALTO(module.parameters(), layerwise=False)
    return found
