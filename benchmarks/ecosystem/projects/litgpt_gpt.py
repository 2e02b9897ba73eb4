"""A small GPT of litgpt in a LightningModule, with gradient accumulation, as its tutorial on Lightning has it."""

import lightning as L
import torch
from common import Module, options
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader


def loss_of(module, batch):
    return chunked_cross_entropy(module.network(batch[:, :-1]), batch[:, 1:], chunk_size=0)


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    config = Config(block_size=32, vocab_size=101, padded_vocab_size=128, n_layer=2, n_head=2, n_embd=32)
    module = Module(GPT(config), loss_of, optimizer)
    loader = DataLoader(torch.randint(101, (1024, 33)), 8 * batch_factor, shuffle=True)
    L.Trainer(**options(callbacks, accumulate_grad_batches=2)).fit(module, loader)
    return module
