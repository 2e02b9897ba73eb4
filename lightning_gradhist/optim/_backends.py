"""Who makes a step: the eager functions, the same ones compiled for the CPU, or the Triton kernels of the same names."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lightning_gradhist import kernels
from lightning_gradhist.optim._lists import Piece, StepLists, StepScalars, in_memory_order, one_by_one, pieces, whole

Step = TypeVar("Step", bound=Callable[..., Any])

_CPU_PIECE = 2**19  # elements; few enough for the cache that cores share, and enough to pay for the calls
_DEVICE_PIECE = 2**24  # bounds the temporary memory
_SMALL = 2**13  # elements below which copying a tensor costs less than a call
_GATHERED = 2**15  # elements of small tensors that are copied together


class Backend(Protocol):
    """One way of making the steps that the optimizers' modules define."""

    def function(self, step: Step) -> Step:
        """What stands for an eager function, with the same signature."""
        ...

    def unsupported(self, lists: StepLists) -> str | None:
        """Say what keeps it from these tensors; None if it takes them."""
        ...

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """The parts that are stepped one after another, the same whenever they are asked for.

        ``written`` names the lists that the function writes to.
        """
        ...


class Eager:
    """The functions as they are, on cache-sized pieces, on all tensors at once or on one at a time."""

    def __init__(self, foreach: bool | None) -> None:
        self.foreach = foreach

    def function(self, step: Step) -> Step:
        """The function itself."""
        return step

    def unsupported(self, lists: StepLists) -> None:
        """It takes any tensors."""

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """What ``foreach`` asks for."""
        if self.foreach is None:
            on_cpu = lists.params[0].device.type == "cpu"
            return pieces(lists, scalars, _CPU_PIECE if on_cpu else _DEVICE_PIECE)
        return whole(lists, scalars, small=True) if self.foreach else one_by_one(lists, scalars)


class Compiled:
    """The functions compiled to one pass over memory, for tensors of one dimension and any length."""

    def function(self, step: Step) -> Step:
        """The compiled function, which all optimizers share."""
        return _compiled(step)

    def unsupported(self, lists: StepLists) -> None:
        """It takes any tensors."""

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """One tensor after another; small ones as a copy of several."""
        scalars = scalars.as_tensors()
        alone = isinstance(scalars.step, list)  # several tensors in one must have the number of the step in common
        lasting = (column for name, column in lists._asdict().items() if name != "grads")
        contiguous = map(all, zip(*(map(Tensor.is_contiguous, column) for column in lasting), strict=True))
        held: list[int] = []
        size = 0
        for owner, is_contiguous in enumerate(contiguous):
            numel = lists.params[owner].numel()
            if numel >= _SMALL or alone or not is_contiguous:
                yield from self._alone(lists, scalars, owner, written)
                continue
            held.append(owner)
            size += numel
            if size >= _GATHERED:
                yield from self._gathered(lists, scalars, held, written)
                held, size = [], 0
        if size:
            yield from self._gathered(lists, scalars, held, written)

    @staticmethod
    def _alone(lists: StepLists, scalars: StepScalars, owner: int, written: Sequence[str]) -> Iterator[Piece]:
        """One entry as a view, or as a copy where its memory has gaps."""
        entry = StepLists(*([column[owner]] for column in lists))
        tensors = tuple(tensor for (tensor,) in entry)
        if not tensors[0].numel():
            return
        flat = in_memory_order(tensors)
        one_dimensional = flat or [tensor.reshape(-1) for tensor in tensors]
        yield Piece([_one_entry(one_dimensional)], scalars.of(owner), slice(owner, owner + 1), small=False)
        if flat is None:
            copies = StepLists(*([tensor] for tensor in one_dimensional))
            for name in written:
                getattr(entry, name)[0].copy_(getattr(copies, name)[0].view(tensors[0].shape))

    @staticmethod
    def _gathered(lists: StepLists, scalars: StepScalars, owners: list[int], written: Sequence[str]) -> Iterator[Piece]:
        """A copy of some entries as one, which is copied back when the piece has been stepped."""
        entries = StepLists(*([column[owner] for owner in owners] for column in lists))
        # DDP's own, in C++: for thousands of small tensors Python takes longer than the step
        gathered = _one_entry([torch._utils._flatten_dense_tensors(column) for column in entries])
        sizes = torch.tensor([param.numel() for param in entries.params], device="cpu")
        index = torch.tensor(owners, device="cpu")
        yield Piece([gathered], scalars.of(owners[0]), index, small=True, sizes=sizes)
        for name in written:
            column = getattr(entries, name)
            torch._foreach_copy_(column, torch._utils._unflatten_dense_tensors(getattr(gathered, name)[0], column))


