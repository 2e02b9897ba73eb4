"""How a probe goes: what the ranks agree on, and what ends it but not the training, on every rank or on none."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Callable
from enum import IntEnum
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar

import torch
from torch.utils.data import get_worker_info

from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.strategies import least_over_ranks

_T = TypeVar("_T")
_MESSAGES = ("out of memory", "can't allocate memory", "cudnn_status_not_supported")  # the last is cuDNN's for the same
_TRIES = 1000  # after which a worker is ended, in which the user's code catches a refusal, and tries again


class Outcome(IntEnum):
    """How a batch went on this rank. The ranks agree on the worst, so that all call the same collectives."""

    DONE = 0
    REPEATED = 1
    NOT_FINITE = 2
    NO_LOSS = 3
    OUT_OF_MEMORY = 4
    OVERFLOW = 5
    NO_BATCH = 6
    FAILED = 7
    STOPPED = 8


WHY_LEFT_OUT = {
    Outcome.REPEATED: (
        "had the same samples as another, so that a step has fewer than are counted (split an IterableDataset over ranks and"
        " workers in its __iter__, by torch.distributed.get_rank() and torch.utils.data.get_worker_info(); have a dataset that"
        " draws at random do so by the index)"
    ),
    Outcome.NOT_FINITE: "gave a gradient that is not finite (Trainer(detect_anomaly=True) finds out where)",
    Outcome.NO_LOSS: "gave no loss that depends on a parameter of the optimizer, as where training_step returns None, or"
    " on_train_batch_start returns -1",
    Outcome.OUT_OF_MEMORY: "ran out of memory (a smaller batch, or a model without the probe's copies, may fit)",
}


class ProbeRefusedError(RuntimeError):
    """The probe cannot be made; the message says why, and the way out. Raised on every rank or on none."""


class ProbeEnded(BaseException):  # noqa: N818 - no error: what the user's code catches must not catch it
    """Raised where the copy of something is used that may not be, past an ``except Exception``, as data have for bad samples."""


class Refusals:
    """What was refused: known also where the user's code catches what is raised, here or in a worker of a loader."""

    def __init__(self) -> None:
        self._first, self._times = multiprocessing.RawArray("c", 600), 0

    def __call__(self, why: str) -> BaseException:
        """What to raise. A worker hands on errors alone."""
        self._first.value = self._first.value or why.encode()[:599]
        self._times += 1
        if get_worker_info() is None:
            return ProbeEnded(why)
        if self._times > _TRIES:
            os._exit(1)
        return ProbeRefusedError(why)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Shared with a worker that is started; one that hands on a sample can share nothing, and would hand on nothing.
        return super().__reduce_ex__(protocol) if get_spawning_popen() is not None else (Refusals, ())

    def check(self) -> None:
        """Raises a :class:`ProbeRefusedError` if something was refused."""
        if self._first.value:
            raise ProbeRefusedError(self._first.value.decode(errors="ignore"))


def on_every_rank(trainer: Trainer, what: str, action: Callable[[], _T]) -> _T:
    """Does something on every rank, which calls no collective; where it fails on one, it has failed on all.

    Raises:
        ProbeRefusedError: with the reason of the first rank that has one, and ``what`` it is that was done, in a few words.
    """
    result: Any = None
    reason = None
    try:
        result = action()
    except (Exception, ProbeEnded) as error:
        reason = why_failed(what, error)
    agree(trainer, reason)
    return result


def why_failed(what: str, error: BaseException) -> str:
    """What :func:`agree` is told, of an error."""
    return str(error) if isinstance(error, (ProbeRefusedError, ProbeEnded)) else f"{what} raised {error!r:.300}"


def agree(trainer: Trainer, reason: str | None) -> None:
    """Ends the probe on every rank if one has a reason; to be called on every rank.

    Raises:
        ProbeRefusedError: with the reason of the first rank that has one.
    """
    if least_over_ranks(float(reason is None), trainer) < 1:
        free_memory()
        reasons = [reason] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(reasons, reason)
        raise ProbeRefusedError(next(reason for reason in reasons if reason is not None))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the host, has no room left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error).lower() for message in _MESSAGES)


def free_memory() -> None:
    """Gives back what nobody holds any more, after an error that held the whole graph of a batch."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used
