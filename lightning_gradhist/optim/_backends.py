"""Who makes a step, and in which buckets: the eager functions, these compiled for the CPU, or the kernels of the same names."""

from __future__ import annotations

import functools
import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from lightning_gradhist import kernels
from lightning_gradhist.kernels import StepScalars, StepTensors

_CPU_BUCKET = 2**19  # elements; few enough for the cache that cores share, and enough to pay for the calls
_DEVICE_BUCKET = 2**24  # bounds the temporary memory
_SMALL = 2**13  # elements below which copying a tensor costs less than a call
_FLAT_BUCKET = 2**17  # elements of small tensors that are copied into one


class Bucket(NamedTuple):
    """What is stepped together: whole entries of the lists, as views or copies."""

    chunks: list[StepTensors]  # one, or those of a single large entry, which are stepped one after another
    scalars: StepScalars
    entries: slice | Tensor  # which entries of the lists they are: an index of the first dimension
    small: bool  # whether there is room for a copy of one of the lists
    sizes: Tensor | None = None  # elements of each entry, int64 [n], where one tensor holds several, one after another


Step = TypeVar("Step", bound=Callable[..., Any])
Do = Callable[[Bucket], None]


class Backend:
    """One way of making the steps that the optimizers' modules define."""

    def function(self, step: Step) -> Step:
        """What stands for an eager function, with the same signature."""
        return step

    def unsupported(self, tensors: StepTensors) -> str | None:
        """Say what keeps it from these tensors; None if it takes them."""
        return None

    @abstractmethod
    def for_each_bucket(self, do: Do, tensors: StepTensors, scalars: StepScalars, written: Sequence[str]) -> None:
        """Do something that writes to some of the lists with one bucket after another, the same ones at each call."""


class Eager(Backend):
    """The functions as they are, on buckets that fit a cache, on all tensors at once or on one at a time."""

    def __init__(self, foreach: bool | None) -> None:
        self.foreach = foreach

    def for_each_bucket(self, do: Do, tensors: StepTensors, scalars: StepScalars, written: Sequence[str]) -> None:
        if self.foreach:
            do(_whole(tensors, scalars, small=True))
        elif self.foreach is False:
            for index, entry in enumerate(zip(*tensors, strict=True)):
                do(_bucket([entry], scalars, index))
        else:
            size = _CPU_BUCKET if tensors.params[0].device.type == "cpu" else _DEVICE_BUCKET
            for bucket in _cut(tensors, scalars, size):
                do(bucket)


class Compiled(Backend):
    """The functions compiled to one pass over memory, for tensors of one dimension and any length."""

    def function(self, step: Step) -> Step:
        return _compiled(step)

    def for_each_bucket(self, do: Do, tensors: StepTensors, scalars: StepScalars, written: Sequence[str]) -> None:
        for flat in _flat_buckets(tensors, scalars.as_tensors(), written):
            with flat as bucket:
                do(bucket)


class Kernels(Backend):
    """The Triton kernels, which take all tensors at once."""

    def __init__(self) -> None:
        self.operands: Any = None  # of the coming step, once it is known that the kernels take its tensors

    def function(self, step: Step) -> Step:
        from lightning_gradhist.kernels import adam_e, alto  # imports Triton

        launch = getattr(adam_e if hasattr(adam_e, step.__name__) else alto, step.__name__)
        return cast(Step, functools.partial(launch, operands=self.operands))

    def unsupported(self, tensors: StepTensors) -> str | None:
        from lightning_gradhist.kernels import _launch

        try:
            self.operands = _launch.operands_of(tensors)
        except ValueError as error:
            return str(error)
        return None

    def for_each_bucket(self, do: Do, tensors: StepTensors, scalars: StepScalars, written: Sequence[str]) -> None:
        do(_whole(tensors, scalars, small=False))
        # A kernel is handed addresses: nobody else tells autograd what it has written.
        torch.autograd.graph.increment_version([*chain.from_iterable(getattr(tensors, name) for name in written)])


