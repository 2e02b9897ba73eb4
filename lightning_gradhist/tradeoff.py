"""What more GPUs would buy: the steps and the samples that a run needs, over batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_gradhist.explore import is_number
from lightning_gradhist.noise.interval import Band, NoiseEstimate

_CRITICAL, _LOWEST, _HIGHEST = 0.12, 0.04, 0.5  # of the mean B_adam; benchmarks/calibration, Theorem 5
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass(frozen=True)
class TradeoffRow:
    """What a run at one batch size needs, as multiples of what it needs at the present one."""

    factor: float  # batch size as a multiple of the present one
    batch_size: float  # samples of an optimizer step
    steps: Band  # optimizer steps to the same loss; with perfectly divided work, the time
    samples: Band  # to the same loss, which is the computation that is paid for


def critical_batch_size(noise: NoiseEstimate) -> NoiseEstimate:
    """The noise scale of Theorem 5, where half of the samples are spent on noise, from ``B_adam`` over a run.

    It is 0.12 of ``B_adam`` in samples, with an interval from 0.04 of the lower end to 0.5 of the upper one: on three
    workloads Theorem 5 fitted best with 0.044, 0.074 and 0.5 times the mean (``benchmarks/calibration``).

    Args:
        noise: ``B_adam`` over a whole run; one at its start is far too small.

    Example:
        >>> critical = critical_batch_size(NoiseEstimate(1000.0, 800.0, 1300.0, confidence=0.95, measurements=200))
        >>> critical.lower, critical.value, critical.upper
        (32.0, 120.0, 650.0)
    """
    return replace(noise, value=_CRITICAL * noise.value, lower=_LOWEST * noise.lower, upper=_HIGHEST * noise.upper)


def batch_size_tradeoff(
    noise: NoiseEstimate, batch_size: float, factors: Sequence[float] = FACTORS
) -> tuple[TradeoffRow, ...]:
    r"""Steps and samples to the same loss at other batch sizes, each at its own best learning rate.

    .. math:: S(B) = S_{min} (1 + B_n / B), \qquad E(B) = E_{min} (1 + B / B_n)

    Li et al. 2024 (arXiv 2405.14578), Theorem 5, after McCandlish et al. 2018 (arXiv 1812.06162). Against the present
    batch size :math:`B_0` the minima cancel: with :math:`q = (B + B_n) / (B_0 + B_n)` samples are multiplied by
    :math:`q` and steps by :math:`q B_0 / B`.

    Args:
        noise: the noise scale :math:`B_n` with a bounded interval, as :func:`critical_batch_size` gives it.
        batch_size: samples of an optimizer step at present, positive.
        factors: batch sizes as multiples of the present one, positive, a row each; from 1/8 to 64 by default.

    Raises:
        ValueError: for an interval without a bound, and for a batch size or factor that is not positive.

    Example:
        >>> noise = NoiseEstimate(value=1000.0, lower=800.0, upper=1300.0, confidence=0.95, measurements=200)
        >>> (row,) = batch_size_tradeoff(noise, batch_size=250, factors=[4])
        >>> row.batch_size, row.steps.value, row.samples.value  # four times the GPUs: 2.5 times as fast, 1.6 times the work
        (1000, 0.4, 1.6)
    """
    if not noise.bounded:
        raise ValueError(
            f"noise must have a bounded interval, got {noise.lower:g} to {noise.upper:g}; record a longer run"
        )
    for name, number in (("batch_size", batch_size), *(("factors", factor) for factor in factors)):
        if not (is_number(number) and 0 < number < math.inf):
            raise ValueError(f"{name} must be positive, got {number!r}")
    return tuple(_row(noise, batch_size, factor) for factor in factors)


def _row(noise: NoiseEstimate, batch_size: float, factor: float) -> TradeoffRow:
    scales = (noise.value, noise.lower, noise.upper)
    samples = [(factor * batch_size + scale) / (batch_size + scale) for scale in scales]
    steps = [grown / factor for grown in samples]
    return TradeoffRow(factor, factor * batch_size, *(Band(x[0], min(x), max(x)) for x in (steps, samples)))
