"""The step of ALTO as two phases, each one launch for all tensors, with the norms of the layers between them."""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.kernels._chunks import BLOCK, addresses, block_of, is_full, locate, read, write
from lightning_gradhist.kernels._launch import (
    CHUNK,
    OPTIONS,
    Operands,
    kernel_arguments,
    launch,
    on_device_of,
    operands_of,
)
from lightning_gradhist.kernels._math import adam_direction, moved, number, scalars_of, square, stored


def alto_moments(tensors: StepTensors, s: StepScalars, operands: Operands | None = None) -> Tensor:
    """As the eager :func:`~lightning_gradhist.optim.alto.alto_moments`, in fp32; see :func:`adam_e.adam_e_step`.

    The squares are summed by chunk in float64, and those sums in a fixed order: the same bits from run to run.
    """
    if not tensors.params:
        return torch.zeros(0, 2, dtype=torch.float64, device="cpu")
    operands, device = operands or operands_of(tensors), tensors.params[0].device
    sums = torch.empty(len(operands.table.chunks), 2, dtype=torch.float64, device=device)
    launch(alto_moments_kernel, operands, sums, *kernel_arguments(tensors, s))
    squared_norms = torch.empty(len(tensors.params), 2, dtype=torch.float64, device=device)
    with on_device_of(sums):
        sum_chunks_kernel[(len(tensors.params),)](operands.table.extents, sums, squared_norms, CHUNK, **OPTIONS)
    return squared_norms


def alto_apply(tensors: StepTensors, s: StepScalars, ratios: Tensor | None, operands: Operands | None = None) -> None:
    """As the eager :func:`~lightning_gradhist.optim.alto.alto_apply`, in fp32; ratios are ``[n]``."""
    if not tensors.params:
        return
    operands = operands or operands_of(tensors)
    scale = 1.0 if ratios is None else ratios.float().contiguous()
    scalars, variant = kernel_arguments(tensors, s)
    launch(alto_apply_kernel, operands, scale, scalars, variant._replace(grad=None, maximize=False))


@triton.jit
def alto_moments_kernel(table, sums, s, VARIANT: tl.constexpr, CHUNK: tl.constexpr):
    """Move one chunk of ``e``, ``m`` and ``v`` on, and sum its squares of ``theta`` and ``r``."""
    program = tl.program_id(0)
    chunk = locate(table, program, CHUNK)
    at = addresses(table, chunk, 5)
    s = scalars_of(s, chunk.tensor)
    theta_squares = tl.zeros([BLOCK], tl.float64)  # in fp32 squares of 1e-23 vanish and of 1e20 overflow
    r_squares = tl.zeros([BLOCK], tl.float64)
    if is_full(chunk, at, CHUNK):
        for start in range(0, CHUNK, BLOCK):
            block = block_of(chunk, start, BLOCK, True)
            theta_squares, r_squares = _move_block(at, block, s, theta_squares, r_squares, VARIANT)
    else:
        for start in range(0, chunk.size, BLOCK):
            block = block_of(chunk, start, BLOCK, False)
            theta_squares, r_squares = _move_block(at, block, s, theta_squares, r_squares, VARIANT)
    tl.store(sums + 2 * program, tl.sum(theta_squares, axis=0))
    tl.store(sums + 2 * program + 1, tl.sum(r_squares, axis=0))


@triton.jit
def _move_block(at, block, s, theta_squares, r_squares, VARIANT: tl.constexpr):
    theta_at, g_at, e_at, m_at, v_at = at
    theta = read(theta_at, block, VARIANT.param)
    g = read(g_at, block, VARIANT.grad)
    e = read(e_at, block, VARIANT.state)
    m = read(m_at, block, VARIANT.state)
    v = read(v_at, block, VARIANT.state)

    if VARIANT.maximize:
        g = -g
    explored = g + s.mix * (g - e)
    e = stored(moved(e, g, s.explore_beta), s.step, VARIANT.state, VARIANT.state)
    m = stored(moved(m, explored, s.beta1), s.step, VARIANT.state, VARIANT.state)
    v = stored(moved(v, explored * explored, s.beta2), s.step, VARIANT.state, VARIANT.state)  # as it is read again
    r = adam_direction(m, v, s)
    if VARIANT.decay:
        r += s.weight_decay * theta

    write(e_at, block, e, VARIANT.state)
    write(m_at, block, m, VARIANT.state)
    write(v_at, block, v, VARIANT.state)
    if not block.full:
        r = tl.where(block.inside, r, 0.0)  # 0 / 0 outside, at eps 0
    return theta_squares + square(theta), r_squares + square(r)


@triton.jit
def sum_chunks_kernel(extents, sums, squared_norms, CHUNK: tl.constexpr):
    """Sum what the chunks of one tensor have summed, in their order."""
    tensor = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(tl.load(extents + 2 * tensor), CHUNK)
    first = tl.load(extents + 2 * tensor + 1)
    thetas = tl.zeros([BLOCK], tl.float64)
    rs = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        thetas += tl.load(sums + 2 * (first + chunk), mask=chunk < count, other=0.0)
        rs += tl.load(sums + 2 * (first + chunk) + 1, mask=chunk < count, other=0.0)
    tl.store(squared_norms + 2 * tensor, tl.sum(thetas, axis=0))
    tl.store(squared_norms + 2 * tensor + 1, tl.sum(rs, axis=0))


@triton.jit
def alto_apply_kernel(table, ratios, s, VARIANT: tl.constexpr, CHUNK: tl.constexpr):
    """Compute ``r`` of one chunk again, and apply it."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, which the first phase left in the cache
    chunk = locate(table, program, CHUNK)
    theta_at, _g_at, _e_at, m_at, v_at = addresses(table, chunk, 5)
    at = (theta_at, m_at, v_at)
    s = scalars_of(s, chunk.tensor)
    rate = s.lr * number(ratios, chunk.tensor)
    if is_full(chunk, at, CHUNK):
        for start in range(0, CHUNK, BLOCK):
            _apply_block(at, block_of(chunk, start, BLOCK, True), s, rate, VARIANT)
    else:
        for start in range(0, chunk.size, BLOCK):
            _apply_block(at, block_of(chunk, start, BLOCK, False), s, rate, VARIANT)


@triton.jit
def _apply_block(at, block, s, rate, VARIANT: tl.constexpr):
    theta_at, m_at, v_at = at
    theta = read(theta_at, block, VARIANT.param)
    m = read(m_at, block, VARIANT.state)
    v = read(v_at, block, VARIANT.state)

    r = adam_direction(m, v, s)
    if VARIANT.decay:
        r += s.weight_decay * theta
    theta -= rate * r
    write(theta_at, block, stored(theta, s.step, VARIANT.param, VARIANT.state), VARIANT.param)