class Kernels:
    """The Triton kernels, which take all tensors at once."""

    def function(self, step: Step) -> Step:
        """The launcher of the same name."""
        from lightning_gradhist.kernels import adam_e, alto  # imports Triton

        return cast(Step, getattr(adam_e if hasattr(adam_e, step.__name__) else alto, step.__name__))

    def unsupported(self, lists: StepLists) -> str | None:
        """What :mod:`lightning_gradhist.kernels` says."""
        from lightning_gradhist.kernels import _tables

        return _tables.unsupported(lists)

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """Everything."""
        return whole(lists, scalars, small=False)


def backend_of(
    group: dict[str, Any],
    lists: StepLists,
    fault: Callable[..., str | None],
) -> Backend:
    """Decide who steps the tensors of a group, before anything is changed.

    Args:
        group: The param group, with ``foreach`` and ``fused``.
        lists: What is to be stepped, all on one device.
        fault: Says what is wrong with a backend on a device, None if nothing is; with ``again=True`` it tries anew what
            failed before.

    Raises:
        RuntimeError: If ``fused=True`` cannot be had on that device.
        ValueError: If the kernels do not take these tensors, and ``fused=True``.
    """
    device = lists.params[0].device
    foreach, fused = group["foreach"], group["fused"]
    if torch.compiler.is_compiling():  # that compiler makes one pass of all of it, whatever the device
        return Eager(foreach is not False)
    if fused:
        if device.type != "cpu" and not kernels.run_on(device):
            raise RuntimeError(
                _no_fused(f"it is for the CPU, and for CUDA devices with Triton; parameters are on {device}")
            )
        backend = Kernels() if kernels.run_on(device) else Compiled()
        reason = fault(backend, device, again=True)
        if reason is not None:
            hint = " It is compiled there, for which g++ or clang is needed." if device.type == "cpu" else ""
            raise RuntimeError(_no_fused(f"on {device} {reason}.{hint}"))
        unsupported = backend.unsupported(lists)
        if unsupported is not None:
            raise ValueError(_no_fused(f"{unsupported}."))
        return backend
    if fused is None and foreach is None and kernels.run_on(device):
        triton_kernels = Kernels()
        reason = fault(triton_kernels, device)
        if reason is None:
            return triton_kernels if triton_kernels.unsupported(lists) is None else Eager(None)
        _warn_once(f"Triton's kernels are not used on {device}: {reason}. The eager steps are.")
    return Eager(foreach)


def _no_fused(reason: str) -> str:
    return f"fused=True is not to be had: {reason} Use the eager step, fused=False."


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def _compiled(step: Step) -> Step:
    # one kind each of dtypes, decay and direction; without the argument (torch < 2.13) it compiles eight, then says so
    options: dict[str, Any] = {"dynamic": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = 64
    return cast(Step, torch.compile(step, **options))


def _one_entry(tensors: Sequence[Tensor]) -> StepLists:
    # detached: what a tensor is a view of, and whether it requires a gradient, are reasons to compile again
    return StepLists(*([tensor.detach()] for tensor in tensors))
