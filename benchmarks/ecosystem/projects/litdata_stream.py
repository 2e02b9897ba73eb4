"""A StreamingDataset of litdata with its StreamingDataLoader, which keeps a state of its own."""

from pathlib import Path

import lightning as L
import torch
from common import Module, options
from litdata import StreamingDataLoader, StreamingDataset, optimize
from torch import nn


def loss_of(module, batch):
    return nn.functional.cross_entropy(module.network(batch["x"]), batch["y"])


def sample(index):
    generator = torch.Generator().manual_seed(index)
    return {"x": torch.randn(8, generator=generator), "y": index % 3}


def train(callbacks, batch_factor, optimizer):
    folder = Path.cwd() / "stream"
    if not folder.exists():
        optimize(fn=sample, inputs=list(range(512)), output_dir=str(folder), num_workers=1, chunk_bytes="64KB")
    torch.manual_seed(0)
    module = Module(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), loss_of, optimizer)
    data = StreamingDataset(str(folder), shuffle=True, seed=0)
    loader = StreamingDataLoader(data, batch_size=8 * batch_factor, num_workers=0)
    L.Trainer(**options(callbacks)).fit(module, loader)
    return module
