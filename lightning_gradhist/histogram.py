"""Histograms of magnitudes on bins that are read off the bits of a float."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist import kernels

BINS_PER_OCTAVE = 8  # bins to a factor of two, a power of two: a bin is at most 1/8 of its magnitude wide
_MANTISSA_BITS = 23
_SHIFT = _MANTISSA_BITS - BINS_PER_OCTAVE.bit_length() + 1  # from the bits of a float32 to its bin
_EXPONENTS = 256
COLUMNS = (_EXPONENTS - 2) * BINS_PER_OCTAVE + 3  # columns of a table of counts: zeros, bins, infinities, NaN
_CPU_CHUNK = 2**17  # stays in a core's cache: ten times faster than one pass over 20 million values
_CPU_SMALL = 2**15  # up to here a tensor takes less time with others than alone
_DEVICE_CHUNK = 2**24  # bounds the temporary memory to 300 MiB


@dataclass(frozen=True)
class Bins:
    """Counts of finite values on bins, with what can be told from them alone, as :class:`MagnitudeHistogram` tells it."""

    edges: Tensor  # of the bins, float64 [bins + 1]
    counts: Tensor  # int64 [rows, bins]

    def quantiles(self, shares: Sequence[float]) -> Tensor:
        """As :meth:`MagnitudeHistogram.quantile`, of several shares: float64 ``[rows, len(shares)]``."""
        cumulative = self.counts.cumsum(1)
        number = cumulative[:, -1:]
        ranks = (number.double() * torch.tensor(shares, dtype=torch.float64, device=number.device)).long()
        bins = torch.searchsorted(cumulative, ranks.minimum(number - 1).clamp_(min=0), right=True)
        middles = (self.edges[:-1] * self.edges[1:]).sqrt()
        return torch.where(number > 0, middles[bins.clamp_(max=len(middles) - 1)], math.nan)

    def shares_below(self, magnitudes: Sequence[float]) -> Tensor:
        """As :meth:`MagnitudeHistogram.share_below`, of several magnitudes: float64 ``[rows, len(magnitudes)]``."""
        limits = torch.tensor(magnitudes, dtype=torch.float64, device=self.edges.device)
        inside = ((limits - self.edges[:-1, None]) / self.edges.diff()[:, None]).clamp_(0, 1)
        return (self.counts.double() @ inside) / self.counts.sum(1, keepdim=True)

    def norm(self) -> Tensor:
        """As :meth:`MagnitudeHistogram.norm`, float64 ``[rows]``."""
        low, high = self.edges[:-1], self.edges[1:]
        return (self.counts.double() @ ((low.square() + low * high + high.square()) / 3)).sqrt()


class MagnitudeHistogram:
    r"""Counts of :math:`|x|` on log-spaced bins, one row of bins a name.

    The bin of a value is its float32 exponent and its top 3 mantissa bits, ``(bits(x) & 0x7fffffff) >> 20``. So every
    power of two is split into 8 bins of equal width, the same on every device and rank: counts add exactly, and a loss
    scale of ``2**n`` moves every count by ``8 * n`` bins.

    Values of other dtypes are converted to float32; float64 is truncated to its bin, not rounded. Every value is counted
    once: zeros, also those that a sparse tensor does not store, and magnitudes below ``2**-126`` (subnormal in float32) in
    :attr:`zeros`, infinities and magnitudes of ``2**128`` or more in :attr:`infs`, NaN in :attr:`nans`.

    Args:
        names: the names of the rows, which must differ; also an attribute.
        device: of the counts; the host by default.

    Attributes:
        table: all counts, int64 ``[len(names), 2035]``: zeros, bins, infinities, NaN. Adding tables merges histograms.

    Raises:
        ValueError: for repeated names.

    Example:
        >>> import torch
        >>> histogram = MagnitudeHistogram(["weight", "bias"])
        >>> histogram.update({"weight": torch.tensor([0.5, -1.0, 1.0, 0.0]), "bias": torch.tensor([torch.nan, 3e-8])})
        >>> histogram.counts.sum(1).tolist(), histogram.zeros.tolist(), histogram.nans.tolist()
        ([3, 1], [1, 0], [0, 1])
        >>> [round(x, 2) for x in histogram.quantile(0.98).log2().tolist()]
        [0.08, -24.92]
    """

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.names = list(names)
        self._row_of = {name: row for row, name in enumerate(self.names)}
        if len(self._row_of) != len(self.names):
            repeated = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"names must differ, got {repeated} more than once")
        self.table = torch.zeros(len(self.names), COLUMNS, dtype=torch.int64, device=device)

    @classmethod
    def from_table(cls, names: Sequence[str], table: Tensor) -> MagnitudeHistogram:
        """The histogram of a :attr:`table` with these names; the table is not copied."""
        histogram = cls(names, device="meta")
        histogram.table = table
        return histogram

    @property
    def counts(self) -> Tensor:
        """Counts of the finite values from ``2**-126`` up, int64 ``[len(names), 2032]``."""
        return self.table[:, 1:-2]

    @property
    def zeros(self) -> Tensor:
        """Counts of the zeros and of what is subnormal in float32, int64 ``[len(names)]``."""
        return self.table[:, 0]

    @property
    def infs(self) -> Tensor:
        """Counts of the infinities, int64 ``[len(names)]``."""
        return self.table[:, -2]

    @property
    def nans(self) -> Tensor:
        """Counts of NaN, int64 ``[len(names)]``."""
        return self.table[:, -1]

    @property
    def edges(self) -> Tensor:
        """Edges of the bins, exact in float64 ``[2033]``; a bin holds its lower edge."""
        exponents = torch.arange(1, _EXPONENTS, dtype=torch.float64, device="cpu") - 127
        mantissas = torch.arange(BINS_PER_OCTAVE, dtype=torch.float64, device="cpu") / BINS_PER_OCTAVE
        edges = torch.exp2(exponents)[:, None] * (1 + mantissas)
        return edges.flatten()[: COLUMNS - 2].to(self.table.device)

    def update(self, values: Mapping[str, Tensor], rows: Mapping[str, str] | None = None) -> None:
        """Counts the magnitudes of floating-point tensors of any shape, layout and device.

        The host does not wait for tensors on the device of :attr:`table`. With Triton on CUDA, those of one dtype of float32,
        bfloat16 and float16 are counted in one launch.

        Args:
            values: from a name to a tensor. Names may be missing.
            rows: from each name in ``values`` to that of :attr:`names` under which it is counted; itself by default.

        Raises:
            ValueError: for a name that the histogram does not have.
            TypeError: for a tensor that is not real floating point.
        """
        alike: dict[Any, tuple[list[int], list[Tensor]]] = {}
        for name, tensor in values.items():
            row = self._row_of.get(name if rows is None else rows[name])
            if row is None:
                raise ValueError(f"name {name!r} is not one of the histogram's names: {self.names}")
            if not tensor.dtype.is_floating_point:
                raise TypeError(f"magnitudes are counted of real floating-point tensors, got {tensor.dtype}")
            indices, tensors = alike.setdefault((tensor.device, tensor.dtype, tensor.layout), ([], []))
            indices.append(row)
            tensors.append(tensor)
        for (device, *_), (indices, tensors) in alike.items():
            if device == self.table.device:
                _add(self.table, indices, tensors)
            else:
                table = torch.zeros(len(indices), COLUMNS, dtype=torch.int64, device=device)
                _add(table, range(len(indices)), tensors)
                self.table.index_add_(0, torch.tensor(indices, device=self.table.device), table.to(self.table.device))

    def reset(self) -> None:
        """Forgets all counts."""
        self.table.zero_()

    def all_reduce(self, group: Any = None) -> None:
        """Adds the counts of all ranks in one all-reduce of :attr:`table`; to be called on every rank."""
        torch.distributed.all_reduce(self.table, group=group)

    def merge(self, other: MagnitudeHistogram) -> None:
        """Adds the counts of another histogram with the same names, else raises ``ValueError``."""
        if self.names != other.names:
            raise ValueError(f"other must have the same names to be merged: {self.names}, got {other.names}")
        self.table += other.table.to(self.table.device)

    def to(self, device: torch.device | str) -> MagnitudeHistogram:
        """The histogram on a device; itself where it is there already."""
        table = self.table.to(device)
        return self if table is self.table else self.from_table(self.names, table)

    def pooled(self) -> MagnitudeHistogram:
        """The histogram of all names together, under the one name ``all``."""
        return self.from_table(["all"], self.table.sum(0, keepdim=True))

    def total(self) -> Tensor:
        """Number of values counted, int64 ``[len(names)]``."""
        return self.table.sum(1)

    def quantile(self, q: float, pooled: bool = False) -> Tensor:
        """The ``int(q * n)``-th smallest of the ``n`` values in :attr:`counts`, exact to one bin.

        Zeros and non-finite values are left out. The answer is the geometric middle of the bin that holds the value.

        Args:
            q: from 0 to 1, else ``ValueError``.
            pooled: over all names together.

        Returns:
            float64 ``[len(names)]``, or 0-d if pooled; NaN where nothing was counted.
        """
        if not 0.0 <= q <= 1.0:
            raise ValueError(f"q must lie in [0, 1], got {q!r}")
        return self.pooled().quantile(q)[0] if pooled else self._bins.quantiles([q])[:, 0]

    def share_below(self, magnitude: float) -> Tensor:
        """Share of the values in :attr:`counts` below a magnitude from 0 up, interpolated within the bin that holds it.

        float64 ``[len(names)]`` from 0 to 1; NaN where nothing was counted.
        """
        return self._bins.shares_below([magnitude])[:, 0]

    def norm(self) -> Tensor:
        """Euclidean norm of the values in :attr:`counts`, float64 ``[len(names)]``, taking them as uniform in a bin."""
        return self._bins.norm()

    def occupied(self) -> Bins:
        """The bins from the first to the last that has a count in any row, or one bin; a last row is of all together."""
        pooled = self.counts.sum(0, keepdim=True)
        there = pooled[0].nonzero()[:, 0].tolist() or [0]
        first, end = there[0], there[-1] + 1
        return Bins(self.edges[first : end + 1], torch.cat([self.counts[:, first:end], pooled[:, first:end]]))

    @property
    def _bins(self) -> Bins:
        return Bins(self.edges, self.counts)


def add_magnitudes(table: Tensor, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
    """Adds the counts of tensors of one dtype and device to rows of a table, a row each, without a kernel."""
    small: list[tuple[int, Tensor]] = []
    for row, tensor in zip(rows, tensors, strict=True):
        values, implicit_zeros = flat_values(tensor)
        if implicit_zeros:
            table[row, 0] += implicit_zeros
        if table.device.type != "cpu":  # bincount would wait for the device to learn the largest index
            for chunk in values.split(_DEVICE_CHUNK) if values.numel() else ():
                _add_on_device(table[row], _columns(chunk))
        elif values.numel() > _CPU_SMALL:
            _add_large(table[row], values)
        else:
            small.append((row, values))
    ends = accumulate(values.numel() for _, values in small)
    for _, batch in groupby(zip(ends, small, strict=True), key=lambda pair: pair[0] // _CPU_CHUNK):
        _add_small(table, [pair for _, pair in batch])


def flat_values(tensor: Tensor) -> tuple[Tensor, int]:
    """The stored values of a tensor in one dimension, not copied where memory allows, and the number of other zeros."""
    tensor = (tensor.detach() if tensor.requires_grad else tensor).resolve_neg()  # a lazy sign has no bits to look at
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
    if tensor.layout != torch.strided:
        values = tensor.values()
        return values.reshape(-1), tensor.numel() - values.numel()
    if tensor.is_contiguous():  # most are, and sorting strides takes longer than counting a small tensor
        return tensor if tensor.dim() == 1 else tensor.view(-1), 0
    # The order of the values does not matter: that of the memory needs no copy (channels_last).
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(by_stride).reshape(-1), 0


@functools.cache
def _kernel(device: torch.device) -> ModuleType | None:
    """What counts on a device in place of :func:`add_magnitudes`; tried once, as a kernel needs more than Triton."""
    if not kernels.run_on(device):
        return None
    try:
        from lightning_gradhist.kernels import histogram

        wrong = _counted_otherwise(histogram, device)
        reason = None if wrong is None else f"counts {wrong} otherwise than torch"
    except Exception as error:
        reason = f"failed: {error!r}"
    if reason is not None:
        warnings.warn(f"histograms are counted without their Triton kernel, which {reason}", stacklevel=2)
    return histogram if reason is None else None


def _counted_otherwise(kernel: ModuleType, device: torch.device) -> torch.dtype | None:
    """The first dtype of which a kernel is wrong: on any bits, of odd sizes, not aligned, and with gaps."""
    bits = torch.randint(-(2**31), 2**31, (20_001,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = bits.to(device).view(dtype)
        tensors = [values, values[1:], values[::3], values[:1], values[:0], values[: 2**14]]
        counted, expected = torch.zeros(2, len(tensors), COLUMNS, dtype=torch.int64, device=device)
        kernel.add_magnitudes(counted, range(len(tensors)), tensors)
        add_magnitudes(expected, range(len(tensors)), tensors)
        if not torch.equal(counted, expected):
            return dtype
    return None


def _add(table: Tensor, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
    kernel = _kernel(table.device)
    if kernel is not None and kernel.supported(tensors[0]):
        kernel.add_magnitudes(table, rows, [flat_values(tensor)[0] for tensor in tensors])
    else:
        add_magnitudes(table, rows, tensors)


def _add_large(row: Tensor, values: Tensor) -> None:
    """Count the bits as they are, and put zeros, infinities and NaN into their columns afterwards."""
    bins, beyond = _EXPONENTS * BINS_PER_OCTAVE, (_EXPONENTS - 1) * BINS_PER_OCTAVE
    raw = torch.zeros(2 * bins, dtype=torch.int64, device="cpu")
    buffer = torch.empty(_CPU_CHUNK, dtype=torch.int32, device="cpu")
    for chunk in values.split(_CPU_CHUNK):
        raw += torch.bincount(_signed_bins(chunk, bins, buffer[: chunk.numel()]), minlength=2 * bins)
    counts = raw.view(2, bins).sum(0)
    if counts[beyond:].any():  # infinities and NaN share an exponent; most tensors have neither
        nans = values.isnan().sum()
        row[-1] += nans
        row[-2] -= nans
    row[0] += counts[:BINS_PER_OCTAVE].sum()
    row[1:-2] += counts[BINS_PER_OCTAVE:beyond]
    row[-2] += counts[beyond:].sum()


def _signed_bins(values: Tensor, bins: int, buffer: Tensor) -> Tensor:
    """The bin of each value, apart by sign: to add to one place twice in a row takes a processor several times as long."""
    if values.dtype == torch.float64:
        return _bin_index(values)
    bits = values.to(torch.float32).view(torch.int32)
    return torch.bitwise_right_shift(bits, _SHIFT, out=buffer).add_(bins)


def _add_small(table: Tensor, batch: Sequence[tuple[int, Tensor]]) -> None:
    """Count several tensors in one go, without an array of counts that has most of its bins empty."""
    rows, tensors = zip(*batch, strict=True)
    columns = _columns(torch.cat(tensors))
    starts = torch.tensor(rows, device="cpu") * table.shape[1]
    sizes = torch.tensor([tensor.numel() for tensor in tensors], device="cpu")
    _scatter(table.view(-1), starts.repeat_interleave(sizes, output_size=columns.numel()).add_(columns))


def _add_on_device(row: Tensor, columns: Tensor) -> None:
    if columns.is_cuda:  # in the memory of each block of threads: 15 times as fast on an H200 as adding to one row
        row += torch.histc(columns, COLUMNS, 0, COLUMNS)
    else:
        _scatter(row, columns)


def _scatter(counts: Tensor, index: Tensor) -> None:
    counts.scatter_add_(0, index.long(), counts.new_ones(1).expand(index.numel()))


def _columns(values: Tensor) -> Tensor:
    """The column of the table that each value is counted in."""
    columns, nans = _bin_index(values).sub_(BINS_PER_OCTAVE - 1).clamp_(min=0), COLUMNS - 1
    if columns.is_cpu and columns.numel() and columns.max() < nans - 1:  # most have neither infinities nor NaN
        return columns
    return columns.masked_fill_(values.isnan(), nans)


def _bin_index(values: Tensor) -> Tensor:
    if values.dtype != torch.float64:
        bits = values.to(torch.float32).view(torch.int32)
        return (bits & 0x7FFFFFFF).bitwise_right_shift_(_SHIFT)
    bits = values.contiguous().view(torch.int64) & 0x7FFFFFFFFFFFFFFF
    index = bits.bitwise_right_shift_(_SHIFT + 52 - _MANTISSA_BITS).sub_((1023 - 127) * BINS_PER_OCTAVE)
    return index.clamp_(0, (_EXPONENTS - 1) * BINS_PER_OCTAVE)
