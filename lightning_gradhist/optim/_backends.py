"""Who makes a step: the eager functions, the same ones compiled for the CPU, or the Triton kernels of the same names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from lightning_gradhist import kernels
from lightning_gradhist.optim._lists import Piece, StepLists, StepScalars, in_memory_order, one_by_one, pieces, whole

Step = TypeVar("Step", bound=Callable[..., Any])

_CPU_PIECE = 2**16  # elements; five lists and their temporaries then stay in a core's cache
_DEVICE_PIECE = 2**24  # bounds the temporary memory
_SMALL = 2**13  # elements below which copying a tensor costs less than a call
_GATHERED = 2**15  # elements of small tensors that are copied together


class Backend(Protocol):
    """One way of making the steps that the optimizers' modules define."""

    def function(self, step: Step) -> Step:
        """What stands for an eager function, with the same signature."""
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

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """What ``foreach`` asks for."""
        if self.foreach is None:
            on_cpu = lists.params[0].device.type == "cpu"
            return pieces(lists, scalars, _CPU_PIECE if on_cpu else _DEVICE_PIECE)
        return whole(lists, scalars) if self.foreach else one_by_one(lists, scalars)


class Compiled:
    """The functions compiled to one pass over memory, for tensors of one dimension and any length."""

    def function(self, step: Step) -> Step:
        """The compiled function, which all optimizers share."""
        return _compiled(step)

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """One tensor after another; small ones, and those whose memory has gaps, as a copy of several."""
        scalars = scalars.as_tensors()
        alone = isinstance(scalars.step, list)  # several tensors in one must have the number of the step in common
        held: list[int] = []
        size = 0
        for owner, entry in enumerate(zip(*lists, strict=True)):
            numel = entry[0].numel()
            flat = None if numel < _SMALL and not alone else in_memory_order(entry)
            if flat is not None and numel:
                yield Piece(_one_entry(flat), scalars.of_one(owner), slice(owner, owner + 1))
            elif numel:
                held.append(owner)
                size += numel
            if held and (alone or size >= _GATHERED):
                yield from _gathered(lists, scalars, held, written)
                held, size = [], 0
        if held:
            yield from _gathered(lists, scalars, held, written)


class Kernels:
    """The Triton kernels, which take all tensors at once."""

    def function(self, step: Step) -> Step:
        """The launcher of the same name."""
        from lightning_gradhist.kernels import adam_e, alto  # imports Triton

        return cast(Step, getattr(adam_e if hasattr(adam_e, step.__name__) else alto, step.__name__))

    def pieces(self, lists: StepLists, scalars: StepScalars, written: Sequence[str]) -> Iterator[Piece]:
        """Everything."""
        return whole(lists, scalars)


def backend_of(group: dict[str, Any], lists: StepLists, fault: Callable[[torch.device], str | None]) -> Backend:
    """Decide who steps the tensors of a group.

    Args:
        group: The param group, with ``foreach`` and ``fused``.
        lists: What is to be stepped, all on one device.
        fault: Says what is wrong with the kernels on a device, None if nothing.

    Raises:
        RuntimeError: If ``fused=True`` cannot be had on that device.
    """
    device = lists.params[0].device
    eager = Eager(group["foreach"])
    if torch.compiler.is_compiling():  # that compiler makes one pass of it, whatever the device
        return eager
    if group["fused"]:
        _refuse_fault(device, fault)
        return Compiled() if device.type == "cpu" else Kernels()
    if group["fused"] is None and group["foreach"] is None and kernels.run_on(device):
        from lightning_gradhist.kernels._tables import supported  # imports Triton

        return Kernels() if supported(lists) and fault(device) is None else eager
    return eager


def refuse_fused(group: dict[str, Any], whom: str) -> None:
    """Raise before anything is changed where ``fused=True`` cannot be had.

    Raises:
        RuntimeError: On the CPU without a C++ compiler, on CUDA without Triton, on any other device.
    """
    for kind in sorted({param.device.type for param in group["params"]}):
        if kind == "cpu":
            reason = _missing_compiler()
        elif kind == "cuda":
            reason = (
                None if kernels.available() else 'Triton is not installed: pip install "lightning-gradhist[triton]"'
            )
        else:
            reason = f"it is for parameters on the CPU and on CUDA devices, and here they are on {kind}"
        if reason is not None:
            raise RuntimeError(f"{whom}(fused=True) is not to be had: {reason}. Or use the eager step, fused=False.")


def _refuse_fault(device: torch.device, fault: Callable[[torch.device], str | None]) -> None:
    reason = fault(device) if device.type == "cuda" else None
    if reason is not None:
        raise RuntimeError(f"fused=True is not to be had on {device}: {reason}. Use the eager step, fused=False.")


@functools.cache
def _missing_compiler() -> str | None:
    # torch.compile finds it only when it compiles, with the step half made, and says so in pages.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "on the CPU it is compiled, and no C++ compiler was found; install g++ or clang, or name yours in CXX"
    return None


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


def _gathered(lists: StepLists, scalars: StepScalars, owners: list[int], written: Sequence[str]) -> Iterator[Piece]:
    """A copy of some entries as one, which is copied back when the piece has been stepped."""
    entries = StepLists(*([column[owner] for owner in owners] for column in lists))
    # DDP's own, in C++: thousands of small tensors would take Python longer than the step
    gathered = _one_entry([torch._utils._flatten_dense_tensors(column) for column in entries])
    sizes = torch.tensor([param.numel() for param in entries.params])
    yield Piece(gathered, scalars.of_one(owners[0]), torch.tensor(owners), sizes)
    for name in written:
        column = getattr(entries, name)
        torch._foreach_copy_(column, torch._utils._unflatten_dense_tensors(getattr(gathered, name)[0], column))
