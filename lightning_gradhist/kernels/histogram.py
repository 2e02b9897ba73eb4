"""Histograms of magnitudes: one launch counts all tensors of a dtype."""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_gradhist.kernels._chunks import (
    ALIGNMENT,
    DEVICE_TYPE,
    DTYPES,
    addresses,
    block_of,
    is_full,
    locate,
    read,
)
from lightning_gradhist.kernels._launch import OPTIONS, chunk_table, on_device_of

CHUNK = 16384  # elements a program: 32 a thread, so that few programs add to the same row of the table
_SHARED = not torch.version.hip and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
WINDOW = 2048 if _SHARED else 256
"""Bins that are counted together: all, where Triton counts in shared memory. Before 3.8, and on AMD, each of them takes
time, and the magnitudes of a chunk nearly always lie within 32 octaves: those of a window, one after another."""
LAUNCH = {**OPTIONS, "num_warps": 4 * OPTIONS["num_warps"]}  # 512 threads, which share one set of bins


def supported(tensor: Tensor) -> bool:
    """Whether the kernel counts tensors of this dtype and layout, on this device."""
    return tensor.device.type == DEVICE_TYPE and tensor.dtype in DTYPES and tensor.layout == torch.strided


def add_magnitudes(table: Tensor, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Add the counts of tensors to rows of the table of a :class:`~lightning_gradhist.histogram.MagnitudeHistogram`.

    A program counts one chunk in shared memory, and adds the bins that are not empty to the table. Those sums are of
    integers, and so the same in any order. The host waits for nothing. The tensors, a row each, are one-dimensional and of
    one dtype of fp32, bf16 and fp16, on the device of the table, else ``ValueError``; those with gaps are copied.
    """
    if not tensors:
        return
    first = tensors[0]
    row_of = table.unbind()
    dense = [tensor.contiguous() for tensor in tensors]

    def check() -> None:
        kinds = sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors})
        if not supported(first) or len(kinds) > 1 or table.device != first.device:
            raise ValueError(
                f"No kernel for these tensors: they must be of one dtype of float32, bfloat16 and float16, on the CUDA "
                f"device of the table, got {', '.join(kinds)} and a table on {table.device}. Use "
                f"lightning_gradhist.histogram.add_magnitudes."
            )

    with on_device_of(first):
        places = chunk_table([dense, [row_of[row] for row in rows]], check, CHUNK)
        if not len(places.chunks):
            return
        columns = table.shape[1]
        count_kernel[(len(places.chunks),)](places, DTYPES[first.dtype], columns, WINDOW, CHUNK, **LAUNCH)


@triton.jit
def count_kernel(table, DTYPE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Count one chunk."""
    chunk = locate(table, tl.program_id(0), CHUNK)
    values_at, row_at = addresses(table, chunk, 2)
    row = row_at.to(tl.pointer_type(tl.int64))
    if is_full(chunk, (values_at,), CHUNK):
        _count_block(values_at, block_of(chunk, 0, CHUNK, True), 0, row, DTYPE, COLUMNS, WINDOW)
    else:
        _count_block(values_at, block_of(chunk, 0, CHUNK, False), CHUNK - chunk.size, row, DTYPE, COLUMNS, WINDOW)


@triton.jit
def _count_block(values_at, block, outside, row, DTYPE: tl.constexpr, COLUMNS: tl.constexpr, WINDOW: tl.constexpr):
    width: tl.constexpr = ALIGNMENT * 8 // DTYPE.primitive_bitwidth
    zeros_end: tl.constexpr = COLUMNS // 254  # the bins of zeros and subnormals, which are column 0
    bin_ = bin_of(read(values_at, block, DTYPE, width), COLUMNS // 254)  # those outside are read as zeros
    slots = tl.arange(0, WINDOW)
    if WINDOW >= 256 * zeros_end:
        counts = tl.histogram(bin_, WINDOW) - tl.where(slots == 0, outside, 0)
        column = tl.maximum(slots - (zeros_end - 1), 0)
        tl.atomic_add(row + column, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    else:
        zeros = tl.sum((bin_ < zeros_end).to(tl.int32), axis=0) - outside
        tl.atomic_add(row, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")
        first = tl.min(tl.where(bin_ < zeros_end, COLUMNS, bin_), axis=0)
        for start in range(first, tl.max(bin_, axis=0) + 1, WINDOW - 1):
            # bins below the window wrap round to large numbers; its last slot is for all that are not in it
            slot = tl.minimum((bin_ - start).to(tl.uint32, bitcast=True), WINDOW - 1).to(tl.int32)
            counts = tl.histogram(slot, WINDOW)
            here = (counts > 0) & (slots < WINDOW - 1)
            columns = row + (start - (zeros_end - 1)) + slots
            tl.atomic_add(columns, counts.to(tl.int64), mask=here, sem="relaxed")


@triton.jit
def bin_of(values, BINS_PER_OCTAVE: tl.constexpr):
    """Exponent and first bits of the mantissa; of all NaN the bin after that of infinity."""
    octave: tl.constexpr = 8388608  # 2**23
    bits = values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    bits = tl.where(bits > 0x7F800000, 0x7F800000 + octave // BINS_PER_OCTAVE, bits)
    return (bits // (octave // BINS_PER_OCTAVE)).to(tl.int32)
