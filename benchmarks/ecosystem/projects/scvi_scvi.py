"""SCVI of scvi-tools, whose loader draws whole batches through its sampler."""

import anndata
import numpy as np
import scvi
from common import options


def data():
    draw = np.random.default_rng(0)
    found = anndata.AnnData(draw.poisson(1.0, (1280, 50)).astype("float32"))
    found.obs["label"] = np.where(np.arange(1280) % 3 == 0, "unknown", np.where(np.arange(1280) % 2, "a", "b"))
    found.obs["label"] = found.obs["label"].astype("category")
    return found


def settings(callbacks, batch_factor):
    more = options(callbacks)
    for name in ("max_steps", "devices", "enable_checkpointing"):
        more.pop(name)
    return {**more, "max_epochs": 2, "batch_size": 64 * batch_factor, "train_size": 1.0, "logger": None}


def train(callbacks, batch_factor, optimizer):
    if optimizer is not None:
        raise NotImplementedError("its optimizer is chosen by name")
    found = data()
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(found)
    model = scvi.model.SCVI(found, n_hidden=16, n_latent=4)
    model.train(**settings(callbacks, batch_factor))
    return model.module
