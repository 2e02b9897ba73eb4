"""NHITS of neuralforecast on two series with a batch size of 32, as its examples have it."""

import numpy as np
import pandas as pd
from common import options
from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS


def train(callbacks, batch_factor, optimizer):
    draw = np.random.default_rng(0)
    days = pd.date_range("2020-01-01", periods=120, freq="D")
    frames = [pd.DataFrame({"unique_id": f"s{k}", "ds": days, "y": draw.normal(size=120).cumsum()}) for k in range(2)]
    size = {"h": 4, "input_size": 12, "mlp_units": 3 * [[16, 16]], "batch_size": 32 * batch_factor}
    model = NHITS(**size, optimizer=optimizer, logger=True, random_seed=0, **options(callbacks))
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(pd.concat(frames, ignore_index=True))
    callbacks[:] = forecast.models[0].trainer_kwargs["callbacks"][: len(callbacks)]  # it has copied the model, and them
    return forecast.models[0]
