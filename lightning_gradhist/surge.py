"""Learning rate from batch size and noise scale: the surge law and its peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NOISE_LAWS = ("surge", "saturating", "falling_surge")
"""The laws that need a noise scale."""
_EXPONENTS = {"sqrt": 0.5, "fourth_root": 0.25, "linear": 1.0, "keep": 0.0}
PLAIN_LAWS = tuple(_EXPONENTS)
"""The laws that need no noise scale."""
LAWS = (*NOISE_LAWS, *PLAIN_LAWS)
NOISE_FACTORS = dict.fromkeys(NOISE_LAWS, 1.0)
"""Each formula's noise scale as a multiple of the measured ``B_adam``, which is not the same quantity: its metric is
Adam's, its value an average over a run. 1 takes it as it is measured."""


class ScalingLaw(Protocol):
    """How the best learning rate changes with the batch size."""

    def ratio(self, batch_size: float, reference_batch_size: float) -> float:
        """Best learning rate at ``batch_size`` as a multiple of that at ``reference_batch_size``, both in samples."""
        ...


@dataclass(frozen=True)
class PowerLaw:
    """``ratio = (batch_size / reference_batch_size) ** exponent``.

    The exponent is 0.5 for the square-root law, 0.25 for the fourth root, 1 for the linear law and 0 to keep the rate.
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
        noise = self.noise_scale
        return math.sqrt(batch / reference) * (1.0 if math.isinf(noise) else (noise + reference) / (noise + batch))

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


@dataclass(frozen=True)
class SaturatingLaw:
    r"""The best rate rises like a power of the batch size up to the noise scale, then levels off; it has no peak.

    .. math:: \eta(B) = \eta_{max} \, (1 + B_n / B)^{-a}

    McCandlish et al., "An Empirical Model of Large-Batch Training", 2018 (arXiv 1812.06162): ``a = 1`` for
    SGD; for optimizers like Adam a smaller power, here the square root.

    Args:
        noise_scale: :math:`B_n` in samples, positive; infinite gives the power law ``(B / B_0) ** a``.
        exponent: ``a``, positive; 0.5 by default.

    Raises:
        ValueError: for a value that is not positive.

    Example:
        >>> law = SaturatingLaw(noise_scale=1000)
        >>> round(law.ratio(1024, 64), 2), round(law.ratio(1e9, 1000), 2)
        (2.9, 1.41)
    """

    noise_scale: float
    exponent: float = 0.5

    def __post_init__(self) -> None:
        _samples("noise_scale", self.noise_scale, infinite=True)
        if not 0 < self.exponent < math.inf:
            raise ValueError(f"exponent must be a positive number, got {self.exponent!r}")

    def ratio(self, batch_size: float, reference_batch_size: float) -> float:
        """Best learning rate at ``batch_size`` as a multiple of that at ``reference_batch_size``, both in samples."""
        batch = _samples("batch_size", batch_size)
        reference = _samples("reference_batch_size", reference_batch_size)
        more_signal = (
            1.0 if math.isinf(self.noise_scale) else (reference + self.noise_scale) / (batch + self.noise_scale)
        )
        return (batch / reference * more_signal) ** self.exponent


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
    """The law of a name.

    Args:
        name: ``"surge"`` (:class:`SurgeLaw`), ``"falling_surge"`` (the same without a bound), ``"saturating"``
            (:class:`SaturatingLaw`), or a :class:`PowerLaw`: ``"sqrt"``, ``"fourth_root"``, ``"linear"`` or ``"keep"``.
        noise_scale: in samples, for the first three.
        valid_until: in samples, for ``"surge"``.

    Raises:
        ValueError: for another name, and for a ``noise_scale`` or ``valid_until`` that is not positive.
    """
    if name == "surge":
        return SurgeLaw(noise_scale, valid_until=valid_until)
    if name == "falling_surge":
        return SurgeLaw(noise_scale)
    if name == "saturating":
        return SaturatingLaw(noise_scale)
    if name not in _EXPONENTS:
        raise ValueError(f"the name of a law must be one of {LAWS}, got {name!r}")
    return PowerLaw(_EXPONENTS[name])


def _samples(name: str, value: float, infinite: bool = False) -> float:
    if not value > 0 or (math.isinf(value) and not infinite):
        raise ValueError(f"{name} must be a positive number of samples, got {value!r}")
    return value
