"""How far a learning rate is carried: a law applied with bounds, intervals and refusals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lightning_gradhist.intervals import ENOUGH, NoiseEstimate
from lightning_gradhist.surge import NOISE_FACTORS, NOISE_LAWS, scaling_law

MAX_SPREAD = 2.0  # a learning rate that is not known to a factor of two is not worth setting


@dataclass(frozen=True)
class RateRatio:
    """A ratio of learning rates, its interval, and what to know about it.

    Attributes:
        value: learning rate as a multiple of the reference's.
        lower: smallest ratio at the noise scale and the two ends of its interval.
        upper: largest of the three.
        law: name of the law that it comes from.
        reasons: sentences, in the order in which the decisions were made.
    """

    value: float
    lower: float
    upper: float
    law: str
    reasons: tuple[str, ...] = ()


def careful_ratio(
    law: str, noise_scale: float, batch_size: float, reference_batch_size: float, from_record: bool
) -> float:
    """The ratio of a law that needs a noise scale, within the bounds that :func:`choose_ratio` states.

    Args:
        law: one of :data:`lightning_gradhist.surge.NOISE_LAWS`.
        noise_scale: ``B_adam`` as it is measured, in samples, from 0 up.
        batch_size: in samples.
        reference_batch_size: in samples.
        from_record: whether it was measured over a run rather than at its start.
    """
    if noise_scale <= 0:  # no noise: nothing is gained by a larger batch
        return 1.0
    scale = NOISE_FACTORS[law] * noise_scale
    ratio = scaling_law(law, scale, valid_until=_bound_of(law, scale)).ratio(batch_size, reference_batch_size)
    if from_record:
        return ratio
    low, high = sorted((1.0, math.sqrt(batch_size / reference_batch_size)))
    return min(max(ratio, low), high)


def choose_ratio(
    law: str,
    batch_size: float,
    reference_batch_size: float,
    noise: NoiseEstimate | None = None,
    *,
    from_record: bool = False,
    fallback: str = "keep",
) -> RateRatio:
    r"""Applies a law with care: bounds what a probe may do, and refuses what the data do not support.

    Of the laws that need a noise scale, ``"surge"``, ``"falling_surge"`` and ``"saturating"``:

    - From a probe at the start of a run the noise scale is far too small, so the ratio stays between 1 and the square
      root of the ratio of batch sizes. From the record of a run the full law is used.
    - Beyond :math:`\tfrac{\pi}{2} B_n`, the bound of Theorem 3 over all coordinates together, the ratio of ``"surge"``
      levels off; that of ``"saturating"`` does so by itself, and that of ``"falling_surge"`` falls on.
    - Where no signal stands out of the noise, where the interval of the noise scale has no bound above or none but zero
      below, and where its ends give ratios of the full law a factor of two or more apart, the law is refused, and the
      fallback is used instead. At the reference's own batch size nothing is refused: the ratio is 1.

    Args:
        law: one of :data:`lightning_gradhist.surge.LAWS`.
        batch_size: samples of an optimizer step.
        reference_batch_size: samples of an optimizer step of the run whose rate is trusted.
        noise: ``B_adam``; needed for :data:`lightning_gradhist.surge.NOISE_LAWS`.
        from_record: whether it was measured over a run rather than at its start.
        fallback: the law that is used on a refusal: one that needs no noise scale.

    Raises:
        ValueError: for another law or fallback, and for a batch size that is not positive.

    Example:
        >>> noise = NoiseEstimate(value=3000.0, lower=2500.0, upper=3600.0, confidence=0.95, measurements=200)
        >>> ratio = choose_ratio("surge", 1024, 256, noise, from_record=True)
        >>> round(ratio.lower, 2), round(ratio.value, 2), round(ratio.upper, 2)
        (1.56, 1.62, 1.67)
    """
    if fallback in NOISE_LAWS:
        raise ValueError(f"fallback is used where a law is refused, so it must be another than {NOISE_LAWS}")
    if law not in NOISE_LAWS:
        value = scaling_law(law).ratio(batch_size, reference_batch_size)
        return RateRatio(value, value, value, law)

    def refused(why: str) -> RateRatio:
        result = choose_ratio(fallback, batch_size, reference_batch_size)
        if batch_size == reference_batch_size:  # where every law, whatever the noise, gives 1
            return replace(result, law=law)
        if from_record and noise is not None and noise.measurements < ENOUGH:
            why += (
                f" (the record has {noise.measurements} measurements, and some {ENOUGH} are wanted; record a longer run, or lower"
                " every_n_steps of the GradientHistogramMonitor there)"
            )
        return replace(result, reasons=(f"{law} law refused: {why}; fallback={fallback!r} is used",))

    if noise is None or noise.measurements == 0:
        return refused("there is no noise scale")
    if not math.isfinite(noise.value):
        return refused("no signal stands out of the noise of the gradients")
    scales = (noise.value, noise.lower, noise.upper)
    full = [careful_ratio(law, scale, batch_size, reference_batch_size, from_record=True) for scale in scales]
    if not 0 < noise.lower <= noise.upper < math.inf or max(full) >= MAX_SPREAD * min(full):
        return refused(
            f"the noise scale is too uncertain ({noise.lower:.3g} to {_bounded(noise.upper)} samples): the rate could be"
            f" multiplied by {min(full):.3g} or by {max(full):.3g}"
        )
    ratios = [careful_ratio(law, scale, batch_size, reference_batch_size, from_record) for scale in scales]
    reasons = [_origin(law, from_record)]
    bound = _bound_of(law, NOISE_FACTORS[law] * noise.value)
    if batch_size > bound:
        reasons.append(f"{batch_size:g} samples are beyond the bound of the law, {bound:.3g}: the rate levels off")
    return RateRatio(ratios[0], min(ratios), max(ratios), law, tuple(reasons))


def _bound_of(law: str, noise_scale: float) -> float:
    return math.pi / 2 * noise_scale if law == "surge" else math.inf


def _origin(law: str, from_record: bool) -> str:
    if from_record:
        return f"{law} law with the noise scale of a recorded run"
    return (
        f"{law} law with the noise scale of a probe, which is too small at the start of a run: the ratio is kept between 1"
        " and the square root of the ratio of batch sizes; record a run with GradientHistogramMonitor for the full law"
    )


def _bounded(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.3g}"
