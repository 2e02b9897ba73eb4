"""Histograms of magnitudes: one launch counts all tensors of a dtype."""
# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_gradhist.kernels._launch import OPTIONS, on_device_of
from lightning_gradhist.kernels._tables import ALIGNMENT, DTYPES, INTERPRETED, chunk_table, elements, locate, read

CHUNK = 8192
"""Elements a program: more than twice the bins that are cleared and read for them, sixteen a thread."""
BINS = 4096
"""Bins counted at a time, at most: 16 kB of shared memory, which every device has for several programs at once."""
WARPS = 4 * OPTIONS["num_warps"]  # 512 threads, which share one set of bins


def supported(tensor: Tensor) -> bool:
    """Whether the kernel counts tensors of this dtype and layout, on this device."""
    runs = tensor.device.type == ("cpu" if INTERPRETED else "cuda")
    return runs and tensor.dtype in DTYPES and tensor.layout == torch.strided


def add_magnitudes(table: Tensor, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Add the counts of tensors to rows of the table of a :class:`~lightning_gradhist.histogram.MagnitudeHistogram`.

    A program counts one chunk in shared memory, and adds the bins that are not empty to the table. Those sums are of
    integers, and so the same in any order. The host waits for nothing.

    Args:
        table: ``[names, 254 * bins_per_octave + 3]`` in int64, contiguous, on the device of the tensors.
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
        count_kernel[(len(places.chunks),)](
            places.chunks,
            places.extents,
            places.pointers,
            DTYPE=DTYPES[first.dtype],
            **sizes(table.shape[1] // 254),
            **{**OPTIONS, "num_warps": WARPS},
        )


def sizes(bins_per_octave: int) -> dict[str, int]:
    """The sizes that the kernel is compiled for, by the names of its arguments."""
    bins = triton.next_power_of_2(254 * bins_per_octave + 4)  # one more than the columns
    return {"BINS_PER_OCTAVE": bins_per_octave, "ALIGNMENT": ALIGNMENT, "CHUNK": CHUNK, "BINS": min(bins, BINS)}


@triton.jit
def count_kernel(
    chunks,
    extents,
    pointers,
    DTYPE: tl.constexpr,
    BINS_PER_OCTAVE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Count one chunk."""
    tensor, offset, size = locate(chunks, extents, tl.program_id(0), CHUNK)
    values_at = tl.load(pointers + 2 * tensor)
    row = tl.load(pointers + 2 * tensor + 1).to(tl.pointer_type(tl.int64))
    if (values_at % ALIGNMENT == 0) & (size == CHUNK):
        _count_chunk(values_at, offset, size, row, DTYPE, BINS_PER_OCTAVE, ALIGNMENT, CHUNK, BINS, FULL=True)
    else:
        _count_chunk(values_at, offset, size, row, DTYPE, BINS_PER_OCTAVE, ALIGNMENT, CHUNK, BINS, FULL=False)


@triton.jit
def _count_chunk(
    values_at, offset, size, row,
    DTYPE: tl.constexpr, BINS_PER_OCTAVE: tl.constexpr, ALIGNMENT: tl.constexpr, CHUNK: tl.constexpr,
    BINS: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, CHUNK)
    inside = offsets < size
    width: tl.constexpr = ALIGNMENT * 8 // DTYPE.primitive_bitwidth
    values = read(elements(values_at, offset, offsets, DTYPE, FULL, width), inside, FULL)
    column = column_of(values, BINS_PER_OCTAVE)
    if not FULL:
        column = tl.where(inside, column, -1)
    bins = tl.arange(0, BINS)
    for start in range(0, 254 * BINS_PER_OCTAVE + 3, BINS - 1):
        # The last bin takes what lies in other columns; those before this part are huge as unsigned numbers.
        here = tl.minimum((column - start).to(tl.uint32, bitcast=True), BINS - 1).to(tl.int32, bitcast=True)
        counts = tl.histogram(here, BINS)
        tl.atomic_add(row + start + bins, counts.to(tl.int64), mask=(counts > 0) & (bins < BINS - 1), sem="relaxed")


@triton.jit
def column_of(values, BINS_PER_OCTAVE: tl.constexpr):
    """The column of the table: of zeros and subnormals 0, then that of the bits, of infinity and of NaN."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bin_ = bits // (8388608 // BINS_PER_OCTAVE)  # 2**23 is an octave
    column = tl.maximum(bin_ - (BINS_PER_OCTAVE - 1), 0)
    return tl.where(bits > 0x7F800000, 254 * BINS_PER_OCTAVE + 2, column)
