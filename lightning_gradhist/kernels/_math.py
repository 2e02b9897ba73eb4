"""The arithmetic of the steps, on blocks of elements; each function reads as a line of the optimizers' docstrings."""
# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

# Quotients and roots are rounded as torch rounds them: Triton's own are approximations that flush subnormals.


@triton.jit
def explored_gradient(g, e, mix):
    """``g' = g + c * (g - e)``."""
    return g + mix * (g - e)


@triton.jit
def moved(average, value, beta, rest):
    """``beta * average + (1 - beta) * value``; ``rest`` is ``1 - beta``, which fp32 would round coarsely near 1."""
    return beta * average + rest * value


@triton.jit
def adam_direction(m, v, unbias1, unbias2, eps):
    """``(m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)``; ``unbias1`` is ``1 / (1 - beta1^k)``."""
    return tl.div_rn(m * unbias1, tl.sqrt_rn(v * unbias2) + eps)


@triton.jit
def stored(x, step, DTYPE: tl.constexpr, STATE: tl.constexpr):
    """What is stored of ``x``: with bf16 state, a neighbour in bf16 by chance, else ``x``, which the store rounds."""
    if STATE == tl.bfloat16 and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        mixed = bits ^ (step.to(tl.int32).to(tl.uint32) * 0x9E3779B9)
        mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352D
        mixed = (mixed ^ (mixed >> 15)) * 0x846CA68B
        chosen = ((bits + (mixed >> 16)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where((bits & 0x7F800000) != 0x7F800000, chosen, x)
    return x


@triton.jit
def scalar(value, ON_DEVICE: tl.constexpr):
    """A number, or the one that a pointer points to, in fp32."""
    if ON_DEVICE:
        number = tl.load(value).to(tl.float32)
    else:
        number = value
    return number


@triton.jit
def scalar_of(values, tensor, ON_DEVICE: tl.constexpr):
    """A number that all tensors share, or this tensor's entry of an fp32 array."""
    if ON_DEVICE:
        number = tl.load(values + tensor)
    else:
        number = values
    return number
