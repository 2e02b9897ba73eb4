"""How kernels are launched: which tensors they take, the tables in which a program finds its chunk, and what all are given.

Tensors are taken in the order of their memory, so that a parameter and its state must have the same strides.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.kernels._chunks import DEVICE_TYPE, DTYPES
from lightning_gradhist.kernels._math import KernelScalars

CHUNK = 2048  # elements a program of a step: enough to pay for its look-ups, few enough that a small model spreads
STATE_DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = {
    "num_warps": 2 if torch.version.hip else 4,  # 128 threads; a warp of AMD's is twice as wide
    "num_stages": 1,  # loads must not be moved over the stores of an earlier block
    "enable_fp_fusion": False,  # a fused multiply-add would round unlike the eager step, and saves no time here
}
_STAGED = 2**16  # bytes
_KEPT = 64  # tables of each kind; a table of a whole model takes 0.1% of its fp32 parameters


class Variant(NamedTuple):
    """What a kernel is compiled for: dtypes in Triton's terms, and the branches of the step."""

    param: Any
    grad: Any
    state: Any
    maximize: bool
    decay: bool
    decoupled: bool = False


class ChunkTable(NamedTuple):
    """Where a launch finds its ``n`` tensors, on their device."""

    pointers: Tensor  # [n, columns] int64: addresses, a column for each list of tensors
    extents: Tensor  # [n, 2] int64: number of elements, and number of the first chunk
    chunks: Tensor  # [chunks, 2] int32: of each chunk the tensor, and its place in it


class Operands(NamedTuple):
    """Tensors that the kernels take, gradients in the order of the memory of their parameters, and where they are."""

    tensors: StepTensors
    table: ChunkTable


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def launch(kernel: Any, operands: Operands, *arguments: Any) -> None:
    """Launch a program for each chunk; the operands are to be held till then, as they may have copies of gradients."""
    table = operands.table
    if len(table.chunks):
        with on_device_of(table.chunks):
            kernel[(len(table.chunks),)](table, *arguments, CHUNK, **OPTIONS)


def kernel_arguments(tensors: StepTensors, s: StepScalars) -> tuple[KernelScalars, Variant]:
    """The scalars as the kernels take them, and what a kernel is compiled for."""
    param, grad, state = (column[0].dtype for column in (tensors.params, tensors.grads, tensors.exp_avgs))
    scalars = KernelScalars(
        lr=s.lr if isinstance(s.lr, Tensor) else float(s.lr),
        mix=float(s.mix),
        explore_beta=_decay(s.explore_beta),
        beta1=_decay(s.beta1),
        beta2=_decay(s.beta2),
        step=_of_each(s.step) if state == torch.bfloat16 else 0.0,  # it matters for rounding to bf16 alone
        unbias1=_inverse(_of_each(s.bias_correction1)),
        unbias2=_inverse(_of_each(s.bias_correction2)),
        eps=float(s.eps),
        weight_decay=float(s.weight_decay),
    )
    return scalars, Variant(DTYPES[param], DTYPES[grad], DTYPES[state], bool(s.maximize), s.decays())


def _decay(beta: Any) -> tuple[float, float]:
    return float(beta), 1.0 - beta  # here, in float64


def _of_each(values: Any) -> float | Tensor:
    """A number, or that of each tensor as fp32 ``[n]``."""
    return float(values) if isinstance(values, (int, float)) else torch.stack(list(values)).float()


def _inverse(value: float | Tensor) -> float | Tensor:
    return value.reciprocal() if isinstance(value, Tensor) else 1.0 / value


def operands_of(tensors: StepTensors) -> Operands:
    """What the kernels of a step are launched on; ``ValueError`` if they do not take these tensors."""

    def check() -> None:
        reason = unsupported(tensors)
        if reason is not None:
            raise ValueError(reason)

    if tensors.params[0].device.type != DEVICE_TYPE:  # some of which have no addresses to look up
        check()
    with on_device_of(tensors.params[0]):
        ordered = tensors._replace(grads=_in_memory_order(tensors))
        return Operands(ordered, chunk_table(ordered, check))


def unsupported(tensors: StepTensors) -> str | None:
    """Say what keeps the kernels from these tensors, naming the entry; None if they take them.

    They take parameters of one device and one dtype of fp32, bf16 and fp16, gradients of one such dtype in any strides, and
    state in fp32 or all in bf16, with the strides of the parameter, whose memory has neither gaps nor overlaps.
    """
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
    return all(other == shapes[0] for other in shapes) and all(map(_all_contiguous, tensors))


