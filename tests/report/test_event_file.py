"""Checksums of event files, against those of tensorboard, byte by byte."""

from __future__ import annotations

import random

import pytest
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from lightning_gradhist.report.event_file import checksum


@pytest.mark.parametrize("size", [0, 1, 3, 8, 8191, 8192, 8193, 12_287, 12_288, 50_001])
def test_checksums_are_tensorboards(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert checksum(data) == masked_crc32c(data)


@pytest.mark.parametrize("byte", [b"\0", b"\xff"])
def test_checksums_of_one_byte_again_and_again(byte: bytes) -> None:
    assert checksum(9001 * byte) == masked_crc32c(9001 * byte) != checksum(9000 * byte)
