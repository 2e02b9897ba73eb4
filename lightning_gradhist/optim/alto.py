"""ALTO: the layer-wise optimizer with adaptor E, for large batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from lightning_gradhist.explore import AUTO
from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.optim._backends import Bucket
from lightning_gradhist.optim._checks import as_tuple, refuse_flat
from lightning_gradhist.optim._formulas import (
    STATE,
    adam_directions,
    add_multiple,
    explored_gradients,
    move_averages,
    move_averages_of_squares,
    widened,
    write_back,
)
from lightning_gradhist.optim._moments import MomentOptimizer, Subgroup
from lightning_gradhist.optim._sharding import any_sharded, sum_over_shards

EPS2 = 1e-6  # bounds the trust ratio by 1 / EPS2: the paper's epsilon 2
EPS3 = 1e-10  # added to the norm of the parameters: the paper's epsilon 3


def alto_reference(
    theta: Tensor, g: Tensor, e: Tensor, m: Tensor, v: Tensor, k: int, group: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """The specification of :class:`ALTO`: the ``k``-th step of one layer, as the equation in its docstring has it.

    ``theta``, ``g``, ``e``, ``m`` and ``v`` are float64 tensors of one shape; ``alpha`` and ``explore_beta`` of ``group``
    are numbers. Returns ``theta``, ``e``, ``m`` and ``v`` after the step.
    """
    (beta1, beta2), explore_beta = group["betas"], group["explore_beta"]
    unbias1, unbias2 = (1 - beta1**k, 1 - beta2**k) if group["bias_correction"] else (1.0, 1.0)
    g = -g if group["maximize"] else g
    explored = g + group["alpha"] * (1 - explore_beta) * (g - e)
    e = explore_beta * e + (1 - explore_beta) * g
    m = beta1 * m + (1 - beta1) * explored
    v = beta2 * v + (1 - beta2) * explored**2
    r = (m / unbias1) / ((v / unbias2) ** 0.5 + group["eps"]) + group["weight_decay"] * theta
    phi = theta.norm() + EPS3
    scaled = group["layerwise"] and bool(theta.any() and r.any())
    theta = theta - group["lr"] * r * (phi / (r.norm() + EPS2 * phi) if scaled else 1.0)
    return theta, e, m, v


def alto_moments(tensors: StepTensors, s: StepScalars) -> Tensor:
    """Move ``e``, ``m`` and ``v`` on in place; parameters and gradients are not changed.

    What is returned are the squared norms of ``theta`` and of the update ``r`` of each entry, ``[n, 2]`` in float64.
    """
    return squared_norms(*alto_updates(tensors, s))


def alto_updates(tensors: StepTensors, s: StepScalars) -> tuple[list[Tensor], list[Tensor]]:
    """Move ``e``, ``m`` and ``v`` on in place as :func:`alto_moments`; returns ``theta`` and ``r`` themselves."""
    wide = widened(tensors)
    _, g, e, m, v = wide  # a list of tensors each

    if s.maximize:
        g = list(torch._foreach_neg(g))
    explored = explored_gradients(g, e, s.mix)
    move_averages(e, g, s.explore_beta)
    move_averages(m, explored, s.beta1)
    move_averages_of_squares(v, explored, s.beta2)

    write_back(wide, tensors, s, STATE)
    return _theta_and_r(tensors, s)  # of what was stored, as the second phase reads it


def _theta_and_r(tensors: StepTensors, s: StepScalars) -> tuple[list[Tensor], list[Tensor]]:
    """``theta`` and ``r``, whose lists are new."""
    theta, _, _, m, v = widened(tensors, ("params", "exp_avgs", "exp_avg_sqs"))
    r = adam_directions(m, v, s)
    if s.decays():
        add_multiple(r, theta, s.weight_decay)
    return theta, r


def alto_apply(tensors: StepTensors, s: StepScalars, ratios: Tensor | None) -> None:
    """Subtract ``lr * ratio * r`` from the parameters in place, with the state as :func:`alto_moments` left it.

    ``ratios`` are the trust ratio of each entry, ``[n]``, or of each element of a single one, ``[1, numel]``; None for 1.
    """
    subtract_updates(tensors, s, _theta_and_r(tensors, s)[1], ratios)


def subtract_updates(tensors: StepTensors, s: StepScalars, r: list[Tensor], ratios: Tensor | None) -> None:
    """As :func:`alto_apply`, with updates ``r`` that are at hand; they are changed."""
    wide = widened(tensors, ("params",))
    if ratios is not None:
        torch._foreach_mul_(r, list(ratios.to(r[0].dtype).unbind()))
    add_multiple(wide.params, r, -s.lr)
    write_back(wide, tensors, s, ("params",))


def squared_norms(theta: list[Tensor], r: list[Tensor], sizes: Tensor | None = None) -> Tensor:
    """``[n, 2]``: squared norms of ``theta`` and ``r`` of each entry, or of each part of a single one of given sizes."""
    dtype = _norm_dtype(theta[0])
    if sizes is not None:
        squares = torch.cat([*theta, *r]).to(dtype).square_()
        return torch.segment_reduce(squares, "sum", lengths=sizes.repeat(2)).view(2, -1).t()
    if torch.compiler.is_compiling():  # makes one pass of it
        squares = torch.stack([tensor.to(dtype).square().sum() for tensor in (*theta, *r)])
    else:
        squares = torch.stack([*torch._foreach_norm([*theta, *r], 2, dtype)]).square_()
    return squares.view(2, -1).t()


def _norm_dtype(tensor: Tensor) -> torch.dtype:
    # In fp32 squares of 1e-23 vanish and of 1e20 overflow. Apple's devices have no float64.
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def trust_ratio(squares: Tensor) -> Tensor:
    """Compute ``phi(|theta|) / (|r| + EPS2 * phi(|theta|))`` with ``phi(x) = x + EPS3``; 1 where one of the norms is zero.

    From ``[n, 2]``, squared norms of ``theta`` and of the update ``r`` of each tensor, to ``[n]``, > 0.
    """
    theta_norm, update_norm = squares.sqrt().unbind(1)
    phi = theta_norm + EPS3
    ratio = phi / (update_norm + EPS2 * phi)
    return torch.where((theta_norm > 0) & (update_norm > 0), ratio, 1.0)


class ALTO(MomentOptimizer):
    """LAMB that sees the gradient through adaptor E.

    Each step has ``lr`` times the length of the layer's weights. At step ``k`` with gradient ``g``, ``c = alpha * (1 -
    explore_beta)``, ``phi(x) = x + 1e-10`` and all buffers zero at first, for each parameter tensor::

        g'    = g + c * (g - e)                            # = g + alpha * a
        e     = explore_beta * e + (1 - explore_beta) * g
        m     = beta1 * m + (1 - beta1) * g'
        v     = beta2 * v + (1 - beta2) * g'^2
        r     = (m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps) + weight_decay * theta
        theta = theta - lr * r * phi(|theta|) / (|r| + 1e-6 * phi(|theta|))

    The paper's ``a``, the moving average of the gradient's change, is ``(1 - explore_beta) * (g - e)``: one buffer does for
    its two. The trust ratio, the factor behind ``r``, is 1 where ``theta`` or ``r`` is zero, so that a zero-initialised
    layer can learn.

    The state of a parameter is ``exp_avg_grad`` (e), ``exp_avg`` (m) and ``exp_avg_sq`` (v), shaped as the parameter and in
    fp32 (float64 for float64, or ``state_dtype``), and ``step``. For fp16 and bf16 the step is computed in fp32 and its
    result rounded. Gradients are neither clipped nor changed. Every argument but ``params`` can differ by param group
    and is read at each step.

    Args:
        params: Parameters, named parameters or param groups. Complex ones are refused.
        lr: Learning rate, >= 0; a number or a tensor of one element. It is relative: 0.01 moves each layer by 1% of its
            length per step. A rate tuned for Adam means nothing here.
        betas: Decays ``(beta1, beta2)`` of the first and the second moment, each in [0, 1).
        eps: Added to the root of the second moment, >= 0; at 0 a coordinate whose gradients are all zero becomes NaN. It
            turns the update's direction, not its length.
        weight_decay: Weight decay, >= 0, added to the direction before its length is set.
        alpha: Weight of the gradient's change, ``|alpha| < 1 / (1 - explore_beta)``: negative explores along valleys
            (large batches), positive exploits. ``"auto"`` is 0.5 with ``explore_beta`` 0.01, the paper's choice below
            1,000 samples a batch, until a callback or :meth:`set_batch_size` writes numbers in its place; from 1,000
            on, the paper takes -5 and 0.99.
        explore_beta: Decay of the average in E, in [0, 1); ``"auto"`` if and only if ``alpha`` is.
        layerwise: Apply the trust ratio. Switch it off in the group of biases and norm layers to step them as AdamE does.
        bias_correction: Divide ``m`` and ``v`` by ``1 - beta^k``; False is the paper's "ALTO Vanilla".
        maximize: Ascend instead of descend.
        foreach: How many tensors the eager step takes at once: as many as fit a cache, or on other devices than the CPU a
            bounded memory (None), all, in several times their memory (True), or one (False). The result is the same but
            for the order of the sums in the norms (and, with ``state_dtype=torch.bfloat16``, for the neighbour that is
            then chosen).
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
        TypeError: If a parameter is complex, or with ``layerwise`` a part of a flat partition (ZeRO, and FSDP1 but for
            ``use_orig_params=True``).

    Source: Zhao et al., "Exploring Landscapes for Better Minima along Valleys", NeurIPS 2025 (arXiv 2510.27153), adaptor E
    applied to LAMB.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = ALTO([x], lr=0.01, alpha=-5.0, explore_beta=0.99)
        >>> x.square().sum().backward()
        >>> before = x.detach().clone()
        >>> optimizer.step()
        >>> print(f"{(x.detach() - before).norm():.4f}")  # lr times the length 5 of x
        0.0500
    """

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
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        defaults = {
            "lr": lr, "betas": as_tuple(betas), "eps": eps, "weight_decay": weight_decay,
            "alpha": alpha, "explore_beta": explore_beta, "layerwise": layerwise, "bias_correction": bias_correction,
            "maximize": maximize, "foreach": foreach, "fused": fused, "capturable": capturable, "state_dtype": state_dtype,
        }  # fmt: skip
        super().__init__(params, defaults)

    _added_defaults: ClassVar[dict[str, Any]] = __init__.__kwdefaults__  # type: ignore[assignment]

    def _update(self, subgroups: list[Subgroup]) -> None:
        layers = [param for group in self.param_groups if group["layerwise"] for param in group["params"]]
        if any_sharded(layers):
            _update_shards(subgroups, layers)
            return
        for subgroup in subgroups:
            subgroup.for_each_bucket(_step_bucket, (*STATE, "params"))

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        if group["layerwise"]:
            refuse_flat(group["params"], type(self).__name__)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict as :class:`AdamE` does, or one of the authors' ALTO (``e-optimizer-adaptor`` 0.1.0).

        That goes on as theirs would, except for their clipping: clip the global gradient norm to 1 yourself if it was active.
        """
        groups = state_dict["param_groups"]
        is_authors = bool(groups) and all("alp" in group for group in groups)
        super().load_state_dict(_from_authors(state_dict) if is_authors else state_dict)


