"""What ends the probe where it would wait for others, write into what is lent, or use what there is only once."""

from __future__ import annotations

import bisect
import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import get_worker_info

from lightning_gradhist.callbacks.probe.outcome import Refusals

_PATIENCE = 30.0  # seconds that one waits, or looks again and again, in vain
_HARMLESS = ("torch.", "multiprocessing.", "tqdm.", "asyncio.", "concurrent.futures.")
"""Whose threads end with their loader, or do what they are asked to and nothing else, as fsspec's loop of events does."""
THREAD_IN_WORKER = "start the thread in each __iter__, of a worker: DataLoader(num_workers=1)"


@contextmanager
def without_threads(refusals: Refusals) -> Generator[None, None, None]:
    """Within it, this thread starts none that would read on, and draw numbers, when the probe has ended."""
    start, own = threading.Thread.start, threading.get_ident()

    def checked(thread: threading.Thread) -> None:
        target = getattr(thread, "_target", None) or type(thread)  # private
        of_data = threading.get_ident() == own and get_worker_info() is None  # workers inherit this
        if of_data and not f"{getattr(target, '__module__', '')}.".startswith(_HARMLESS):
            raise refusals(
                f"{thread.name} ({type(thread).__name__}) is a thread of the data, which may read on when the probe has ended;"
                f" {THREAD_IN_WORKER}"
            )
        start(thread)

    threading.Thread.start = checked  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        threading.Thread.start = start  # type: ignore[method-assign]


@contextmanager
def signals_held_back(received_sigterm: bool) -> Generator[Any, None, None]:
    """Has handlers of signals called at its end: what they set within a probe would be put back.

    Gives what stands in for Lightning's connector of signals. A signal that comes again is not held back, nor is Ctrl-C
    without a handler of the user's, the end of a worker, or an alarm that code within sets.
    """
    connector, held = SimpleNamespace(received_sigterm=received_sigterm), []
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():  # which alone handles signals
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals() if _is_of_run(number)}
    waiting, own = set(handlers), os.getpid()

    def hold(number: int, frame: Any) -> None:
        # Code within may keep this function as the handler of before, and workers inherit it.
        if number not in waiting or os.getpid() != own:
            handlers[number](number, frame)
            return
        waiting.remove(number)
        held.append(number)
        package = (getattr(handlers[number], "__module__", None) or "").partition(".")[0]
        is_lightnings = package in ("lightning", "pytorch_lightning")  # else the user's code decides
        connector.received_sigterm |= number == signal.SIGTERM and is_lightnings

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield connector
    finally:
        waiting.clear()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def _is_of_run(number: int) -> bool:
    """Whether a signal has a handler in Python, and comes from without."""
    handler = signal.getsignal(number)
    if not callable(handler) or handler is signal.default_int_handler or number == getattr(signal, "SIGCHLD", None):
        return False
    return number != getattr(signal, "SIGALRM", None) or signal.getitimer(signal.ITIMER_REAL)[0] > 0


class Missing:
    """In the place of what cannot be copied. To use it ends the probe."""

    def __init__(self, why: str, refusals: Refusals) -> None:
        vars(self).update(why=why, refusals=refusals)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Missing, (*vars(self).values(),)  # on its way to a worker

    def _use(self, *args: Any, **kwargs: Any) -> Any:
        raise vars(self)["refusals"](vars(self)["why"])

    __call__ = __iter__ = __next__ = __len__ = __bool__ = __float__ = __int__ = __enter__ = __exit__ = _use
    __contains__ = __getitem__ = __setitem__ = __delitem__ = __getattr__ = __setattr__ = _use
    __add__ = __radd__ = __mul__ = __rmul__ = _use


class Unheard(threading.Condition):
    """The copy of a condition, as a queue has them, of which threads that run already know nothing."""

    def __init__(self, lock: Any, where: str, refusals: Refusals) -> None:
        super().__init__(lock)
        self._refusals = refusals
        self._where, self._strangers, self._in_vain = where, set(threading.enumerate()), 0.0

    def wait(self, timeout: float | None = None) -> bool:
        """Waits, but not for ever; not at all where no thread was started since that could tell it."""
        while True:
            is_alone = self._strangers.issuperset(threading.enumerate())
            if self._in_vain >= _PATIENCE or (is_alone and timeout is None):
                raise self._refusals(
                    f"{self._where} is waited for in vain: another thread waits for it or fills it, which does not know the"
                    f" probe's copy; {THREAD_IN_WORKER}"
                )
            seconds = 1.0 if timeout is None else timeout
            if super().wait(seconds):
                self._in_vain = 0.0
                return True
            self._in_vain += seconds
            if timeout is not None:
                return False


class Lent:
    """Ranges of memory that nothing may be written into within both of its modes.

    Args:
        ranges: their addresses, sizes in bytes, and what to call them.
        refusals: what is told of it.
    """

    def __init__(self, ranges: list[tuple[int, int, str]], refusals: Refusals) -> None:
        self.refusals = refusals
        self._ranges = sorted(ranges)
        self.tensors, self.arrays = _Unwritable(self), _ReadOnlyArrays(self)

    def name_of(self, address: int) -> str | None:
        """What the range is called that an address lies in."""
        place = bisect.bisect_right(self._ranges, address, key=lambda one: one[0]) - 1
        start, size, name = self._ranges[place] if place >= 0 else (0, 0, "")
        return name if start <= address < start + size else None


class _Unwritable(TorchDispatchMode):
    """Ends the probe where an operation writes into what is lent."""

    def __init__(self, lent: Lent) -> None:
        super().__init__()
        self._lent = lent

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments, kwargs = func._schema.arguments, kwargs or {}
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = given.get(argument.name)
                for tensor in written if isinstance(written, (list, tuple)) else [written]:
                    self._check(tensor)
        return func(*args, **kwargs)

    def _check(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return
        name = self._lent.name_of(tensor.untyped_storage().data_ptr())
        if name is not None:
            raise self._lent.refusals(f"{name} is written into when it is read, and too large to be copied")


class _ReadOnlyArrays(TorchFunctionMode):
    """Numpy's views of lent tensors cannot be written into."""

    def __init__(self, lent: Lent) -> None:
        super().__init__()
        self._lent = lent

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, np.ndarray) and self._lent.name_of(result.__array_interface__["data"][0]) is not None:
            result.flags.writeable = False
        return result
