"""ALTO: the layer-wise optimizer with adaptor E, for large batches."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from lightning_gradhist.adaptor import AUTO
from lightning_gradhist.optim._base import Batch, ExploringOptimizer, ParamsT
from lightning_gradhist.optim._formulas import (
    STATE,
    adam_directions,
    add_multiple,
    explored_gradients,
    move_moments,
    widened,
    write_back,
)
from lightning_gradhist.optim._lists import Piece, StepLists, StepScalars
from lightning_gradhist.optim._parameters import wide_dtype
from lightning_gradhist.optim._sharding import is_sharded, refuse_flat, sum_over_shards

_READ = ("params", "exp_avgs", "exp_avg_sqs")
EPS2 = 1e-6
"""Bounds the trust ratio by ``1 / EPS2``: the paper's epsilon 2."""
EPS3 = 1e-10
"""Added to the norm of the parameters: the paper's epsilon 3."""
_EXACT_NORM = 2**16  # elements up to which torch's norm on the CPU, which adds up one by one, is right to 1e-5


def alto_moments(lists: StepLists, s: StepScalars) -> Tensor:
    """Move ``e``, ``m`` and ``v`` on in place.

    Args:
        lists: Parameters, gradients and state; parameters and gradients are not changed.
        s: The scalars of this step.

    Returns:
        ``[n, 2]``: squared norms of ``theta`` and of the update ``r`` for each of the ``n`` entries.
    """
    return squared_norms(*alto_updates(lists, s))


def alto_updates(lists: StepLists, s: StepScalars) -> tuple[list[Tensor], list[Tensor]]:
    """Move ``e``, ``m`` and ``v`` on in place as :func:`alto_moments`; returns ``theta`` and ``r`` themselves."""
    wide = widened(lists)
    move_moments(explored_gradients(wide, s), wide, s)
    write_back(wide, lists, s, STATE)
    wide = widened(lists, _READ)  # rounded: what a second phase reads
    return wide.params, _updates(wide, s)


def squared_norms(thetas: list[Tensor], updates: list[Tensor], sizes: Tensor | None = None) -> Tensor:
    """``[n, 2]``: squared norms of ``theta`` and ``r`` of each entry, or of each part of a single one of given sizes."""
    if sizes is not None:
        squares = torch.cat([*thetas, *updates]).square_().view(2, -1)
        return torch.segment_reduce(squares.t(), "sum", lengths=sizes, axis=0)
    return torch.stack([_squared_norms_of(column) for column in (thetas, updates)], dim=1)


def _squared_norms_of(tensors: list[Tensor]) -> Tensor:
    on_cpu = tensors[0].device.type == "cpu"
    if on_cpu and torch.compiler.is_compiling():  # which adds up one by one, and in float64 at no cost
        sums = [tensor.square().sum(dtype=torch.float64) for tensor in tensors]
        return torch.stack(sums).to(tensors[0].dtype)
    if on_cpu and any(tensor.numel() > _EXACT_NORM for tensor in tensors):
        return torch.stack([tensor.square().sum() for tensor in tensors])
    return torch.stack(list(torch._foreach_norm(tensors))).square_()


def alto_apply(lists: StepLists, s: StepScalars, ratios: Tensor | None) -> None:
    """Subtract ``lr * ratio * r`` from the parameters in place.

    Args:
        lists: Parameters and state, as :func:`alto_moments` left them.
        s: The scalars of this step.
        ratios: The trust ratio of each entry, ``[n]``, or of each element of a single one, ``[1, numel]``; None for 1.
    """
    subtract_updates(lists, s, _updates(widened(lists, _READ), s), ratios)


def subtract_updates(lists: StepLists, s: StepScalars, updates: list[Tensor], ratios: Tensor | None) -> None:
    """As :func:`alto_apply`, with updates ``r`` that are at hand; they are changed."""
    wide = widened(lists, ("params",))
    if ratios is not None:
        torch._foreach_mul_(updates, list(ratios.unbind()))
    add_multiple(wide.params, updates, -s.lr)
    write_back(wide, lists, s, ("params",))


def _updates(wide: StepLists, s: StepScalars) -> list[Tensor]:
    updates = adam_directions(wide, s)
    if isinstance(s.weight_decay, Tensor) or s.weight_decay != 0.0:
        add_multiple(updates, wide.params, s.weight_decay)
    return updates


