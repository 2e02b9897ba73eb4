"""What the optimizers ask of parameters and gradients, and how they name one in a message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What is computed with, and by default kept as state: fp32 for fp16 and bf16, else the dtype of the tensor."""
    return torch.promote_types(tensor.dtype, torch.float32)


def refuse_complex(group: dict[str, Any], whom: str) -> None:
    """Raise a TypeError that names the first complex parameter of a group."""
    for index, param in enumerate(group["params"]):
        if param.is_complex():
            raise TypeError(
                f"{whom} takes real parameters only, but {_describe(group, index)} has dtype {param.dtype}. "
                "Hold real and imaginary parts as one real parameter and use torch.view_as_complex on it in forward."
            )


def refuse_sparse(group: dict[str, Any], whom: str) -> None:
    """Raise a RuntimeError that names the first parameter of a group with a sparse gradient."""
    for index, param in enumerate(group["params"]):
        if param.grad is not None and param.grad.layout != torch.strided:
            raise RuntimeError(
                f"{whom} takes dense gradients only, but {_describe(group, index)} has a gradient with layout "
                f"{param.grad.layout}. Build its layer with sparse=False, make the gradient dense before the step, "
                "or give that parameter to torch.optim.SparseAdam."
            )


def _describe(group: dict[str, Any], index: int) -> str:
    name = group["param_names"][index] if "param_names" in group else f"parameter {index} of its group"
    return f"{name} with shape {tuple(group['params'][index].shape)}"
