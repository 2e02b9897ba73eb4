"""The samples of batches and steps, as they are counted."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from lightning_gradhist.callbacks.batch_size import count_samples

Pair = namedtuple("Pair", "x y")


@dataclass
class Record:
    x: torch.Tensor
    names: list[str]


class Graphs:
    """As a batch of torch_geometric's: more nodes than graphs."""

    num_graphs = 4
    x = torch.zeros(19, 3)


class NoLength(tuple):
    def __len__(self) -> int:
        raise TypeError("no length")


class Raises(dict):
    def values(self) -> Any:
        raise RuntimeError("not here")


SEQUENCES = [torch.zeros(n, 3) for n in (5, 4, 2)]


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        pytest.param(torch.zeros(7, 2), 7, id="tensor"),
        pytest.param(torch.tensor(3.0), 1, id="a number"),
        pytest.param([torch.zeros(7, 2), torch.zeros(7)], 7, id="list"),
        pytest.param((torch.zeros(7, 2), {"y": [torch.zeros(7)]}), 7, id="nested"),
        pytest.param(Pair(torch.zeros(7, 2), torch.zeros(7)), 7, id="namedtuple"),
        pytest.param(Record(torch.zeros(7, 2), ["a"] * 9), 7, id="dataclass"),
        pytest.param(
            UserDict(input_ids=torch.zeros(7, 128), mask=torch.zeros(7, 128)), 7, id="as transformers' encodings"
        ),
        pytest.param(Graphs(), 4, id="graphs"),
        pytest.param([Graphs(), torch.zeros(4)], 4, id="graphs and targets"),
        pytest.param(pack_sequence(SEQUENCES), 3, id="packed sequences"),
        pytest.param((pack_sequence(SEQUENCES), torch.zeros(3)), 3, id="packed sequences and targets"),
        pytest.param(torch.nested.nested_tensor(SEQUENCES, layout=torch.jagged), 3, id="nested tensor"),
        pytest.param(torch.eye(7).to_sparse(), 7, id="sparse"),
        pytest.param(NoLength([torch.zeros(7)]), 7, id="a tuple without a length"),
        pytest.param((torch.zeros(35, 20), torch.zeros(20)), None, id="sequence first"),
        pytest.param((torch.zeros(3, 8, 8), torch.tensor(1)), None, id="a single image and its label"),
        pytest.param(SEQUENCES, None, id="ragged"),
        pytest.param({"a": torch.zeros(8), "b": torch.zeros(4)}, None, id="two loaders"),
        pytest.param(torch.zeros(0, 3), None, id="empty"),
        pytest.param("text", None, id="no tensor"),
        pytest.param(SimpleNamespace(x=torch.zeros(7)), None, id="unknown object"),
        pytest.param(None, None, id="nothing"),
        pytest.param(Raises(), None, id="raises"),
    ],
)
def test_samples_of_a_batch(batch: Any, samples: int | None) -> None:
    assert count_samples(batch) == samples
