"""The arithmetic of the steps, on blocks of elements; each function reads as a line of the optimizers' docstrings."""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Quotients and roots are rounded as torch rounds them: Triton's own are approximations that flush subnormals.


class KernelScalars(NamedTuple):
    """The scalars of a step as kernels take them: numbers, or tensors on their device where that is said.

    A decay is a pair ``(beta, 1 - beta)``, as fp32 would round ``1 - beta`` coarsely near 1.
    """

    lr: Any  # or a tensor of one element
    mix: Any
    explore_beta: Any
    beta1: Any
    beta2: Any
    step: Any  # or fp32 [n], as the next two
    unbias1: Any  # 1 / (1 - beta1^k): a product is faster than a quotient, and needs fewer registers
    unbias2: Any
    eps: Any
    weight_decay: Any


@triton.jit
def scalars_of(s, tensor):
    """The scalars of one tensor, with numbers for what is on the device."""
    return KernelScalars(
        number(s.lr, 0), s.mix, s.explore_beta, s.beta1, s.beta2, number(s.step, tensor),
        number(s.unbias1, tensor), number(s.unbias2, tensor), s.eps, s.weight_decay,
    )  # fmt: skip


@triton.jit
def square(x):
    """``x^2`` in float64."""
    wide = x.to(tl.float64)
    return wide * wide


@triton.jit
def number(value, index):
    """A number, or an element of an array on the device, in fp32."""
    found = value
    if found.dtype.is_ptr():
        found = tl.load(found + index).to(tl.float32)
    return found


@triton.jit
def moved(average, value, decay):
    """``beta * average + (1 - beta) * value``."""
    return decay[0] * average + decay[1] * value


@triton.jit
def adam_direction(m, v, s):
    """``(m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)``."""
    return tl.div_rn(m * s.unbias1, tl.sqrt_rn(v * s.unbias2) + s.eps)


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
