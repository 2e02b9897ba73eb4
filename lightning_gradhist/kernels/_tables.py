"""Chunk tables: how one launch finds its way through a list of tensors.

Each program works on one chunk of one tensor, :data:`CHUNK` elements in a step. It looks up which, and where the memory
of that tensor is. Tensors are taken in the order of their memory, so that a parameter and its state must have the same strides.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096
"""Elements a program of a step: enough to pay for its look-ups, few enough to spread a small model over the device."""
ALIGNMENT = 16
"""Bytes of the widest load and store."""
DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What parameters and gradients may be; state is fp32 or bf16."""
_KEPT = 64  # tables of each kind; a table of a whole model takes 0.05% of its fp32 parameters


class Lists(Protocol):
    """What a step works on: ``optim._lists.StepLists``, which this package does not import."""

    @property
    def params(self) -> list[Tensor]: ...  # noqa: D102
    @property
    def grads(self) -> list[Tensor]: ...  # noqa: D102
    @property
    def exp_avg_grads(self) -> list[Tensor]: ...  # noqa: D102
    @property
    def exp_avgs(self) -> list[Tensor]: ...  # noqa: D102
    @property
    def exp_avg_sqs(self) -> list[Tensor]: ...  # noqa: D102


class ChunkTable(NamedTuple):
    """Where a launch finds its ``n`` tensors, on their device."""

    pointers: Tensor
    """``[n, columns]`` int64: addresses, a column for each list of tensors."""
    extents: Tensor
    """``[n, 2]`` int64: number of elements, and number of the first chunk."""
    chunks: Tensor
    """``[chunks, 2]`` int32: of each chunk the tensor, and its place in it."""


def unsupported(lists: Lists) -> str | None:
    """Say what keeps the kernels from these lists.

    They take parameters of one device and one dtype of fp32, bf16 and fp16, gradients of one such dtype in any
    strides, and state in fp32 or all in bf16, with the strides of the parameter, whose memory has neither gaps nor
    overlaps.

    Args:
        lists: Parameters, gradients and state.

    Returns:
        The reason, naming the entry; None if there is none.
    """
    if not lists.params:
        return None
    device = lists.params[0].device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return (
            f"the tensors are on {device}; the kernels run on CUDA devices (TRITON_INTERPRET=1 is for tests on the CPU)"
        )
    if _plainly_supported(lists):
        return None
    state = {"exp_avg_grads": lists.exp_avg_grads, "exp_avgs": lists.exp_avgs, "exp_avg_sqs": lists.exp_avg_sqs}
    for name, column in {"params": lists.params, "grads": lists.grads, **state}.items():
        dtype = (lists.exp_avgs if name in state else column)[0].dtype
        if name in state and dtype not in (torch.float32, torch.bfloat16):
            return f"{name} are {dtype}; they must be float32 or bfloat16"
        if dtype not in DTYPES:
            return f"{name} are {dtype}; they must be float32, bfloat16 or float16"
        for index, (param, tensor) in enumerate(zip(lists.params, column, strict=True)):
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


def _plainly_supported(lists: Lists) -> bool:
    """Whether all is contiguous and of one kind, which is told faster than what is wrong with thousands of tensors."""
    columns = [lists.params, lists.grads, lists.exp_avg_grads, lists.exp_avgs, lists.exp_avg_sqs]
    kinds = [{(tensor.dtype, tensor.device) for tensor in column} for column in columns]
    if any(len(kind) > 1 for kind in kinds) or len(set.union(*kinds[2:])) > 1:
        return False
    ((param, device),), ((grad, grad_device),), ((state, state_device),) = kinds[:3]
    one_kind = {param, grad} <= DTYPES.keys() and state in (torch.float32, torch.bfloat16)
    if not one_kind or not device == grad_device == state_device:
        return False
    shapes = [[tensor.shape for tensor in column] for column in columns]
    return all(other == shapes[0] for other in shapes) and all(map(_all_contiguous, columns))


