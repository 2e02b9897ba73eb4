"""ALTO: the layer-wise optimizer with adaptor E, for large batches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from lightning_gradhist.explore import AUTO
from lightning_gradhist.optim._base import (
    ExploringOptimizer,
    ParamsT,
    StepScalars,
    adam_direction,
    explored_gradient,
)

EPS2 = 1e-6
"""Bounds the trust ratio by ``1 / EPS2``: the paper's epsilon 2."""
EPS3 = 1e-10
"""Added to the norm of the parameters: the paper's epsilon 3."""


def trust_ratio(theta: Tensor, update: Tensor) -> Tensor:
    """Compute ``phi(|theta|) / (|update| + EPS2 * phi(|theta|))`` with ``phi(x) = x + EPS3``.

    Args:
        theta: Parameter, any shape.
        update: Update ``r``, shaped as ``theta``.

    Returns:
        A 0-d tensor on the device of ``theta``, > 0; 1 where one of the norms is zero.
    """
    theta_norm = torch.linalg.vector_norm(theta)
    update_norm = torch.linalg.vector_norm(update)
    phi = theta_norm + EPS3
    ratio = phi / (update_norm + EPS2 * phi)
    return torch.where((theta_norm > 0) & (update_norm > 0), ratio, 1.0)


def alto_step(
    param: Tensor,
    grad: Tensor,
    exp_avg_grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    s: StepScalars,
    *,
    layerwise: bool,
) -> None:
    """Make one ALTO step in place, in the dtype of the buffers; ``grad`` is not changed.

    Args:
        param: Parameter ``theta``, any shape.
        grad: Gradient ``g``, shaped as ``param``.
        exp_avg_grad: ``e``, shaped as ``param``.
        exp_avg: ``m``, shaped as ``param``.
        exp_avg_sq: ``v``, shaped as ``param``.
        s: The scalars of this step.
        layerwise: Give the update the length of the parameter.
    """
    theta = param.to(exp_avg.dtype)  # param itself unless it is fp16 or bf16
    g = explored_gradient(grad.to(exp_avg.dtype), exp_avg_grad, s)
    r = adam_direction(g, exp_avg, exp_avg_sq, s).add_(theta, alpha=s.weight_decay)
    if layerwise:
        r.mul_(trust_ratio(theta, r))
    theta.sub_(r.mul_(s.lr))
    if theta is not param:
        param.copy_(theta)


