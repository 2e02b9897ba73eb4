"""What one step works on: lists of tensors, and how they are cut into pieces that fit a cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
    """The scalars of one step. A bias correction is a number, or one 0-d tensor for each entry of the lists."""

    lr: float | Tensor
    mix: float
    """``c = alpha * (1 - explore_beta)``."""
    explore_beta: float
    beta1: float
    beta2: float
    bias_correction1: float | Sequence[Tensor]
    """``1 - beta1^k`` at step k, or 1 without bias correction."""
    bias_correction2: float | Sequence[Tensor]
    """``1 - beta2^k`` at step k, or 1 without bias correction."""
    eps: float
    weight_decay: float
    maximize: bool


class Piece(NamedTuple):
    """A part of a step: views of some entries of the lists, and which entries they are of."""

    lists: StepLists
    scalars: StepScalars
    owners: list[int]


def pieces(lists: StepLists, scalars: StepScalars, size: int) -> Iterator[Piece]:
    """Cuts lists into pieces of at most ``size`` elements: small tensors together, large ones in parts.

    A tensor whose memory has gaps is taken whole.
    """
    columns: list[tuple[Tensor, ...]] = []
    owners: list[int] = []
    held = 0
    for owner, entry in enumerate(zip(*lists, strict=True)):
        for part in _parts(entry, size):
            if held and held + part[0].numel() > size:
                yield _piece(columns, scalars, owners)
                columns, owners, held = [], [], 0
            columns.append(part)
            owners.append(owner)
            held += part[0].numel()
    if columns:
        yield _piece(columns, scalars, owners)


def whole(lists: StepLists, scalars: StepScalars) -> Iterator[Piece]:
    """All entries at once."""
    yield Piece(lists, scalars, list(range(len(lists.params))))


def one_by_one(lists: StepLists, scalars: StepScalars) -> Iterator[Piece]:
    """One entry after another."""
    for owner, entry in enumerate(zip(*lists, strict=True)):
        yield _piece([entry], scalars, [owner])


def _parts(entry: tuple[Tensor, ...], size: int) -> Iterator[tuple[Tensor, ...]]:
    if entry[0].numel() <= size:
        yield entry
        return
    order = sorted(range(entry[0].dim()), key=entry[0].stride, reverse=True)
    in_memory_order = [tensor.permute(order) for tensor in entry]
    param, grad, *state = in_memory_order
    if not all(tensor.is_contiguous() for tensor in (param, *state)):
        yield entry
        return
    flat = [param.view(-1), grad.reshape(-1), *(tensor.view(-1) for tensor in state)]
    yield from zip(*(tensor.split(size) for tensor in flat), strict=True)


def _piece(columns: list[tuple[Tensor, ...]], scalars: StepScalars, owners: list[int]) -> Piece:
    of_owners = scalars._replace(
        bias_correction1=_of(scalars.bias_correction1, owners), bias_correction2=_of(scalars.bias_correction2, owners)
    )
    return Piece(StepLists(*(list(column) for column in zip(*columns, strict=True))), of_owners, owners)


def _of(correction: float | Sequence[Tensor], owners: list[int]) -> float | Sequence[Tensor]:
    return correction if isinstance(correction, float) else [correction[owner] for owner in owners]


# --- the formulas that the optimizers share ---------------------------------------------------------------------------
# torch._foreach_* are what torch's own optimizers are made of; there is no public form of them.


def in_dtype_of(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Tensors in the dtypes of others: themselves where these agree, else copies."""
    return [tensor.to(other.dtype) for tensor, other in zip(tensors, like, strict=True)]


def mixed_gradients(grads: list[Tensor], exp_avg_grads: list[Tensor], mix: float) -> list[Tensor]:
    """``g' = g + alpha * a = g + c * (g - e)`` with ``c = mix``, as new tensors."""
    mixed = list(torch._foreach_sub(grads, exp_avg_grads))
    torch._foreach_mul_(mixed, mix)
    torch._foreach_add_(mixed, grads)
    return mixed


def move_average(exp_avg_grads: list[Tensor], grads: list[Tensor], explore_beta: float) -> None:
    """``e = explore_beta * e + (1 - explore_beta) * g``, in place."""
    torch._foreach_lerp_(exp_avg_grads, grads, 1.0 - explore_beta)


def explored_gradients(lists: StepLists, s: StepScalars) -> list[Tensor]:
    """``g'``, and moves ``e`` on; the gradients are not changed."""
    grads = in_dtype_of(lists.grads, lists.exp_avg_grads)
    if s.maximize:
        grads = list(torch._foreach_neg(grads))
    explored = mixed_gradients(grads, lists.exp_avg_grads, s.mix)
    move_average(lists.exp_avg_grads, grads, s.explore_beta)
    return explored


def move_moments(explored: list[Tensor], lists: StepLists, s: StepScalars) -> None:
    """``m = beta1 * m + (1 - beta1) * g'`` and ``v = beta2 * v + (1 - beta2) * g'^2``, in place."""
    torch._foreach_lerp_(lists.exp_avgs, explored, 1.0 - s.beta1)
    torch._foreach_mul_(lists.exp_avg_sqs, s.beta2)
    torch._foreach_addcmul_(lists.exp_avg_sqs, explored, explored, 1.0 - s.beta2)


def adam_directions(lists: StepLists, s: StepScalars) -> list[Tensor]:
    """``(m / (1 - beta1^k)) / (sqrt(v / (1 - beta2^k)) + eps)``; changes nothing."""
    denominators = torch._foreach_div(lists.exp_avg_sqs, s.bias_correction2)  # type: ignore[arg-type]
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, s.eps)
    directions = list(torch._foreach_div(lists.exp_avgs, s.bias_correction1))  # type: ignore[arg-type]
    torch._foreach_div_(directions, denominators)
    return directions


def subtract_update(params: list[Tensor], thetas: list[Tensor], update: list[Tensor], lr: float | Tensor) -> None:
    """``theta = theta - lr * update`` in place, rounded to the dtype of the parameters."""
    torch._foreach_mul_(update, lr)
    torch._foreach_sub_(thetas, update)
    for param, theta in zip(params, thetas, strict=True):
        if theta is not param:
            param.copy_(theta)


def wide(lists: StepLists) -> list[Tensor]:
    """The parameters in the dtype of their state: themselves, or copies in fp32 of fp16 and bf16."""
    return in_dtype_of(lists.params, lists.exp_avgs)
