"""Chunk tables: how one launch finds its way through a list of tensors.

Each program works on one chunk of one tensor, :data:`CHUNK` elements in a step. It looks up which, and where the memory
of that tensor is. Tensors are taken in the order of their memory, so that a parameter and its state must have the same strides.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 2048
"""Elements a program of a step: enough to pay for its look-ups, few enough to spread a small model over the device."""
_STAGED = 2**16  # bytes
_KEPT = 64  # tables of each kind; a table of a whole model takes 0.1% of its fp32 parameters


class ChunkTable(NamedTuple):
    """Where a launch finds its ``n`` tensors, on their device."""

    pointers: Tensor
    """``[n, columns]`` int64: addresses, a column for each list of tensors."""
    extents: Tensor
    """``[n, 2]`` int64: number of elements, and number of the first chunk."""
    chunks: Tensor
    """``[chunks, 2]`` int32: of each chunk the tensor, and its place in it."""


def chunk_table(columns: Sequence[list[Tensor]], check: Callable[[], None], chunk: int = CHUNK) -> ChunkTable:
    """Look up or build the table of some lists of tensors.

    A table is found by the addresses, sizes and strides it was made for: it is as good for other tensors in the same
    place. It is made with one small copy to the device, and none where nothing moved.

    The current device is that of the columns, the first of which, parameters, are cut into chunks of as many elements.
    ``check`` is called before a table is built; it raises if the kernels do not take these tensors.
    """
    params = columns[0]
    device = params[0].device
    numels = array("q", map(Tensor.numel, params))
    addresses = array("q", chain.from_iterable(map(Tensor.data_ptr, column) for column in columns))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        check()
        return _captured(addresses, numels, chunk, device)  # a graph may outlive what is kept here
    # Of this stream only: nothing else orders the copy, or its memory's reuse, with work on another.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    strides = None if all(map(all_contiguous, columns)) else [[t.stride() for t in column] for column in columns]
    dtypes = [{tensor.dtype for tensor in column} for column in columns[:2]]
    place = (device, stream)

    def pointers() -> Tensor:
        check()
        return _sent(_rows(addresses, len(columns)), device)

    def layout() -> tuple[Tensor, Tensor]:
        extents = _extents(numels, chunk)
        return _sent(extents, device), _sent(_chunks(extents, chunk), device)

    key = (place, addresses.tobytes(), numels.tobytes(), str(strides), str(dtypes))
    return ChunkTable(_POINTERS.get(key, pointers), *_LAYOUTS.get((place, numels.tobytes(), chunk), layout))


class _Recent:
    """The values that were asked for most recently."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Any, Any] = OrderedDict()

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of a key; made if it is not there."""
        value = self._values.pop(key, None)
        if value is None:
            value = make()
        self._values[key] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value


_POINTERS, _LAYOUTS = _Recent(_KEPT), _Recent(_KEPT)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: CUDA stages at once what is small, the rest only if it is pinned."""
    is_large = device.type == "cuda" and table.nbytes > _STAGED
    return (table.pin_memory() if is_large else table).to(device, non_blocking=True)


def _rows(addresses: array[int], columns: int) -> Tensor:
    return torch.frombuffer(addresses, dtype=torch.int64).view(columns, -1).t().contiguous()


def _extents(numels: array[int], chunk: int) -> Tensor:
    numel = torch.frombuffer(numels, dtype=torch.int64)
    counts = _counts(numel, chunk)
    return torch.stack([numel, counts.cumsum(0) - counts], dim=1)


def _chunks(extents: Tensor, chunk: int, total: int | None = None) -> Tensor:
    numel, first = extents.unbind(1)
    counts = _counts(numel, chunk)
    tensors = torch.arange(len(numel), device=numel.device).repeat_interleave(counts, output_size=total)
    places = torch.arange(len(tensors), device=numel.device) - first[tensors]
    return torch.stack([tensors, places], dim=1).int()


def _counts(numel: Tensor, chunk: int) -> Tensor:
    return (numel + (chunk - 1)) // chunk


def _captured(addresses: array[int], numels: array[int], chunk: int, device: torch.device) -> ChunkTable:
    """A table that is part of the CUDA graph being captured: made by kernels alone, in the graph's memory."""
    rows, extents = _rows(addresses, len(addresses) // len(numels)), _extents(numels, chunk)
    values = torch.cat([rows.view(-1), extents.view(-1)]).tolist()
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), values)  # its kernels carry the values as arguments
    pointers, extents_there = table.split([rows.numel(), extents.numel()])
    extents_there = extents_there.view(-1, 2)
    total = int(_counts(extents[:, 0], chunk).sum())
    return ChunkTable(pointers.view(rows.shape), extents_there, _chunks(extents_there, chunk, total))


def all_contiguous(tensors: list[Tensor]) -> bool:
    """Whether all tensors are contiguous."""
    return all(map(Tensor.is_contiguous, tensors))
