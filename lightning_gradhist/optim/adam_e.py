"""AdamE: Adam and AdamW with adaptor E."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from lightning_gradhist.explore import AUTO
from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.optim._backends import Bucket
from lightning_gradhist.optim._checks import as_tuple
from lightning_gradhist.optim._formulas import (
    STATE,
    add_multiple,
    explored_gradients,
    move_averages,
    move_averages_of_squares,
    subtract_adam_directions,
    widened,
    write_back,
)
from lightning_gradhist.optim._moments import MomentOptimizer, Subgroup

WRITTEN = ("params", *STATE)


def adam_e_reference(theta: Any, g: Any, e: Any, m: Any, v: Any, k: int, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """The specification of :class:`AdamE`: the ``k``-th step of one number, as the equation in its docstring has it.

    ``theta``, ``g``, ``e``, ``m`` and ``v`` are floats, or float64 tensors for many numbers at once; ``alpha`` and
    ``explore_beta`` of ``group`` are numbers. Returns ``theta``, ``e``, ``m`` and ``v`` after the step.
    """
    lr, (beta1, beta2), explore_beta, decay = (group[n] for n in ("lr", "betas", "explore_beta", "weight_decay"))
    g = -g if group["maximize"] else g
    explored = g + group["alpha"] * (1 - explore_beta) * (g - e)
    e = explore_beta * e + (1 - explore_beta) * g
    if group["decoupled_weight_decay"]:
        theta = theta * (1 - lr * decay)
    else:
        explored = explored + decay * theta
    m = beta1 * m + (1 - beta1) * explored
    v = beta2 * v + (1 - beta2) * explored**2
    theta = theta - lr * (m / (1 - beta1**k)) / ((v / (1 - beta2**k)) ** 0.5 + group["eps"])
    return theta, e, m, v


def adam_e_step(tensors: StepTensors, s: StepScalars, *, decoupled_weight_decay: bool) -> None:
    """Make one AdamE step in place, in fp32 or float64; the gradients are not changed.

    ``decoupled_weight_decay`` shrinks ``theta`` (AdamW); else the decay is added to the gradient (Adam).
    """
    wide = widened(tensors)
    theta, g, e, m, v = wide  # a list of tensors each

    if s.maximize:
        g = list(torch._foreach_neg(g))
    explored = explored_gradients(g, e, s.mix)
    move_averages(e, g, s.explore_beta)
    if s.decays():
        if decoupled_weight_decay:
            torch._foreach_mul_(theta, 1.0 - s.lr * s.weight_decay)
        else:
            add_multiple(explored, theta, s.weight_decay)
    move_averages(m, explored, s.beta1)
    move_averages_of_squares(v, explored, s.beta2)
    subtract_adam_directions(theta, m, v, s)

    write_back(wide, tensors, s, WRITTEN)


class AdamE(MomentOptimizer):
    """Adam or AdamW that sees the gradient through adaptor E ("EAdam" in the paper).

    At step ``k`` with gradient ``g``, ``c = alpha * (1 - explore_beta)`` and all buffers zero at first::

        g'    = g + c * (g - e)                            # = g + alpha * a
        e     = explore_beta * e + (1 - explore_beta) * g
        m     = beta1 * m + (1 - beta1) * g'
        v     = beta2 * v + (1 - beta2) * g'^2
        theta = theta - lr * (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)

    The paper's ``a``, the moving average of the gradient's change, is ``(1 - explore_beta) * (g - e)``: one buffer does for
    its two. Weight decay: ``theta`` is first multiplied by ``1 - lr * weight_decay`` (decoupled, AdamW), or ``weight_decay *
    theta`` is added to ``g'`` (coupled, Adam). At ``alpha = 0`` it is ``torch.optim.AdamW`` or ``torch.optim.Adam``.

    The state of a parameter is ``exp_avg_grad`` (e), ``exp_avg`` (m) and ``exp_avg_sq`` (v), shaped as the parameter and in
    fp32 (float64 for float64, or ``state_dtype``), and ``step``. For fp16 and bf16 the step is computed in fp32 and its
    result rounded. Gradients are neither clipped nor changed. Every argument but ``params`` can differ by param group
    and is read at each step.

    Args:
        params: Parameters, named parameters or param groups. Complex ones are refused.
        lr: Learning rate, >= 0; a number or a tensor of one element.
        betas: Decays ``(beta1, beta2)`` of the first and the second moment, each in [0, 1).
        eps: Added to the root of the second moment, >= 0; at 0 a coordinate whose gradients are all zero becomes NaN.
        weight_decay: Weight decay, >= 0.
        alpha: Weight of the gradient's change, ``|alpha| < 1 / (1 - explore_beta)``: negative explores along valleys
            (large batches), positive exploits. ``"auto"`` is 0.5 with ``explore_beta`` 0.01, the paper's choice below
            1,000 samples a batch, until a callback or :meth:`set_batch_size` writes numbers in its place; from 1,000
            on, the paper takes -5 and 0.99.
        explore_beta: Decay of the average in E, in [0, 1); ``"auto"`` if and only if ``alpha`` is.
        decoupled_weight_decay: Weight decay as in AdamW rather than as in Adam.
        maximize: Ascend instead of descend.
        foreach: How many tensors the eager step takes at once: as many as fit a cache, or on other devices than the CPU a
            bounded memory (None), all, in several times their memory (True), or one (False). The result is the same.
        fused: True makes the step in one pass over memory: on CUDA by Triton kernels, on the CPU by ``torch.compile``, which
            needs a C++ compiler; a small trial step must agree with the eager one first. False takes the eager step.
            None takes the kernels on CUDA where they run and pass their trial (else, with one warning, the eager
            step), and the eager step on the CPU, or where ``foreach`` is given.
        capturable: Keep ``step`` on the device, and read it and a tensor ``lr`` there, so that a CUDA graph can hold the step.
        state_dtype: None for state in fp32 (float64 for float64); ``torch.bfloat16`` for half the memory. State and
            parameters in bf16 are then rounded up or down by chance, right in the mean, so that changes too small for
            bf16 are not lost; the chance comes from the values and the number of the step alone.

    Raises:
        ValueError: If a hyper-parameter is out of range, or ``foreach`` and ``fused`` are both True.
        TypeError: If a parameter is complex.

    Source: Zhao et al., "Exploring Landscapes for Better Minima along Valleys", NeurIPS 2025 (arXiv 2510.27153), adaptor E
    applied to Adam.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = AdamE([x], lr=0.1, alpha=-5.0, explore_beta=0.99)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     x.square().sum().backward()
        ...     optimizer.step()
        >>> bool(x.abs().max() < 0.1)
        True
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        alpha: float | str = AUTO,
        explore_beta: float | str = AUTO,
        decoupled_weight_decay: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": as_tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "alpha": alpha, "explore_beta": explore_beta, "decoupled_weight_decay": decoupled_weight_decay,
            "maximize": maximize, "foreach": foreach, "fused": fused, "capturable": capturable, "state_dtype": state_dtype,
        }  # fmt: skip
        super().__init__(params, defaults)

    _added_defaults: ClassVar[dict[str, Any]] = __init__.__kwdefaults__  # type: ignore[assignment]

    def _update(self, subgroups: list[Subgroup]) -> None:
        for subgroup in subgroups:
            subgroup.for_each_bucket(_step_bucket, WRITTEN)


def _step_bucket(subgroup: Subgroup, bucket: Bucket) -> None:
    step = subgroup.backend.function(adam_e_step)
    for chunk in bucket.chunks:
        step(chunk, bucket.scalars, decoupled_weight_decay=subgroup.group["decoupled_weight_decay"])
