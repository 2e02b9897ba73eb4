"""A small BERT classifier from a config, with padding and a linear warm-up."""

import lightning as L
import torch
from common import STEPS, optimizer_of, options
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


class Module(L.LightningModule):
    def __init__(self, optimizer):
        super().__init__()
        self.chosen = optimizer
        config = BertConfig(
            vocab_size=101,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=3,
        )
        self.model = BertForSequenceClassification(config)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        made = optimizer_of(self.chosen, self.parameters())
        schedule = get_linear_schedule_with_warmup(made, 5, STEPS)
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def collate(rows):
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, (tokens, _) in enumerate(rows):
        ids[index, : len(tokens)] = tokens
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([label for _, label in rows])}


def train(callbacks, batch_factor, optimizer):
    torch.manual_seed(0)
    rows = [(torch.randint(1, 101, (5 + index % 20,)), index % 3) for index in range(512)]
    module = Module(optimizer)
    loader = DataLoader(rows, 8 * batch_factor, shuffle=True, collate_fn=collate)
    L.Trainer(**options(callbacks)).fit(module, loader)
    return module