def _update_shards(subgroups: list[Subgroup], layers: list[Tensor]) -> None:
    """Moves all on before anything is subtracted, so that one collective does for all norms."""
    squares: dict[Tensor, Tensor] = {}
    for subgroup in subgroups:
        squares.update(zip(subgroup.params, _all_moments(subgroup), strict=True))
    sum_over_shards(layers, squares)
    for subgroup in subgroups:
        _apply_all(subgroup, torch.stack([squares[param] for param in subgroup.params]))


def _all_moments(subgroup: Subgroup) -> Tensor:
    m = subgroup.tensors.exp_avgs[0]
    squares = torch.zeros(len(subgroup.params), 2, dtype=_norm_dtype(m), device=m.device)

    def move(_: Subgroup, bucket: Bucket) -> None:
        squares[bucket.entries] = _moments_of_bucket(subgroup, bucket)

    subgroup.for_each_bucket(move, STATE)
    return squares


def _apply_all(subgroup: Subgroup, squares: Tensor) -> None:
    subgroup.for_each_bucket(lambda _, bucket: _apply_bucket(subgroup, bucket, squares[bucket.entries]), ("params",))


def _step_bucket(subgroup: Subgroup, bucket: Bucket) -> None:
    """Makes the step of whole tensors, while they are in the cache."""
    if not bucket.small:
        _apply_bucket(subgroup, bucket, _moments_of_bucket(subgroup, bucket))
        return
    (tensors,) = bucket.chunks
    theta, r = subgroup.backend.function(alto_updates)(tensors, bucket.scalars)
    squares = squared_norms(theta, r, bucket.sizes) if subgroup.group["layerwise"] else None
    subtract_updates(tensors, bucket.scalars, r, _ratios(bucket, squares))


