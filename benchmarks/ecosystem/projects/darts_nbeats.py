"""N-BEATS of darts, in double precision as its series are."""

import numpy as np
from common import STEPS, options
from darts import TimeSeries
from darts.models import NBEATSModel


def train(callbacks, batch_factor, optimizer):
    series = TimeSeries.from_values(np.random.default_rng(0).normal(size=400).cumsum())
    trainer = options(callbacks, limit_train_batches=STEPS // 3, logger=True)
    trainer.pop("max_steps")
    size = {"num_stacks": 2, "num_blocks": 1, "layer_widths": 16, "batch_size": 8 * batch_factor, "n_epochs": 3}
    chosen = {} if optimizer is None else {"optimizer_cls": optimizer, "optimizer_kwargs": {"lr": 1e-3}}
    model = NBEATSModel(12, 4, random_state=0, pl_trainer_kwargs=trainer, **size, **chosen)
    model.fit(series)
    return model.model
