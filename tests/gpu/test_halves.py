"""The two halves of a batch on a GPU: those that the CPU tells."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_gradhist.callbacks.monitor.halves import HalfBatches

BATCH = 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = 0.03  # as the monitor has it; a GPU may multiply float32 in 10 bits


class Layers(nn.Module):
    """One of each kind of which halves are known."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.images = nn.Embedding(30, 16), nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, words: Tensor, images: Tensor) -> Tensor:
        return self.head(self.norm(self.words(words).sum(1) + self.images(images).tanh().sum((2, 3))))


def problem() -> tuple[Layers, Tensor, Tensor]:
    torch.manual_seed(0)
    return Layers(), torch.randint(30, (BATCH, 7)), torch.randn(BATCH, 3, 10, 9)


def looked_at(device: torch.device, dtype: torch.dtype) -> tuple[HalfBatches, dict[str, Tensor]]:
    """What is found of the same batch, under autocast but for float32, and the gradients."""
    model, words, images = problem()
    model.to(device)
    parameters = dict(model.named_parameters())
    halves = HalfBatches(model, parameters, step=3)
    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
        out = model(words.to(device), images.to(device))
    (1024 * out.float().square().mean()).backward()
    halves.close()
    return halves, {name: p.grad / 1024 for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=["32-true", "bf16-mixed", "16-mixed"])
def test_halves_are_those_of_the_cpu(dtype: torch.dtype, device: torch.device) -> None:
    expected, _ = looked_at(torch.device("cpu"), torch.float32)
    found, gradients = looked_at(device, dtype)
    assert found.error is None and found._found.keys() == expected._found.keys() == gradients.keys()
    for name, theirs in expected._found.items():
        mine = found._found[name]
        assert mine.sizes == theirs.sizes == (32, 32)
        for one, other in ((mine.first, theirs.first), (mine.second, theirs.second)):
            error = (one.detach().cpu().double() - other.double()).norm()
            assert error <= TOLERANCE * other.norm(), name
    sums = found.measure(gradients, BATCH, 1024.0, TOLERANCE, lambda pick: None)
    assert sums is not None and sums[:2].isfinite().all()  # they add up to the gradient


@pytest.mark.cuda_only
def test_nothing_is_looked_at_while_a_graph_is_captured(device: torch.device) -> None:
    model, words, images = (one.to(device) for one in problem())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(words, images).square().mean().backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    halves = HalfBatches(model, dict(model.named_parameters()), step=3)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(words, images).square().mean().backward()
    halves.close()
    assert halves.error is None and not halves._found
