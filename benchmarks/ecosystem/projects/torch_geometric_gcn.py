"""A graph classifier with PyTorch Geometric's loader, whose batches hold graphs of many sizes."""

import lightning as L
import torch
from common import Module, options
from torch import nn
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GCNConv, global_mean_pool


def loss_of(module, batch):
    first, second, head = module.network
    hidden = first(batch.x, batch.edge_index).relu()
    hidden = global_mean_pool(second(hidden, batch.edge_index).relu(), batch.batch)
    loss = nn.functional.cross_entropy(head(hidden), batch.y)
    module.log("loss", loss, batch_size=batch.num_graphs)
    return loss


def graph(index):
    nodes = 3 + index % 9
    x, edges = torch.randn(nodes, 8), torch.randint(nodes, (2, 3 * nodes))
    return Data(x=x, edge_index=edges, y=torch.tensor([index % 3]))


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    graphs = [graph(index) for index in range(512)]
    network = nn.ModuleList([GCNConv(8, 16), GCNConv(16, 16), nn.Linear(16, 3)])
    module = Module(network, loss_of, optimizer)
    L.Trainer(**options(callbacks)).fit(module, DataLoader(graphs, batch_size=16 * batch_factor, shuffle=True))
    return module
