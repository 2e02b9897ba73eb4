"""An equivariant network of nequip with its EMA module and data module, energies and forces of a spring for targets."""

from pathlib import Path

import ase.io
import lightning as L
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from common import options
from nequip.data.datamodule import ASEDataModule
from nequip.train import EMALightningModule
from nequip.utils.global_state import set_global_state

KINDS = ["H", "O"]
SIZE = {"r_max": 4.0, "num_layers": 2, "l_max": 1, "num_features": 8, "radial_mlp_width": 16}
MODEL = {"_target_": "nequip.model.NequIPGNNModel", "seed": 0, "model_dtype": "float32", "type_names": KINDS}
MODEL |= {**SIZE, "avg_num_neighbors": 3.0}
TRANSFORMS = [
    {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": KINDS},
    {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": 4.0},
]
WEIGHTS = {"total_energy": 1.0, "forces": 1.0}


def molecules(count):
    draw = np.random.default_rng(0)
    for index in range(count):
        size = 3 + index % 3
        places = np.arange(size)[:, None] + 0.2 * draw.normal(size=(size, 3))
        atoms = Atoms(["O", *["H"] * (size - 1)], positions=places)
        away = atoms.positions - atoms.positions.mean(0)
        atoms.calc = SinglePointCalculator(atoms, energy=float((away**2).sum()), forces=-2 * away)
        yield atoms


def train(callbacks, batch_factor, optimizer):
    set_global_state()
    file = str(Path.cwd() / "molecules.xyz")
    ase.io.write(file, list(molecules(160)), format="extxyz")
    files = {"train_file_path": file, "val_file_path": file}
    loading = {
        "train_dataloader": {"batch_size": 4 * batch_factor, "shuffle": True},
        "val_dataloader": {"batch_size": 16},
    }
    data = ASEDataModule(seed=0, transforms=TRANSFORMS, **files, **loading)
    chosen = optimizer or torch.optim.AdamW
    module = EMALightningModule(
        model=MODEL,
        num_datasets=data.num_datasets,
        optimizer={"_target_": f"{chosen.__module__}.{chosen.__name__}", "lr": 1e-3},
        loss={"_target_": "nequip.train.EnergyForceLoss", "per_atom_energy": True, "coeffs": WEIGHTS},
        val_metrics={"_target_": "nequip.train.EnergyForceMetrics", "coeffs": {"total_energy_mae": 1.0}},
    )
    L.Trainer(**options(callbacks)).fit(module, datamodule=data)
    return module
