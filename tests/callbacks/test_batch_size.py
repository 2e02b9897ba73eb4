"""The samples of batches and steps, as they are counted."""

from __future__ import annotations

from collections import UserDict, namedtuple
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from support import fit
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks.batch_size import count_samples, digest, repeats_samples

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


class OfFrames(L.LightningModule):
    """Takes time first, as recurrent layers of torch do."""

    def __init__(self, layer: Any = nn.Identity) -> None:
        super().__init__()
        self.head, self.layer = nn.Linear(8, 2), layer()

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        tensors = [one.flatten(0, -2) for one in tree_leaves(batch) if isinstance(one, torch.Tensor) and one.ndim > 1]
        return self.head(torch.cat(tensors)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Frames(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(torch.randn(400, 5, 8))


def recurrent() -> nn.Module:
    return nn.GRU(8, 4)


def batch_first() -> nn.Module:
    return nn.GRU(8, 4, batch_first=True)


def stacked(frames: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.stack(frames, 1)]


def calibrated(tmp_path: Any, data: Any, layer: Any = nn.Identity) -> Any:
    calibration = OptimizerCalibration(reference_batch_size=4, learning_rate="sqrt", probe_batches=8)
    fit(tmp_path, calibration, data=data, module=lambda: OfFrames(layer), max_steps=1)
    return calibration.result


@pytest.mark.parametrize(
    ("batch", "layer", "samples"),
    [
        pytest.param([torch.randn(35, 20, 8)], nn.Identity, 35, id="time first"),
        pytest.param([torch.randn(3, 8, 8)] * 5, nn.Identity, 3, id="a list of images"),
        pytest.param([torch.randn(20, 35, 8)], batch_first, 20, id="layers that take samples first"),
    ],
)
def test_what_only_the_batch_says_is_told(tmp_path, caplog, batch: Any, layer: Any, samples: int) -> None:
    batches = [[one + place for one in batch] for place in range(8)]
    result = calibrated(tmp_path, DataLoader(batches, batch_size=None), layer)  # type: ignore[arg-type]
    assert result.effective_batch_size == samples
    assert any(f"taken as {samples} samples, the first dimension" in reason for reason in result.reasons)
    monitor = GradientHistogramMonitor(every_n_steps=1)
    with caplog.at_level("INFO"):
        data = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
        fit(tmp_path, monitor, data=data, module=lambda: OfFrames(layer), max_steps=3)
    told = [one.message for one in caplog.records if f"taken as {samples} samples, the first dimension" in one.message]
    assert [one for one in told if "pass GradientHistogramMonitor(batch_size=...)" in one] == told[-1:]


def test_what_the_loader_says_too_is_not_told(tmp_path) -> None:
    result = calibrated(tmp_path, DataLoader([*torch.randn(32, 5, 8)], batch_size=4))  # type: ignore[arg-type]
    assert result.effective_batch_size == 4 and not any("first dimension" in reason for reason in result.reasons)


@pytest.mark.filterwarnings("ignore:.*this process is multi-threaded")
@pytest.mark.parametrize(
    ("data", "layer", "why"),
    [
        pytest.param(
            lambda: DataLoader([[torch.randn(35, 20, 8)]] * 8, batch_size=None),  # type: ignore[arg-type]
            recurrent,
            "may be time",
            id="recurrent layers",
        ),
        pytest.param(
            lambda: DataLoader(Frames(), 20, num_workers=2, collate_fn=stacked),
            nn.Identity,
            "says 20 samples a batch",
            id="workers that do not come to an end",
        ),
    ],
)
def test_time_is_not_taken_for_samples(tmp_path, data: Any, layer: Any, why: str) -> None:
    with pytest.warns(UserWarning, match=why):
        assert calibrated(tmp_path, data(), layer).effective_batch_size is None


def zipped(samples: list[Any]) -> Any:
    """As for torchvision's detection."""
    return tuple(zip(*samples, strict=True))


def first(samples: list[Any]) -> Any:
    return samples[0]


IMAGES = [torch.randn(3, 8, 8) for _ in range(8)]


@pytest.mark.parametrize(
    ("samples", "collate", "found", "why"),
    [
        pytest.param(
            [(image, {"label": 1}) for image in IMAGES], zipped, None, "says 1 samples .* have 3", id="images, listed"
        ),
        pytest.param(
            [{"image": image} for image in IMAGES], list, None, "says 1 samples .* have 3", id="a list of one"
        ),
        pytest.param(
            [(image, torch.zeros(2, 8)) for image in IMAGES],
            zipped,
            None,
            "cannot be read .* nor counted",
            id="images and boxes, listed",
        ),
        pytest.param([(image[:1], image[:1]) for image in IMAGES], zipped, 1, None, id="gray images, listed"),
        pytest.param(
            [(image.reshape(24, 8), torch.ones(24)) for image in IMAGES],
            zipped,
            24,
            "taken as 24",
            id="batches, listed",
        ),
        pytest.param([(image, 1) for image in IMAGES], None, 1, None, id="stacked"),
        pytest.param([(image, image) for image in IMAGES], first, 3, "taken as 3 samples", id="batches already"),
        pytest.param([[image] for image in IMAGES], first, 3, "taken as 3 samples", id="batches of one tensor"),
        pytest.param([[[image], image] for image in IMAGES], first, 3, "taken as 3 samples", id="batches with a list"),
    ],
)
def test_a_loader_that_says_one_is_believed_where_samples_are_listed(tmp_path, samples, collate, found, why) -> None:
    with pytest.warns(UserWarning, match=why) if found is None else nullcontext():
        result = calibrated(tmp_path, DataLoader(samples, 1, collate_fn=collate))
    assert result.effective_batch_size == found
    assert found is None or [why] * any("taken as" in one for one in result.reasons) == [why] * (why is not None)


def test_a_digest_tells_samples_apart() -> None:
    batch = {"inputs": torch.randn(8, 3), "labels": [torch.arange(8)]}
    assert digest(batch) == digest({**batch})
    digests = [digest({**batch, "inputs": torch.randn(8, 3)}) for _ in range(100)]
    assert len({float(one) for one in digests if one is not None}) > 95
    orders = [digest(torch.stack([torch.randperm(16) for _ in range(8)])) for _ in range(50)]
    assert len({float(one) for one in orders if one is not None}) > 45
    for batch in (torch.full((3,), torch.nan), torch.zeros(2000), [torch.ones(8, 3), torch.zeros(8)]):
        missing = digest(batch)
        assert missing is not None and missing.isnan()  # of which nobody can tell whether they are data
    assert digest(["no tensor"]) is None


class Fresh(IterableDataset):
    def __iter__(self) -> Any:
        yield torch.zeros(1)


@pytest.mark.parametrize(
    ("data", "batches", "repeats"),
    [
        pytest.param(DataLoader(range(20), 2, shuffle=True), 10, True, id="ten batches"),
        pytest.param(DataLoader(range(22), 2, shuffle=True), 11, False, id="eleven"),
        pytest.param(DataLoader(range(22), 2, shuffle=True), 1, False, id="some of eleven, drawn anew"),
        pytest.param(DataLoader(range(22), 2), 1, True, id="some of eleven, in order"),
        pytest.param(
            [DataLoader(range(40), 2), DataLoader(range(20), 2)], 20, True, id="a list, of which one is short"
        ),
        pytest.param({"a": DataLoader(Fresh()), "b": DataLoader(range(40), 2)}, 20, False, id="a dictionary"),
        pytest.param(DataLoader(Fresh()), 1, False, id="a stream"),
        pytest.param(iter([1]), 1, False, id="an iterator"),
    ],
)
def test_short_epochs_of_indexed_data_repeat_their_samples(data: Any, batches: int, repeats: bool) -> None:
    trainer: Any = SimpleNamespace(train_dataloader=data, num_training_batches=batches)
    assert repeats_samples(trainer) == repeats
