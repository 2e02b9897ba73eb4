"""Theorem 5: the samples and steps to a loss at each batch size, against what a noise scale predicts."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from transfers import FACTORS

Needed = Mapping[float, Mapping[int, float]]
"""Samples to each target by batch size."""


def common(needed: Needed, sizes: list[int]) -> dict[float, np.ndarray]:
    """Samples at each batch size, of the targets that all of them reach."""
    return {
        t: np.array([by_size[size] for size in sizes]) for t, by_size in needed.items() if set(by_size) == set(sizes)
    }


def samples_ratio(noise: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Samples from each batch size to each other as Theorem 5 has them, ``(B + B_noise) / (B_0 + B_noise)``.

    Args:
        noise: in samples, ``[..., n]``, at each batch size that is known.
        sizes: batch sizes, ``[n]``.

    Returns:
        ``[..., n, n]``.
    """
    batch, known = np.array(sizes, float), noise[..., None]
    return (batch + known) / (batch[:, None] + known)


def errors(noise: np.ndarray, samples: Mapping[float, np.ndarray], sizes: list[int]) -> np.ndarray:
    """Log2 of predicted over measured samples, from each size to each other: ``[..., targets, n, n]``, NaN on the diagonal.

    Steps have the same errors, as a step is always of the same size.
    """
    logs = np.log2(list(samples.values()))
    measured = logs[:, None, :] - logs[:, :, None]
    found = np.log2(samples_ratio(noise, sizes))[..., None, :, :] - measured
    return np.where(np.eye(len(sizes), dtype=bool), np.nan, found)


def by_factor(noise: np.ndarray, samples: Mapping[float, np.ndarray], sizes: list[int]) -> np.ndarray:
    """Mean absolute error in octaves for each of :data:`transfers.FACTORS` times the noise ``[runs, n]``."""
    found = np.abs(errors(FACTORS[:, None, None] * noise, samples, sizes))
    return np.nanmean(found.reshape(len(FACTORS), -1), 1)
