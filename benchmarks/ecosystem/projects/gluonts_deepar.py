"""DeepAR of GluonTS, whose loader is no DataLoader."""

import numpy as np
import pandas as pd
from common import STEPS, options
from gluonts.dataset.common import ListDataset
from gluonts.torch.model.deepar import DeepAREstimator


def train(callbacks, batch_factor, optimizer):
    if optimizer is not None:
        raise NotImplementedError("its optimizer is Adam")
    draw = np.random.default_rng(0)
    start = pd.Period("2020-01-01", freq="D")
    rows = [{"start": start, "target": draw.normal(size=100).cumsum()} for _ in range(20)]
    trainer = options(callbacks, max_epochs=1)
    for name in ("max_steps", "enable_checkpointing"):  # it has a checkpoint of its own
        trainer.pop(name)
    size = {"prediction_length": 4, "context_length": 12, "hidden_size": 16, "batch_size": 16 * batch_factor}
    estimator = DeepAREstimator(freq="D", num_batches_per_epoch=STEPS, trainer_kwargs=trainer, **size)
    return estimator.train_model(ListDataset(rows, freq="D")).trained_net
