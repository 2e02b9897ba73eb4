"""A small BERT classifier from a config, with padding and a linear warm-up."""

import lightning as L
import torch
from common import STEPS, Module, options
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


class Scheduled(Module):
    def configure_optimizers(self):
        made = super().configure_optimizers()
        schedule = get_linear_schedule_with_warmup(made, 5, STEPS)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def collate(rows):
    ids = pad_sequence([tokens for tokens, _ in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([label for _, label in rows])}


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    rows = [(torch.randint(1, 101, (5 + index % 20,)), index % 3) for index in range(512)]
    size = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = BertForSequenceClassification(BertConfig(**size, intermediate_size=64, num_labels=3))
    module = Scheduled(network, lambda module, batch: module.network(**batch).loss, optimizer)
    loader = DataLoader(rows, 8 * batch_factor, shuffle=True, collate_fn=collate)
    L.Trainer(**options(callbacks)).fit(module, loader)
    return module