class ALTO(ExploringOptimizer):
    """LAMB that sees the gradient through adaptor E.

    Each step has ``lr`` times the length of the layer's weights. At step ``k`` with gradient ``g``, ``c =
    alpha * (1 - explore_beta)``, ``phi(x) = x + 1e-10`` and all buffers zero at first, for each parameter
    tensor::

        g'    = g + c * (g - e)                            # = g + alpha * a
        e     = explore_beta * e + (1 - explore_beta) * g
        m     = beta1 * m + (1 - beta1) * g'
        v     = beta2 * v + (1 - beta2) * g'^2
        r     = (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps) + weight_decay * theta
        theta = theta - lr * r * phi(|theta|) / (|r| + 1e-6 * phi(|theta|))

    ``a`` is the paper's moving average of the gradient's change, ``a_k = explore_beta * a_{k-1} + (1 -
    explore_beta) * (g_k - g_{k-1})``. It equals ``(1 - explore_beta) * (g_k - e_{k-1})``, so that one buffer
    does for its two. The trust ratio, the factor behind ``r``, is 1 where ``theta`` or ``r`` is zero, so that
    a zero-initialised layer can learn.

    The state of a parameter is ``exp_avg_grad`` (e), ``exp_avg`` (m) and ``exp_avg_sq`` (v), shaped as the
    parameter and in fp32 (float64 for float64), and ``step``. For fp16 and bf16 the step is computed in fp32
    and its result rounded. Gradients are neither clipped nor changed. Every argument but ``params`` can
    differ by param group and is read at each step.

    Args:
        params: Parameters, named parameters or param groups. Complex ones are refused.
        lr: Learning rate, >= 0; a number or a tensor of one element, which is read at each step. It is
            relative: 0.01 moves each layer by 1% of its length per step. A rate tuned for Adam means nothing
            here.
        betas: Decays ``(beta1, beta2)`` of the first and the second moment, each in [0, 1).
        eps: Added to the root of the second moment, >= 0; at 0 a coordinate whose gradients are all zero
            becomes NaN. It turns the update's direction, not its length.
        weight_decay: Weight decay, >= 0, added to the direction before its length is set.
        alpha: Weight of the gradient's change, ``|alpha| < 1 / (1 - explore_beta)``: negative explores along
            valleys (large batches), positive exploits. ``"auto"`` stays in the param group until a callback
            or the user writes a number there; until then the small-batch choice, 0.5 with ``explore_beta``
            0.01, is in force. From 1,000 samples a batch the paper takes -5 and 0.99.
        explore_beta: Decay of the average in E, in [0, 1); ``"auto"`` if and only if ``alpha`` is.
        layerwise: Apply the trust ratio. Switch it off in the group of biases and norm layers to step them as
            AdamE does.
        bias_correction: Divide ``m`` and ``v`` by ``1 - beta^k``; False is the paper's "ALTO Vanilla".
        maximize: Ascend instead of descend.

    Raises:
        ValueError: If a hyper-parameter is out of range.
        TypeError: If a parameter is complex.

    Source: Zhao et al., "Exploring Landscapes for Better Minima along Valleys", NeurIPS 2025 (arXiv
    2510.27153), adaptor E applied to LAMB.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = ALTO([x], lr=0.01, alpha=-5.0, explore_beta=0.99)
        >>> x.square().sum().backward()
        >>> before = x.detach().clone()
        >>> optimizer.step()
        >>> print(f"{(x.detach() - before).norm():.4f}")  # lr times the length 5 of x
        0.0500
    """

    _added_defaults: ClassVar[dict[str, Any]] = {
        **ExploringOptimizer._added_defaults,
        "layerwise": True,
        "bias_correction": True,
    }

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 1e-4,
        *,
        alpha: float | str = AUTO,
        explore_beta: float | str = AUTO,
        layerwise: bool = True,
        bias_correction: bool = True,
        maximize: bool = False,
    ) -> None:
        """Check the hyper-parameters and register the parameters."""
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "alpha": alpha,
            "explore_beta": explore_beta,
            "layerwise": layerwise,
            "bias_correction": bias_correction,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _step_param(self, param: Tensor, state: dict[str, Tensor], s: StepScalars, group: dict[str, Any]) -> None:
        assert param.grad is not None
        alto_step(
            param,
            param.grad,
            state["exp_avg_grad"],
            state["exp_avg"],
            state["exp_avg_sq"],
            s,
            layerwise=group["layerwise"],
        )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class, of torch's Adam or AdamW, or of the authors' ALTO.

        The authors' is the one in ``e-optimizer-adaptor`` 0.1.0. The state stays in fp32 for fp16 and bf16
        parameters, and is copied: later steps do not write to ``state_dict``. Hyper-parameters that
        ``state_dict`` does not have keep their present values. A checkpoint of the authors' ALTO goes on as
        theirs would, except for their clipping: clip the global gradient norm to 1 yourself if it was active.

        Args:
            state_dict: What :meth:`state_dict` returned; it is not changed.

        Raises:
            ValueError: If the groups do not fit or a hyper-parameter is out of range; nothing has been
                changed then.
        """
        groups = state_dict["param_groups"]
        is_authors = bool(groups) and all("alp" in group for group in groups)
        super().load_state_dict(_from_authors(state_dict) if is_authors else state_dict)


def _from_authors(state_dict: StateDict) -> StateDict:
    """Translate a state dict of the authors' ALTO, whose two buffers for E determine our one."""
    groups: list[dict[str, Any]] = []
    state: dict[Any, Any] = {}
    for saved in state_dict["param_groups"]:
        explore_beta, beta1, beta2 = saved["betas"]
        group = {name: value for name, value in saved.items() if name != "alp"}
        group.update(betas=(beta1, beta2), alpha=saved["alp"], explore_beta=explore_beta)
        group["layerwise"] = saved["weight_decay"] != 0  # theirs has no trust ratio without decay
        groups.append(group)
        for key in saved["params"]:
            if key in state_dict["state"]:
                state[key] = _state_from_authors(state_dict["state"][key], explore_beta)
    return {**state_dict, "state": state, "param_groups": groups}


def _state_from_authors(saved: dict[str, Any], explore_beta: float) -> dict[str, Any]:
    exp_avg_grad = saved["prev_grad"] - saved["exp_grad_diff"] * (explore_beta / (1.0 - explore_beta))
    return {
        "step": saved["step"],
        "exp_avg_grad": exp_avg_grad,
        "exp_avg": saved["exp_avg"],
        "exp_avg_sq": saved["exp_avg_sq"],
    }
