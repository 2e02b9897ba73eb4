"""Noise and signal of one optimizer step: from two successive gradients, or from a part of the step against the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_gradhist.tensors import batches, joined, pieces, sums, total


def adam_weight(second_moment: Tensor, eps: float) -> Tensor:
    r"""The metric in which Adam steps, :math:`1 / (\sqrt{\hat v} + \epsilon)`; 0 where :math:`\hat v = 0`."""
    return second_moment.sqrt().add_(eps).reciprocal_().masked_fill_((second_moment > 0).logical_not_(), 0)


def measure_pair(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None
) -> Tensor:
    """Noise and signal of two independent gradients of the same size.

    Args:
        first: names and gradients.
        second: names and gradients; a name that only one of the two has is left out.
        weights: names and :func:`adam_weight`; None if the optimizer has no second moment.

    Returns:
        float64 ``[4]``: noise and signal with weight 1, then with ``weights``; NaN where there is nothing to measure.
    """
    shared = {name: gradient for name, gradient in first.items() if name in second}
    return _measured(lambda one, two: ((one - two).square_().div_(2), one * two), shared, second, weights)


def measure_part(
    part: Mapping[str, Tensor], whole: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None, parts: int
) -> Tensor:
    r"""Noise and signal of a gradient, from the mean over one of the equal parts of its samples.

    With :math:`\Sigma / B` the covariance of the whole, :math:`E|p - g|^2 = (n - 1) \operatorname{tr}\Sigma / B` and
    :math:`E|g|^2 = |G|^2 + \operatorname{tr}\Sigma / B`, at fixed weights and for independent samples (McCandlish et al.
    2018, appendix A.1, with the difference in place of two norms, which has less variance).

    Args:
        part: names and gradients of one part; a name that it has not had no gradient there, which is zero.
        whole: names and gradients of all parts together, their mean.
        weights: names and :func:`adam_weight`; None if the optimizer has no second moment.
        parts: number ``n`` of the parts, at least 2.

    Returns:
        float64 ``[4]``: noise and signal with weight 1, then with ``weights``; NaN where there is nothing to measure.
    """
    if parts < 2:
        raise ValueError(f"parts must be at least 2, got {parts!r}: of a part that is the whole nothing can be learnt")

    def noise_and_signal(g: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
        noise = (one - g).square_().div_(parts - 1)
        return noise, g.square().sub_(noise)

    return _measured(noise_and_signal, whole, part, weights)


def _measured(
    noise_and_signal: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    gradients: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None,
) -> Tensor:
    """Sums over all values of what is made of a gradient and another one, ``[4]`` as of :func:`measure_pair`."""
    terms = []
    for some in batches(gradients):
        for one, other, weight in pieces(joined(some), joined(some, others), _joined_weights(some, weights)):
            noise, signal = noise_and_signal(one.float(), other.float())
            terms.append(sums(noise, signal, weight * noise, weight * signal))
    return total(terms) if terms else torch.full((4,), math.nan, dtype=torch.float64)


def _joined_weights(batch: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None) -> Tensor:
    if weights is None:
        first = next(iter(batch.values()))
        return torch.full((), math.nan, device=first.device).expand(sum(tensor.numel() for tensor in batch.values()))
    return joined(batch, weights)
