"""The data and the model of the examples: real handwritten digits and a small convolutional network."""

from __future__ import annotations

import gzip
from pathlib import Path

import lightning as L
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


class Digits(L.LightningDataModule):
    """Handwritten digits of scikit-learn, or Fashion-MNIST where a folder with its four idx files is given.

    Args:
        batch_size: samples of one batch on one device.
        data_dir: folder with ``train-images-idx3-ubyte.gz`` and its three companions.
    """

    def __init__(self, batch_size: int, data_dir: str | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train, self.val = _fashion_mnist(Path(data_dir)) if data_dir else _digits()

    def train_dataloader(self) -> DataLoader:
        """Shuffled training data."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Validation data."""
        return DataLoader(self.val, 500)


class NoisyDigits(Digits):
    """11,520 samples of :class:`Digits`, shuffled, with noise on the pixels and a tenth of the labels drawn at random."""

    def __init__(self, batch_size: int, data_dir: str | None = None) -> None:
        super().__init__(batch_size, data_dir)
        generator = torch.Generator().manual_seed(0)
        images, labels = self.train.tensors
        chosen = torch.randperm(8 * 1440, generator=generator) % len(labels)
        images = images[chosen] + 0.3 * torch.randn(images[chosen].shape, generator=generator)
        drawn = torch.randint(10, labels[chosen].shape, generator=generator)
        wrong = torch.rand(drawn.shape, generator=generator) < 0.1
        self.train = TensorDataset(images, torch.where(wrong, drawn, labels[chosen]))


class Classifier(L.LightningModule):
    """A convolutional network of five layers.

    Args:
        optimizer: makes the optimizer from the parameters.
        width: channels of the first layer.
        unit: what the loss is multiplied by, as another unit of measurement would.
    """

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
        width: int = 16,
        unit: float = 1.0,
        **options,
    ) -> None:
        super().__init__()
        self.optimizer, self.unit, self.options = optimizer, unit, options
        self.body = nn.Sequential(
            *_block(1, width),
            nn.MaxPool2d(2),
            *_block(width, 2 * width),
            nn.MaxPool2d(2),
            *_block(2 * width, 2 * width),
        )
        self.head = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 10))
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[n, 10]`` of images ``[n, 1, height, width]``."""
        return self.head(self.body(images).mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, in the unit of the loss."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss * self.unit

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self):  # noqa: ANN201
        """The optimizer, and a cosine decay over the run."""
        optimizer = self.optimizer(self.parameters(), **self.options)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU()]


def _digits() -> tuple[TensorDataset, TensorDataset]:
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[:1440], order[1440:]
    return TensorDataset(images[train], labels[train]), TensorDataset(images[val], labels[val])


def _fashion_mnist(folder: Path) -> tuple[TensorDataset, TensorDataset]:
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"data_dir={str(folder)!r} lacks {missing}; it must hold the four idx files of Fashion-MNIST"
        )
    return tuple(  # type: ignore[return-value]
        TensorDataset(
            _idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None].float() / 255,
            _idx(folder / f"{part}-labels-idx1-ubyte.gz").long(),
        )
        for part in ("train", "t10k")
    )


def _idx(path: Path) -> Tensor:
    content = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape).copy())
