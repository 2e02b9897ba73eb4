"""BYOL with lightly's heads, loss, momentum update and transform, as in its documentation."""

import copy

import pytorch_lightning as pl
import torch
from common import optimizer_of, options
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.utils.scheduler import cosine_schedule
from torch import nn
from torch.utils.data import DataLoader


class BYOL(pl.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.chosen = optimizer
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.projection_head = BYOLProjectionHead(32, 64, 16)
        self.prediction_head = BYOLPredictionHead(16, 64, 16)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NegativeCosineSimilarity()

    def training_step(self, batch, batch_idx):
        momentum = cosine_schedule(self.global_step, 100, 0.996, 1)
        update_momentum(self.backbone, self.backbone_momentum, m=momentum)
        update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
        online = [self.prediction_head(self.projection_head(self.backbone(view))) for view in batch]
        with torch.no_grad():
            targets = [self.projection_head_momentum(self.backbone_momentum(view)) for view in batch]
        return 0.5 * (self.criterion(online[0], targets[1]) + self.criterion(online[1], targets[0]))

    def configure_optimizers(self):
        return optimizer_of(self.chosen, self.parameters())


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    views = [[torch.randn(3, 16, 16), torch.randn(3, 16, 16)] for _ in range(512)]
    module = BYOL(optimizer)
    pl.Trainer(**options(callbacks)).fit(module, DataLoader(views, 16 * batch_factor, shuffle=True, drop_last=True))
    return module
