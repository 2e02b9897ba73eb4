"""A graph classifier with PyTorch Geometric's loader, whose batches hold graphs of many sizes."""

import lightning as L
import torch
from common import optimizer_of, options
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool


class Module(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.chosen = optimizer
        self.first, self.second, self.head = GCNConv(8, 16), GCNConv(16, 16), nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        hidden = self.first(batch.x, batch.edge_index).relu()
        hidden = global_mean_pool(self.second(hidden, batch.edge_index).relu(), batch.batch)
        loss = nn.functional.cross_entropy(self.head(hidden), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self):
        return optimizer_of(self.chosen, self.parameters())


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    graphs = []
    for index in range(512):
        nodes = 3 + index % 9
        graphs.append(
            Data(x=torch.randn(nodes, 8), edge_index=torch.randint(nodes, (2, 3 * nodes)), y=torch.tensor([index % 3]))
        )
    module = Module(optimizer)
    L.Trainer(**options(callbacks)).fit(module, DataLoader(graphs, batch_size=16 * batch_factor, shuffle=True))
    return module
