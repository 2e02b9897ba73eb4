"""A StreamingDataset of litdata with its StreamingDataLoader, which keeps a state of its own."""

from pathlib import Path

import lightning as L
import torch
from common import optimizer_of, options
from litdata import StreamingDataLoader, StreamingDataset, optimize
from torch import nn


class Module(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.chosen = optimizer
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.body(batch["x"]), batch["y"])

    def configure_optimizers(self):
        return optimizer_of(self.chosen, self.parameters())


def sample(index):
    generator = torch.Generator().manual_seed(index)
    return {"x": torch.randn(8, generator=generator), "y": index % 3}


def train(callbacks, batch_factor, optimizer):
    folder = Path.cwd() / "stream"
    if not folder.exists():
        optimize(fn=sample, inputs=list(range(512)), output_dir=str(folder), num_workers=1, chunk_bytes="64KB")
    torch.manual_seed(0)
    module = Module(optimizer)
    loader = StreamingDataLoader(
        StreamingDataset(str(folder), shuffle=True, seed=0), batch_size=8 * batch_factor, num_workers=0
    )
    L.Trainer(**options(callbacks)).fit(module, loader)
    return module
