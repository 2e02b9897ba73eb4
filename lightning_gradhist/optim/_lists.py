"""What one step works on: lists of tensors, and how they are cut into pieces that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class StepLists(NamedTuple):
    """Parameters, gradients and state of one step, one entry a parameter, or a piece of one, in each list."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avg_grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]


class StepScalars(NamedTuple):
    """The scalars of one step, numbers or 0-d tensors.

    Where parameters have made different numbers of steps, those that depend on it have one 0-d tensor for each entry of
    the lists.
    """

    lr: float | Tensor
    mix: float | Tensor
    """``c = alpha * (1 - explore_beta)``."""
    explore_beta: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    step: float | Tensor | Sequence[Tensor]
    """The number ``k`` of the step, from 1 up."""
    bias_correction1: float | Tensor | Sequence[Tensor]
    """``1 - beta1^k``, or 1 without bias correction."""
    bias_correction2: float | Tensor | Sequence[Tensor]
    """``1 - beta2^k``, or 1 without bias correction."""
    eps: float | Tensor
    weight_decay: float | Tensor
    """The number 0.0 for none."""
    maximize: bool

    def of(self, owners: slice | int) -> StepScalars:
        """The scalars of some of the entries, or of one of them, then without lists."""
        chosen: dict[str, Any] = {
            name: value[owners] for name, value in self._asdict().items() if isinstance(value, list)
        }
        return self._replace(**chosen)

    def as_tensors(self) -> StepScalars:
        """All numbers as 0-d float64 tensors, so that a compiled step does not depend on their values."""
        numbers: dict[str, Any] = {
            name: torch.tensor(value, dtype=torch.float64, device="cpu")
            for name, value in self._asdict().items()
            if isinstance(value, float) and not (name == "weight_decay" and value == 0.0)
        }
        return self._replace(**numbers)


class Piece(NamedTuple):
    """What is stepped together: whole entries of the lists, as views or copies."""

    parts: list[StepLists]
    """One, or the parts of a single entry, which are stepped one after another."""
    scalars: StepScalars
    owners: slice | Tensor
    """Which entries they are: an index of the first dimension."""
    small: bool
    """Whether there is room for a copy of one of the lists."""
    sizes: Tensor | None = None
    """Where one tensor holds several entries, one after another: their numbers of elements, int64 ``[n]``."""


def pieces(lists: StepLists, scalars: StepScalars, size: int) -> Iterator[Piece]:
    """Small tensors together, at most ``size`` elements of them, and large ones in parts of at most ``size`` elements.

    A tensor whose memory has gaps is taken whole.
    """
    columns: list[tuple[Tensor, ...]] = []
    held = first = 0
    for owner, entry in enumerate(zip(*lists, strict=True)):
        parts = _parts(entry, size)
        if columns and (len(parts) > 1 or held + entry[0].numel() > size):
            yield _together(columns, scalars, first)
            columns, held = [], 0
        if len(parts) > 1:
            yield Piece(
                [_lists([part]) for part in parts], scalars.of(slice(owner, owner + 1)), slice(owner, owner + 1), False
            )
            continue
        first = first if columns else owner
        columns.append(entry)
        held += entry[0].numel()
    if columns:
        yield _together(columns, scalars, first)


def whole(lists: StepLists, scalars: StepScalars, *, small: bool) -> Iterator[Piece]:
    """All entries at once."""
    yield Piece([lists], scalars, slice(0, len(lists.params)), small)


def one_by_one(lists: StepLists, scalars: StepScalars) -> Iterator[Piece]:
    """One entry after another."""
    for owner, entry in enumerate(zip(*lists, strict=True)):
        yield _together([entry], scalars, owner)


def in_memory_order(entry: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Parameter, gradient and state as one-dimensional views in the order of their memory; None where it has gaps."""
    order = sorted(range(entry[0].dim()), key=entry[0].stride, reverse=True)
    param, grad, *state = (tensor.permute(order) for tensor in entry)
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        return None
    return param.view(-1), grad.reshape(-1), *(tensor.view(-1) for tensor in state)


def _parts(entry: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    flat = in_memory_order(entry) if entry[0].numel() > size else None
    return [entry] if flat is None else list(zip(*(tensor.split(size) for tensor in flat), strict=True))


def _together(columns: list[tuple[Tensor, ...]], scalars: StepScalars, first: int) -> Piece:
    owners = slice(first, first + len(columns))
    return Piece([_lists(columns)], scalars.of(owners), owners, True)


def _lists(entries: list[tuple[Tensor, ...]]) -> StepLists:
    return StepLists(*map(list, zip(*entries, strict=True)))
