"""The histogram on a GPU against numpy's counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradhist import MagnitudeHistogram
from lightning_gradhist.histogram import _kernel

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0, -1.0, 2.0**-126, 2.0**-127, 2.0**-149, 65504.0, 3.0e38]


def counted(tensor: Tensor) -> Tensor:
    histogram = MagnitudeHistogram(["x"], tensor.device)
    histogram.update({"x": tensor})
    return histogram.table[0].cpu()


def by_numpy(tensor: Tensor) -> Tensor:
    """Zeros, bins, infinities and NaN of a tensor, from values in double precision."""
    values = np.abs(tensor.detach().cpu().double().numpy().ravel())
    edges = MagnitudeHistogram([]).edges.numpy()
    finite = values[(values >= edges[0]) & (values < edges[-1])]
    bins = np.bincount(np.searchsorted(edges, finite, side="right") - 1, minlength=len(edges) - 1)
    ends = [np.count_nonzero(values >= edges[-1]), np.count_nonzero(np.isnan(values))]
    return torch.from_numpy(np.concatenate([[np.count_nonzero(values < edges[0])], bins, ends]))


def drawn(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Magnitudes over many decades, and what is no number."""
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator) * torch.exp2(40 * torch.rand(size, generator=generator) - 30)
    special = torch.tensor(SPECIAL[: size // 2])
    values[: len(special)] = special
    return values.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, 31, 4095, 4096, 4097, 2**20 + 3])
def test_every_dtype_and_size(size: int, dtype: torch.dtype, device: torch.device) -> None:
    tensor = drawn(size, dtype, device)
    assert torch.equal(counted(tensor), by_numpy(tensor))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_large_tensors(dtype: torch.dtype, device: torch.device) -> None:
    tensor = drawn(2**25 if device.type == "cuda" else 2**21, dtype, device)
    assert torch.equal(counted(tensor), by_numpy(tensor))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_strides_and_unaligned_views(dtype: torch.dtype, device: torch.device) -> None:
    flat = drawn(3 * 65 * 257 + 7, dtype, device)
    views = [
        flat[1:],
        flat[3:-2],
        flat[::3],
        flat[: 65 * 257].view(65, 257).t(),
        flat[: 5 * 6 * 7 * 8].view(5, 6, 7, 8),
    ]
    views += [views[-1].to(memory_format=torch.channels_last), flat[:1].expand(1000)]
    for view in views:
        assert torch.equal(counted(view), by_numpy(view)), (view.shape, view.stride())


def test_many_tensors_at_once(device: torch.device) -> None:
    tensors = {f"t{index}": drawn(1 + 37 * index % 501, torch.float32, device) for index in range(2000)}
    histogram = MagnitudeHistogram(list(tensors), device)
    histogram.update(tensors)
    for row, tensor in enumerate(tensors.values()):
        assert torch.equal(histogram.table[row].cpu(), by_numpy(tensor))


@pytest.mark.cuda_only
def test_more_elements_than_32_bits_can_address(device: torch.device) -> None:
    tensor = torch.ones(2**31 + 5, dtype=torch.bfloat16, device=device)
    tensor[-3:] = torch.tensor([0.0, 4.0, torch.nan], dtype=torch.bfloat16)
    table = counted(tensor)
    assert table.sum() == 2**31 + 5 and table[0] == 1 and table[-1] == 1 and table.max() == 2**31 + 2


@pytest.mark.cuda_only
def test_the_kernel_counts_as_torch_does(device: torch.device) -> None:
    assert _kernel(device) is not None  # tried, and not left out


@pytest.mark.cuda_only
def test_a_count_waits_for_no_device(device: torch.device) -> None:
    tensor = drawn(2**16, torch.float32, device)
    histogram = MagnitudeHistogram(["x"], device)
    histogram.update({"x": tensor})  # the kernel is compiled, and tried
    torch.cuda.set_sync_debug_mode("error")
    try:
        histogram.update({"x": tensor})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(histogram.table[0].cpu(), 2 * by_numpy(tensor))
