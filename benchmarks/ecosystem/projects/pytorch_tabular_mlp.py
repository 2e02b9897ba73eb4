"""A category embedding model of pytorch_tabular."""

import numpy as np
import pandas as pd
from common import STEPS
from pytorch_tabular import TabularModel
from pytorch_tabular.config import DataConfig, OptimizerConfig, TrainerConfig
from pytorch_tabular.models import CategoryEmbeddingModelConfig


def train(callbacks, batch_factor, optimizer):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.normal(size=(960, 5)), columns=list("abcde"))
    frame["kind"] = draw.choice(["x", "y", "z"], 960)
    frame["target"] = (frame["a"] + frame["b"] > 0).astype(int)
    quiet = {"progress_bar": "none", "checkpoints": None, "early_stopping": None, "load_best": False}
    of_trainer = {"limit_train_batches": STEPS, "enable_model_summary": False}
    length = {"batch_size": 32 * batch_factor, "max_epochs": 1}
    model = TabularModel(
        data_config=DataConfig(target=["target"], continuous_cols=list("abcde"), categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-16"),
        optimizer_config=OptimizerConfig(),
        trainer_config=TrainerConfig(accelerator="cpu", trainer_kwargs=of_trainer, **length, **quiet),
        verbose=False,
    )
    more = {} if optimizer is None else {"optimizer": optimizer}
    model.fit(train=frame, callbacks=callbacks, seed=0, **more)
    return model.model
