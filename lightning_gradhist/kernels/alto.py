"""The step of ALTO as two phases, each one launch for all tensors, with the norms of the layers between them."""
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_gradhist.kernels._launch import (
    BLOCK,
    OPTIONS,
    Scalars,
    direction_arguments,
    moment_arguments,
    on_device_of,
    rate_arguments,
    state_arguments,
)
from lightning_gradhist.kernels._math import adam_direction, explored_gradient, moved, scalar, scalar_of, stored
from lightning_gradhist.kernels._tables import (
    ALIGNMENT,
    CHUNK,
    DTYPES,
    Lists,
    chunk_table,
    elements,
    in_memory_order,
    locate,
    read,
    refuse_unsupported,
    write,
)


def alto_moments(lists: Lists, s: Scalars) -> Tensor:
    """Move ``e``, ``m`` and ``v`` on in place.

    The squares are summed by chunk, and those sums in a fixed order: the same bits from run to run.

    Args:
        lists: Parameters, gradients and state; parameters and gradients are not changed.
        s: The scalars of this step; tensors among them are on the device of the parameters, and are read there.

    Returns:
        ``[n, 2]`` in fp32: squared norms of ``theta`` and of the update ``r`` for each of the ``n`` entries.

    Raises:
        ValueError: If the kernels do not take these tensors; nothing has been changed then.
    """
    if not lists.params:
        return torch.zeros(0, 2, dtype=torch.float32)
    device = lists.params[0].device
    with on_device_of(lists.params[0]):
        grads = in_memory_order(lists)
        columns = [lists.params, grads, lists.exp_avg_grads, lists.exp_avgs, lists.exp_avg_sqs]
        table = chunk_table(columns, lambda: refuse_unsupported(lists))
        sums = torch.empty(len(table.chunks), 2, dtype=torch.float32, device=device)
        if len(sums):
            alto_moments_kernel[(len(sums),)](
                table.chunks,
                table.extents,
                table.pointers,
                sums,
                **moment_arguments(s),
                **direction_arguments(s),
                weight_decay=float(s.weight_decay),
                **state_arguments(s, lists.exp_avgs[0].dtype),
                PARAM=DTYPES[lists.params[0].dtype],
                GRAD=DTYPES[grads[0].dtype],
                DECAY=bool(s.weight_decay != 0.0),
                MAXIMIZE=bool(s.maximize),
                ALIGNMENT=ALIGNMENT,
                CHUNK=CHUNK,
                BLOCK=BLOCK,
                **OPTIONS,
            )
        squared_norms = torch.empty(len(lists.params), 2, dtype=torch.float32, device=device)
        sum_chunks_kernel[(len(lists.params),)](table.extents, sums, squared_norms, CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS)
    return squared_norms


def alto_apply(lists: Lists, s: Scalars, ratios: Tensor | None) -> None:
    """Subtract ``lr * ratio * r`` from the parameters in place.

    Args:
        lists: Parameters and state, as :func:`alto_moments` left them.
        s: The scalars of this step.
        ratios: The trust ratio of each entry, ``[n]`` on the device of the parameters; None for 1.

    Raises:
        ValueError: If the kernels do not take these tensors; nothing has been changed then.
    """
    if not lists.params:
        return
    with on_device_of(lists.params[0]):
        columns = [lists.params, lists.exp_avgs, lists.exp_avg_sqs]
        table = chunk_table(columns, lambda: refuse_unsupported(lists))
        if not len(table.chunks):
            return
        if ratios is not None:
            ratios = ratios.float().contiguous()
        alto_apply_kernel[(len(table.chunks),)](
            table.chunks,
            table.extents,
            table.pointers,
            ratios,
            **direction_arguments(s),
            **rate_arguments(s),
            weight_decay=float(s.weight_decay),
            **state_arguments(s, lists.exp_avgs[0].dtype),
            PARAM=DTYPES[lists.params[0].dtype],
            DECAY=bool(s.weight_decay != 0.0),
            HAS_RATIOS=ratios is not None,
            ALIGNMENT=ALIGNMENT,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )


