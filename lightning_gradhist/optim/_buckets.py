"""How the tensors of a step are cut: small ones together in a bucket, large ones in chunks that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from lightning_gradhist.kernels._operands import StepScalars, StepTensors


class Bucket(NamedTuple):
    """What is stepped together: whole entries of the lists, as views or copies."""

    chunks: list[StepTensors]
    """One, or those of a single large entry, which are stepped one after another."""
    scalars: StepScalars
    entries: slice | Tensor
    """Which entries of the lists they are: an index of the first dimension."""
    small: bool
    """Whether there is room for a copy of one of the lists."""
    sizes: Tensor | None = None
    """Where one tensor holds several entries, one after another: their numbers of elements, int64 ``[n]``."""


def buckets_of(tensors: StepTensors, scalars: StepScalars, size: int) -> Iterator[Bucket]:
    """Small tensors together, at most ``size`` elements of them, and large ones in chunks of at most ``size`` elements.

    A tensor whose memory has gaps is one chunk.
    """
    bucket: list[tuple[Tensor, ...]] = []
    filled = first = 0
    for index, entry in enumerate(zip(*tensors, strict=True)):
        chunks = _chunks_of(entry, size)
        if bucket and (len(chunks) > 1 or filled + entry[0].numel() > size):
            yield _bucket(bucket, scalars, first)
            bucket, filled = [], 0
        if len(chunks) > 1:
            place = slice(index, index + 1)
            yield Bucket([_transposed([chunk]) for chunk in chunks], scalars.of(place), place, small=False)
            continue
        first = first if bucket else index
        bucket.append(entry)
        filled += entry[0].numel()
    if bucket:
        yield _bucket(bucket, scalars, first)


def one_bucket(tensors: StepTensors, scalars: StepScalars, *, small: bool) -> Bucket:
    """All entries at once."""
    return Bucket([tensors], scalars, slice(0, len(tensors.params)), small)


def one_by_one(tensors: StepTensors, scalars: StepScalars) -> Iterator[Bucket]:
    """Every entry in a bucket of its own."""
    for index, entry in enumerate(zip(*tensors, strict=True)):
        yield _bucket([entry], scalars, index)


def flat_views(entry: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Parameter, gradient and state as one-dimensional views in the order of their memory; None where it has gaps."""
    order = sorted(range(entry[0].dim()), key=entry[0].stride, reverse=True)
    param, grad, *state = (tensor.permute(order) for tensor in entry)
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        return None
    return param.view(-1), grad.reshape(-1), *(tensor.view(-1) for tensor in state)


def _chunks_of(entry: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    flat = flat_views(entry) if entry[0].numel() > size else None
    return [entry] if flat is None else list(zip(*(tensor.split(size) for tensor in flat), strict=True))


def _bucket(entries: list[tuple[Tensor, ...]], scalars: StepScalars, first: int) -> Bucket:
    place = slice(first, first + len(entries))
    return Bucket([_transposed(entries)], scalars.of(place), place, small=True)


def _transposed(entries: list[tuple[Tensor, ...]]) -> StepTensors:
    return StepTensors(*map(list, zip(*entries, strict=True)))
