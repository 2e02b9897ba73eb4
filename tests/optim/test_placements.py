"""Where DTensors lie, told without other ranks: torch's own process group that does nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_gradhist._dtensor import placed_as
from lightning_gradhist.optim._sharding import _sharded_dims, is_sharded


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    if distributed.is_initialized():  # of an earlier test in this process
        distributed.destroy_process_group()
    distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    distributed.destroy_process_group()


def test_fsdp2_over_tensor_parallelism_is_sharded_over_both(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    fully_shard(model, mesh=mesh["data"])
    dims = {name: _sharded_dims(param) for name, param in model.named_parameters() if isinstance(param, DTensor)}
    assert dims == {"0.weight": (0, 1), "0.bias": (0, 1), "1.weight": (0, 1), "1.bias": (0,)}
    assert all(map(is_sharded, model.parameters()))


def test_a_gradient_is_laid_out_as_its_parameter(mesh: DeviceMesh) -> None:
    param = DTensor.from_local(torch.ones(4), mesh, [Replicate(), Replicate()])
    pending = DTensor.from_local(torch.ones(4), mesh, [Partial(), Replicate()])
    placed = placed_as(pending, param)
    assert isinstance(placed, DTensor) and placed.placements == param.placements
    sharded = DTensor.from_local(torch.ones(2), mesh, [Shard(0), Replicate()])
    assert placed_as(sharded, sharded) is sharded