@triton.jit
def alto_moments_kernel(
    chunks,
    extents,
    pointers,
    sums,
    mix,
    explore_beta,
    explore_rest,
    beta1,
    rest1,
    beta2,
    rest2,
    unbias1,
    unbias2,
    eps,
    weight_decay,
    step,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STEPS_ON_DEVICE: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move one chunk of ``e``, ``m`` and ``v`` on, and sum its squares of ``theta`` and ``r``."""
    program = tl.program_id(0)
    tensor, offset, size = locate(chunks, extents, program, CHUNK)
    theta_at = tl.load(pointers + 5 * tensor)
    g_at = tl.load(pointers + 5 * tensor + 1)
    e_at = tl.load(pointers + 5 * tensor + 2)
    m_at = tl.load(pointers + 5 * tensor + 3)
    v_at = tl.load(pointers + 5 * tensor + 4)
    unbias1 = scalar_of(unbias1, tensor, STEPS_ON_DEVICE)
    unbias2 = scalar_of(unbias2, tensor, STEPS_ON_DEVICE)
    if STATE == tl.bfloat16:
        step = scalar_of(step, tensor, STEP_ON_DEVICE)
    theta_squares = tl.zeros([BLOCK], tl.float32)
    r_squares = tl.zeros([BLOCK], tl.float32)
    aligned = (theta_at | g_at | e_at | m_at | v_at) % ALIGNMENT == 0
    if aligned & (size == CHUNK):
        for start in range(0, CHUNK, BLOCK):
            theta, r = _move_block(
                theta_at, g_at, e_at, m_at, v_at, offset, start + tl.arange(0, BLOCK), size,
                mix, explore_beta, explore_rest, beta1, rest1, beta2, rest2, unbias1, unbias2, eps,
                weight_decay, step, PARAM, STATE, GRAD, DECAY, MAXIMIZE, FULL=True,
            )  # fmt: skip
            theta_squares += theta * theta
            r_squares += r * r
    else:
        for start in range(0, size, BLOCK):
            theta, r = _move_block(
                theta_at, g_at, e_at, m_at, v_at, offset, start + tl.arange(0, BLOCK), size,
                mix, explore_beta, explore_rest, beta1, rest1, beta2, rest2, unbias1, unbias2, eps,
                weight_decay, step, PARAM, STATE, GRAD, DECAY, MAXIMIZE, FULL=False,
            )  # fmt: skip
            theta_squares += theta * theta
            r_squares += r * r
    tl.store(sums + 2 * program, tl.sum(theta_squares, axis=0))
    tl.store(sums + 2 * program + 1, tl.sum(r_squares, axis=0))


@triton.jit
def _move_block(
    theta_at, g_at, e_at, m_at, v_at, offset, offsets, size,
    mix, explore_beta, explore_rest, beta1, rest1, beta2, rest2, unbias1, unbias2, eps,
    weight_decay, step,
    PARAM: tl.constexpr, STATE: tl.constexpr, GRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    inside = offsets < size
    es = elements(e_at, offset, offsets, STATE, FULL)
    ms = elements(m_at, offset, offsets, STATE, FULL)
    vs = elements(v_at, offset, offsets, STATE, FULL)
    theta = read(elements(theta_at, offset, offsets, PARAM, FULL), inside, FULL)
    g = read(elements(g_at, offset, offsets, GRAD, FULL), inside, FULL)
    e = read(es, inside, FULL)
    m = read(ms, inside, FULL)
    v = read(vs, inside, FULL)

    if MAXIMIZE:
        g = -g
    explored = explored_gradient(g, e, mix)
    e = stored(moved(e, g, explore_beta, explore_rest), step, STATE, STATE)
    m = stored(moved(m, explored, beta1, rest1), step, STATE, STATE)
    v = stored(moved(v, explored * explored, beta2, rest2), step, STATE, STATE)  # as the second phase reads it
    r = adam_direction(m, v, unbias1, unbias2, eps)
    if DECAY:
        r += weight_decay * theta

    write(es, e, inside, FULL)
    write(ms, m, inside, FULL)
    write(vs, v, inside, FULL)
    if not FULL:
        r = tl.where(inside, r, 0.0)  # 0 / 0 outside, at eps 0
    return theta, r


@triton.jit
def sum_chunks_kernel(extents, sums, squared_norms, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Sum what the chunks of one tensor have summed, in their order."""
    tensor = tl.program_id(0).to(tl.int64)
    count = tl.cdiv(tl.load(extents + 2 * tensor), CHUNK)
    first = tl.load(extents + 2 * tensor + 1)
    thetas = tl.zeros([BLOCK], tl.float32)
    rs = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        thetas += tl.load(sums + 2 * (first + chunk), mask=chunk < count, other=0.0)
        rs += tl.load(sums + 2 * (first + chunk) + 1, mask=chunk < count, other=0.0)
    tl.store(squared_norms + 2 * tensor, tl.sum(thetas, axis=0))
    tl.store(squared_norms + 2 * tensor + 1, tl.sum(rs, axis=0))


@triton.jit
def alto_apply_kernel(
    chunks,
    extents,
    pointers,
    ratios,
    unbias1,
    unbias2,
    eps,
    lr,
    weight_decay,
    step,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_RATIOS: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    STEPS_ON_DEVICE: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute ``r`` of one chunk again, and apply it."""
    program = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end, which the first phase left in the cache
    tensor, offset, size = locate(chunks, extents, program, CHUNK)
    theta_at = tl.load(pointers + 3 * tensor)
    m_at = tl.load(pointers + 3 * tensor + 1)
    v_at = tl.load(pointers + 3 * tensor + 2)
    rate = scalar(lr, LR_ON_DEVICE)
    unbias1 = scalar_of(unbias1, tensor, STEPS_ON_DEVICE)
    unbias2 = scalar_of(unbias2, tensor, STEPS_ON_DEVICE)
    if STATE == tl.bfloat16:
        step = scalar_of(step, tensor, STEP_ON_DEVICE)
    if HAS_RATIOS:
        rate *= tl.load(ratios + tensor)
    aligned = (theta_at | m_at | v_at) % ALIGNMENT == 0
    if aligned & (size == CHUNK):
        for start in range(0, CHUNK, BLOCK):
            _apply_block(
                theta_at, m_at, v_at, offset, start + tl.arange(0, BLOCK), size,
                unbias1, unbias2, eps, rate, weight_decay, step, PARAM, STATE, DECAY, FULL=True,
            )  # fmt: skip
    else:
        for start in range(0, size, BLOCK):
            _apply_block(
                theta_at, m_at, v_at, offset, start + tl.arange(0, BLOCK), size,
                unbias1, unbias2, eps, rate, weight_decay, step, PARAM, STATE, DECAY, FULL=False,
            )  # fmt: skip


@triton.jit
def _apply_block(
    theta_at, m_at, v_at, offset, offsets, size,
    unbias1, unbias2, eps, rate, weight_decay, step,
    PARAM: tl.constexpr, STATE: tl.constexpr, DECAY: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    inside = offsets < size
    thetas = elements(theta_at, offset, offsets, PARAM, FULL)
    theta = read(thetas, inside, FULL)
    m = read(elements(m_at, offset, offsets, STATE, FULL), inside, FULL)
    v = read(elements(v_at, offset, offsets, STATE, FULL), inside, FULL)

    r = adam_direction(m, v, unbias1, unbias2, eps)
    if DECAY:
        r += weight_decay * theta
    write(thetas, stored(theta - rate * r, step, PARAM, STATE), inside, FULL)
