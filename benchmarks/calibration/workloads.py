"""Four real workloads that two CPU cores bear. A sample is one image or one sequence.

The batch sizes of a workload are a factor of four apart. A run at equal samples is at most one pass over the data.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from digits import Digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts its four files
CONTEXT = 32
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
VOCABULARY = len(CHARACTERS) + 1  # and one for all others
_TEXT_BYTES, _TEST_SEQUENCES = 4_000_000, 2048
_COPIES, _NOISE = 16, 0.5  # the noise's standard deviation, where white is 1


class Data(NamedTuple):
    """Tensors in memory: inputs ``[n, ...]`` and the classes ``[n]`` or ``[n, context]`` to predict."""

    train: TensorDataset
    test: TensorDataset


@dataclass(frozen=True)
class Workload:
    """A model from inputs to logits ``[..., classes]``, by torch's global random numbers; its data; the size of its grid."""

    name: str
    make_model: Callable[[], nn.Module]
    load: Callable[[Path], Data]  # from the folder of Fashion-MNIST
    batch_sizes: tuple[int, ...]  # ascending
    samples: int  # of a run at equal samples
    steps: int  # of a run at equal steps
    learning_rate: float  # of Adam, where the search for the best one starts at the smallest batch size
    noise_batch_size: int  # samples of a gradient that the noise scale is measured with
    targets: tuple[float, ...]  # losses of which the samples to reach them are recorded, descending


class GPT(nn.Module):
    """A transformer that predicts the next character, layers normalised first, causal attention."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(characters) + self.positions.weight))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.queries_keys_values = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        layers = (nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.perceptron = nn.Sequential(nn.LayerNorm(width), *layers)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.queries_keys_values(self.norm(x)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.output(mixed.transpose(1, 2).flatten(-2))
        return x + self.perceptron(x)


class LSTM(nn.Module):
    """One layer of long short-term memory that predicts the next character."""

    def __init__(self, width: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.memory = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.memory(self.tokens(characters))[0])


def cnn() -> nn.Module:
    """Three convolutions and two linear layers, 39,174 parameters, no normalisation."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(288, 84), nn.ReLU(), nn.Linear(84, 10)),
    )


def mlp() -> nn.Module:
    """Two linear layers, 4,810 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def encode(text: bytes) -> Tensor:
    """The number of each character, int64; what is not printable ASCII or a line's end is one character, the last."""
    table = np.full(256, VOCABULARY - 1)
    table[list(CHARACTERS.encode())] = np.arange(len(CHARACTERS))
    return torch.from_numpy(table[np.frombuffer(text, np.uint8)])


def _images(folder: Path) -> Data:
    data = Digits(1, str(folder))
    return Data(data.train, data.val)


def _digits(folder: Path) -> Data:
    """Scikit-learn's digits, 16 copies of each under noise, without which the loss goes to zero and a share says nothing."""
    data, generator = Digits(1), torch.Generator().manual_seed(0)
    return Data(_noisy(data.train, generator), _noisy(data.val, generator))


def _noisy(digits: TensorDataset, generator: torch.Generator) -> TensorDataset:
    images, labels = (tensor.repeat(_COPIES, *[1] * (tensor.ndim - 1)) for tensor in digits.tensors)
    order = torch.randperm(len(labels), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return TensorDataset((images + _NOISE * noise)[order], labels[order])


@cache
def _text(folder: Path) -> Data:
    """The sources of Python's standard library, cut into sequences, in an order that is fixed."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    characters = encode(b"".join(file.read_bytes() for file in files)[:_TEXT_BYTES])
    sequences = characters[: len(characters) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    sequences = sequences[torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0))]
    whole = TensorDataset(sequences[:, :-1], sequences[:, 1:])
    return Data(TensorDataset(*whole[_TEST_SEQUENCES:]), TensorDataset(*whole[:_TEST_SEQUENCES]))


_ALL = (
    Workload("mlp", mlp, _digits, (2, 8, 32, 128, 512), 11_520, 90, 2**-8, 64, (1.5, 1.2, 1.0, 0.9, 0.8)),
    Workload("cnn", cnn, _images, (16, 64, 256, 1024, 4096), 60_000, 60, 2**-9, 64, (1.0, 0.8, 0.6, 0.5, 0.4)),
    Workload("gpt", GPT, _text, (4, 16, 64, 256, 1024), 32_768, 128, 2**-9, 32, (3.0, 2.75, 2.5, 2.25, 2.0)),
    Workload("lstm", LSTM, _text, (4, 16, 64, 256, 1024), 32_768, 128, 2**-8, 32, (3.0, 2.75, 2.5, 2.25, 2.0)),
)
WORKLOADS = {workload.name: workload for workload in _ALL}
"""By name, the cheapest first."""