def trust_ratio(squared_norms: Tensor) -> Tensor:
    """Compute ``phi(|theta|) / (|r| + EPS2 * phi(|theta|))`` with ``phi(x) = x + EPS3``.

    Args:
        squared_norms: ``[n, 2]``, of ``theta`` and of the update ``r`` of each tensor.

    Returns:
        ``[n]``, > 0; 1 where one of the norms is zero.
    """
    theta_norm, update_norm = squared_norms.sqrt().unbind(1)
    phi = theta_norm + EPS3
    ratio = phi / (update_norm + EPS2 * phi)
    return torch.where((theta_norm > 0) & (update_norm > 0), ratio, 1.0)


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
    parameter and in fp32 (float64 for float64, or ``state_dtype``), and ``step``. For fp16 and bf16 the step is
    computed in fp32 and its result rounded. Gradients are neither clipped nor changed. Every argument but ``params`` can
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
            or :meth:`set_batch_size` writes a number there; until then the small-batch choice, 0.5 with ``explore_beta``
            0.01, is in force. From 1,000 samples a batch the paper takes -5 and 0.99.
        explore_beta: Decay of the average in E, in [0, 1); ``"auto"`` if and only if ``alpha`` is.
        layerwise: Apply the trust ratio. Switch it off in the group of biases and norm layers to step them as
            AdamE does.
        bias_correction: Divide ``m`` and ``v`` by ``1 - beta^k``; False is the paper's "ALTO Vanilla".
        maximize: Ascend instead of descend.
        foreach: How the eager step is made: None goes through all tensors in pieces that fit a cache (CPU), or of a
            bounded size (other devices); True takes all tensors at once, which needs memory for several copies of
            them; False takes one tensor at a time. The result is the same but for the order of the sums in the norms (and, with
            ``state_dtype=torch.bfloat16``, for the neighbour that is then chosen).
        fused: True makes the step in one pass over memory: on CUDA by a Triton kernel for all tensors, on the CPU by
            the eager step compiled with ``torch.compile`` (which needs a C++ compiler and, once, its time). False
            does not. None takes the kernels on CUDA devices where Triton is installed, they take the tensors,
            ``foreach`` is None, and they make a small trial step there as the eager one does (if not, there is one
            warning); elsewhere the eager step.
        capturable: Keep ``step`` on the parameter's device and read it and a tensor ``lr`` there, so that a
            step can be captured in a CUDA graph.
        state_dtype: None for state in fp32 (float64 for float64); ``torch.bfloat16`` for half the memory. The state
            and parameters in bf16 are then rounded up or down by chance, right in the mean, so that changes too
            small for bf16 are not lost; the chance comes from the values and the number of the step alone.

    Raises:
        ValueError: If a hyper-parameter is out of range, or ``foreach`` and ``fused`` are both True.
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
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        state_dtype: torch.dtype | None = None,
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
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)

    def _update(self, batches: list[Batch]) -> None:
        layers = [param for group in self.param_groups if group["layerwise"] for param in group["params"]]
        if any(is_sharded(param) for param in layers):
            self._update_shards(batches, layers)
            return
        for batch in batches:
            for piece in batch.pieces((*STATE, "params")):
                _step(batch, piece)

    @staticmethod
    def _update_shards(batches: list[Batch], layers: list[Tensor]) -> None:
        """Moves all on before anything is subtracted, so that one collective does for all norms."""
        sums = [_all_moments(batch) for batch in batches]
        owners = [param for batch in batches for param in batch.owners]
        sum_over_shards(layers, dict(zip(owners, (row for rows in sums for row in rows), strict=True)))
        for batch, squares in zip(batches, sums, strict=True):
            for piece in batch.pieces(("params",)):
                _apply(batch, piece, squares[piece.owners])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, whose hyper-parameters are checked first.

        Args:
            param_group: The parameters under ``"params"``, and what is to differ from the defaults.

        Raises:
            ValueError: If a hyper-parameter is out of range.
            TypeError: If a parameter is complex, or with ``layerwise`` a part of a flat partition (FSDP1, ZeRO).
        """
        super().add_param_group(param_group)
        if self.param_groups[-1]["layerwise"]:
            try:
                refuse_flat(self.param_groups[-1]["params"], type(self).__name__)
            except TypeError:
                self.param_groups.pop()
                raise

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class, of torch's Adam or AdamW, or of the authors' ALTO.

        The authors' is the one in ``e-optimizer-adaptor`` 0.1.0. The state stays in fp32 for fp16 and bf16
        parameters, and is copied: later steps do not write to ``state_dict``. Hyper-parameters that
        ``state_dict`` does not have keep their present values. A checkpoint of the authors' ALTO goes on as
        theirs would, except for their clipping: clip the global gradient norm to 1 yourself if it was active.

        Args:
            state_dict: What :meth:`state_dict` returned; it is not changed.

        Raises:
            ValueError: If the groups do not fit, a hyper-parameter is out of range, or ``amsgrad`` was on; nothing
                has been changed then.
        """
        groups = state_dict["param_groups"]
        is_authors = bool(groups) and all("alp" in group for group in groups)
        super().load_state_dict(_from_authors(state_dict) if is_authors else state_dict)


def _step(batch: Batch, piece: Piece) -> None:
    """Makes the step of whole tensors, while they are in the cache."""
    if not piece.small:
        _apply(batch, piece, _moments(batch, piece))
        return
    (lists,) = piece.parts
    thetas, updates = batch.backend.function(alto_updates)(lists, piece.scalars)
    squares = squared_norms(thetas, updates, piece.sizes) if batch.group["layerwise"] else None
    subtract_updates(lists, piece.scalars, updates, _ratios(piece, squares))


def _all_moments(batch: Batch) -> Tensor:
    m = batch.lists.exp_avgs[0]
    sums = torch.zeros(len(batch.lists.params), 2, dtype=wide_dtype(m), device=m.device)
    for piece in batch.pieces(STATE):
        sums[piece.owners] = _moments(batch, piece)
    return sums


def _moments(batch: Batch, piece: Piece) -> Tensor:
    """Moves ``e``, ``m`` and ``v`` on; the squared norms ``[n, 2]`` of the entries."""
    if piece.sizes is not None:
        (lists,) = piece.parts
        return squared_norms(*batch.backend.function(alto_updates)(lists, piece.scalars), piece.sizes)
    moments = batch.backend.function(alto_moments)
    return torch.stack([moments(part, piece.scalars) for part in piece.parts]).sum(0)


def _apply(batch: Batch, piece: Piece, squares: Tensor) -> None:
    """Subtracts the updates, once the squared norms ``[n, 2]`` of the entries are known."""
    ratios = _ratios(piece, squares if batch.group["layerwise"] else None)
    for part in piece.parts:
        batch.backend.function(alto_apply)(part, piece.scalars, ratios)


def _ratios(piece: Piece, squares: Tensor | None) -> Tensor | None:
    """What the entries are multiplied by: one number each, or one for each element of what holds several."""
    if squares is None:
        return None
    ratios = trust_ratio(squares)
    return ratios if piece.sizes is None else ratios.repeat_interleave(piece.sizes)[None]


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
