r"""What else of Adam depends on the batch size: its memory, its decoupled weight decay, its epsilon.

All three formulas take ``batch_ratio``, the batch size as a multiple of the one at which the value is trusted.
"""

from __future__ import annotations

import math

BETAS, WEIGHT_DECAY, EPS = "betas", "weight_decay", "eps"
SCALED = (BETAS, WEIGHT_DECAY, EPS)
"""What can be scaled with the batch size."""


def scaled_beta(beta: float, batch_ratio: float) -> float:
    r"""The decay of an average over steps whose half-life stays the same in samples.

    .. math:: \beta' = \beta^{B / B_0}

    After :math:`n` samples the average keeps :math:`\beta^{n / B}` of what it was, which shall not depend on B. Busbridge
    et al., "How to Scale Your EMA", NeurIPS 2023 (arXiv 2307.13813); for beta2 of Adam also Malladi et al., "On the SDEs
    and Scaling Rules for Adaptive Gradient Algorithms", NeurIPS 2022 (arXiv 2205.10287), whose
    :math:`1 - (B / B_0)(1 - \beta)` is the same to first order, but leaves the range for large batches.

    Args:
        beta: at the reference, at least 0 and below 1.
        batch_ratio: positive.

    Example:
        >>> round(scaled_beta(0.999, 16), 4)
        0.9841
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta!r}")
    return beta ** _positive("batch_ratio", batch_ratio)


def scaled_weight_decay(weight_decay: float, batch_ratio: float, rate_ratio: float) -> float:
    r"""The decoupled weight decay by which the weights shrink as much per sample as at the reference.

    .. math:: \lambda' = \lambda \, \frac{B / B_0}{\eta' / \eta}

    A step multiplies the weights by :math:`1 - \eta\lambda`, so that they forget within :math:`1 / (\eta\lambda)` steps,
    which are :math:`B / (\eta\lambda)` samples. That these stay the same is the formula, whatever the schedule makes of
    the rate. Wang and Aitchison, "How to set AdamW's weight decay as you scale model and dataset size", 2024 (arXiv
    2405.13698), found that time constant, in epochs, to carry over.

    Args:
        weight_decay: at the reference, from 0 up.
        batch_ratio: positive.
        rate_ratio: learning rate as a multiple of that at the reference, positive.

    Example:
        >>> scaled_weight_decay(0.01, 16, rate_ratio=4)
        0.04
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a number from 0 up, got {weight_decay!r}")
    return weight_decay * _positive("batch_ratio", batch_ratio) / _positive("rate_ratio", rate_ratio)


def scaled_epsilon(eps: float, batch_ratio: float) -> float:
    r"""The epsilon that lies where it was in the distribution of :math:`\sqrt v`, where noise dominates that.

    .. math:: \epsilon' = \epsilon / \sqrt{B / B_0}

    Noise of the mean over a batch has the standard deviation :math:`\sigma / \sqrt B`. Where the gradient is more signal
    than noise :math:`\sqrt v` does not fall with B, and this epsilon is too small, which does less harm than one that is
    too large. Malladi et al. 2022 (arXiv 2205.10287).

    Args:
        eps: at the reference, from 0 up.
        batch_ratio: positive.

    Example:
        >>> scaled_epsilon(1e-4, 16)
        2.5e-05
    """
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a number from 0 up, got {eps!r}")
    return eps / math.sqrt(_positive("batch_ratio", batch_ratio))


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    return value
