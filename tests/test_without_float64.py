"""A device that has no float64, as Apple's: what needs it is made on the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_gradhist import MagnitudeHistogram, tensors
from lightning_gradhist.callbacks.monitor import updates
from lightning_gradhist.noise import step
from lightning_gradhist.noise.step import measure_pair, measure_part


class WithoutFloat64(TorchDispatchMode):
    """Stands for the device: float64 is refused in all that is not brought to the host by :meth:`bring`."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: set[int] = set()
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in (leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)):
            if any(one.untyped_storage().data_ptr() in self.on_host for one in inputs):
                self.on_host.add(tensor.untyped_storage().data_ptr())
                self.kept.append(tensor)  # so that no other tensor gets its memory
            elif tensor.dtype == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return made

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        copied = tensor.clone()
        self.on_host.add(copied.untyped_storage().data_ptr())
        self.kept.append(copied)
        return copied


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> WithoutFloat64:
    mode = WithoutFloat64()
    for module in (tensors, updates, step):
        monkeypatch.setattr(module, "with_float64", mode.bring)
    return mode


def test_the_device_refuses_float64(device: WithoutFloat64) -> None:
    with device, pytest.raises(TypeError, match="float64"):
        torch.ones(3).double()


def test_noise_is_measured(device: WithoutFloat64) -> None:
    one, two = ({"a": torch.randn(50), "b": torch.randn(3)} for _ in range(2))
    weights = {name: torch.rand_like(tensor) for name, tensor in one.items()}
    expected = [measure_pair(one, two, weights), measure_part(one, two, weights)]
    with device:
        found = [measure_pair(one, two, weights), measure_part(one, two, weights)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("sizes", [{"a": 50, "b": 3}, {"a": 2**17 + 1}])
def test_an_update_is_measured(device: WithoutFloat64, sizes: dict[str, int]) -> None:
    before, after, roots = ({name: torch.rand(size) for name, size in sizes.items()} for _ in range(3))
    arguments = before, *(torch.cat(list(some.values())) for some in (after, roots)), [0.5] * len(sizes)
    expected = updates._sums(*arguments)
    with device:
        assert torch.equal(updates._sums(*arguments), expected)
        MagnitudeHistogram(["a", "b"]).update({"a": before["a"]})