def _moments_of_bucket(subgroup: Subgroup, bucket: Bucket) -> Tensor:
    """Moves ``e``, ``m`` and ``v`` on; the squared norms ``[n, 2]`` of the entries."""
    if bucket.sizes is not None:
        (tensors,) = bucket.chunks
        return squared_norms(*subgroup.backend.function(alto_updates)(tensors, bucket.scalars), bucket.sizes)
    moments = subgroup.backend.function(alto_moments)
    return torch.stack([moments(chunk, bucket.scalars) for chunk in bucket.chunks]).sum(0)


def _apply_bucket(subgroup: Subgroup, bucket: Bucket, squares: Tensor) -> None:
    """Subtracts the updates, once the squared norms ``[n, 2]`` of the entries are known."""
    ratios = _ratios(bucket, squares if subgroup.group["layerwise"] else None)
    for chunk in bucket.chunks:
        subgroup.backend.function(alto_apply)(chunk, bucket.scalars, ratios)


def _ratios(bucket: Bucket, squares: Tensor | None) -> Tensor | None:
    """What the entries are multiplied by: one number each, or one for each element of what holds several."""
    if squares is None:
        return None
    ratios = trust_ratio(squares)
    return ratios if bucket.sizes is None else ratios.repeat_interleave(bucket.sizes)[None]


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
                theirs = state_dict["state"][key]
                e = theirs["prev_grad"] - theirs["exp_grad_diff"] * (explore_beta / (1.0 - explore_beta))
                state[key] = {"exp_avg_grad": e, **{name: theirs[name] for name in ("step", "exp_avg", "exp_avg_sq")}}
    return {**state_dict, "state": state, "param_groups": groups}
