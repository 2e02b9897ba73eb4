"""The step of AdamE as one launch for all tensors."""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.kernels._chunks import BLOCK, addresses, block_of, is_full, locate, read, write
from lightning_gradhist.kernels._launch import Operands, kernel_arguments, launch, operands_of
from lightning_gradhist.kernels._math import adam_direction, moved, scalars_of, stored


def adam_e_step(
    tensors: StepTensors, s: StepScalars, *, decoupled_weight_decay: bool, operands: Operands | None = None
) -> None:
    """As the eager :func:`~lightning_gradhist.optim.adam_e.adam_e_step`, in fp32.

    Tensors among the scalars are on the device of the parameters, and are read there. The operands are those of the
    tensors, where they are known. ``ValueError`` if the kernels do not take these; nothing has been changed then.
    """
    if not tensors.params:
        return
    operands = operands or operands_of(tensors)
    scalars, variant = kernel_arguments(tensors, s)
    launch(adam_e_kernel, operands, scalars, variant._replace(decoupled=bool(decoupled_weight_decay and s.decays())))


@triton.jit
def adam_e_kernel(table, s, VARIANT: tl.constexpr, CHUNK: tl.constexpr):
    """Step one chunk."""
    chunk = locate(table, tl.program_id(0), CHUNK)
    at = addresses(table, chunk, 5)
    s = scalars_of(s, chunk.tensor)
    if is_full(chunk, at, CHUNK):
        for start in range(0, CHUNK, BLOCK):
            _step_block(at, block_of(chunk, start, BLOCK, True), s, VARIANT)
    else:
        for start in range(0, chunk.size, BLOCK):
            _step_block(at, block_of(chunk, start, BLOCK, False), s, VARIANT)


@triton.jit
def _step_block(at, block, s, VARIANT: tl.constexpr):
    theta_at, g_at, e_at, m_at, v_at = at
    theta = read(theta_at, block, VARIANT.param)
    g = read(g_at, block, VARIANT.grad)
    e = read(e_at, block, VARIANT.state)
    m = read(m_at, block, VARIANT.state)
    v = read(v_at, block, VARIANT.state)

    if VARIANT.maximize:
        g = -g
    explored = g + s.mix * (g - e)
    e = moved(e, g, s.explore_beta)
    if VARIANT.decay:
        if VARIANT.decoupled:
            theta *= 1.0 - s.lr * s.weight_decay
        else:
            explored += s.weight_decay * theta
    m = moved(m, explored, s.beta1)
    v = moved(v, explored * explored, s.beta2)
    theta -= s.lr * adam_direction(m, v, s)

    write(e_at, block, stored(e, s.step, VARIANT.state, VARIANT.state), VARIANT.state)
    write(m_at, block, stored(m, s.step, VARIANT.state, VARIANT.state), VARIANT.state)
    write(v_at, block, stored(v, s.step, VARIANT.state, VARIANT.state), VARIANT.state)
    write(theta_at, block, stored(theta, s.step, VARIANT.param, VARIANT.state), VARIANT.param)