def backend_of(
    group: dict[str, Any], tensors: StepTensors, fault: Callable[[Backend, torch.device, bool], str | None]
) -> Backend:
    """Decide who steps the tensors of a group, all on one device, before anything is changed.

    ``fault`` says what is wrong with a backend on a device, None if nothing is; it tries again, if told to. ``RuntimeError``
    if ``fused=True`` cannot be had on that device; ``ValueError`` if the kernels then do not take these tensors.
    """
    device = tensors.params[0].device
    foreach, fused = group["foreach"], group["fused"]
    if torch.compiler.is_compiling():  # that compiler makes one pass of all of it, whatever the device
        return Eager(foreach is not False)
    if fused is None and foreach is None and kernels.run_on(device):
        backend: Backend = Kernels()
        if fault(backend, device, False) is None and backend.unsupported(tensors) is None:
            return backend
    if not fused:
        return Eager(foreach)
    if device.type != "cpu" and not kernels.run_on(device):
        where = f"it is for the CPU, and for CUDA devices with Triton; parameters are on {device}"
        raise RuntimeError(_no_fused(where))
    backend = Kernels() if kernels.run_on(device) else Compiled()
    reason = fault(backend, device, True)
    if reason is not None:
        hint = " It is compiled there, for which g++ or clang is needed." if device.type == "cpu" else ""
        raise RuntimeError(_no_fused(f"on {device} {reason}.{hint}"))
    unsupported = backend.unsupported(tensors)
    if unsupported is not None:
        raise ValueError(_no_fused(f"{unsupported}."))
    return backend


def _no_fused(reason: str) -> str:
    return f"fused=True is not to be had: {reason} Use the eager step, fused=False."


def _whole(tensors: StepTensors, scalars: StepScalars, *, small: bool) -> Bucket:
    return Bucket([tensors], scalars, slice(0, len(tensors.params)), small)


def _cut(tensors: StepTensors, scalars: StepScalars, size: int) -> Iterator[Bucket]:
    """Small tensors together, at most ``size`` elements, and large ones in chunks of as many; one with gaps is one chunk."""
    bucket: list[tuple[Tensor, ...]] = []
    filled = first = 0
    for index, entry in enumerate(zip(*tensors, strict=True)):
        flat = _flat_views(entry) if entry[0].numel() > size else None
        if bucket and (flat is not None or filled + entry[0].numel() > size):
            yield _bucket(bucket, scalars, first)
            bucket, filled = [], 0
        if flat is not None:
            chunks = zip(*(tensor.split(size) for tensor in flat), strict=True)
            place = slice(index, index + 1)
            yield Bucket([_transposed([chunk]) for chunk in chunks], scalars.of(place), place, small=False)
            continue
        first = first if bucket else index
        bucket.append(entry)
        filled += entry[0].numel()
    if bucket:
        yield _bucket(bucket, scalars, first)


def _bucket(entries: list[tuple[Tensor, ...]], scalars: StepScalars, first: int) -> Bucket:
    place = slice(first, first + len(entries))
    return Bucket([_transposed(entries)], scalars.of(place), place, small=True)


def _transposed(entries: list[tuple[Tensor, ...]]) -> StepTensors:
    return StepTensors(*map(list, zip(*entries, strict=True)))


