"""A small GPT-2 from a config, the loss that the model gives."""

import lightning as L
import torch
from common import Module, options
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel


def loss_of(module, batch):
    loss = module.network(**batch).loss
    module.log("loss", loss)
    return loss


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    samples = [{"input_ids": row, "labels": row} for row in torch.randint(101, (512, 32))]
    network = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    module = Module(network, loss_of, optimizer)
    L.Trainer(**options(callbacks)).fit(module, DataLoader(samples, 8 * batch_factor, shuffle=True))
    return module
