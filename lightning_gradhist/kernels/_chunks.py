"""How a program finds its chunk of a tensor, and reads and writes it block by block."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

ALIGNMENT = tl.constexpr(16)  # bytes of the widest load and store
BLOCK = tl.constexpr(512)  # elements in registers at a time: a 128-bit load a thread and tensor, so many threads fit
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}  # state has not the last


class Chunk(NamedTuple):
    """What a program works on: which tensor, from which element on, and how many."""

    tensor: Any
    offset: Any
    size: Any


class Block(NamedTuple):
    """Elements of a chunk: its offset, theirs in it, which are inside of it, and if all are, and known to be aligned."""

    offset: Any
    offsets: Any
    inside: Any
    full: Any


@triton.jit
def locate(table, program, CHUNK: tl.constexpr):
    tensor = tl.load(table.chunks + 2 * program).to(tl.int64)
    offset = tl.load(table.chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(table.extents + 2 * tensor) - offset, CHUNK).to(tl.int32)
    return Chunk(tensor, offset, size)


@triton.jit
def addresses(table, chunk, COLUMNS: tl.constexpr):
    """Where the tensor of a chunk is in each of the lists."""
    found = ()
    for column in tl.static_range(COLUMNS):
        found += (tl.load(table.pointers + COLUMNS * chunk.tensor + column),)  # type: ignore[assignment]
    return found


@triton.jit
def is_full(chunk, at, CHUNK: tl.constexpr):
    """Whether a chunk has all its elements, and is aligned in all lists."""
    bits = at[0]
    for column in tl.static_range(1, len(at)):
        bits |= at[column]
    return (bits % ALIGNMENT == 0) & (chunk.size == CHUNK)


@triton.jit
def block_of(chunk, start, SIZE: tl.constexpr, FULL: tl.constexpr):
    offsets = start + tl.arange(0, SIZE)
    return Block(chunk.offset, offsets, offsets < chunk.size, FULL)


@triton.jit
def elements(address, block, DTYPE: tl.constexpr, WIDTH: tl.constexpr = 4):
    """Pointers to a block of elements; those of a full block are known to be aligned, so that loads are wide."""
    start = address.to(tl.pointer_type(DTYPE))
    if block.full:
        # by as many elements for all dtypes of a kernel: else values would change threads through shared memory
        start = tl.multiple_of(start, WIDTH * DTYPE.primitive_bitwidth // 8)
    return start + block.offset + block.offsets


@triton.jit
def read(address, block, DTYPE: tl.constexpr, WIDTH: tl.constexpr = 4):
    """A block in fp32; zeros outside."""
    pointers = elements(address, block, DTYPE, WIDTH)
    if block.full:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=block.inside, other=0.0)
    return values.to(tl.float32)


@triton.jit
def write(address, block, values, DTYPE: tl.constexpr):
    """Store a block, rounded to the nearest."""
    pointers = elements(address, block, DTYPE)
    if block.full:
        tl.store(pointers, values.to(DTYPE))
    else:
        tl.store(pointers, values.to(DTYPE), mask=block.inside)


INTERPRETED = not isinstance(locate, triton.runtime.JITFunction)  # by TRITON_INTERPRET=1, on the CPU
DEVICE_TYPE = "cpu" if INTERPRETED else "cuda"  # of the tensors that they take
