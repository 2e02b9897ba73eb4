"""Noise and signal of one optimizer step: from two successive gradients, or from a part of the step against the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradhist.tensors import batches, joined, pieces, total, widened, with_float64


def adam_weight(second_moment: Tensor, eps: float) -> Tensor:
    r"""The metric in which Adam steps, :math:`1 / (\sqrt{\hat v} + \epsilon)`; 0 where :math:`\hat v = 0`."""
    weight = second_moment.sqrt().add_(eps).reciprocal_()
    return weight.mul_(second_moment.sign()).nan_to_num_(0.0, posinf=math.inf)  # a mask takes twice as long


def measure_pair(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> Tensor:
    r"""Squared distance :math:`|g_1 - g_2|^2` and product :math:`g_1 g_2` of two independent gradients.

    Of :math:`n_1` and :math:`n_2` samples, at fixed weights, :math:`E|g_1 - g_2|^2 = \operatorname{tr}\Sigma (1/n_1 + 1/n_2)`
    and :math:`E\,g_1 g_2 = |G|^2`, with :math:`\Sigma` the covariance of one sample's gradient. A name that only one of the
    two has is left out. ``weights`` are those of :func:`adam_weight`, None if the optimizer has no second moment.

    The result is float64 ``[4]``: distance and product with weight 1, then with ``weights``; NaN where there is nothing to
    measure. :func:`noise_and_signal` makes noise and signal of it, also of a sum over ranks.
    """
    shared = {name: gradient for name, gradient in first.items() if name in second}
    return _measured(shared, second, weights)


def measure_part(
    part: Mapping[str, Tensor], whole: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> Tensor:
    r"""Squared distance :math:`|p - g|^2` of the gradient of a micro-batch from that of the whole step, and :math:`|g|^2`.

    The whole is the mean of the gradients of ``K`` micro-batches of :math:`n_k` samples, accumulated or of other ranks. At
    fixed weights and for independent samples its covariance is :math:`\Sigma / N` with :math:`1/N = \sum_k 1/n_k / K^2`, and

    .. math:: E|p - g|^2 = \operatorname{tr}\Sigma \left(\frac{1 - 2/K}{n} + \frac1N\right), \qquad
        E|g|^2 = |G|^2 + \operatorname{tr}\Sigma / N

    (McCandlish et al. 2018, appendix A.1, with the difference in place of two norms, which has less variance). A name that
    ``part`` has not had no gradient there, which is zero. Weights and result are as of :func:`measure_pair`.
    """
    return _measured(whole, part, weights, squares=True)


def noise_and_signal(sums: Tensor, spread: Tensor | float, excess: Tensor | float, samples: Tensor | float) -> Tensor:
    r"""Noise :math:`\operatorname{tr}\Sigma / n` and signal :math:`|G|^2` without bias, with weight 1, then weighted: ``[4]``.

    Args:
        sums: float64 ``[4]`` of :func:`measure_pair` or :func:`measure_part`.
        spread: expected distance as a multiple of :math:`\operatorname{tr}\Sigma`.
        excess: what the expected product has more than :math:`|G|^2`, likewise: 0 of a pair, :math:`1/N` of a part.
        samples: ``n`` of the gradient that the noise is told for.
    """
    distances, products = sums[0::2], sums[1::2]
    trace = distances / spread
    return torch.stack([trace / samples, products - trace * excess], dim=1).flatten()


def _measured(
    gradients: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None,
    squares: bool = False,
) -> Tensor:
    """Sums over all values of squared distance and product of a gradient and another one, or its square, ``[4]``."""
    terms = []
    for some in batches({name: gradient for name, gradient in gradients.items() if gradient.numel()}):
        metric = [] if weights is None else [joined(some, weights)]
        for one, other, *weight in pieces(joined(some), joined(some, others), *metric):
            one, other = widened(one), widened(other)
            distance = one - other
            product = _dot(one, one if squares else other, *weight)
            terms.append(torch.stack([_dot(distance, distance, *weight), product], 1))
    return total(terms).flatten() if terms else torch.full((4,), math.nan, dtype=torch.float64, device="cpu")


def _dot(one: Tensor, other: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sum of products with weight 1, and weighted, float64 ``[2]``; the products themselves may be too small for float32."""
    unit = one.abs().amax().clamp(min=torch.finfo(one.dtype).tiny)
    scaled = one * unit.reciprocal()
    plain = torch.dot(scaled, other)
    weighted = math.nan * plain if weight is None else torch.dot(scaled.mul_(weight), other)
    return with_float64(torch.stack([plain, weighted])).double() * with_float64(unit).double()
