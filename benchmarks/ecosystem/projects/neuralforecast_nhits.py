"""NHITS of neuralforecast on two series with a batch size of 32, as its examples have it."""

import numpy as np
import pandas as pd
from common import STEPS
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS


def train(callbacks, batch_factor, optimizer):
    draw = np.random.default_rng(0)
    frames = [
        pd.DataFrame({
            "unique_id": f"s{index}",
            "ds": pd.date_range("2020-01-01", periods=120, freq="D"),
            "y": draw.normal(size=120).cumsum(),
        })
        for index in range(2)
    ]  # fmt: skip
    model = NHITS(
        h=4,
        input_size=12,
        max_steps=STEPS,
        batch_size=32 * batch_factor,
        mlp_units=3 * [[16, 16]],
        optimizer=optimizer,
        callbacks=callbacks,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=True,
        random_seed=0,
    )
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(pd.concat(frames, ignore_index=True))
    callbacks[:] = forecast.models[0].trainer_kwargs["callbacks"][: len(callbacks)]  # it has copied the model, and them
    return forecast.models[0]
