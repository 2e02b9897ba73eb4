"""Learning rate from batch size and noise scale: the surge law and its peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_gradhist.intervals import NoiseEstimate

LAWS = ("surge", "sqrt", "linear", "keep")
_MAX_SPREAD = 2.0  # a learning rate that is not known to a factor of two is not worth setting


class ScalingLaw(Protocol):
    """How the best learning rate changes with the batch size."""

    def ratio(self, batch_size: float, reference_batch_size: float) -> float:
        """Best learning rate at ``batch_size`` as a multiple of that at ``reference_batch_size``, both in samples."""
        ...


@dataclass(frozen=True)
class PowerLaw:
    """``ratio = (batch_size / reference_batch_size) ** exponent``.

    The exponent is 0.5 for the square-root law, 1 for the linear law and 0 to keep the rate.
    """

    exponent: float

    def ratio(self, batch_size: float, reference_batch_size: float) -> float:
        """Learning rate at ``batch_size`` as a multiple of that at ``reference_batch_size``, both in samples."""
        return (
            _samples("batch_size", batch_size) / _samples("reference_batch_size", reference_batch_size)
        ) ** self.exponent


@dataclass(frozen=True)
class SurgeLaw:
    r"""The surge law: the best rate of Adam-like optimizers rises to a peak at the noise scale, then falls.

    .. math:: \eta(B) = \eta_{max} \Big/ \tfrac12\left(\sqrt{B_n / B} + \sqrt{B / B_n}\right)

    Li et al., "Surge Phenomenon in Optimal Learning Rate and Batch Size Scaling", NeurIPS 2024 (arXiv 2405.14578),
    Theorem 3, which holds for :math:`B \ll \pi\sigma^2 / (2\mu^2)`; for much larger batches the rate is constant (Theorem
    4). So beyond ``valid_until`` the ratio stays what it is there.

    Args:
        noise_scale: :math:`B_n` in samples, positive; infinite gives the square-root law, which has no peak.
        max_learning_rate: :math:`\eta_{max}`, as the optimizer takes it; only the absolute form needs it.
        valid_until: batch size in samples up to which Theorem 3 is used; no bound by default.

    Raises:
        ValueError: for a value that is not positive, and for a ``max_learning_rate`` at an infinite ``noise_scale``.

    Example:
        >>> law = SurgeLaw(noise_scale=1000, max_learning_rate=0.01)
        >>> law.learning_rate(1000), round(law.ratio(1024, 64), 2)
        (0.01, 2.1)
    """

    noise_scale: float
    max_learning_rate: float | None = None
    valid_until: float = math.inf

    def __post_init__(self) -> None:
        _samples("noise_scale", self.noise_scale, infinite=True)
        _samples("valid_until", self.valid_until, infinite=True)
        if self.max_learning_rate is None:
            return
        if not 0 < self.max_learning_rate < math.inf:
            raise ValueError(f"max_learning_rate must be positive, got {self.max_learning_rate!r}")
        if math.isinf(self.noise_scale):
            raise ValueError("max_learning_rate is the peak at noise_scale, which must then be finite; use ratio()")

    def ratio(self, batch_size: float, reference_batch_size: float) -> float:
        """Best learning rate at ``batch_size`` as a multiple of that at ``reference_batch_size``, both in samples."""
        batch = min(_samples("batch_size", batch_size), self.valid_until)
        reference = min(_samples("reference_batch_size", reference_batch_size), self.valid_until)
        if math.isinf(self.noise_scale):
            return math.sqrt(batch / reference)
        return self._share_of_peak(batch) / self._share_of_peak(reference)

    def learning_rate(self, batch_size: float) -> float:
        """Best learning rate at ``batch_size`` samples; needs ``max_learning_rate``."""
        if self.max_learning_rate is None:
            raise ValueError("max_learning_rate is needed for an absolute rate; without it use ratio()")
        return self.max_learning_rate * self._share_of_peak(min(_samples("batch_size", batch_size), self.valid_until))

    def _share_of_peak(self, batch_size: float) -> float:
        root = math.sqrt(self.noise_scale / batch_size)
        return 2 / (root + 1 / root)

    @classmethod
    def from_moments(
        cls, mu: Tensor, sigma: Tensor, hessian_diagonal: Tensor, hessian_product: Callable[[Tensor], Tensor]
    ) -> SurgeLaw:
        r"""The law's two numbers from the moments of the per-sample gradient (Theorem 3).

        .. math::
            B_n = \frac{\pi \sum_i H_{ii}}{2 \sum_{i \ne j} s_i s_j H_{ij}}, \qquad
            \eta_{max} = \sqrt{\frac{B_n}{2\pi}} \, \frac{\sum_i \mu_i^2 / \sigma_i}{\sum_i H_{ii}}, \qquad
            s = \mu / \sigma.

        Args:
            mu: mean, ``[n]``.
            sigma: standard deviation, ``[n]``, positive.
            hessian_diagonal: diagonal of the Hessian, ``[n]``.
            hessian_product: maps a vector ``[n]`` to the Hessian times it.

        Raises:
            ValueError: where the trace or the sum off the diagonal is not positive; the law does not hold there.
        """
        s = mu / sigma
        trace = float(hessian_diagonal.sum())
        off_diagonal = float(s @ hessian_product(s) - (s * s * hessian_diagonal).sum())
        if not (trace > 0 and off_diagonal > 0):
            raise ValueError(
                "the surge law needs a positive trace of the Hessian and a positive sum off its diagonal,"
                f" got {trace:.3g} and {off_diagonal:.3g}"
            )
        noise_scale = math.pi * trace / (2 * off_diagonal)
        peak = math.sqrt(noise_scale / (2 * math.pi)) * float((mu * s).sum()) / trace
        return cls(noise_scale, max_learning_rate=peak)


def sign_descent_rate(
    batch_size: float,
    mu: Tensor,
    sigma: Tensor,
    hessian_diagonal: Tensor,
    hessian_product: Callable[[Tensor], Tensor],
) -> float:
    r"""Best rate of descent along the sign of the batch gradient, for every batch size.

    .. math::
        \eta(B) = \frac{\sum_i E_i \mu_i}{\sum_i (1 - E_i^2) H_{ii} + \sum_{ij} E_i E_j H_{ij}}, \qquad
        E_i = \mathrm{erf}\left(\sqrt{B/2} \, \mu_i / \sigma_i\right)

    Li et al. 2024 (arXiv 2405.14578), Theorem 2, for independent Gaussian coordinates. For small batches it is the surge
    law (Theorem 3), for large ones it is constant (Theorem 4).

    Args:
        batch_size: in samples.
        mu: mean of the per-sample gradient, ``[n]``.
        sigma: its standard deviation, ``[n]``, positive.
        hessian_diagonal: diagonal of the Hessian, ``[n]``.
        hessian_product: maps a vector ``[n]`` to the Hessian times it.

    Raises:
        ValueError: where the curvature along the sign is not positive, so that no rate is best.

    Example:
        >>> import torch
        >>> mu, hessian = torch.tensor([0.1, 0.2]), torch.eye(2)
        >>> round(sign_descent_rate(1e9, mu, torch.ones(2), hessian.diag(), lambda v: hessian @ v), 4)
        0.15
    """
    signal = torch.erf(math.sqrt(_samples("batch_size", batch_size) / 2) * mu / sigma)
    curvature = float(((1 - signal.square()) * hessian_diagonal).sum() + signal @ hessian_product(signal))
    if not curvature > 0:
        raise ValueError(f"the curvature along the sign of the gradient must be positive, got {curvature:.3g}")
    return float((signal * mu).sum()) / curvature


def scaling_law(name: str, noise_scale: float = math.inf, valid_until: float = math.inf) -> ScalingLaw:
    """The law of a name: one of ``"surge"``, ``"sqrt"``, ``"linear"`` and ``"keep"``.

    Args:
        name: of the law.
        noise_scale: in samples, for ``"surge"``.
        valid_until: in samples, for ``"surge"``.
    """
    exponents = {"sqrt": 0.5, "linear": 1.0, "keep": 0.0}
    if name == "surge":
        return SurgeLaw(noise_scale, valid_until=valid_until)
    if name not in exponents:
        raise ValueError(f"the name of a law must be one of {LAWS}, got {name!r}")
    return PowerLaw(exponents[name])


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


def careful_ratio(noise_scale: float, batch_size: float, reference_batch_size: float, from_record: bool) -> float:
    """The ratio of the surge law within the bounds that :func:`choose_ratio` states; all sizes in samples."""
    if noise_scale <= 0:  # no noise: nothing is gained by a larger batch
        return 1.0
    ratio = SurgeLaw(noise_scale, valid_until=math.pi / 2 * noise_scale).ratio(batch_size, reference_batch_size)
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

    - From a probe at the start of a run the noise scale is far too small, so the ratio of ``"surge"`` stays between 1
      and the square root of the ratio of batch sizes. From the record of a run the full law is used.
    - Beyond :math:`\tfrac{\pi}{2} B_n`, the bound of Theorem 3 over all coordinates together, the ratio levels off.
    - Where no signal stands out of the noise, where the interval of the noise scale has no bound above or none but zero
      below, and where its ends give ratios of the full law a factor of two or more apart, ``"surge"`` is refused, and
      the fallback is used instead.

    Args:
        law: one of ``"surge"``, ``"sqrt"``, ``"linear"`` and ``"keep"``.
        batch_size: samples of an optimizer step.
        reference_batch_size: samples of an optimizer step of the run whose rate is trusted.
        noise: noise scale; needed for ``"surge"``.
        from_record: whether it was measured over a run rather than at its start.
        fallback: the law that is used on a refusal: ``"sqrt"``, ``"linear"`` or ``"keep"``.

    Raises:
        ValueError: for another law or fallback, and for a batch size that is not positive.
    """
    if fallback == "surge":
        raise ValueError("fallback is used where 'surge' is refused, so it must be another law")
    if law != "surge":
        value = scaling_law(law).ratio(batch_size, reference_batch_size)
        return RateRatio(value, value, value, law)
    if noise is None or noise.measurements == 0:
        return _refused("there is no noise scale", fallback, batch_size, reference_batch_size)
    if not math.isfinite(noise.value):
        return _refused(
            "no signal stands out of the noise of the gradients", fallback, batch_size, reference_batch_size
        )
    scales = (noise.value, noise.lower, noise.upper)
    full = [careful_ratio(scale, batch_size, reference_batch_size, from_record=True) for scale in scales]
    if not 0 < noise.lower <= noise.upper < math.inf or max(full) >= _MAX_SPREAD * min(full):
        why = (
            f"the noise scale is too uncertain ({noise.lower:.3g} to {_bound(noise.upper)} samples): the rate could be"
            f" multiplied by {min(full):.3g} or by {max(full):.3g}"
        )
        return _refused(why, fallback, batch_size, reference_batch_size)
    ratios = [careful_ratio(scale, batch_size, reference_batch_size, from_record) for scale in scales]
    value, lower, upper = ratios[0], min(ratios), max(ratios)
    reasons = [_origin(from_record)]
    if batch_size > math.pi / 2 * noise.value:
        reasons.append(
            f"{batch_size:g} samples are beyond the bound of the law, {math.pi / 2 * noise.value:.3g}: the rate levels off"
        )
    return RateRatio(value, lower, upper, law, tuple(reasons))


def _origin(from_record: bool) -> str:
    if from_record:
        return "surge law with the noise scale of a recorded run"
    return (
        "surge law with the noise scale of a probe, which is too small at the start of a run: the ratio is kept between 1"
        " and the square root of the ratio of batch sizes; record a run with GradientHistogramMonitor for the full law"
    )


def _refused(why: str, fallback: str, batch_size: float, reference_batch_size: float) -> RateRatio:
    result = choose_ratio(fallback, batch_size, reference_batch_size)
    return replace(result, reasons=(f"surge law refused: {why}; fallback={fallback!r} is used",))


def _bound(value: float) -> str:
    return "unbounded" if math.isinf(value) else f"{value:.3g}"


def _samples(name: str, value: float, infinite: bool = False) -> float:
    if not value > 0 or (math.isinf(value) and not infinite):
        raise ValueError(f"{name} must be a positive number of samples, got {value!r}")
    return value
