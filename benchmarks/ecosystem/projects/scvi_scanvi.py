"""SCANVI of scvi-tools: labelled and unlabelled samples in one batch."""

import scvi
from scvi_scvi import data, settings


def train(callbacks, batch_factor, optimizer):
    if optimizer is not None:
        raise NotImplementedError("its optimizer is chosen by name")
    found = data()
    scvi.settings.seed = 0
    scvi.model.SCANVI.setup_anndata(found, labels_key="label", unlabeled_category="unknown")
    model = scvi.model.SCANVI(found, n_hidden=16, n_latent=4)
    model.train(**settings(callbacks, batch_factor))
    return model.module