def refuse_unsupported(lists: Lists) -> None:
    """Raise before anything is changed.

    Args:
        lists: Parameters, gradients and state.

    Raises:
        ValueError: If the kernels do not take these lists.
    """
    reason = unsupported(lists)
    if reason is not None:
        raise ValueError(f"No kernel for these tensors: {reason}. Use the eager step (fused=False).")


def in_memory_order(lists: Lists) -> list[Tensor]:
    """Gradients with the strides of their parameters: themselves, or copies of those that have others."""
    if _all_contiguous(lists.params) and _all_contiguous(lists.grads):
        return lists.grads
    return [
        grad if _same_order(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
        for grad, param in zip(lists.grads, lists.params, strict=True)
    ]


def chunk_table(columns: Sequence[list[Tensor]], check: Callable[[], None], chunk: int = CHUNK) -> ChunkTable:
    """Look up or build the table of some lists of tensors.

    A table is found by the addresses, sizes and strides it was made for: it is as good for other tensors in the same
    place. It is made with one small copy to the device, and none where nothing moved.

    Args:
        columns: Lists of as many tensors, the first of them parameters; the current device is theirs.
        check: Called before a table is built; raises if the kernels do not take these tensors.
        chunk: Elements of the first column a chunk.

    Returns:
        The table, on the device of the parameters.
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
    place = (device, stream)

    def pointers() -> Tensor:
        check()
        return _rows(addresses, len(columns)).to(device, non_blocking=True)  # pageable: staged before it returns

    def layout() -> tuple[Tensor, Tensor]:
        extents = _extents(numels, chunk)
        return extents.to(device, non_blocking=True), _chunks(extents, chunk).to(device, non_blocking=True)

    key = (place, addresses.tobytes(), numels.tobytes(), str(strides), str(dtypes))
    return ChunkTable(_POINTERS.get(key, pointers), *_LAYOUTS.get((place, numels.tobytes(), chunk), layout))


class _Recent:
    """The values that were asked for most recently."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict = OrderedDict()

    def get(self, key, make):
        value = self._values.pop(key, None)
        if value is None:
            value = make()
        self._values[key] = value
        if len(self._values) > self._size:
            self._values.popitem(last=False)
        return value


_POINTERS, _LAYOUTS = _Recent(_KEPT), _Recent(_KEPT)


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


def _all_contiguous(tensors: list[Tensor]) -> bool:
    return all(map(Tensor.is_contiguous, tensors))


def _same_order(tensor: Tensor, other: Tensor) -> bool:
    if tensor.stride() == other.stride() or not tensor.numel():
        return True
    where = zip(tensor.shape, tensor.stride(), other.stride(), strict=True)
    return all(size == 1 or stride == other_stride for size, stride, other_stride in where)


def _is_dense(tensor: Tensor) -> bool:
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).is_contiguous()


# --- in the kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def locate(chunks, extents, program, CHUNK: tl.constexpr):
    """The tensor of a program, the offset of its chunk there, and how many elements the chunk has."""
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    offset = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    size = tl.minimum(tl.load(extents + 2 * tensor) - offset, CHUNK).to(tl.int32)
    return tensor, offset, size


@triton.jit
def elements(address, offset, offsets, DTYPE: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr = 4):
    """Pointers to a block of elements; those of a full block are known to be aligned, so that loads are wide."""
    if FULL:
        # by as many elements for all dtypes of a kernel: else values would change threads through shared memory
        start = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), WIDTH * DTYPE.primitive_bitwidth // 8)
    else:
        start = address.to(tl.pointer_type(DTYPE))
    return start + offset + offsets


@triton.jit
def read(pointers, inside, FULL: tl.constexpr):
    """A block in fp32; zeros outside."""
    if FULL:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=inside, other=0.0)
    return block.to(tl.float32)


@triton.jit
def write(pointers, block, inside, FULL: tl.constexpr):
    """Store a block, rounded to the nearest of what the pointers point to."""
    if FULL:
        tl.store(pointers, block.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, block.to(pointers.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(locate, triton.runtime.JITFunction)
"""Whether the kernels are interpreted (TRITON_INTERPRET=1), and so work on CPU tensors."""
