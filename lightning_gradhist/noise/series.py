"""The noise scale of a run, averaged over what its steps have measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_gradhist.noise.interval import NoiseEstimate, average, ratio_estimate

METRICS = ("simple", "adam")
_MAX_WINDOWS = 8
_MIN_WINDOW = 8
_WAITING = 64  # bounds what a record holds of the device


class NoiseRecord:
    """Noise scale over a run, at no extra backward pass.

    Within a step, a gradient ``g`` and the mean ``p`` over one of its ``n`` parts (a micro-batch, a rank) give the noise
    ``sum(w * (p - g)**2) / (n - 1)`` and the signal ``sum(w * g**2)`` less that noise, both without bias
    (:func:`measure_part`).

    Else, gradients of successive steps give the signal ``sum(w * g1 * g2)`` and the noise ``sum(w * (g1 - g2)**2) / 2``
    (:func:`measure_pair`). Their bias: the weights of the second gradient are one step further, which the first gradient
    took part in (by ``1 - beta1`` of its length under momentum), so that the signal comes out a little small and the
    noise scale a little large.

    Args:
        samples: plain numbers, in the order of the steps, as :attr:`samples` gives them.
        most: beyond this number of samples, neighbours are averaged, so that a record does not grow for ever.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]] = (), most: int = 4096) -> None:
        self._samples: list[dict[str, Any]] = [dict(sample) for sample in samples]
        self._waiting: list[tuple[int, float, Tensor]] = []
        self._most = most

    def __len__(self) -> int:
        return len(self._samples) + len(self._waiting)

    def add(self, step: int, batch_size: float, measurement: Tensor) -> None:
        """Adds one measurement, without waiting for the device that makes it; every 64th waits for those before it.

        Args:
            step: optimizer step of the gradient, of a pair that of the first.
            batch_size: samples of the gradient.
            measurement: of :func:`measure_part` or :func:`measure_pair`; what is not finite is recorded as None.
        """
        if len(self._waiting) == _WAITING:
            self._take_down()
        self._waiting.append((step, batch_size, measurement))

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What was measured, as numbers: ``step``, ``batch_size``, and noise and signal in each metric."""
        self._take_down()
        return self._samples

    def _take_down(self) -> None:
        for step, batch_size, measurement in self._waiting:
            numbers = [number if math.isfinite(number) else None for number in measurement.tolist()]
            keys = [f"{kind}_{metric}" for metric in METRICS for kind in ("noise", "signal")]
            self._samples.append({"step": step, "batch_size": batch_size, **dict(zip(keys, numbers, strict=True))})
        self._waiting.clear()
        while len(self._samples) > self._most:
            self._samples = [_average_sample(pair) for pair in _cut(self._samples, -(-len(self._samples) // 2))]

    def estimate(self, metric: str = "adam", confidence: float = 0.95) -> NoiseEstimate:
        """The noise scale averaged over the run, in samples.

        It grows during a run, so the run is cut into windows of equal length, each gives a ratio with Fieller's
        interval, and the ratios are averaged, errors in quadrature. There are as many windows, up to eight, as leave
        every interval bounded.

        Args:
            metric: ``"simple"`` or ``"adam"``.
            confidence: of the interval.
        """
        samples = self._known(metric)
        for number in range(max(1, min(_MAX_WINDOWS, len(samples) // _MIN_WINDOW)), 0, -1):
            windows = [_of_window(window, metric, confidence) for window in _cut(samples, number)]
            if all(math.isfinite(window.upper) for window in windows):
                return _average(windows)
        return windows[0]

    def _known(self, metric: str) -> list[dict[str, Any]]:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        return [s for s in self.samples if None not in (s[f"noise_{metric}"], s[f"signal_{metric}"])]


def _average_sample(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    averaged: dict[str, Any] = {"step": samples[0]["step"]}
    for key in samples[0].keys() - {"step"}:
        known = [sample[key] for sample in samples if sample[key] is not None]
        averaged[key] = average(known) if known else None
    return {key: averaged[key] for key in samples[0]}


def _of_window(samples: Sequence[Mapping[str, Any]], metric: str, confidence: float) -> NoiseEstimate:
    # Times the batch size sample by sample, so that a batch size that changes in mid-run does no harm.
    noise = [sample[f"noise_{metric}"] * sample["batch_size"] for sample in samples]
    signal = [sample[f"signal_{metric}"] for sample in samples]
    return ratio_estimate(noise, signal, scale=1.0, confidence=confidence)


def _average(windows: Sequence[NoiseEstimate]) -> NoiseEstimate:
    value = average([window.value for window in windows])
    below = math.hypot(*(window.value - window.lower for window in windows)) / len(windows)
    above = math.hypot(*(window.upper - window.value for window in windows)) / len(windows)
    measurements = sum(window.measurements for window in windows)
    return NoiseEstimate(value, max(value - below, 0.0), value + above, windows[0].confidence, measurements)


def _cut(samples: Sequence[Any], number: int) -> list[Sequence[Any]]:
    cuts = [i * len(samples) // number for i in range(number + 1)]
    return [samples[low:high] for low, high in zip(cuts[:-1], cuts[1:], strict=True)]
