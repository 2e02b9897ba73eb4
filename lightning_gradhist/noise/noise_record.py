"""The noise scale of a run, averaged over what its steps have measured."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.noise.interval import NoiseEstimate, ratio_estimate
from lightning_gradhist.tensors import HostTensor

METRICS = ("simple", "adam")
_MAX_WINDOWS = 8
_MIN_WINDOW = 8
_MOST_CHANGED = 0.05  # of the measurements; at 12% clipped by hand, a noise scale of 24.8 was told as 28 (25.6 to 31.5)
_WAITING = 64  # measurements, after which it is looked for those that have arrived


class NoiseRecord:
    """Noise scale over a run, at no extra backward pass.

    Within a step a part, such as a micro-batch, is measured against the whole, without bias. Else successive steps are
    measured against each other: as the first gradient took part in the step to the second, the signal then comes out too
    small, and the noise scale too large, the more so the larger the rate.

    Args:
        samples: plain numbers, in the order of the steps, as :attr:`samples` gives them.
        most: entries that a record may have. Beyond it two neighbours become one, and from then on an entry is the average
            of twice as many successive measurements, so that all weigh the same.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]] = (), most: int = 4096) -> None:
        self._samples: list[dict[str, Any]] = [dict(sample) for sample in samples]
        # measurements of an entry; the last entry has fewer until it is whole
        self._stride = max(map(_measurements, self._samples), default=1)
        self._waiting: deque[tuple[int, HostTensor]] = deque()  # steps, and batch size and measurement
        self._most = most

    def __len__(self) -> int:
        """Number of measurements."""
        return sum(map(_measurements, self._samples)) + len(self._waiting)

    def add(self, step: int, batch_size: float | Tensor, measurement: Tensor) -> None:
        """Adds one measurement of :func:`~lightning_gradhist.noise.step.noise_and_signal`, without waiting for the device.

        The step is that of the gradient, of a pair that of the first, and the batch size that which the noise is told for.
        """
        if len(self._waiting) >= _WAITING:
            self._take_down(wait=False)
        size = batch_size if isinstance(batch_size, Tensor) else measurement.new_full((), batch_size)
        self._waiting.append((step, HostTensor(torch.cat([size.reshape(1), measurement]))))

    def snapshot(self) -> NoiseRecord:
        """A copy that is not added to, made without waiting for a device."""
        copied = NoiseRecord(self._samples, self._most)
        copied._waiting.extend(self._waiting)
        return copied

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What was measured, as numbers: ``step``, ``batch_size``, and noise and signal in each metric.

        An entry that is the average of several also has their number, ``measurements``, and the step of the first. One
        whose gradients somebody has changed has ``changed``, the share of such measurements.
        """
        self._take_down()
        return self._samples

    @property
    def batch_size(self) -> float:
        """Samples of the last step whose measurement has been taken down, as a rule; 0 where none is known."""
        return next((sample["batch_size"] for sample in reversed(self._samples) if sample.get("batch_size")), 0.0)

    def _take_down(self, wait: bool = True) -> None:
        while self._waiting and (wait or self._waiting[0][1].has_arrived):
            step, measured = self._waiting.popleft()
            numbers = measured().tolist()
            keys = ["batch_size", *(f"{kind}_{metric}" for metric in METRICS for kind in ("noise", "signal"))]
            known = {key: n if math.isfinite(n) else None for key, n in zip(keys, numbers, strict=True)}
            self._append({"step": step, **known, **({"changed": 1.0} if numbers[1] == -math.inf else {})})

    def _append(self, sample: dict[str, Any]) -> None:
        samples = self._samples
        if samples and _measurements(samples[-1]) < self._stride:
            samples.append(_averaged([samples.pop(), sample]))
        else:
            samples.append(sample)
        if len(samples) > self._most:
            self._samples = [_averaged(samples[i : i + 2]) for i in range(0, len(samples), 2)]
            self._stride *= 2

    def estimate(self, metric: str = "adam", confidence: float = 0.95, *, wait: bool = True) -> NoiseEstimate:
        """The noise scale averaged over the run, in samples.

        As it grows during a run, the ratios of windows of equally many steps, with Fieller's intervals, are averaged,
        errors in quadrature. There are as many windows, up to eight, as leave every interval bounded. ``metric`` is
        ``"simple"`` or ``"adam"``. Without ``wait``, what a device measures still is left out.
        """
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        self._take_down(wait)
        whole = [sample for sample in self._samples if _measurements(sample) == self._stride]
        if sum(map(_changed, self._samples)) > _MOST_CHANGED * len(self):
            whole = []  # those that are left are a choice of steps, as of small gradients where large ones are clipped
        samples = [s for s in whole if None not in (s[f"noise_{metric}"], s[f"signal_{metric}"])]
        measured = sum(map(_measurements, samples))
        for number in range(max(1, min(_MAX_WINDOWS, measured // _MIN_WINDOW)), 0, -1):
            spans, cut = _cut(samples, number)
            windows = [_of_window(window, metric, confidence) for window in cut]
            if all(math.isfinite(window.upper) for window in windows):
                break
        found = _average(windows, spans) if len(windows) > 1 else windows[0]
        return replace(found, measurements=sum(window.measurements for window in windows) * self._stride)


def _measurements(sample: Mapping[str, Any]) -> int:
    return sample.get("measurements", 1)


def _changed(sample: Mapping[str, Any]) -> float:
    """Measurements of an entry that were dropped since somebody had changed the gradients."""
    return float(sample.get("changed", 0.0) * _measurements(sample))


def _averaged(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The average of neighbours, each with the weight of its measurements."""
    if len(samples) == 1:
        return dict(samples[0])
    averaged: dict[str, Any] = {"step": samples[0]["step"]}
    for key in [key for key in samples[0] if key not in ("step", "measurements", "changed")]:
        known = [(sample[key], _measurements(sample)) for sample in samples if sample[key] is not None]
        weight = sum(count for _, count in known)
        averaged[key] = math.fsum(value * count for value, count in known) / weight if known else None
    averaged["measurements"] = sum(map(_measurements, samples))
    changed = sum(map(_changed, samples)) / averaged["measurements"]
    return averaged | ({"changed": changed} if changed else {})


