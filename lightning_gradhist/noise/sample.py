"""Some of the values of large gradients, in place of all."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_gradhist.tensors import widened

MOST = 2**18  # values; more hardly narrow the interval of a noise scale, as those of one gradient move together
_SMALL = 2**12  # values of a tensor that is looked at as a whole, which takes less time
_RUN = 16  # values one after another, which a processor reads at once
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples spread evenly, whatever steps they are of


@dataclass(frozen=True)
class Sample:
    r"""Every n-th run of 16 values of a tensor; its last run may be shorter.

    Of a tensor of :math:`n` values it has about :math:`\sqrt n` parts in :math:`\sum \sqrt n`, and of one of up to 4,096 all:
    small tensors, as the biases of the last layer, have more of a gradient's square than of its values. Samples of other
    steps have other values, and over the steps all are looked at equally often.
    """

    strides: Mapping[str, int]  # from one run to the next, by name; of other names it has all values
    turn: float = 0.0  # which run is the first, from 0 to 1 of a stride; that of a tensor depends on its name as well

    @classmethod
    def at(cls, step: int, sizes: Mapping[str, int], most: int = MOST) -> Sample:
        """About ``most`` values of large tensors of such sizes, or all where they have no more; the same at the same step."""
        large = {name: size for name, size in sizes.items() if size > _SMALL}
        roots = sum(map(math.sqrt, large.values()))
        is_all = sum(large.values()) <= most
        strides = {} if is_all else {name: math.ceil(math.sqrt(size) * roots / most) for name, size in large.items()}
        return cls(strides, step * _GOLDEN % 1)

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it has of each tensor, by name, in no shape in particular; those of which it has nothing are left out."""
        found = {name: self._of_one(name, tensor) for name, tensor in tensors.items()}
        return {name: values for name, values in found.items() if values.numel()}

    def of_gradients(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`of`, by such a factor that sums of products of two are, but for chance, those over all values."""
        factors = {name: math.sqrt(stride) for name, stride in self.strides.items() if stride > 1}
        found = self.of(gradients).items()
        return {name: widened(values) * factors[name] if name in factors else values for name, values in found}

    def first(self, name: str, stride: int) -> int:
        """The place of the first that is picked, where every ``stride``-th is."""
        return (int(self.turn * stride) + zlib.crc32(name.encode())) % stride

    def _of_one(self, name: str, tensor: Tensor) -> Tensor:
        stride = self.strides.get(name, 1)
        if stride <= 1:
            return tensor
        first, values = self.first(name, stride), tensor.reshape(-1)
        runs, rest = divmod(values.numel(), _RUN)
        some = values[: runs * _RUN].view(runs, _RUN)[first::stride]
        has_rest = rest > 0 and runs % stride == first
        return torch.cat([some.reshape(-1), values[runs * _RUN :]]) if has_rest else some