def _all_contiguous(tensors: list[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _in_memory_order(tensors: StepTensors) -> list[Tensor]:
    """Gradients with the strides of their parameters: themselves, or copies of those that have others."""
    if _all_contiguous(tensors.params) and _all_contiguous(tensors.grads):
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


_POINTERS: dict[Any, Tensor] = {}  # the tables of addresses that were asked for most recently, the last of them last


def chunk_table(columns: Sequence[list[Tensor]], check: Callable[[], None], chunk: int = CHUNK) -> ChunkTable:
    """Look up or build the table of some lists of tensors, with one small copy to the device, and none where nothing moved.

    A table is found by the addresses, sizes and strides it was made for: it is as good for other tensors in the same
    place. The current device is that of the columns, the first of which, parameters, are cut into chunks of as many
    elements. ``check`` is called before a table is built; it raises if the kernels do not take these tensors.
    """
    params = columns[0]
    device = params[0].device
    numels = array("q", map(Tensor.numel, params))
    addresses = array("q", chain.from_iterable(map(Tensor.data_ptr, column) for column in columns))
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        check()
        return _captured(addresses, numels, chunk, device)  # a graph may outlive what is kept here
    # Of this stream only: nothing else orders the copy, or its memory's reuse, with work on another.
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    strides = None if all(map(_all_contiguous, columns)) else [[t.stride() for t in column] for column in columns]
    dtypes = [{tensor.dtype for tensor in column} for column in columns[:2]]
    key = (device, stream, addresses.tobytes(), numels.tobytes(), str(strides), str(dtypes))
    pointers = _POINTERS.pop(key, None)
    if pointers is None:
        check()
        pointers = _sent(_rows(addresses, len(columns)), device)
    _POINTERS[key] = pointers
    if len(_POINTERS) > _KEPT:
        del _POINTERS[next(iter(_POINTERS))]
    return ChunkTable(pointers, *_layout(numels.tobytes(), chunk, device, stream))


@functools.lru_cache(_KEPT)
def _layout(numels: bytes, chunk: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    extents = _extents(array("q", numels), chunk)
    return _sent(extents, device), _sent(_chunks(extents, chunk), device)


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for it: CUDA stages at once what is small, the rest only if it is pinned."""
    is_large = device.type == "cuda" and table.nbytes > _STAGED
    return (table.pin_memory() if is_large else table).to(device, non_blocking=True)


def _rows(addresses: array[int], columns: int) -> Tensor:
    return torch.frombuffer(addresses, dtype=torch.int64).view(columns, -1).t().contiguous()


def _extents(numels: array[int], chunk: int) -> Tensor:
    numel = torch.frombuffer(numels, dtype=torch.int64)
    counts = _counts(numel, chunk)
    return torch.stack([numel, counts.cumsum(0) - counts], dim=1)


def _chunks(extents: Tensor, chunk: int, total: int | None = None) -> Tensor:
    numel, first = extents.unbind(1)
    counts = _counts(numel, chunk)
    tensors = torch.arange(len(numel), device=numel.device).repeat_interleave(counts, output_size=total)
    places = torch.arange(len(tensors), device=numel.device) - first[tensors]
    return torch.stack([tensors, places], dim=1).int()


def _counts(numel: Tensor, chunk: int) -> Tensor:
    return (numel + (chunk - 1)) // chunk


def _captured(addresses: array[int], numels: array[int], chunk: int, device: torch.device) -> ChunkTable:
    """A table that is part of the CUDA graph being captured: made by kernels alone, in the graph's memory."""
    rows, extents = _rows(addresses, len(addresses) // len(numels)), _extents(numels, chunk)
    values = torch.cat([rows.view(-1), extents.view(-1)]).tolist()
    table = torch.zeros(len(values), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), values)  # its kernels carry the values as arguments
    pointers, extents_there = table.split([rows.numel(), extents.numel()])
    extents_there = extents_there.view(-1, 2)
    total = int(_counts(extents[:, 0], chunk).sum())
    return ChunkTable(pointers.view(rows.shape), extents_there, _chunks(extents_there, chunk, total))
