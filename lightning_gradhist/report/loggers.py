"""Where reports go: one small interface over the loggers of a Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_gradhist.histogram import MagnitudeHistogram

_MAX_BUCKETS = 512


class Sink(Protocol):
    """Takes what is reported. Every method names the optimizer step; a sink may leave out what it cannot show."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""
        ...

    def histogram(self, tag: str, edges: Tensor, counts: Tensor, step: int) -> None:
        """Counts ``[n]`` between edges ``[n + 1]`` in the order of the axis."""
        ...

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """A matplotlib figure."""
        ...

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in Markdown."""
        ...


class TensorBoardSink:
    """Writes to a ``SummaryWriter`` of torch or tensorboardX."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Scalars page."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, edges: Tensor, counts: Tensor, step: int) -> None:
        """Histograms and Distributions pages."""
        middles = (edges[:-1] + edges[1:]) / 2
        self.writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=int(counts.sum()),
            sum=float((counts * middles).sum()),
            sum_squares=float((counts * middles.square()).sum()),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Images page."""
        self.writer.add_figure(tag, figure, step, close=False)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text page."""
        self.writer.add_text(tag, markdown, step)


class ScalarSink:
    """Any other Lightning logger: scalars only."""

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """The logger's own ``log_metrics``."""
        self.logger.log_metrics(dict(values), step=step)

    def histogram(self, tag: str, edges: Tensor, counts: Tensor, step: int) -> None:
        """Left out."""

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Left out."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Left out."""


def sinks(loggers: Iterable[Any]) -> list[Sink]:
    """One sink for each logger of a Trainer, or ``SummaryWriter``."""
    return [_sink(logger) for logger in loggers]


def log_magnitudes(sink: Sink, histogram: MagnitudeHistogram, prefix: str, step: int, pooled_name: str = "all") -> None:
    """Reports a histogram per name and pooled: counts over ``log10`` of the magnitude, and scalars beside them.

    Tags are ``<prefix>_magnitude/<name>`` for the histograms, and for the scalars ``<prefix>_median/<name>``,
    ``<prefix>_norm/<name>`` (both in units of the values), and the shares, from 0 to 1, ``<prefix>_zero_share/<name>``,
    ``<prefix>_nonfinite_share/<name>`` and ``<prefix>_fp16_loss_share/<name>``, the values other than zero that float16
    would turn into zero or infinity. bfloat16 has the range of float32 and loses none. The pooled ones are named
    ``pooled_name``. A name of which nothing was counted is left out.
    """
    edges = histogram.edges.log10()
    scalars: dict[str, float] = {}
    for part, names in ((histogram, histogram.names), (histogram.pooled(), [pooled_name])):
        counted = (part.total() > 0).tolist()
        for tag, column in _scalars(part).items():
            rows = zip(names, column.tolist(), counted, strict=True)
            scalars |= {f"{prefix}_{tag}/{name}": value for name, value, there in rows if there}
        for name, counts in zip(names, part.counts, strict=True):
            if counts.any():
                sink.histogram(f"{prefix}_magnitude/{name}", *shown_buckets(edges, counts), step)
    sink.scalars(scalars, step)


def shown_buckets(edges: Tensor, counts: Tensor, most: int = _MAX_BUCKETS) -> tuple[Tensor, Tensor]:
    """The occupied buckets and their edges, neighbours merged until there are at most ``most``."""
    occupied = counts.nonzero()[:, 0]
    first, last = int(occupied[0]), int(occupied[-1]) + 1
    width = 1
    while -(-(last - first) // width) > most:
        width *= 2
    cuts = torch.arange(first, last + width, width, device=counts.device).clamp_(max=counts.numel())
    cumulative = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return edges[cuts], cumulative[cuts].diff()


def _sink(logger: Any) -> Sink:
    # Lightning's logger wraps a writer in `experiment`; a bare SummaryWriter is taken as it is.
    writer = getattr(logger, "experiment", logger)
    return TensorBoardSink(writer) if hasattr(writer, "add_histogram_raw") else ScalarSink(logger)


def _scalars(histogram: MagnitudeHistogram) -> dict[str, Tensor]:
    total, finite = histogram.total(), histogram.counts.sum(1)
    # float16 rounds up to 2**-25 to zero, and from 65,520 on to infinity; 2**16 is the nearest edge.
    lost = histogram.share_below(2.0**-25) + (1 - histogram.share_below(2.0**16))
    return {
        "median": histogram.quantile(0.5).nan_to_num(0.0),
        "norm": histogram.norm(),
        "zero_share": histogram.zeros / total,
        "nonfinite_share": (histogram.infs + histogram.nans) / total,
        "fp16_loss_share": (lost.nan_to_num(0.0) * finite) / total,
    }
