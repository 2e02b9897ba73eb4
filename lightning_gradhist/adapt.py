"""A ratio of learning rates that follows the noise scale of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_gradhist.intervals import NoiseEstimate
from lightning_gradhist.ratio import choose_ratio

WARMUP, ALWAYS = "warmup", "always"
ADAPT = (WARMUP, ALWAYS)
HALF_LIFE = 8
"""Measurements of the noise scale after which a ratio has gone half of its way, in log, to where it is wanted."""
_ARRIVED = 0.01  # relative; no rate is known better


@dataclass(frozen=True)
class AdaptedRatio:
    r"""The learning rate as a multiple of the reference's, which moves as the noise scale :math:`B_n` of a run grows.

    The law's ratio at the present noise scale, :math:`f(B_n)`, within the bounds that
    :func:`lightning_gradhist.ratio.choose_ratio` keeps for a probe (1 and the square root of the ratio of batch sizes), is
    approached exponentially in the logarithm,

    .. math:: \log r' = \log r + (1 - 2^{-1/8}) \, (\log f(B_n) - \log r),

    once a measurement, so that half of the way is gone after :data:`HALF_LIFE` of them. Where the law is refused the ratio
    stays.

    ``"always"`` follows :math:`f` both ways. ``"warmup"`` only ever goes towards ``end``, where it stops. As nothing takes
    back a step that chance made too far, it goes only as far as the interval of the noise scale makes sure: it takes
    for :math:`f` the end of the ratio's interval that is farther from ``end``.

    Attributes:
        law: one of :data:`lightning_gradhist.surge.NOISE_LAWS`.
        mode: ``"warmup"`` or ``"always"``.
        batch_size: samples of an optimizer step.
        reference_batch_size: samples of an optimizer step of the run whose rate is trusted.
        start: the ratio that the run began with.
        end: where ``"warmup"`` ends.
        value: the ratio now.

    Example:
        >>> noise = NoiseEstimate(value=3000.0, lower=2500.0, upper=3600.0, confidence=0.95, measurements=200)
        >>> ratio = AdaptedRatio("surge", "warmup", 1024, 256, start=1.0, end=2.0, value=1.0)
        >>> round(ratio.after(noise), 3)
        1.038
    """

    law: str
    mode: str
    batch_size: float
    reference_batch_size: float
    start: float
    end: float
    value: float

    @property
    def arrived(self) -> bool:
        """Whether it will not move any more."""
        return self.mode == WARMUP and self.value == self.end

    def after(self, noise: NoiseEstimate) -> float:
        """The ratio after one more measurement, by which the running noise scale has become ``noise``."""
        ratio = choose_ratio(self.law, self.batch_size, self.reference_batch_size, noise)
        if ratio.law != self.law or self.arrived:
            return self.value
        if self.mode == ALWAYS:
            return self._approached(ratio.value)
        sure = ratio.lower if self.end > self.value else ratio.upper
        low, high = sorted((self.value, self.end))
        value = self._approached(min(max(sure, low), high))
        return self.end if abs(math.log(self.end / value)) < _ARRIVED else value

    def _approached(self, target: float) -> float:
        return self.value * (target / self.value) ** (1 - 0.5 ** (1 / HALF_LIFE))


def warmup_end(batch_size: float, reference_batch_size: float, recorded: float | None) -> float:
    """Where ``"warmup"`` ends: at the ratio that a record gave, else at the laws' limit for ever more noise.

    Args:
        batch_size: in samples.
        reference_batch_size: in samples.
        recorded: the law's ratio at the noise scale over a recorded run, or None.
    """
    return math.sqrt(batch_size / reference_batch_size) if recorded is None else recorded
