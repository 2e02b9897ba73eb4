"""Triton kernels: one launch a phase for all tensors of a step, and one for all tensors of a histogram; what a step is given.

The modules hold what :mod:`~lightning_gradhist.optim` and :mod:`~lightning_gradhist.histogram` call in place of their eager
code, with the same names and signatures. Importing them needs Triton; importing this package does not.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


@functools.cache
def available() -> bool:
    """Whether Triton is installed, so that the modules of this package can be imported."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a stand-in for it without a spec
        return False


def run_on(device: torch.device) -> bool:
    """Whether kernels are to be tried on a device: on CUDA, or for tests on the CPU in Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # which does not find its way in a GPU's memory
    return device.type == ("cpu" if interpreted else "cuda") and available()


class StepTensors(NamedTuple):
    """Parameters, gradients and state of one step: lists with one entry a parameter, or a chunk of one."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg_grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]


class StepScalars(NamedTuple):
    """The scalars of one step: numbers or 0-d tensors, or one for each entry where these have made different numbers of steps."""

    lr: float | Tensor
    mix: float | Tensor  # c = alpha * (1 - explore_beta)
    explore_beta: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    step: float | Tensor | Sequence[Tensor]  # the number k of the step, from 1 up
    bias_correction1: float | Tensor | Sequence[Tensor]  # 1 - beta1^k, or 1 without bias correction
    bias_correction2: float | Tensor | Sequence[Tensor]
    eps: float | Tensor
    weight_decay: float | Tensor  # the number 0.0 for none
    maximize: bool

    def of(self, entries: slice | int) -> StepScalars:
        """The scalars of some of the entries, or of one of them, then without lists."""
        chosen: dict[str, Any] = {n: value[entries] for n, value in self._asdict().items() if isinstance(value, list)}
        return self._replace(**chosen)

    def as_tensors(self) -> StepScalars:
        """All numbers as 0-d float64 tensors, so that a compiled step does not depend on their values."""
        numbers: dict[str, Any] = {
            name: torch.tensor(value, dtype=torch.float64, device="cpu")
            for name, value in self._asdict().items()
            if isinstance(value, float) and not (name == "weight_decay" and value == 0.0)
        }
        return self._replace(**numbers)

    def decays(self) -> bool:
        """Whether there is weight decay."""
        return isinstance(self.weight_decay, Tensor) or self.weight_decay != 0.0
