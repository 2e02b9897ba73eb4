"""A noise scale with its interval: Fieller's, for the ratio of two measured averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import covariance, fmean

ENOUGH = 10  # measurements along a run from which its noise scale can be told, as a rule


@dataclass(frozen=True)
class Band:
    """A value with its interval, as a noise scale's interval gives it."""

    value: float
    lower: float
    upper: float

    def times(self, factor: float) -> Band:
        """The band of a multiple."""
        return Band(self.value * factor, self.lower * factor, self.upper * factor)


@dataclass(frozen=True)
class NoiseEstimate(Band):
    """A noise scale in samples, with its confidence interval.

    Attributes:
        value: the estimate; infinite where no signal stands out of the noise.
        lower: lower end of the interval.
        upper: upper end; infinite where the data cannot bound it.
        confidence: probability that the interval is meant to hold the true value with.
        measurements: number of gradients, or pairs of them, that it rests on.
    """

    confidence: float
    measurements: int

    @property
    def bounded(self) -> bool:
        """Whether value and interval are finite."""
        return math.isfinite(self.value) and 0 <= self.lower <= self.upper < math.inf


def ratio_estimate(
    noise: Sequence[float], signal: Sequence[float], *, scale: float, confidence: float, references: float = math.inf
) -> NoiseEstimate:
    """Fieller's interval for ``scale * average(noise) / average(signal)`` from independent pairs of measurements.

    Pairs that are not finite are left out. ``references`` is the number of gradients in the reference that all were measured
    against, whose error is added.
    """
    pairs = [pair for pair in zip(noise, signal, strict=True) if all(map(math.isfinite, pair))]
    if not pairs:
        return NoiseEstimate(math.inf, 0.0, math.inf, confidence, 0)
    unit = max(abs(two) for _, two in pairs) or 1.0  # the fourth power of a gradient's square would fit no float
    noise, signal = zip(*((one / unit, two / unit) for one, two in pairs), strict=True)
    number, top, bottom = len(pairs), fmean(noise), fmean(signal)
    value = scale * top / bottom if bottom > 0 else math.inf
    if number < 3:
        return NoiseEstimate(value, 0.0, math.inf, confidence, number)
    t = student_quantile(0.5 + confidence / 2, number - 1)
    error = t * t * (1 / number + 1 / references)
    # The ratios R with (top - R * bottom)^2 <= t^2 var(top - R * bottom): a R^2 - 2 b R + c <= 0.
    a = bottom * bottom - error * covariance(signal, signal)
    b = top * bottom - error * covariance(noise, signal)
    c = top * top - error * covariance(noise, noise)
    root = math.sqrt(max(b * b - a * c, 0.0))
    lower = max((b - root) / a, 0.0) if a and c > 0 else 0.0
    upper = (b + root) / a if a > 0 and bottom > 0 else math.inf
    return NoiseEstimate(value, scale * lower, scale * upper, confidence, number)


@lru_cache
def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, by bisection of its distribution (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    low, high = -math.pi / 2, math.pi / 2  # of atan(t / sqrt(degrees))
    for _ in range(54):
        angle = (low + high) / 2
        is_below = _student_distribution(angle, degrees) < probability
        low, high = (angle, high) if is_below else (low, angle)
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _student_distribution(angle: float, degrees: int) -> float:
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = term if degrees > 1 else 0.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= (k - 1) / k * math.cos(angle) ** 2
        total += term
    within = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 + within) / 2
