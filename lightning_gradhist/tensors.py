"""Many small tensors side by side, and large ones in pieces that stay in a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_WITHOUT_FLOAT64 = ("mps",)
_BATCH = 2**17  # of float32, which stay in a core's cache
_DEVICE_BATCH = 2**22  # where a launch costs more than the memory of a copy


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of real numbers, which is how Adam treats it; any other as it is."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.dtype.is_complex else tensor


def wide(tensor: Tensor) -> torch.dtype:
    """What its values are computed in: float32, or float64 where it is."""
    return torch.promote_types(tensor.dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in its :func:`wide` dtype."""
    return tensor.to(wide(tensor))


def batches(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors of one dtype and device at a time, as many as have 131,072 values in all (4 million on a GPU), or one alone."""
    filling: dict[Any, tuple[dict[str, Tensor], int]] = {}
    for name, tensor in tensors.items():
        kind = tensor.dtype, tensor.device
        batch, size = filling.get(kind, ({}, 0))
        if batch and size + tensor.numel() > (_BATCH if tensor.device.type == "cpu" else _DEVICE_BATCH):
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        filling[kind] = batch, size + tensor.numel()
    yield from (batch for batch, _ in filling.values())


def joined(batch: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """The tensors of a batch one after another, ``[values]``, or others of the same names; zeros where one is missing.

    To compute something of 100 small tensors takes hardly longer than of one, if they lie side by side.
    """
    some = batch if tensors is None else tensors
    parts = [some[name] if name in some else torch.zeros_like(like) for name, like in batch.items()]
    flat = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, those of small ones side by side."""
    return _by_batch(lambda batch: joined(batch) if len(batch) > 1 else joined(batch).clone(), tensors)


def elementwise(
    function: Callable[[Tensor], Tensor],
    tensors: Mapping[str, Tensor],
    values: Callable[[Mapping[str, Tensor]], Tensor] = joined,
) -> dict[str, Tensor]:
    """A function of each value, or of others that are made of a batch; it must return new tensors, of the shape it gets."""
    return _by_batch(lambda batch: _in_pieces(function, values(batch)), tensors)


def _by_batch(make: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is made of the values of each batch, ``[values]``, in the shapes of its tensors."""
    found: dict[str, Tensor] = {}
    for batch in batches(tensors):
        found |= apart(make(batch), batch)
    return found


def apart(values: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`joined`: parts of ``[values]``, in the shapes of tensors."""
    parts = zip(like.items(), values.split([tensor.numel() for tensor in like.values()]), strict=True)
    return {name: part if tensor.dim() == 1 else part.view(tensor.shape) for (name, tensor), part in parts}


def _in_pieces(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    (first,), *others = pieces(values)
    made = function(first)
    if not others:
        return made
    found = torch.empty(values.shape, dtype=made.dtype, device=made.device)
    into, *rest = found.split(_BATCH)
    into.copy_(made)
    for (piece,), into in zip(others, rest, strict=True):
        into.copy_(function(piece))
    return found


def pieces(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors ``[n]`` side by side, on a CPU in pieces that stay in a core's cache with what is computed of them."""
    if values[0].device.type != "cpu" or values[0].numel() <= _BATCH:
        return iter([values])
    return zip(*(tensor.split(_BATCH) for tensor in values), strict=True)


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, in float64 on the device of the first, or on the host."""
    terms = [with_float64(term) for term in terms]
    return torch.stack([term.to(terms[0].device, torch.float64) for term in terms]).sum(0)


def with_float64(tensor: Tensor) -> Tensor:
    """A tensor where there is float64: as it is, but for one on a device that has none, which is brought to the host."""
    return tensor.cpu() if tensor.device.type in _WITHOUT_FLOAT64 else tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class HostTensor:
    """A tensor of any device on the host; called, it gives the tensor, waiting for a copy that is under way.

    The training thread only starts the copy. The tensor must not be changed afterwards.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._tensor = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))
        else:
            self._tensor = tensor.cpu()

    @property
    def has_arrived(self) -> bool:
        """Whether there is nothing to wait for."""
        return self._copied is None or self._copied.query()

    def __call__(self) -> Tensor:
        """The tensor on the host."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor

    def __getstate__(self) -> dict[str, Any]:
        return {"_tensor": self(), "_copied": None}