def _of_window(samples: Sequence[Mapping[str, Any]], metric: str, confidence: float) -> NoiseEstimate:
    # Times the batch size sample by sample, so that a batch size that changes in mid-run does no harm.
    noise = [sample[f"noise_{metric}"] * sample["batch_size"] for sample in samples]
    signal = [sample[f"signal_{metric}"] for sample in samples]
    return ratio_estimate(noise, signal, scale=1.0, confidence=confidence)


def _average(windows: Sequence[NoiseEstimate], spans: Sequence[float]) -> NoiseEstimate:
    weighed = [(span / math.fsum(spans), window) for span, window in zip(spans, windows, strict=True)]
    value = math.fsum(share * window.value for share, window in weighed)
    below = math.hypot(*(share * (window.value - window.lower) for share, window in weighed))
    above = math.hypot(*(share * (window.upper - window.value) for share, window in weighed))
    return NoiseEstimate(value, max(value - below, 0.0), value + above, windows[0].confidence, 0)


def _cut(samples: Sequence[dict[str, Any]], number: int) -> tuple[list[float], list[list[dict[str, Any]]]]:
    """Windows of about equally many steps, with that number; a sample stands for the steps up to the next one."""
    first, last = (samples[0]["step"], samples[-1]["step"]) if samples else (0, 0)
    if number == 1 or last <= first:
        return [1.0], [list(samples)]
    starts = [sample["step"] for sample in samples]
    starts.append(last + (last - first) / (len(samples) - 1))
    windows: list[list[dict[str, Any]]] = [[] for _ in range(number)]
    spans = [0.0] * number
    for sample, start, end in zip(samples, starts[:-1], starts[1:], strict=True):
        index = min(max(math.ceil(number * (end - first) / (starts[-1] - first) - 1e-9) - 1, 0), number - 1)
        windows[index].append(sample)
        spans[index] += end - start
    return spans, windows
