"""How the kernels of a step are launched: which tensors they take, and the arguments that all of them have."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradhist.kernels._chunks import DEVICE_TYPE, DTYPES
from lightning_gradhist.kernels._math import KernelScalars
from lightning_gradhist.kernels._operands import StepScalars, StepTensors
from lightning_gradhist.kernels._tables import CHUNK, ChunkTable, all_contiguous, chunk_table

STATE_DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = {
    "num_warps": 2 if torch.version.hip else 4,  # 128 threads; a warp of AMD's is twice as wide
    "num_stages": 1,  # loads must not be moved over the stores of an earlier block
    "enable_fp_fusion": False,  # a fused multiply-add would round unlike the eager step, and saves no time here
}


class Variant(NamedTuple):
    """What a kernel is compiled for: dtypes in Triton's terms, and the branches of the step."""

    param: Any
    grad: Any
    state: Any
    maximize: bool
    decay: bool
    decoupled: bool = False


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, on which kernels are launched."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def variant_of(tensors: StepTensors, s: StepScalars) -> Variant:
    """What a kernel for these tensors and scalars is compiled for."""
    param, grad, state = (DTYPES[column[0].dtype] for column in (tensors.params, tensors.grads, tensors.exp_avgs))
    return Variant(param, grad, state, bool(s.maximize), s.decays())


def kernel_scalars(s: StepScalars, state: torch.dtype) -> KernelScalars:
    """The scalars as the kernels take them; the number of the step matters only for rounding to a state in bf16."""
    return KernelScalars(
        lr=s.lr if isinstance(s.lr, Tensor) else float(s.lr),
        mix=float(s.mix),
        explore_beta=_decay(s.explore_beta),
        beta1=_decay(s.beta1),
        beta2=_decay(s.beta2),
        step=_of_each(s.step) if state == torch.bfloat16 else 0.0,
        unbias1=_inverse(_of_each(s.bias_correction1)),
        unbias2=_inverse(_of_each(s.bias_correction2)),
        eps=float(s.eps),
        weight_decay=float(s.weight_decay),
    )


def _decay(beta: Any) -> tuple[float, float]:
    return float(beta), 1.0 - beta  # here, in float64


def _of_each(values: Any) -> float | Tensor:
    """A number, or that of each tensor as fp32 ``[n]``."""
    return float(values) if isinstance(values, (int, float)) else torch.stack(list(values)).float()


def _inverse(value: float | Tensor) -> float | Tensor:
    return value.reciprocal() if isinstance(value, Tensor) else 1.0 / value


def unsupported(tensors: StepTensors) -> str | None:
    """Say what keeps the kernels from these tensors, naming the entry; None if they take them.

    They take parameters of one device and one dtype of fp32, bf16 and fp16, gradients of one such dtype in any
    strides, and state in fp32 or all in bf16, with the strides of the parameter, whose memory has neither gaps nor
    overlaps.
    """
    if not tensors.params:
        return None
    device = tensors.params[0].device
    if device.type != DEVICE_TYPE:
        return (
            f"the tensors are on {device}; the kernels run on CUDA devices (TRITON_INTERPRET=1 is for tests on the CPU)"
        )
    if _plainly_supported(tensors):
        return None
    for name, column in tensors._asdict().items():
        is_state = name not in ("params", "grads")
        dtype = (tensors.exp_avgs if is_state else column)[0].dtype
        if is_state and dtype not in STATE_DTYPES:
            return f"{name} are {dtype}; they must be float32 or bfloat16"
        if dtype not in DTYPES:
            return f"{name} are {dtype}; they must be float32, bfloat16 or float16"
        for index, (param, tensor) in enumerate(zip(tensors.params, column, strict=True)):
            if tensor.device != device:
                return f"{name}[{index}] is on {tensor.device}, not {device}"
            if tensor.dtype != dtype:
                return f"{name}[{index}] is {tensor.dtype}, not {dtype}"
            if tensor.shape != param.shape:
                return f"{name}[{index}] has shape {tuple(tensor.shape)}, its parameter {tuple(param.shape)}"
            if name != "grads" and not _same_order(tensor, param):
                return f"{name}[{index}] has strides {tensor.stride()}, its parameter {param.stride()}"
            if name == "params" and not _is_dense(tensor):
                return f"params[{index}] with strides {tensor.stride()} has gaps or overlaps in its memory"
    return None


def _plainly_supported(tensors: StepTensors) -> bool:
    """Whether all is contiguous and of one kind, which is told faster than what is wrong with thousands of tensors."""
    kinds = [{(tensor.dtype, tensor.device) for tensor in column} for column in tensors]
    if any(len(kind) > 1 for kind in kinds) or len(set.union(*kinds[2:])) > 1:
        return False
    ((param, device),), ((grad, grad_device),), ((state, state_device),) = kinds[:3]
    one_kind = {param, grad} <= DTYPES.keys() and state in STATE_DTYPES
    if not one_kind or not device == grad_device == state_device:
        return False
    shapes = [[tensor.shape for tensor in column] for column in tensors]
    return all(other == shapes[0] for other in shapes) and all(map(all_contiguous, tensors))


class Operands(NamedTuple):
    """Tensors that the kernels take, gradients in the order of the memory of their parameters, and where they are."""

    tensors: StepTensors
    table: ChunkTable


def launch(kernel: Any, operands: Operands, *arguments: Any) -> None:
    """Launch a program for each chunk; the operands are to be held till then, as they may have copies of gradients."""
    table = operands.table
    if len(table.chunks):
        with on_device_of(table.chunks):
            kernel[(len(table.chunks),)](table, *arguments, CHUNK, **OPTIONS)


def operands_of(tensors: StepTensors) -> Operands:
    """What the kernels of a step are launched on.

    Raises:
        ValueError: If they do not take these tensors; nothing has been changed then.
    """

    def check() -> None:
        reason = unsupported(tensors)
        if reason is not None:
            raise ValueError(reason)

    if tensors.params[0].device.type != DEVICE_TYPE:  # some of which have no addresses to look up
        check()
    with on_device_of(tensors.params[0]):
        ordered = tensors._replace(grads=_in_memory_order(tensors))
        return Operands(ordered, chunk_table(ordered, check))


def _in_memory_order(tensors: StepTensors) -> list[Tensor]:
    """Gradients with the strides of their parameters: themselves, or copies of those that have others."""
    if all_contiguous(tensors.params) and all_contiguous(tensors.grads):
        return tensors.grads
    return [
        grad if _same_order(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        for grad, param in zip(tensors.grads, tensors.params, strict=True)
    ]


def _same_order(tensor: Tensor, other: Tensor) -> bool:
    if tensor.stride() == other.stride() or not tensor.numel():
        return True
    where = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == other_stride for size, stride, other_stride in where)


def _is_dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()
