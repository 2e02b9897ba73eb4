"""Event files of TensorBoard: many values in one event, and checksums that take no time.

A model of 2,000 tensors logs 16,000 values a step, and an event for each takes far longer than to make the values.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import google_crc32c
import torch

from lightning_gradhist.logging.magnitude_report import Distribution, Distributions

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter


def scalar_summary(values: Mapping[str, float]) -> Summary:
    """Numbers by tag, each as ``SummaryWriter.add_scalar`` writes it."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    summary = Summary()
    for tag, value in values.items():  # not a list of them, which Python's garbage collector would go through
        summary.value.add(tag=tag, simple_value=value)
    return summary


def histogram_summary(histograms: Mapping[str, Distribution]) -> Summary:
    """Histograms by tag, at least one, each as ``SummaryWriter.add_histogram_raw`` writes it."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    if isinstance(histograms, Distributions):
        counts, edges, sizes = histograms.counts, histograms.edges, histograms.sizes
    else:
        counts = torch.cat([shown.counts for shown in histograms.values()])
        edges = torch.cat([shown.edges for shown in histograms.values()])
        sizes = torch.tensor([len(shown.counts) for shown in histograms.values()], device="cpu")
    counts = counts.double()  # as they are written
    is_lower = torch.ones(len(edges), dtype=torch.bool, device="cpu").index_fill_(0, (sizes + 1).cumsum(0) - 1, False)
    lower, upper = edges[is_lower], edges[is_lower.roll(1)]
    middles = (lower + upper) / 2
    terms = torch.stack([counts, counts * middles, counts * middles.square()], 1)
    owners = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
    sums = terms.new_zeros(len(sizes), 3).index_add_(0, owners, terms)

    minima, limits, buckets = lower.tolist(), upper.tolist(), counts.tolist()
    ends = sizes.cumsum(0).tolist()
    summary = Summary()
    for tag, start, end, (number, total, squares) in zip(histograms, [0, *ends], ends, sums.tolist(), strict=False):
        shown = summary.value.add(tag=tag).histo
        shown.min, shown.max = minima[start], limits[end - 1]
        shown.num, shown.sum, shown.sum_squares = number, total, squares
        shown.bucket_limit.extend(limits[start:end])
        shown.bucket.extend(buckets[start:end])
    return summary


def write(writer: SummaryWriter, summary: Summary, step: int) -> None:
    """Writes all values of a summary as one event."""
    # there is no public method for several values; this one opens a file anew that was closed, as the writer's own do
    file = writer._get_file_writer()
    with suppress(AttributeError):  # of another release, which takes its time
        _speed_up(file.event_writer._async_writer._writer)
    file.add_summary(summary, step)


def _speed_up(records: Any) -> None:
    """Has TensorBoard's ``RecordWriter`` write the same bytes, with checksums that are not made in Python.

    Those take 0.1 s a megabyte, in a thread that holds up the training thread. There is no public way in.
    """
    if "write" not in vars(records):
        records.write = partial(_write_record, records._writer)


def _write_record(file: Any, data: bytes) -> None:
    length = struct.pack("<Q", len(data))
    file.write(length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and moved, as records have it (TFRecord)."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
