"""What is reported of a histogram of magnitudes: what to draw, numbers, and a table of the worst layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy  # comes with whatever draws or logs histograms
import torch
from torch import Tensor

from lightning_gradhist.histogram import MagnitudeHistogram

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
_MAX_BUCKETS = 64  # TensorBoard's page shows 30
_MIN_BUCKETS = 8
_TELLING = 1e-3  # a share below it has no chart of its own
_BY_ROW = ("nonfinite_share", "zero_share", "fp16_loss_share")
# From a number format to the magnitude below which rounding gives zero, half its smallest subnormal number, and the one
# above which it finds no number, the largest one and half a unit of its last place.
_RANGES = {"fp16": (2.0**-25, 65_520.0), "fp8_e4m3": (2.0**-10, 464.0), "fp8_e5m2": (2.0**-17, 61_440.0)}


@dataclass(frozen=True)
class Distribution:
    """A histogram as it is shown."""

    edges: Tensor  # log10 of the magnitude, float64 [n + 1], increasing
    counts: Tensor  # int64 [n], with n from 1 to 64, and to 8 or the root of the number of values if that is less
    quantiles: Mapping[float, float]  # the magnitude below which a share of the values lies, for each of QUANTILES


class Distributions(Mapping[str, Distribution]):
    """Histograms by tag, of thousands of tensors, which lie one after another; ``sizes`` are their numbers of counts, ``[n]``."""

    def __init__(
        self, tags: Sequence[str], sizes: Tensor, edges: Tensor, counts: Tensor, quantiles: Sequence[Sequence[float]]
    ) -> None:
        self.sizes, self.edges, self.counts, self._quantiles = sizes, edges, counts, quantiles
        self._places = {tag: place for place, tag in enumerate(tags)}
        self._ends = sizes.cumsum(0)

    def __getitem__(self, tag: str) -> Distribution:
        place = self._places[tag]
        end = int(self._ends[place])
        start = end - int(self.sizes[place])
        edges = self.edges[start + place : end + place + 1]  # of which each histogram has one more
        return Distribution(edges, self.counts[start:end], dict(zip(QUANTILES, self._quantiles[place], strict=True)))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True)
class MagnitudeReport:
    """What a logged step has to show, by tag; see :func:`magnitude_report`."""

    scalars: Mapping[str, float]
    histograms: Mapping[str, Distribution]


def magnitude_report(histogram: MagnitudeHistogram, prefix: str, pooled_name: str = "all") -> MagnitudeReport:
    """Reports a histogram per name and pooled: counts over ``log10`` of the magnitude, and scalars beside them.

    Tags are ``<prefix>_magnitude/<name>`` for the histograms. Scalars, of all values together:

    - ``<prefix>_median`` and ``<prefix>_norm``, in units of the values; the norm leaves out what is not finite, and is NaN
      where nothing is.
    - ``<prefix>_zero_share`` and ``<prefix>_nonfinite_share``, shares of all values from 0 to 1.
    - ``<prefix>_fp16_loss_share``, ``<prefix>_fp8_e4m3_loss_share`` and ``<prefix>_fp8_e5m2_loss_share``: of values, neither
      zero nor infinite, that are out of the range of float16, float8_e4m3fn or float8_e5m2: a cast without a scale turns
      them into zero, infinity or NaN, or, torch's newer ones to e4m3, into 448. There is none for bfloat16: it has the
      exponents of float32, and loses far less than a bin.

    Each name has its norm, and of the shares of zeros, of what is not finite and of what float16 loses those that are
    0.1% or more. A name of which nothing was counted is left out, and one without a finite value other than zero has no
    histogram. ``pooled_name`` is that of all of them together. The counts are to be on the host.
    """
    counted = _Counted(histogram)
    scalars: dict[str, float] = {}
    names, there = [*histogram.names, pooled_name], counted.total.numpy() > 0
    for tag, column in counted.columns().items():
        values = column.numpy()  # whose operations on a few rows take a tenth of torch's
        least = -math.inf if tag == "norm" else _TELLING if tag in _BY_ROW else math.inf
        is_shown = ~(values < least)  # a norm may be NaN
        is_shown[-1] = True
        (shown,) = (is_shown & there).nonzero()
        found = zip(shown.tolist(), values[shown].tolist(), strict=True)
        scalars |= {f"{prefix}_{tag}/{names[row]}": value for row, value in found}
    return MagnitudeReport(scalars, counted.distributions(f"{prefix}_magnitude", pooled_name))


def distributions(histogram: MagnitudeHistogram, kind: str, pooled_name: str = "all") -> Mapping[str, Distribution]:
    """The histograms alone, by tag ``<kind>/<name>``; arguments are as of :func:`magnitude_report`."""
    return _Counted(histogram).distributions(kind, pooled_name)


def worst_layers(histogram: MagnitudeHistogram, most: int = 10) -> str:
    """A table in Markdown of the names that are worst off, the worst first.

    Those are the ones with the largest share of non-finite values; among equals with the largest share of zeros and of what
    float16 loses, together; among equals with the smallest median.
    """
    counted = _Counted(histogram)
    columns = {tag: column.tolist() for tag, column in counted.columns().items()}
    total = counted.total[:-1].tolist()

    def badness(row: int) -> tuple[float, float, float]:
        lost = columns["zero_share"][row] + columns["fp16_loss_share"][row]
        return -columns["nonfinite_share"][row], -lost, columns["median"][row]

    worst = sorted((row for row, values in enumerate(total) if values), key=badness)[:most]
    table = "| layer | values | median | not finite | zero | lost in float16 |\n|---|--:|--:|--:|--:|--:|\n"
    for row in worst:
        cells = [histogram.names[row].replace("|", "\\|"), f"{total[row]:,}", f"{columns['median'][row]:.2g}"]
        cells += [f"{columns[share][row]:.2%}" for share in _BY_ROW]
        table += f"| {' | '.join(cells)} |\n"
    return table


def shown_buckets(edges: Tensor, counts: Tensor, most: int = 512) -> tuple[Tensor, Tensor]:
    """The occupied buckets and their edges, neighbours merged until there are at most ``most``."""
    below = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).numpy()
    cuts, _ = _cuts(below[None], numpy.array([most]))
    return edges[cuts], torch.from_numpy(numpy.diff(below[cuts]))


def _cuts(below: numpy.ndarray, most: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The edges that stay where neighbours among the occupied bins of each row are merged, a power of two of them each.

    From counts below each edge ``[rows, edges]``, of rows that are not empty, and the most buckets of each; the places of
    the edges of all rows one after another, and how many each row has.
    """
    first = (below > 0).argmax(1) - 1
    last = (below == below[:, -1:]).argmax(1)
    widths = 1 << numpy.ceil(numpy.log2((last - first) / most)).clip(0).astype(numpy.int64)
    sizes = -(-(last - first) // widths) + 1
    ends = sizes.cumsum()
    places = numpy.arange(ends[-1]) - (ends - sizes).repeat(sizes)
    return numpy.minimum(first.repeat(sizes) + places * widths.repeat(sizes), below.shape[1] - 1), sizes


class _Counted:
    """A histogram as it is reported: the rows of its names, and as the last one all of them together."""

    def __init__(self, histogram: MagnitudeHistogram) -> None:
        self.names, self.bins = histogram.names, histogram.occupied()
        kinds = torch.stack([histogram.zeros, histogram.infs + histogram.nans])
        self.zeros, self.nonfinite = torch.cat([kinds, kinds.sum(1, keepdim=True)], 1)
        self.finite = self.bins.counts.sum(1)
        self.total = self.zeros + self.nonfinite + self.finite
        self.quantiles = self.bins.quantiles(QUANTILES)

    def columns(self) -> dict[str, Tensor]:
        """The numbers by which rows are compared, each float64 ``[len(names) + 1]``."""
        below = self.bins.shares_below([limit for limits in _RANGES.values() for limit in limits]).nan_to_num_(0.0)
        lost = {
            f"{name}_loss_share": (flushed + (1 - kept)) * self.finite / self.total
            for name, (flushed, kept) in zip(_RANGES, below.T.unflatten(0, (-1, 2)), strict=True)
        }
        return {
            "median": self.quantiles[:, QUANTILES.index(0.5)].nan_to_num(0.0),
            "norm": self.bins.norm().masked_fill(self.nonfinite == self.total, math.nan),
            "zero_share": self.zeros.double() / self.total,  # or it would be of the default dtype
            "nonfinite_share": self.nonfinite.double() / self.total,
            **lost,
        }

    def distributions(self, kind: str, pooled_name: str) -> Mapping[str, Distribution]:
        """What to draw of each row that has a count, by tag."""
        rows = self.finite.nonzero()[:, 0]  # all of them in a few operations: a model may have thousands
        if not len(rows):
            return {}
        below = torch.nn.functional.pad(self.bins.counts[rows].cumsum(1), (1, 0)).numpy()
        most = self.finite[rows].double().sqrt().ceil().clamp(_MIN_BUCKETS, _MAX_BUCKETS).numpy()
        cuts, sizes = _cuts(below, most)
        at_cuts = torch.from_numpy(below[numpy.arange(len(rows)).repeat(sizes), cuts])
        last = torch.from_numpy(sizes.cumsum() - 1)
        within_rows = torch.ones(len(cuts), dtype=torch.bool, device="cpu").index_fill_(0, last, False)
        counted, edges = at_cuts.diff(append=at_cuts[:1])[within_rows], self.bins.edges.log10()[cuts]
        names = [*self.names, pooled_name]
        tags = [f"{kind}/{names[row]}" for row in rows.tolist()]
        return Distributions(tags, torch.from_numpy(sizes - 1), edges, counted, self.quantiles[rows].tolist())