def _flat_views(entry: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Parameter, gradient and state as one-dimensional views in the order of their memory; None where it has gaps."""
    order = sorted(range(entry[0].dim()), key=entry[0].stride, reverse=True)
    param, grad, *state = (tensor.permute(order) for tensor in entry)
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        return None
    return param.view(-1), grad.reshape(-1), *(tensor.view(-1) for tensor in state)


@functools.cache
def _compiled(step: Step) -> Step:
    # one kind each of dtypes, decay and direction; without the argument (torch < 2.13) it compiles eight, then says so
    options: dict[str, Any] = {"dynamic": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = 64
    return cast(Step, torch.compile(step, **options))


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor of the state may be stepped with others as one."""
    return tensor.numel() < _SMALL and tensor.is_cpu and tensor.is_contiguous()


def _flat_buckets(
    tensors: StepTensors, scalars: StepScalars, written: Sequence[str]
) -> Iterator[AbstractContextManager[Bucket]]:
    """Large entries and those with gaps one by one; small ones together, if they have the number of the step in common."""
    apart = isinstance(scalars.step, list)
    lasting = (column for name, column in tensors._asdict().items() if name != "grads")
    contiguous = map(all, zip(*(map(Tensor.is_contiguous, column) for column in lasting), strict=True))
    small: list[int] = []
    filled = 0
    for index, (is_contiguous, numel) in enumerate(zip(contiguous, map(Tensor.numel, tensors.params), strict=True)):
        if numel == 0:
            continue
        if numel >= _SMALL or apart or not is_contiguous:
            yield _flat_entry(tensors, scalars, index, written)
            continue
        small.append(index)
        filled += numel
        if filled >= _FLAT_BUCKET:
            yield _flat_copy(tensors, scalars, small, written)
            small, filled = [], 0
    if small:
        yield _flat_copy(tensors, scalars, small, written)


@contextmanager
def _flat_entry(tensors: StepTensors, scalars: StepScalars, index: int, written: Sequence[str]) -> Iterator[Bucket]:
    """One entry as a view, or as a copy where its memory has gaps, which is copied back in the end."""
    entry = [column[index] for column in tensors]
    views = _flat_views(entry)
    flat = _one_entry(views or [tensor.reshape(-1) for tensor in entry])
    yield Bucket([flat], scalars.of(index), slice(index, index + 1), small=False)
    if views is None:
        for name in written:
            tensor = getattr(tensors, name)[index]
            tensor.copy_(getattr(flat, name)[0].view(tensor.shape))


@contextmanager
def _flat_copy(
    tensors: StepTensors, scalars: StepScalars, indices: list[int], written: Sequence[str]
) -> Iterator[Bucket]:
    """Some entries as one: as a view of what lies side by side, and of the rest a copy, which is copied back in the end."""
    entries = StepTensors(*([column[index] for index in indices] for column in tensors))
    sizes = [param.numel() for param in entries.params]
    views = {name: side_by_side(column, sizes) for name, column in entries._asdict().items()}
    if views["grads"] is not None and not all(map(Tensor.is_contiguous, entries.grads)):
        views["grads"] = None  # their memory is in another order than the parameters'
    is_flat = all(param.dim() == 1 for param in entries.params)
    # DDP's own, in C++: for thousands of small tensors Python takes longer than the step
    join = torch.cat if is_flat else torch._utils._flatten_dense_tensors
    joined = (join(getattr(entries, name)) if view is None else view for name, view in views.items())
    flat, places = _one_entry([*joined]), torch.tensor(indices, device="cpu")
    yield Bucket([flat], scalars.of(indices[0]), places, small=True, sizes=torch.tensor(sizes, device="cpu"))
    for name in written:
        if views[name] is None:
            column, (values,) = getattr(entries, name), getattr(flat, name)
            parts = values.split(sizes) if is_flat else torch._utils._unflatten_dense_tensors(values, column)
            torch._foreach_copy_(column, parts)


def side_by_side(column: Sequence[Tensor], sizes: Sequence[int]) -> Tensor | None:
    """The memory of contiguous tensors that lie one after another in it; None where they do not."""
    first = column[0]
    width, place = first.element_size(), first.data_ptr()
    for tensor, size in zip(column, sizes, strict=True):
        if tensor.data_ptr() != place:
            return None
        place += width * size
    storage = first.untyped_storage()
    if place > storage.data_ptr() + storage.nbytes():
        return None  # another memory follows by chance
    return first.as_strided((sum(sizes),), (1,))


def _one_entry(tensors: Sequence[Tensor]) -> StepTensors:
    # detached: what a tensor is a view of, and whether it requires a gradient, are reasons to compile again
    return StepTensors(*([tensor.detach()] for tensor in tensors))
