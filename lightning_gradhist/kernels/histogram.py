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
    DTYPES,
    INTERPRETED,
    addresses,
    block_of,
    is_full,
    locate,
    read,
)
from lightning_gradhist.kernels._launch import OPTIONS, on_device_of
from lightning_gradhist.kernels._tables import chunk_table

CHUNK = 8192
"""Elements a program: four times the bins that are cleared and read for them, sixteen a thread."""
LAUNCH = {**OPTIONS, "num_warps": 4 * OPTIONS["num_warps"]}  # 512 threads, which share one set of bins


def supported(tensor: Tensor) -> bool:
    """Whether the kernel counts tensors of this dtype and layout, on this device."""
    runs = tensor.device.type == ("cpu" if INTERPRETED else "cuda")
    return runs and tensor.dtype in DTYPES and tensor.layout == torch.strided


def add_magnitudes(table: Tensor, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Add the counts of tensors to rows of the table of a :class:`~lightning_gradhist.histogram.MagnitudeHistogram`.

    A program counts one chunk in shared memory, and adds the bins that are not empty to the table. Those sums are of
    integers, and so the same in any order. The host waits for nothing.

    Args:
        table: ``[names, columns]`` in int64, of ``254 * bins_per_octave + 3`` columns, contiguous, on the device of the tensors.
        rows: A row for each tensor.
        tensors: One-dimensional, of one dtype of fp32, bf16 and fp16. Those with gaps are copied.

    Raises:
        ValueError: If the kernel does not take these tensors; nothing has been counted then.
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
        bins = triton.next_power_of_2(columns + 1)  # one more for what is outside
        count_kernel[(len(places.chunks),)](places, DTYPES[first.dtype], columns, bins, CHUNK, **LAUNCH)


@triton.jit
def count_kernel(table, DTYPE: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr, CHUNK: tl.constexpr):
    """Count one chunk."""
    chunk = locate(table, tl.program_id(0), CHUNK)
    values_at, row_at = addresses(table, chunk, 2)
    row = row_at.to(tl.pointer_type(tl.int64))
    if is_full(chunk, (values_at,), CHUNK):
        _count_block(values_at, block_of(chunk, 0, CHUNK, True), row, DTYPE, COLUMNS, BINS)
    else:
        _count_block(values_at, block_of(chunk, 0, CHUNK, False), row, DTYPE, COLUMNS, BINS)


@triton.jit
def _count_block(values_at, block, row, DTYPE: tl.constexpr, COLUMNS: tl.constexpr, BINS: tl.constexpr):
    width: tl.constexpr = ALIGNMENT * 8 // DTYPE.primitive_bitwidth
    column = column_of(read(values_at, block, DTYPE, width), COLUMNS // 254)
    if not block.full:
        column = tl.where(block.inside, column, BINS - 1)
    counts = tl.histogram(column, BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(row + bins, counts.to(tl.int64), mask=(counts > 0) & (bins < COLUMNS), sem="relaxed")


@triton.jit
def column_of(values, BINS_PER_OCTAVE: tl.constexpr):
    """The column of the table: of zeros and subnormals 0, then that of the bits, of infinity and of NaN."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bin_ = bits // (8388608 // BINS_PER_OCTAVE)  # 2**23 is an octave
    column = tl.maximum(bin_ - (BINS_PER_OCTAVE - 1), 0)
    return tl.where(bits > 0x7F800000, 254 * BINS_PER_OCTAVE + 2, column)
