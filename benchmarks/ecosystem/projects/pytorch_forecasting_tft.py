"""A temporal fusion transformer of pytorch-forecasting, as in its tutorial, with the "synchronized" batch sampler."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
from common import options
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.metrics import QuantileLoss

COLUMNS = {
    "time_idx": "time",
    "target": "value",
    "group_ids": ["series"],
    "static_categoricals": ["series"],
    "time_varying_known_reals": ["time"],
    "time_varying_unknown_reals": ["value"],
}


def train(callbacks, batch_factor, optimizer):
    if optimizer is not None:
        raise NotImplementedError("its optimizer is chosen by name")
    draw = np.random.default_rng(0)
    frames = [
        pd.DataFrame({"time": range(60), "series": f"s{k}", "value": draw.normal(size=60).cumsum()}) for k in range(40)
    ]
    frame = pd.concat(frames, ignore_index=True)
    data = TimeSeriesDataSet(frame, max_encoder_length=12, max_prediction_length=4, **COLUMNS)
    loader = data.to_dataloader(train=True, batch_size=16 * batch_factor, num_workers=0, batch_sampler="synchronized")
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=8, loss=QuantileLoss(), learning_rate=1e-3)
    pl.Trainer(**options(callbacks, gradient_clip_val=0.1)).fit(module, train_dataloaders=loader)
    return module
