"""Learning rate from batch size and length of the run: the surge law and its plain peers, and how far a rate is carried."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_gradhist.explore import is_number
from lightning_gradhist.noise.interval import ENOUGH, Band, NoiseEstimate

SURGE = "surge"  # the law that needs a noise scale
PlainLaw = Literal["sqrt", "fourth_root", "linear", "keep"]  # the laws that need none
Law = Literal["surge", "sqrt", "fourth_root", "linear", "keep"]
LAWS: tuple[Law, ...] = get_args(Law)
PLAIN_LAWS: tuple[PlainLaw, ...] = get_args(PlainLaw)
# Theorem 3 holds up to this multiple of the noise scale of all coordinates; then the rate is constant
BOUND = math.pi / 2
MAX_SPREAD = 2.0  # a learning rate that is not known to this factor is not worth setting
SHORT_RUN = 50  # steps below which the best rates of runs follow no law that is known (benchmarks/calibration)
EXPONENTS = {"sqrt": 0.5, "fourth_root": 0.25, "linear": 1.0, "keep": 0.0}
_FROM_RECORD = "surge law with the noise scale of a recorded run"
_FROM_PROBE = (
    "surge law with the noise scale of a probe, which is too small at the start of a run: the ratio is kept between 1"
    " and the square root of the ratio of batch sizes; record a run with GradientHistogramMonitor for the full law"
)


@dataclass(frozen=True)
class SurgeLaw:
    r"""The surge law: the best rate of Adam-like optimizers rises to a peak at the noise scale, then falls.

    .. math:: \eta(B) = \eta_{max} \Big/ \tfrac12\left(\sqrt{B_n / B} + \sqrt{B / B_n}\right)

    Li et al., "Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling", NeurIPS 2024 (arXiv 2405.14578),
    Theorem 3, for :math:`B \ll \pi\sigma^2 / (2\mu^2)`; far above, and here beyond ``valid_until``, the rate is constant
    (Theorem 4). In a ratio the peak :math:`\eta_{max}` cancels.

    Args:
        noise_scale: :math:`B_n` in samples, positive; infinite gives the square-root law, which has no peak.
        valid_until: batch size in samples up to which Theorem 3 is used; no bound by default.

    Raises:
        ValueError: for a value that is not positive.

    Example:
        >>> round(SurgeLaw(noise_scale=1000).ratio(1024, 64), 2)
        2.1
    """

    noise_scale: float
    valid_until: float = math.inf

    def __post_init__(self) -> None:
        _samples("noise_scale", self.noise_scale, infinite=True)
        _samples("valid_until", self.valid_until, infinite=True)

    def ratio(self, batch_size: float, reference_batch_size: float) -> float:
        """Best learning rate at ``batch_size`` as a multiple of that at ``reference_batch_size``, both in samples."""
        batch = min(_samples("batch_size", batch_size), self.valid_until)
        reference = min(_samples("reference_batch_size", reference_batch_size), self.valid_until)
        noise = self.noise_scale
        return math.sqrt(batch / reference) * (1.0 if math.isinf(noise) else (noise + reference) / (noise + batch))


@dataclass(frozen=True)
class RateRatio(Band):
    """A learning rate as a multiple of the reference's, and what to know about it.

    Its band goes from the smallest ratio at the noise scale and the two ends of its interval to the largest of the three.
    """

    law: str  # that it comes from
    reasons: tuple[str, ...] = ()  # sentences, in the order of the decisions
    share: float = 1.0  # of equal samples, that the surge law was used with


def plain_ratio(law: str, batch_size: float, reference_batch_size: float) -> float:
    """The rate as a multiple of the reference's, a power of the ratio of batch sizes, by one of :data:`PLAIN_LAWS`."""
    if law not in EXPONENTS:
        raise ValueError(f"the name of a law must be one of {LAWS}, got {law!r}")
    batch = _samples("batch_size", batch_size)
    return (batch / _samples("reference_batch_size", reference_batch_size)) ** EXPONENTS[law]


def share_of_equal_samples(
    batch_size: float, reference_batch_size: float, steps: float, reference_steps: float
) -> float:
    r"""How near a run is to one of as many samples as the reference's, 1, from one of as many steps, 0.

    It is :math:`h = \log(S_0 / S) / \log(B / B_0)`, from 0 to 1, with :math:`B` samples in each of :math:`S` optimizer steps;
    at the reference's own batch size it is 1.

    Example:
        >>> share_of_equal_samples(256, 64, steps=1000, reference_steps=4000), share_of_equal_samples(256, 64, 4000, 4000)
        (1.0, 0.0)
    """
    if batch_size == reference_batch_size:
        return 1.0
    return min(max(math.log(reference_steps / steps) / math.log(batch_size / reference_batch_size), 0.0), 1.0)


def surge_ratio(
    noise_scale: float, batch_size: float, reference_batch_size: float, from_record: bool, share: float = 1.0
) -> float:
    """The ratio of the surge law, within the bounds that :func:`choose_ratio` states; noise scales from 0 up."""
    if noise_scale <= 0:  # no noise: nothing is gained by a larger batch
        return 1.0
    ratio = SurgeLaw(noise_scale, valid_until=BOUND * noise_scale).ratio(batch_size, reference_batch_size)
    if not from_record:
        return _from_one_to(ratio, math.sqrt(batch_size / reference_batch_size))
    at_equal_steps = _from_one_to(ratio, plain_ratio("fourth_root", batch_size, reference_batch_size))
    return ratio**share * at_equal_steps ** (1 - share)


