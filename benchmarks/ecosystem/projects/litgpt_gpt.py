"""A small GPT of litgpt in a LightningModule, with gradient accumulation, as its tutorial on Lightning has it."""

import lightning as L
import torch
from common import optimizer_of, options
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch.utils.data import DataLoader


class Module(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.chosen = optimizer
        config = Config(block_size=32, vocab_size=101, padded_vocab_size=128, n_layer=2, n_head=2, n_embd=32)
        self.model = GPT(config)

    def training_step(self, batch, batch_idx):
        logits = self.model(batch[:, :-1])
        return chunked_cross_entropy(logits, batch[:, 1:], chunk_size=0)

    def configure_optimizers(self):
        return optimizer_of(self.chosen, self.parameters())


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    module = Module(optimizer)
    loader = DataLoader(torch.randint(101, (1024, 33)), 8 * batch_factor, shuffle=True)
    L.Trainer(**options(callbacks, accumulate_grad_batches=2)).fit(module, loader)
    return module
