"""A small GPT-2 from a config, the loss that the model gives."""

import lightning as L
import torch
from common import optimizer_of, options
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel


class Module(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.chosen = optimizer
        self.model = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2))

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return optimizer_of(self.chosen, self.parameters())


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    tokens = torch.randint(101, (512, 32))
    samples = [{"input_ids": row, "labels": row} for row in tokens]
    module = Module(optimizer)
    loader = DataLoader(samples, 8 * batch_factor, shuffle=True)
    L.Trainer(**options(callbacks)).fit(module, loader)
    return module
