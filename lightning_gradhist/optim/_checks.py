"""What the optimizers refuse, before anything has changed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from lightning_gradhist._flat import is_flat
from lightning_gradhist.explore import check_explore, is_number


def check_hyper_parameters(group: dict[str, Any]) -> None:
    """Raise an error that names the first hyper-parameter of a group of AdamE or ALTO that is no number or out of range."""
    betas = as_tuple(group["betas"])
    given = [(name, group[name]) for name in ("lr", "eps", "weight_decay")]
    for name, value in given + [("betas", beta) for beta in betas]:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(
                f"{name}={group[name]!r} has {value.numel()} elements: it must be a number or a tensor of one element. "
                "For several rates, use several param groups."
            )
        if not (is_number(value) or isinstance(value, Tensor)):
            raise TypeError(
                f"{name}={group[name]!r} holds the {type(value).__name__} {value!r}: it must be a number. YAML reads 1e-3 as "
                "a string; write 1.0e-3."
            )
    for name, value in given:
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name}={value!r} is out of range: it must be finite and satisfy {name} >= 0.")
    if len(betas) != 2:
        raise ValueError(
            f"betas={group['betas']!r} has {len(betas)} elements: it must have two, the decays of the first and "
            "the second moment. The decay of adaptor E is explore_beta."
        )
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"betas[{index}]={beta!r} is out of range: it must satisfy 0 <= beta < 1.")
    check_explore(group["alpha"], group["explore_beta"])
    if group["fused"] and group["foreach"]:
        raise ValueError("fused=True and foreach=True exclude each other: leave one of them at None.")
    if group["state_dtype"] not in (None, torch.bfloat16):
        raise ValueError(
            f"state_dtype={group['state_dtype']!r} is not offered: it must be None, for fp32 (float64 for float64 "
            "parameters), or torch.bfloat16."
        )


def as_tuple(betas: Any) -> tuple[Any, ...]:
    """The betas that were given, one by one; what cannot be gone through is one alone."""
    try:
        return tuple(betas)
    except TypeError:  # a number, or a tensor of no dimension
        return (betas,)


def refuse_complex(group: dict[str, Any], whom: str) -> None:
    for index, param in enumerate(group["params"]):
        if param.is_complex():
            raise TypeError(
                f"{whom} takes real parameters only, but {_describe(group, index)} has dtype {param.dtype}. "
                "Hold real and imaginary parts as one real parameter and use torch.view_as_complex on it in forward."
            )


def refuse_sparse(group: dict[str, Any], whom: str) -> None:
    for index, param in enumerate(group["params"]):
        if param.grad is not None and param.grad.layout != torch.strided:
            raise RuntimeError(
                f"{whom} takes dense gradients only, but {_describe(group, index)} has a gradient with layout "
                f"{param.grad.layout}. Build its layer with sparse=False, make the gradient dense before the step, "
                "or give that parameter to torch.optim.SparseAdam."
            )


def refuse_flat(params: Iterable[Tensor], whom: str) -> None:
    """Raise a TypeError if a parameter is a rank's part of a flat partition, whose norm would not be its layer's."""
    for param in params:
        if is_flat(param):
            raise TypeError(
                f"{whom} needs the norm of each layer, but a parameter of shape {tuple(param.shape)} belongs to a flat "
                "partition of DeepSpeed ZeRO, or of FSDP1 (FullyShardedDataParallel) without use_orig_params=True. Give "
                "that, shard with FSDP2 (torch.distributed.fsdp.fully_shard, Lightning's ModelParallelStrategy), use DDP, "
                "or set layerwise=False."
            )


def refuse_narrow_state(group: dict[str, Any]) -> None:
    wide = [index for index, param in enumerate(group["params"]) if param.dtype == torch.float64]
    if group["state_dtype"] is not None and wide:
        raise ValueError(
            f"state_dtype={group['state_dtype']} is for parameters of fp32, bf16 and fp16, but parameter {wide[0]} of its "
            "group is float64. Put those into a group with state_dtype=None."
        )


def refuse_amsgrad(group: dict[str, Any], whom: str) -> None:
    if group.get("amsgrad"):
        raise ValueError(
            f"the state dict is of an optimizer with amsgrad=True, and {whom} keeps no maximum of the "
            "second moment. To go on without it, set 'amsgrad' to False in its param groups and take 'max_exp_avg_sq' out "
            "of its state before it is loaded."
        )


def refuse_capture(optimizer: Optimizer) -> None:
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():
        return
    on_host = [index for index, group in enumerate(optimizer.param_groups) if not group["capturable"]]
    if on_host and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{type(optimizer).__name__} is being captured in a CUDA graph with capturable=False in param group "
            f"{on_host[0]}: its replays would all make the same step. Make the optimizer with capturable=True."
        )


def _describe(group: dict[str, Any], index: int) -> str:
    name = group["param_names"][index] if "param_names" in group else f"parameter {index} of its group"
    return f"{name} with shape {tuple(group['params'][index].shape)}"
