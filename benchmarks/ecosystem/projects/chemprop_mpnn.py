"""A message passing network of chemprop on generated molecules."""

from chemprop import data, models, nn
from common import options
from lightning import pytorch as pl


def train(callbacks, batch_factor, optimizer):
    if optimizer is not None:
        raise NotImplementedError("its optimizer is Adam with a schedule of its own")
    molecules = ["C" * (1 + index % 12) + "O" * (index % 3) for index in range(512)]
    points = data.MoleculeDataset([data.MoleculeDatapoint.from_smi(text, [float(len(text))]) for text in molecules])
    loader = data.build_dataloader(points, batch_size=16 * batch_factor, shuffle=True, num_workers=0)
    layers = nn.BondMessagePassing(d_h=32), nn.MeanAggregation(), nn.RegressionFFN(input_dim=32, hidden_dim=32)
    module = models.MPNN(*layers)
    pl.Trainer(**options(callbacks)).fit(module, loader)
    return module
