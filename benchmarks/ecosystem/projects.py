"""Examples of other people's projects, each trained some thirty steps as the project's users do.

Each is a function of the callbacks, a factor on its batch size, and a class of optimizer, None for the project's own, and
returns the module. A project that copies callbacks puts those that it used into the list. What an example imports is in
the virtual environment of its project alone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

STEPS = 30


class Project(NamedTuple):
    """What is installed, first the distribution whose version is reported; the example; and why it has no other optimizer."""

    requirements: str
    train: Callable[..., nn.Module]
    own_optimizer: str


PROJECTS: dict[str, Project] = {}


def project(requirements: str, own_optimizer: str = "") -> Callable[..., Any]:
    def entered(train: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        PROJECTS[train.__name__] = Project(requirements, train, own_optimizer)
        return train

    return entered


def options(callbacks: list[Any], without: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """Arguments of a Trainer on the CPU, quiet, with whatever logger is its default."""
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    every = {"accelerator": "cpu", "devices": 1, "callbacks": callbacks, "max_steps": STEPS, **quiet, **more}
    return {name: value for name, value in every.items() if name not in without}


def optimizer_of(chosen: type | None, parameters: Any) -> Any:
    return (chosen or torch.optim.AdamW)(parameters, lr=1e-3)


def series(count: int, length: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.normal(size=length).cumsum() for _ in range(count)]


class Module(L.LightningModule):
    """A network of a project, a function of this module and a batch that gives the loss, and a schedule, if any."""

    def __init__(self, network, loss, optimizer, schedule=None):
        super().__init__()
        self.network, self.loss, self.chosen, self.schedule = network, loss, optimizer, schedule

    def training_step(self, batch, batch_idx):
        return self.loss(self, batch)

    def configure_optimizers(self):
        made = optimizer_of(self.chosen, self.parameters())
        return ([made], [{"scheduler": self.schedule(made), "interval": "step"}]) if self.schedule else made


def fit(module: Any, data: Any, trainer: Any) -> Any:
    trainer.fit(module, data)
    return module


@project("transformers")
def transformers_gpt2(callbacks, batch_factor, optimizer):
    """A small GPT-2 from a config, the loss that the model gives."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def loss_of(module, batch):
        loss = module.network(**batch).loss
        module.log("loss", loss)
        return loss

    samples = [{"input_ids": row, "labels": row} for row in torch.randint(101, (512, 32))]
    network = GPT2LMHeadModel(GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    loader = DataLoader(samples, 8 * batch_factor, shuffle=True)
    return fit(Module(network, loss_of, optimizer), loader, L.Trainer(**options(callbacks)))


@project("transformers")
def transformers_bert(callbacks, batch_factor, optimizer):
    """A small BERT classifier from a config, with padding and a linear warm-up."""
    from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup

    def collate(rows):
        ids = nn.utils.rnn.pad_sequence([tokens for tokens, _ in rows], batch_first=True)
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}

    rows = [(torch.randint(1, 101, (5 + index % 20,)), index % 3) for index in range(512)]
    size = {"vocab_size": 101, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    network = BertForSequenceClassification(BertConfig(**size, intermediate_size=64, num_labels=3))
    warm_up = lambda made: get_linear_schedule_with_warmup(made, 5, STEPS)  # noqa: E731
    module = Module(network, lambda module, batch: module.network(**batch).loss, optimizer, warm_up)
    loader = DataLoader(rows, 8 * batch_factor, shuffle=True, collate_fn=collate)
    return fit(module, loader, L.Trainer(**options(callbacks)))


@project("lightly")
def lightly_byol(callbacks, batch_factor, optimizer):
    """BYOL with lightly's heads, loss, momentum update and transform, as in its documentation."""
    import copy

    import pytorch_lightning as pl
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.utils.scheduler import cosine_schedule

    class BYOL(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
            self.projection_head = BYOLProjectionHead(32, 64, 16)
            self.prediction_head = BYOLPredictionHead(16, 64, 16)
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
            self.criterion = NegativeCosineSimilarity()

        def training_step(self, batch, batch_idx):
            momentum = cosine_schedule(self.global_step, 100, 0.996, 1)
            update_momentum(self.backbone, self.backbone_momentum, m=momentum)
            update_momentum(self.projection_head, self.projection_head_momentum, m=momentum)
            online = [self.prediction_head(self.projection_head(self.backbone(view))) for view in batch]
            with torch.no_grad():
                targets = [self.projection_head_momentum(self.backbone_momentum(view)) for view in batch]
            return 0.5 * (self.criterion(online[0], targets[1]) + self.criterion(online[1], targets[0]))

        def configure_optimizers(self):
            return optimizer_of(optimizer, self.parameters())

    views = [[torch.randn(3, 16, 16), torch.randn(3, 16, 16)] for _ in range(512)]
    loader = DataLoader(views, 16 * batch_factor, shuffle=True, drop_last=True)
    return fit(BYOL(), loader, pl.Trainer(**options(callbacks)))


@project("torch_geometric")
def torch_geometric_gcn(callbacks, batch_factor, optimizer):
    """A graph classifier with PyTorch Geometric's loader, whose batches hold graphs of many sizes."""
    from torch_geometric import data, loader
    from torch_geometric.nn import GCNConv, global_mean_pool

    def loss_of(module, batch):
        first, second, head = module.network
        hidden = first(batch.x, batch.edge_index).relu()
        hidden = global_mean_pool(second(hidden, batch.edge_index).relu(), batch.batch)
        loss = nn.functional.cross_entropy(head(hidden), batch.y)
        module.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def graph(index):
        nodes = 3 + index % 9
        x, edges = torch.randn(nodes, 8), torch.randint(nodes, (2, 3 * nodes))
        return data.Data(x=x, edge_index=edges, y=torch.tensor([index % 3]))

    network = nn.ModuleList([GCNConv(8, 16), GCNConv(16, 16), nn.Linear(16, 3)])
    graphs = loader.DataLoader([graph(index) for index in range(512)], batch_size=16 * batch_factor, shuffle=True)
    return fit(Module(network, loss_of, optimizer), graphs, L.Trainer(**options(callbacks)))


@project("pytorch-forecasting", own_optimizer="its optimizer is chosen by name")
def pytorch_forecasting_tft(callbacks, batch_factor, optimizer):
    """A temporal fusion transformer of pytorch-forecasting, as in its tutorial, with the "synchronized" batch sampler."""
    import pandas as pd
    from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
    from pytorch_forecasting.metrics import QuantileLoss

    frames = [pd.DataFrame({"time": range(60), "series": f"s{k}", "value": v}) for k, v in enumerate(series(40, 60))]
    columns = {"time_idx": "time", "target": "value", "group_ids": ["series"], "static_categoricals": ["series"]}
    columns |= {"time_varying_known_reals": ["time"], "time_varying_unknown_reals": ["value"]}
    frame = pd.concat(frames, ignore_index=True)
    data = TimeSeriesDataSet(frame, max_encoder_length=12, max_prediction_length=4, **columns)
    loader = data.to_dataloader(train=True, batch_size=16 * batch_factor, num_workers=0, batch_sampler="synchronized")
    module = TemporalFusionTransformer.from_dataset(data, hidden_size=8, loss=QuantileLoss(), learning_rate=1e-3)
    return fit(module, loader, L.Trainer(**options(callbacks, gradient_clip_val=0.1)))


@project("chemprop", own_optimizer="its optimizer is Adam with a schedule of its own")
def chemprop_mpnn(callbacks, batch_factor, optimizer):
    """A message passing network of chemprop on generated molecules."""
    from chemprop import data, models
    from chemprop.nn import BondMessagePassing, MeanAggregation, RegressionFFN

    molecules = ["C" * (1 + index % 12) + "O" * (index % 3) for index in range(512)]
    points = data.MoleculeDataset([data.MoleculeDatapoint.from_smi(text, [float(len(text))]) for text in molecules])
    loader = data.build_dataloader(points, batch_size=16 * batch_factor, shuffle=True, num_workers=0)
    layers = BondMessagePassing(d_h=32), MeanAggregation(), RegressionFFN(input_dim=32, hidden_dim=32)
    return fit(models.MPNN(*layers), loader, L.Trainer(**options(callbacks)))


@project("gluonts[torch]", own_optimizer="its optimizer is Adam")
def gluonts_deepar(callbacks, batch_factor, optimizer):
    """DeepAR of GluonTS, whose loader is no DataLoader."""
    import pandas as pd
    from gluonts.dataset.common import ListDataset
    from gluonts.torch.model.deepar import DeepAREstimator

    start = pd.Period("2020-01-01", freq="D")
    rows = [{"start": start, "target": target} for target in series(20, 100)]
    trainer = options(callbacks, ("max_steps", "enable_checkpointing"), max_epochs=1)  # it has a checkpoint of its own
    size = {"prediction_length": 4, "context_length": 12, "hidden_size": 16, "batch_size": 16 * batch_factor}
    estimator = DeepAREstimator(freq="D", num_batches_per_epoch=STEPS, trainer_kwargs=trainer, **size)
    return estimator.train_model(ListDataset(rows, freq="D")).trained_net


@project("neuralforecast")
def neuralforecast_nhits(callbacks, batch_factor, optimizer):
    """NHITS of neuralforecast on two series with a batch size of 32, as its examples have it."""
    import pandas as pd
    from neuralforecast import NeuralForecast
    from neuralforecast.models import NHITS

    days = pd.date_range("2020-01-01", periods=120, freq="D")
    frames = [pd.DataFrame({"unique_id": f"s{k}", "ds": days, "y": y}) for k, y in enumerate(series(2, 120))]
    size = {"h": 4, "input_size": 12, "mlp_units": 3 * [[16, 16]], "batch_size": 32 * batch_factor}
    model = NHITS(**size, optimizer=optimizer, logger=True, random_seed=0, **options(callbacks))
    forecast = NeuralForecast(models=[model], freq="D")
    forecast.fit(pd.concat(frames, ignore_index=True))
    callbacks[:] = forecast.models[0].trainer_kwargs["callbacks"][: len(callbacks)]  # it has copied the model, and them
    return forecast.models[0]


@project("darts[torch]")
def darts_nbeats(callbacks, batch_factor, optimizer):
    """N-BEATS of darts, in double precision as its series are."""
    from darts import TimeSeries
    from darts.models import NBEATSModel

    trainer = options(callbacks, ("max_steps",), limit_train_batches=STEPS // 3, logger=True)
    size = {"num_stacks": 2, "num_blocks": 1, "layer_widths": 16, "batch_size": 8 * batch_factor, "n_epochs": 3}
    chosen = {} if optimizer is None else {"optimizer_cls": optimizer, "optimizer_kwargs": {"lr": 1e-3}}
    model = NBEATSModel(12, 4, random_state=0, pl_trainer_kwargs=trainer, **size, **chosen)
    model.fit(TimeSeries.from_values(series(1, 400)[0]))
    return model.model


def _scvi(callbacks, batch_factor, name, **columns):
    import anndata
    import scvi

    data = anndata.AnnData(np.random.default_rng(0).poisson(1.0, (1280, 50)).astype("float32"))
    data.obs["label"] = np.where(np.arange(1280) % 3 == 0, "unknown", np.where(np.arange(1280) % 2, "a", "b"))
    data.obs["label"] = data.obs["label"].astype("category")
    scvi.settings.seed = 0
    kind = getattr(scvi.model, name)
    kind.setup_anndata(data, **columns)
    model = kind(data, n_hidden=16, n_latent=4)
    size = {"max_epochs": 2, "batch_size": 64 * batch_factor, "train_size": 1.0, "logger": None}
    model.train(**options(callbacks, ("max_steps", "devices", "enable_checkpointing")), **size)
    return model.module


@project("scvi-tools", own_optimizer="its optimizer is chosen by name")
def scvi_scvi(callbacks, batch_factor, optimizer):
    """SCVI of scvi-tools, whose loader draws whole batches through its sampler."""
    return _scvi(callbacks, batch_factor, "SCVI")


@project("scvi-tools", own_optimizer="its optimizer is chosen by name")
def scvi_scanvi(callbacks, batch_factor, optimizer):
    """SCANVI of scvi-tools: labelled and unlabelled samples in one batch."""
    return _scvi(callbacks, batch_factor, "SCANVI", labels_key="label", unlabeled_category="unknown")


@project("pytorch_tabular requests")
def pytorch_tabular_mlp(callbacks, batch_factor, optimizer):
    """A category embedding model of pytorch_tabular."""
    import pandas as pd
    from pytorch_tabular import TabularModel, config
    from pytorch_tabular.models import CategoryEmbeddingModelConfig

    draw, names = np.random.default_rng(0), list("abcde")
    frame = pd.DataFrame(draw.normal(size=(960, 5)), columns=names)
    frame["kind"] = draw.choice(["x", "y", "z"], 960)
    frame["target"] = (frame["a"] + frame["b"] > 0).astype(int)
    quiet = {"progress_bar": "none", "checkpoints": None, "early_stopping": None, "load_best": False}
    of_trainer = {"limit_train_batches": STEPS, "enable_model_summary": False}
    length = {"accelerator": "cpu", "batch_size": 32 * batch_factor, "max_epochs": 1}
    model = TabularModel(
        data_config=config.DataConfig(target=["target"], continuous_cols=names, categorical_cols=["kind"]),
        model_config=CategoryEmbeddingModelConfig(task="classification", layers="16-16"),
        optimizer_config=config.OptimizerConfig(),
        trainer_config=config.TrainerConfig(trainer_kwargs=of_trainer, **length, **quiet),
        verbose=False,
    )
    more = {} if optimizer is None else {"optimizer": optimizer}
    model.fit(train=frame, callbacks=callbacks, seed=0, **more)
    return model.model


@project("litgpt")
def litgpt_gpt(callbacks, batch_factor, optimizer):
    """A small GPT of litgpt in a LightningModule, with gradient accumulation, as its tutorial on Lightning has it."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    def loss_of(module, batch):
        return chunked_cross_entropy(module.network(batch[:, :-1]), batch[:, 1:], chunk_size=0)

    config = Config(block_size=32, vocab_size=101, padded_vocab_size=128, n_layer=2, n_head=2, n_embd=32)
    loader = DataLoader(torch.randint(101, (1024, 33)), 8 * batch_factor, shuffle=True)
    trainer = L.Trainer(**options(callbacks, accumulate_grad_batches=2))
    return fit(Module(GPT(config), loss_of, optimizer), loader, trainer)


def _sample(index):
    generator = torch.Generator().manual_seed(index)
    return {"x": torch.randn(8, generator=generator), "y": index % 3}


@project("litdata")
def litdata_stream(callbacks, batch_factor, optimizer):
    """A StreamingDataset of litdata with its StreamingDataLoader, which keeps a state of its own."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    def loss_of(module, batch):
        return nn.functional.cross_entropy(module.network(batch["x"]), batch["y"])

    folder = Path.cwd() / "stream"
    optimize(fn=_sample, inputs=list(range(512)), output_dir=str(folder), num_workers=1, chunk_bytes="64KB")
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    data = StreamingDataset(str(folder), shuffle=True, seed=0)
    loader = StreamingDataLoader(data, batch_size=8 * batch_factor, num_workers=0)
    return fit(Module(network, loss_of, optimizer), loader, L.Trainer(**options(callbacks)))


@project("nequip")
def nequip_model(callbacks, batch_factor, optimizer):
    """An equivariant network of nequip with its EMA module and data module, energies and forces of a spring for targets."""
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator
    from nequip.data.datamodule import ASEDataModule
    from nequip.train import EMALightningModule
    from nequip.utils.global_state import set_global_state

    def molecules(count):
        draw = np.random.default_rng(0)
        for index in range(count):
            size = 3 + index % 3
            places = np.arange(size)[:, None] + 0.2 * draw.normal(size=(size, 3))
            atoms = ase.Atoms(["O", *["H"] * (size - 1)], positions=places)
            away = atoms.positions - atoms.positions.mean(0)
            atoms.calc = SinglePointCalculator(atoms, energy=float((away**2).sum()), forces=-2 * away)
            yield atoms

    set_global_state()
    file = str(Path.cwd() / "molecules.xyz")
    ase.io.write(file, list(molecules(160)), format="extxyz")
    settings = json.loads(Path(__file__).with_name("nequip.json").read_text(encoding="utf-8"))
    train = {"train_file_path": file, "train_dataloader": {"batch_size": 4 * batch_factor, "shuffle": True}}
    val = {"val_file_path": file, "val_dataloader": {"batch_size": 16}}
    data = ASEDataModule(seed=0, **settings["data"], **train, **val)
    chosen = optimizer or torch.optim.AdamW
    of_optimizer = {"_target_": f"{chosen.__module__}.{chosen.__name__}", "lr": 1e-3}
    module = EMALightningModule(num_datasets=data.num_datasets, optimizer=of_optimizer, **settings["module"])
    return fit(module, data, L.Trainer(**options(callbacks)))
