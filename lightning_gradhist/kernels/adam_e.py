"""The step of AdamE as one launch for all tensors."""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

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

NO_DECAY, COUPLED, DECOUPLED = 0, 1, 2


def adam_e_step(lists: Lists, s: Scalars, *, decoupled_weight_decay: bool) -> None:
    """Make one AdamE step in place, in fp32; the gradients are not changed.

    Args:
        lists: Parameters, gradients and state.
        s: The scalars of this step; tensors among them are on the device of the parameters, and are read there.
        decoupled_weight_decay: Shrink ``theta`` (AdamW), or add the decay to the gradient (Adam).

    Raises:
        ValueError: If the kernels do not take these tensors; nothing has been changed then.
    """
    if not lists.params:
        return
    with on_device_of(lists.params[0]):
        grads = in_memory_order(lists)
        columns = [lists.params, grads, lists.exp_avg_grads, lists.exp_avgs, lists.exp_avg_sqs]
        table = chunk_table(columns, lambda: refuse_unsupported(lists))
        if not len(table.chunks):
            return
        adam_e_kernel[(len(table.chunks),)](
            table.chunks,
            table.extents,
            table.pointers,
            **moment_arguments(s),
            **direction_arguments(s),
            **rate_arguments(s),
            weight_decay=float(s.weight_decay),
            **state_arguments(s, lists.exp_avgs[0].dtype),
            PARAM=DTYPES[lists.params[0].dtype],
            GRAD=DTYPES[grads[0].dtype],
            DECAY=NO_DECAY if s.weight_decay == 0.0 else DECOUPLED if decoupled_weight_decay else COUPLED,
            MAXIMIZE=bool(s.maximize),
            ALIGNMENT=ALIGNMENT,
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            **OPTIONS,
        )


@triton.jit
def adam_e_kernel(
    chunks,
    extents,
    pointers,
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
    lr,
    weight_decay,
    step,
    PARAM: tl.constexpr,
    STATE: tl.constexpr,
    GRAD: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    STEPS_ON_DEVICE: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step one chunk."""
    tensor, offset, size = locate(chunks, extents, tl.program_id(0), CHUNK)
    theta_at = tl.load(pointers + 5 * tensor)
    g_at = tl.load(pointers + 5 * tensor + 1)
    e_at = tl.load(pointers + 5 * tensor + 2)
    m_at = tl.load(pointers + 5 * tensor + 3)
    v_at = tl.load(pointers + 5 * tensor + 4)
    rate = scalar(lr, LR_ON_DEVICE)
    unbias1 = scalar_of(unbias1, tensor, STEPS_ON_DEVICE)
    unbias2 = scalar_of(unbias2, tensor, STEPS_ON_DEVICE)
    if STATE == tl.bfloat16:
        step = scalar_of(step, tensor, STEP_ON_DEVICE)
    aligned = (theta_at | g_at | e_at | m_at | v_at) % ALIGNMENT == 0
    if aligned & (size == CHUNK):
        for start in range(0, CHUNK, BLOCK):
            _step_block(
                theta_at, g_at, e_at, m_at, v_at, offset, start + tl.arange(0, BLOCK), size,
                mix, explore_beta, explore_rest, beta1, rest1, beta2, rest2, unbias1, unbias2, eps,
                rate, weight_decay, step, PARAM, STATE, GRAD, DECAY, MAXIMIZE, FULL=True,
            )  # fmt: skip
    else:
        for start in range(0, size, BLOCK):
            _step_block(
                theta_at, g_at, e_at, m_at, v_at, offset, start + tl.arange(0, BLOCK), size,
                mix, explore_beta, explore_rest, beta1, rest1, beta2, rest2, unbias1, unbias2, eps,
                rate, weight_decay, step, PARAM, STATE, GRAD, DECAY, MAXIMIZE, FULL=False,
            )  # fmt: skip


@triton.jit
def _step_block(
    theta_at, g_at, e_at, m_at, v_at, offset, offsets, size,
    mix, explore_beta, explore_rest, beta1, rest1, beta2, rest2, unbias1, unbias2, eps,
    lr, weight_decay, step,
    PARAM: tl.constexpr, STATE: tl.constexpr, GRAD: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    inside = offsets < size
    thetas = elements(theta_at, offset, offsets, PARAM, FULL)
    gs = elements(g_at, offset, offsets, GRAD, FULL)
    es = elements(e_at, offset, offsets, STATE, FULL)
    ms = elements(m_at, offset, offsets, STATE, FULL)
    vs = elements(v_at, offset, offsets, STATE, FULL)
    theta = read(thetas, inside, FULL)
    g = read(gs, inside, FULL)
    e = read(es, inside, FULL)
    m = read(ms, inside, FULL)
    v = read(vs, inside, FULL)

    if MAXIMIZE:
        g = -g
    explored = explored_gradient(g, e, mix)
    e = moved(e, g, explore_beta, explore_rest)
    if DECAY == 2:  # DECOUPLED
        theta *= 1.0 - lr * weight_decay
    elif DECAY == 1:  # COUPLED
        explored += weight_decay * theta
    m = moved(m, explored, beta1, rest1)
    v = moved(v, explored * explored, beta2, rest2)
    theta -= lr * adam_direction(m, v, unbias1, unbias2, eps)

    write(es, stored(e, step, STATE, STATE), inside, FULL)
    write(ms, stored(m, step, STATE, STATE), inside, FULL)
    write(vs, stored(v, step, STATE, STATE), inside, FULL)
    write(thetas, stored(theta, step, PARAM, STATE), inside, FULL)
