"""Gradient noise: how many samples a batch needs before its gradient is more signal than noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.explore import is_number
from lightning_gradhist.noise.interval import NoiseEstimate, ratio_estimate
from lightning_gradhist.noise.step import adam_weight
from lightning_gradhist.tensors import apart, batches, joined, total, wide


class GradientMoments:
    """Streaming mean and variance of gradients, coordinate by coordinate (Welford; over ranks as Chan et al. 1983).

    In float32, or float64 for float64; ``like`` are names and tensors whose shapes and devices the gradients have.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.count, self.weight = 0, 0.0  # of the gradients, the sum of their weights
        self.mean = {name: _accumulator(tensor) for name, tensor in like.items()}
        self.sum_of_squares = {name: _accumulator(tensor) for name, tensor in like.items()}
        self._batches = [list(batch) for batch in batches(self.mean)]  # small ones go together, which takes less time

    def update(self, gradients: Mapping[str, Tensor | None], weight: float = 1.0) -> None:
        """Adds one gradient; a parameter that is missing or None has gradient zero.

        ``weight`` is its samples as a multiple of those of a gradient that mean and variance are told for.
        """
        before, self.count, self.weight = self.weight, self.count + 1, self.weight + weight
        for names in self._batches:
            means, squares = [self.mean[name] for name in names], [self.sum_of_squares[name] for name in names]
            deviations = [_deviation(gradients.get(name), mean) for name, mean in zip(names, means, strict=True)]
            torch._foreach_add_(means, deviations, alpha=weight / self.weight)
            torch._foreach_addcmul_(squares, deviations, deviations, value=weight * before / self.weight)

    def all_reduce(self, group: Any = None) -> None:
        """Merges the instances of all ranks; to be called on every rank, which then hold the same."""
        device = next(iter(self.mean.values())).device
        totals = torch.tensor([self.count, self.weight], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(totals, group=group)
        count, weight = totals.tolist()
        share = self.weight / max(weight, 1e-300)
        pooled = _all_reduced({name: mean * share for name, mean in self.mean.items()}, group)
        for name, mean in self.mean.items():
            difference = mean - pooled[name]
            self.sum_of_squares[name].addcmul_(difference, difference, value=self.weight)
        self.mean, self.sum_of_squares = pooled, _all_reduced(self.sum_of_squares, group)
        self.count, self.weight = int(count), weight

    def variance(self) -> dict[str, Tensor]:
        """Unbiased variance of a gradient of weight 1; needs two gradients."""
        return {name: squares / (self.count - 1) for name, squares in self.sum_of_squares.items()}

    def second_moment(self, batch_ratio: float = 1.0, centered: Collection[str] = ()) -> dict[str, Tensor]:
        r"""Expected squared gradient :math:`\mu^2 + \sigma^2 / k` of a batch ``k = batch_ratio`` times as large.

        Of the names in ``centered`` it is the variance :math:`\sigma^2 / k`.
        """
        moments = {}
        for name, variance in self.variance().items():
            moments[name] = variance / batch_ratio
            if name not in centered:  # the square of the measured mean is too large by its variance
                moments[name] += self.mean[name].square().sub_(variance / self.weight).clamp_(min=0)
        return moments


class NoiseScale:
    r"""Noise scale of a gradient at fixed weights, from independent gradients in two halves.

    For gradients of ``batch_size`` samples with mean :math:`\mu` and variance :math:`\sigma_b^2` (coordinate by
    coordinate) and weights :math:`w`, the noise scale in samples is

    .. math:: B = b \, \sum_i w_i \sigma_{b,i}^2 / \sum_i w_i \mu_i^2,

    with :math:`w = 1` for ``B_simple`` (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.9) and :math:`w = 1 / (\sqrt{v} +
    \epsilon)` for ``B_adam``, the metric in which Adam steps. The first half of the gradients gives mean, variance and
    :math:`v`. Each gradient ``g`` of the second half, of ``m`` samples, then measures the signal, ``sum(w * mean * g)``, and
    the noise, ``sum(w * (g - mean)**2) / (b/m + 1/W)``, where ``W`` is the number of samples of the first half as a multiple
    of ``b``. What ``w * mean`` has too little, as ``w`` falls with the measured mean, is added by Stein's lemma.

    The interval is Fieller's for the ratio of the averages. That of ``B_adam`` is in the metric that the first half gave,
    which differs from that of the exact :math:`v` by a few percent. Memory: two tensors a parameter for the first half,
    four from :meth:`split` on.

    Args:
        like: names and tensors whose shapes and devices the gradients have, such as the parameters.
        batch_size: samples ``b`` of a gradient, unless :meth:`update` says another number.

    Raises:
        ValueError: for a batch size that is not positive.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> noise = NoiseScale({"weight": torch.zeros(4000)}, batch_size=8)
        >>> for _ in range(16):
        ...     noise.update({"weight": 1 + 2 * torch.randn(4000, generator=generator)})
        >>> noise.split(eps=1e-8)
        >>> for _ in range(16):
        ...     noise.update({"weight": 1 + 2 * torch.randn(4000, generator=generator)})
        >>> estimate = noise.simple()  # sigma^2 = 4, mu^2 = 1, 8 samples a gradient: 32
        >>> estimate.lower < 32 < estimate.upper, round(estimate.value)
        (True, 32)
    """

    def __init__(self, like: Mapping[str, Tensor], batch_size: float) -> None:
        if not (is_number(batch_size) and batch_size > 0):
            raise ValueError(f"batch_size must be a positive number of samples, got {batch_size!r}")
        self.batch_size = batch_size
        self.first_half = GradientMoments(like)
        self._weights: dict[str, Tensor] | None = None
        self._references: dict[str, Tensor] = {}  # what a gradient is multiplied by for the signal of B_adam
        # of the second half: noise and signal in each metric, [4] float64, and the factor by which noise is too large
        self._measurements: list[tuple[Tensor, float]] = []

    @property
    def measurements(self) -> int:
        """Number of gradients in the second half."""
        return len(self._measurements)

    def update(self, gradients: Mapping[str, Tensor | None], samples: float | None = None) -> None:
        """Adds one gradient, of ``batch_size`` samples or another number: to the first half, or after :meth:`split` the second.

        A parameter that is missing or None has gradient zero.
        """
        weight = 1.0 if samples is None else samples / self.batch_size
        if self._weights is None:
            self.first_half.update(gradients, weight)
            return
        terms = []
        for batch in batches(self.first_half.mean):
            mean = joined(batch)
            there = {name: gradients.get(name) for name in batch}
            gradient = joined(batch, {name: g.detach().to(mean.dtype) for name, g in there.items() if g is not None})
            squares = (gradient - mean).square_()
            weight_of, reference = joined(batch, self._weights), joined(batch, self._references)
            products = (squares, mean * gradient, weight_of * squares, reference * gradient)
            terms.append(torch.stack([product.sum() for product in products]))
        inflation = 1 / weight + 1 / self.first_half.weight  # the deviation is from a measured mean
        self._measurements.append((total(terms), inflation))

    def split(self, eps: float, batch_ratio: float = 1.0, centered: Collection[str] = ()) -> None:
        """Ends the first half of two gradients or more, and fixes the metric of ``B_adam`` from it.

        Args:
            eps: Adam's epsilon, in units of the gradient.
            batch_ratio: samples of an optimizer step as a multiple of ``batch_size``, which is what ``v`` is of.
            centered: names of the parameters whose ``v`` is the variance, as a centered RMSprop has it.
        """
        if self._weights is not None:
            raise RuntimeError("split() ends the first half and can be called once")
        if self.first_half.count < 2:
            raise RuntimeError(f"the first half needs two gradients for a variance, got {self.first_half.count}")
        second_moment, variance = self.first_half.second_moment(batch_ratio, centered), self.first_half.variance()
        self._weights = {name: adam_weight(v, eps) for name, v in second_moment.items()}
        self._references = {
            name: mean * self._weights[name]  # which does not depend on the mean
            if name in centered
            else _unbiased_reference(mean, variance[name] / self.first_half.weight, second_moment[name], eps)
            for name, mean in self.first_half.mean.items()
        }

    def all_reduce(self, group: Any = None) -> None:
        """Merges over all ranks, at the end of each half; to be called on every rank."""
        if self._weights is None:
            self.first_half.all_reduce(group)
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        own = [(numbers.cpu(), inflation) for numbers, inflation in self._measurements]
        torch.distributed.all_gather_object(gathered, own, group=group)
        self._measurements = [measurement for of_rank in gathered for measurement in of_rank]

    def all_reduce_shards(self, group: Any = None, device: torch.device | None = None) -> None:
        """As :meth:`all_reduce`, for ranks that each hold another part of every gradient: one all-reduce of the sums.

        The first half needs nothing of the other ranks. ``device`` is what they communicate on, if not that of the gradients.
        """
        if self._measurements:
            measured, inflations = zip(*self._measurements, strict=True)
            summed = torch.stack(measured).to(device)
            torch.distributed.all_reduce(summed, group=group)
            self._measurements = list(zip(summed.unbind(), inflations, strict=True))

    def simple(self, confidence: float = 0.95) -> NoiseEstimate:
        """``B_simple``, in samples, with its interval."""
        return self._estimate(0, confidence)

    def adam(self, confidence: float = 0.95) -> NoiseEstimate:
        """``B_adam``, in samples, with its interval."""
        return self._estimate(2, confidence)

    def _estimate(self, column: int, confidence: float) -> NoiseEstimate:
        noise = [float(numbers[column]) / inflation for numbers, inflation in self._measurements]
        signal = [float(numbers[column + 1]) for numbers, _ in self._measurements]
        references = self.first_half.weight
        return ratio_estimate(noise, signal, scale=self.batch_size, confidence=confidence, references=references)


def _all_reduced(tensors: Mapping[str, Tensor], group: Any) -> dict[str, Tensor]:
    """Sums over ranks, in one collective for each dtype, however many tensors there are."""
    summed: dict[str, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        of_dtype = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        flat = torch.cat([tensor.reshape(-1) for tensor in of_dtype.values()])
        torch.distributed.all_reduce(flat, group=group)
        summed |= apart(flat, of_dtype)
    return {name: summed[name] for name in tensors}


def _accumulator(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor, dtype=wide(tensor), requires_grad=False)


def _deviation(gradient: Tensor | None, mean: Tensor) -> Tensor:
    return -mean if gradient is None else gradient.detach().to(mean.dtype) - mean


def _unbiased_reference(mean: Tensor, variance: Tensor, second_moment: Tensor, eps: float) -> Tensor:
    """``w * mean - variance * dw/dmean``, whose expectation is ``E[w] * E[mean]`` (Stein's lemma for a normal mean)."""
    weight = adam_weight(second_moment, eps)
    # The second moment moves with mean**2 above the variance of the mean, and not below. There dw/dmean is
    # -weight**2 * mean / sqrt(v), factored so that nothing leaves the range of float32.
    slope = torch.where(mean.square() > variance, weight * (mean / second_moment.sqrt()), 0)
    return weight * (mean + variance * slope)