def _from_one_to(ratio: float, bound: float) -> float:
    low, high = sorted((1.0, bound))
    return min(max(ratio, low), high)


def choose_ratio(
    law: str,
    batch_size: float,
    reference_batch_size: float,
    noise: NoiseEstimate | None = None,
    *,
    from_record: bool = False,
    fallback: str = "keep",
    share: float = 1.0,
) -> RateRatio:
    r"""Applies a law with care: bounds what a probe may do, and refuses what the data do not support.

    The surge law:

    - With the noise scale of a probe, which is far too small, the ratio stays between 1 and the square root of the ratio of
      batch sizes. With that of a record the full law is used for a run of as many samples as the recorded one; for one of as
      many steps it is kept between 1 and the fourth root; and between these it is their geometric mean, with the weights
      :math:`h` and :math:`1 - h`.
    - Beyond :math:`\tfrac{\pi}{2} B_n`, the bound of Theorem 3 over all coordinates together, the ratio levels off.
    - It is refused, and the fallback used, where no signal stands out of the noise, and where the interval of the noise
      scale is not within positive bounds, or its ends give ratios of the full law a factor of two or more apart. At the
      reference's own batch size nothing is refused: the ratio is 1.

    Args:
        law: one of :data:`LAWS`.
        batch_size: samples of an optimizer step.
        reference_batch_size: those of the run whose rate is trusted.
        noise: ``B_adam``, which ``"surge"`` needs.
        from_record: whether that was measured over a run rather than at its start.
        fallback: the law that is used on a refusal: one of :data:`PLAIN_LAWS`.
        share: :math:`h` of :func:`share_of_equal_samples`, from 0 to 1.

    Raises:
        ValueError: for another law or fallback, and for a batch size that is not positive.

    Example:
        >>> noise = NoiseEstimate(value=3000.0, lower=2500.0, upper=3600.0, confidence=0.95, measurements=200)
        >>> ratio = choose_ratio("surge", 1024, 256, noise, from_record=True)
        >>> round(ratio.lower, 2), round(ratio.value, 2), round(ratio.upper, 2)
        (1.56, 1.62, 1.67)
    """
    if fallback == SURGE:
        raise ValueError(
            f"fallback is used where the surge law is refused, so it must be another than {SURGE!r}: {PLAIN_LAWS}"
        )
    if law != SURGE:
        value = plain_ratio(law, batch_size, reference_batch_size)
        return RateRatio(value, value, value, law)
    plain = choose_ratio(fallback, batch_size, reference_batch_size)
    why = _why_refused(batch_size, reference_batch_size, noise, from_record, share)
    if why is not None and batch_size == reference_batch_size:  # where every law, whatever the noise, gives 1
        return replace(plain, law=law)
    if why is not None or noise is None:
        return replace(plain, reasons=(f"surge law refused: {why}; fallback={fallback!r} is used",))
    scales, reasons = (noise.value, noise.lower, noise.upper), [_FROM_RECORD if from_record else _FROM_PROBE]
    ratios = [surge_ratio(scale, batch_size, reference_batch_size, from_record, share) for scale in scales]
    bound = BOUND * noise.value
    if batch_size > bound:
        reasons.append(f"{batch_size:g} samples are beyond the bound of the law, {bound:.3g}: the rate levels off")
    return RateRatio(ratios[0], min(ratios), max(ratios), law, tuple(reasons), share)


def _why_refused(
    batch_size: float, reference_batch_size: float, noise: NoiseEstimate | None, from_record: bool, share: float
) -> str | None:
    """What keeps the surge law from these batch sizes and this noise scale, or None."""
    why = None
    if noise is None or noise.measurements == 0:
        why = "there is no noise scale"
    elif not math.isfinite(noise.value):
        why = "no signal stands out of the noise of the gradients"
    else:
        scales = (noise.value, noise.lower, noise.upper)
        full = [surge_ratio(scale, batch_size, reference_batch_size, True, share) for scale in scales]
        if not 0 < noise.lower <= noise.upper < math.inf or max(full) >= MAX_SPREAD * min(full):
            samples = f"{noise.lower:.3g} " + (f"to {noise.upper:.3g} samples" if noise.bounded else "samples or more")
            least, most = f"{min(full):.3g}", f"{max(full):.3g}"
            why = f"the noise scale is too uncertain ({samples})"
            why += f": the rate could be multiplied by anything from {least} to {most}" if least != most else ""
    if why is None or not from_record or noise is None:
        return why
    if noise.measurements >= ENOUGH:
        return f"{why} (record a longer run, or pass fallback='fourth_root')"
    return (
        f"{why} (the record has {noise.measurements} measurements, and some {ENOUGH} are wanted; record a longer run, or lower"
        " every_n_steps of the GradientHistogramMonitor there)"
    )


def _samples(name: str, value: float, infinite: bool = False) -> float:
    if not (is_number(value) and value > 0) or (math.isinf(value) and not infinite):
        raise ValueError(f"{name} must be a positive number of samples, got {value!r}")
    return value
