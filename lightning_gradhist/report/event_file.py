"""Event files of TensorBoard: many values in one event, and checksums of large events that take little time.

A model of 2,000 tensors logs 16,000 values a step. An event for each takes far longer than to make the values, and
tensorboard adds up its checksums byte by byte in Python, 50 ns each, while no other thread can run.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_gradhist.report.magnitudes import Distribution

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import FileWriter, SummaryWriter

_LANES = 1024  # words of 32 bits that are folded onto the next as many at once
_ONES = 0xFFFFFFFF


def scalar_summary(values: Mapping[str, float]) -> Summary:
    """Numbers by tag, each as ``SummaryWriter.add_scalar`` writes it."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary()
    for tag, value in values.items():  # not a list of them, which Python's garbage collector would go through
        summary.value.add(tag=tag, simple_value=value)
    return summary


def histogram_summary(histograms: Mapping[str, Distribution]) -> Summary:
    """Histograms by tag, at least one, each as ``SummaryWriter.add_histogram_raw`` writes it."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary

    counts = torch.cat([shown.counts for shown in histograms.values()]).double()  # as they are written
    edges = torch.cat([shown.edges for shown in histograms.values()])
    sizes = torch.tensor([len(shown.counts) for shown in histograms.values()])
    last_edges = (sizes + 1).cumsum(0) - 1
    is_lower = torch.ones(len(edges), dtype=torch.bool).index_fill_(0, last_edges, False)
    lower, upper = edges[is_lower], edges[is_lower.roll(1)]
    middles = (lower + upper) / 2
    terms = torch.stack([counts, counts * middles, counts * middles.square()], 1)
    owners = torch.arange(len(sizes)).repeat_interleave(sizes)
    sums = terms.new_zeros(len(sizes), 3).index_add_(0, owners, terms)

    minima, limits, buckets = lower.tolist(), upper.tolist(), counts.tolist()
    ends = sizes.cumsum(0).tolist()
    summary = Summary()
    for tag, start, end, (number, total, squares) in zip(histograms, [0, *ends], ends, sums.tolist(), strict=False):
        histogram = HistogramProto(
            min=minima[start],
            max=limits[end - 1],
            num=number,
            sum=total,
            sum_squares=squares,
            bucket_limit=limits[start:end],
            bucket=buckets[start:end],
        )
        summary.value.add(tag=tag, histo=histogram)
    return summary


def write(writer: SummaryWriter, summary: Summary, step: int) -> None:
    """Writes all values of a summary as one event."""
    file = writer._get_file_writer()  # as the writer's own methods do: it opens a file anew that was closed
    _quicken(file)
    file.add_summary(summary, step)


def _quicken(file: FileWriter) -> None:
    """Has the records of a file take :func:`checksum`, which changes no byte of them."""
    try:  # there is no public way to them; without this one writing is only slower
        records: Any = file.event_writer._async_writer._writer
        output = records._writer
    except AttributeError:
        return

    def write_record(event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        output.write(length + struct.pack("<I", checksum(length)) + event + struct.pack("<I", checksum(event)))

    records.write = write_record


def checksum(data: bytes) -> int:
    """The masked CRC-32C of an event file, by which its readers know that data are whole.

    It is tensorboard's of a few kB that are worth the same. Bits have a remainder modulo a polynomial, so that 4 kB can
    be folded onto the 4 kB behind them, word by word: each is replaced by what has its remainder so much further on.
    """
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    if len(data) < 8 * _LANES:
        return masked_crc32c(data)
    row = 4 * _LANES
    start = _complement(data[:4]) + data[4:]  # a CRC begins with the complement of the first word
    rows = np.frombuffer(start.rjust(-(-len(data) // row) * row, b"\0"), "<u4").reshape(-1, _LANES)
    low, high = _fold_tables()
    folded = rows[0]
    for following in rows[1:]:
        folded = following ^ low[folded & 0xFFFF] ^ high[folded >> 16]
    rest = folded.astype("<u4").tobytes()
    return masked_crc32c(_complement(rest[:4]) + rest[4:])


@functools.cache
def _fold_tables() -> tuple[np.ndarray, np.ndarray]:
    """What the lower and the upper 16 bits of a word become ``_LANES`` words further on."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc_update

    zeros = bytes(4 * _LANES - 4)
    images = [crc_update(_ONES, struct.pack("<I", 1 << bit) + zeros) ^ _ONES for bit in range(32)]
    low, high = (functools.reduce(_with_bit, half, np.zeros(1, np.uint32)) for half in (images[:16], images[16:]))
    return low, high


def _with_bit(table: np.ndarray, image: int) -> np.ndarray:
    return np.concatenate([table, table ^ np.uint32(image)])


def _complement(word: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in word)
