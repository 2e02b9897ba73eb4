"""The formulas that the optimizers share, on lists of tensors, and the precision that they are computed in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.tensors import wide

STATE = StepTensors._fields[2:]

# torch._foreach_* are what torch's own optimizers are made of; there is no public form of them.


def explored_gradients(grads: list[Tensor], exp_avg_grads: list[Tensor], mix: float | Tensor) -> list[Tensor]:
    """``g' = g + alpha * a = g + c * (g - e)`` with ``c = mix``, as new tensors."""
    if not isinstance(mix, Tensor):
        return list(torch._foreach_lerp(grads, exp_avg_grads, -mix))
    explored = list(torch._foreach_sub(grads, exp_avg_grads))
    torch._foreach_mul_(explored, mix)
    torch._foreach_add_(explored, grads)
    return explored


def move_averages(averages: list[Tensor], values: list[Tensor], beta: float | Tensor) -> None:
    """``average = beta * average + (1 - beta) * value``, in place."""
    if isinstance(beta, Tensor):
        torch._foreach_mul_(averages, beta)
        add_multiple(averages, values, 1.0 - beta)
    else:
        torch._foreach_lerp_(averages, values, 1.0 - beta)


def move_averages_of_squares(averages: list[Tensor], values: list[Tensor], beta: float | Tensor) -> None:
    """``average = beta * average + (1 - beta) * value^2``, in place."""
    torch._foreach_mul_(averages, beta)
    if isinstance(beta, Tensor):
        add_multiple(averages, list(torch._foreach_mul(values, values)), 1.0 - beta)
    else:
        torch._foreach_addcmul_(averages, values, values, 1.0 - beta)


def add_multiple(tensors: list[Tensor], others: list[Tensor], factor: float | Tensor) -> None:
    """``tensor = tensor + factor * other``, in place."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, list(torch._foreach_mul(others, factor)))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)


def adam_directions(ms: list[Tensor], vs: list[Tensor], s: StepScalars) -> list[Tensor]:
    """``(m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)``; changes nothing."""
    eps, factor = _uncorrected(s)
    directions = list(torch._foreach_div(ms, _denominators(vs, eps)))
    torch._foreach_mul_(directions, factor)
    return directions


def subtract_adam_directions(thetas: list[Tensor], ms: list[Tensor], vs: list[Tensor], s: StepScalars) -> None:
    """``theta = theta - lr * direction`` with those of :func:`adam_directions`, in place."""
    eps, factor = _uncorrected(s)
    if isinstance(factor, float) and not isinstance(s.lr, Tensor):  # in one pass
        torch._foreach_addcdiv_(thetas, ms, _denominators(vs, eps), -s.lr * factor)
    else:
        add_multiple(thetas, adam_directions(ms, vs, s), -s.lr)


def _uncorrected(s: StepScalars) -> tuple[Any, Any]:
    """``eps'`` and ``f`` so that the direction is ``f * m / (sqrt(v) + eps')``, which saves a pass over ``v``."""
    if isinstance(s.bias_correction2, list):
        roots = torch._foreach_sqrt(s.bias_correction2)
        return torch._foreach_mul(roots, s.eps), torch._foreach_div(roots, s.bias_correction1)  # type: ignore[arg-type]
    root = s.bias_correction2**0.5  # type: ignore[operator]
    return s.eps * root, root / s.bias_correction1  # type: ignore[operator]


def _denominators(vs: list[Tensor], eps: Any) -> list[Tensor]:
    denominators = list(torch._foreach_sqrt(vs))
    torch._foreach_add_(denominators, [eps] * len(denominators) if isinstance(eps, Tensor) else eps)
    return denominators


def widened(tensors: StepTensors, columns: Sequence[str] = StepTensors._fields) -> StepTensors:
    """The lists as they are computed with: fp16 and bf16 of some columns copied to fp32, all else as it is."""
    copied = {name: [tensor.to(wide(tensor)) for tensor in getattr(tensors, name)] for name in columns}
    return tensors._replace(**copied)


def write_back(computed: StepTensors, tensors: StepTensors, s: StepScalars, columns: Sequence[str]) -> None:
    """Rounds what :func:`widened` copied into its place: stochastically to bf16 where the state is bf16."""
    for name in columns:
        for index, (value, tensor) in enumerate(zip(getattr(computed, name), getattr(tensors, name), strict=True)):
            if value is not tensor:
                stochastic = tensor.dtype == tensors.exp_avgs[index].dtype == torch.bfloat16
                step = s.step[index] if isinstance(s.step, list) else s.step
                tensor.copy_(rounded_stochastically(value, step) if stochastic else value)  # type: ignore[arg-type]


def rounded_stochastically(values: Tensor, step: float | Tensor) -> Tensor:
    """Round fp32 to one of its two neighbours in bf16, as fp32; the nearer one more often, so that the mean is the value.

    The random bits are a hash of the value and the number of the step: the same on every device and after a resume,
    and nothing is drawn from the user's generators. What bf16 can hold stays as it is.
    """
    bits = values.view(torch.int32)
    # multiply-xorshift ("lowbias32", by C. Wellons); int32 has no logical shift, hence the masks
    seed = _signed(round(step) * _GOLDEN) if isinstance(step, (int, float)) else step.to(torch.int32) * _signed(_GOLDEN)
    mixed = bits ^ seed
    mixed = (mixed ^ ((mixed >> 16) & 0xFFFF)) * 0x7FEB352D
    mixed = (mixed ^ ((mixed >> 15) & 0x1FFFF)) * _signed(0x846CA68B)
    chosen = ((bits + ((mixed >> 16) & 0xFFFF)) & _signed(0xFFFF0000)).view(torch.float32)
    return torch.where(values.isfinite(), chosen, values)


_GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: spreads successive steps


def _signed(bits: int) -> int:
    """The int32 with these bits."""
    return ((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
