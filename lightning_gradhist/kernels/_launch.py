"""How the kernels are launched."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gradhist.kernels._tables import DTYPES

BLOCK = 512
"""Elements that a program holds in registers at a time: one 128-bit load a thread and tensor, so that many threads fit."""
OPTIONS = {
    "num_warps": 2 if torch.version.hip else 4,  # 128 threads; a warp of AMD's is twice as wide
    "num_stages": 1,  # loads must not be moved over the stores of an earlier block
    "enable_fp_fusion": False,  # a fused multiply-add would round unlike the eager step, and saves no time here
}


class Scalars(Protocol):
    """The scalars of a step: ``optim._lists.StepScalars``, which this package does not import."""

    @property
    def lr(self) -> float | Tensor: ...  # noqa: D102
    @property
    def mix(self) -> float: ...  # noqa: D102
    @property
    def explore_beta(self) -> float: ...  # noqa: D102
    @property
    def beta1(self) -> float: ...  # noqa: D102
    @property
    def beta2(self) -> float: ...  # noqa: D102
    @property
    def step(self) -> float | Sequence[Tensor]: ...  # noqa: D102
    @property
    def bias_correction1(self) -> float | Sequence[Tensor]: ...  # noqa: D102
    @property
    def bias_correction2(self) -> float | Sequence[Tensor]: ...  # noqa: D102
    @property
    def eps(self) -> float: ...  # noqa: D102
    @property
    def weight_decay(self) -> float: ...  # noqa: D102
    @property
    def maximize(self) -> bool: ...  # noqa: D102


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def moment_arguments(s: Scalars) -> dict[str, float]:
    """What moves ``e``, ``m`` and ``v``, by the names of the kernels' arguments."""
    return {
        "mix": float(s.mix),
        "explore_beta": float(s.explore_beta),
        "explore_rest": 1.0 - s.explore_beta,  # here, in float64
        "beta1": float(s.beta1),
        "rest1": 1.0 - s.beta1,
        "beta2": float(s.beta2),
        "rest2": 1.0 - s.beta2,
    }


def direction_arguments(s: Scalars) -> dict[str, Any]:
    """What makes a direction of ``m`` and ``v``, by the names of the kernels' arguments."""
    return {
        "unbias1": _unbias(s.bias_correction1),
        "unbias2": _unbias(s.bias_correction2),
        "eps": float(s.eps),
        "STEPS_ON_DEVICE": not isinstance(s.bias_correction1, (int, float)),
    }


def rate_arguments(s: Scalars) -> dict[str, Any]:
    """The learning rate and where it is, by the names of the kernels' arguments."""
    return {"lr": s.lr if isinstance(s.lr, Tensor) else float(s.lr), "LR_ON_DEVICE": isinstance(s.lr, Tensor)}


def state_arguments(s: Scalars, dtype: torch.dtype) -> dict[str, Any]:
    """The dtype of the state, and the number of the step, on which rounding to bf16 depends."""
    if dtype == torch.float32:
        step: float | Tensor = 0.0
    else:
        step = float(s.step) if isinstance(s.step, (int, float)) else torch.stack(list(s.step)).float()
    return {"STATE": DTYPES[dtype], "step": step, "STEP_ON_DEVICE": isinstance(step, Tensor)}


def _unbias(correction: float | Sequence[Tensor]) -> float | Tensor:
    """One over a number, or over ``[n]`` in fp32: a quotient an element less, and the registers that it takes."""
    if isinstance(correction, (int, float)):
        return 1.0 / correction
    return torch.stack(list(correction)).float().reciprocal()
