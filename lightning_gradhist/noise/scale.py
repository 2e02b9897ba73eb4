"""Gradient noise: how many samples a batch needs before its gradient is more signal than noise."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.noise.interval import NoiseEstimate, ratio_estimate
from lightning_gradhist.noise.step import adam_weight
from lightning_gradhist.tensors import sums, total


class GradientMoments:
    """Streaming mean and variance of gradients, coordinate by coordinate (Welford; merged as Chan et al. 1983).

    Args:
        like: names and tensors whose shapes and devices the gradients have. Kept in float32, or float64 for float64.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.count = 0
        self.weight = 0.0
        """The sum of the gradients' weights."""
        self.mean = {name: _accumulator(tensor) for name, tensor in like.items()}
        self.sum_of_squares = {name: _accumulator(tensor) for name, tensor in like.items()}

    def update(self, gradients: Mapping[str, Tensor | None], weight: float = 1.0) -> None:
        """Adds one gradient; a parameter that is missing or None has gradient zero.

        Args:
            gradients: names and gradients.
            weight: its samples as a multiple of those of a gradient that mean and variance are told for. The variance of
                this one is by so much smaller.
        """
        before = self.weight
        self.count += 1
        self.weight += weight
        for name, mean in self.mean.items():
            deviation = _deviation(gradients.get(name), mean)
            mean.add_(deviation, alpha=weight / self.weight)
            self.sum_of_squares[name].addcmul_(deviation, deviation, value=weight * before / self.weight)

    def merge(self, other: GradientMoments) -> None:
        """Adds the gradients that another instance has seen."""
        total = self.weight + other.weight
        if total == 0:
            return
        for name, mean in self.mean.items():
            difference = other.mean[name] - mean
            weight = self.weight * other.weight / total
            self.sum_of_squares[name].add_(other.sum_of_squares[name]).addcmul_(difference, difference, value=weight)
            mean.add_(difference, alpha=other.weight / total)
        self.count, self.weight = self.count + other.count, total

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

        The square of the measured mean is larger than :math:`\mu^2` by :math:`\sigma^2 / W`, with ``W`` the sum of the
        weights, which is taken off. Of the names in ``centered`` it is the variance :math:`\sigma^2 / k`.
        """
        variance = self.variance()
        return {
            name: variance[name] / batch_ratio
            if name in centered
            else mean.square().sub_(variance[name] / self.weight).clamp_(min=0).add_(variance[name] / batch_ratio)
            for name, mean in self.mean.items()
        }


class NoiseScale:
    r"""Noise scale of a gradient at fixed weights, from independent gradients in two halves.

    For gradients of ``batch_size`` samples with mean :math:`\mu` and variance :math:`\sigma_b^2` (coordinate by
    coordinate) and weights :math:`w`, the noise scale in samples is

    .. math:: B = b \, \sum_i w_i \sigma_{b,i}^2 / \sum_i w_i \mu_i^2,

    with :math:`w = 1` for ``B_simple`` (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.9) and :math:`w = 1 / (\sqrt{v} +
    \epsilon)` for ``B_adam``, the metric in which Adam steps. The square of one measured mean counts noise as signal.
    So the first half of the gradients gives mean, variance and :math:`v`; then each gradient ``g`` of the second half
    gives one independent measurement of the signal, ``sum(w * mean * g)``, and one of the noise,
    ``sum(w * (g - mean)**2) / (b/m + 1/W)``. Here ``m`` is the number of its samples, and ``W`` that of the first half as a
    multiple of ``b``, since :math:`E(g - mean)^2 = \sigma_b^2 (b/m + 1/W)` where ``mean`` weighs each gradient by its
    samples. As ``w`` is smaller where the measured mean is larger, ``w * mean`` comes out
    too small; Stein's lemma says by how much, and that is added. The interval is Fieller's for the ratio of the averages;
    the error of the first half is bounded by that of the second. It is the interval of ``B_adam`` in the metric that the
    first half gave, which differs from the metric of the exact :math:`v` by a few percent.

    Args:
        like: names and tensors whose shapes and devices the gradients have, such as the parameters.
        batch_size: samples ``b`` of a gradient, unless :meth:`update` says another number.

    Memory: two tensors a parameter for the first half, four from :meth:`split` on.

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
        if not batch_size > 0:
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
        """Adds one gradient: to the first half, or after :meth:`split` to the second.

        Args:
            gradients: names and gradients; a parameter that is missing or None has gradient zero.
            samples: of this gradient, where they are others than ``batch_size``.
        """
        weight = 1.0 if samples is None else samples / self.batch_size
        if self._weights is None:
            self.first_half.update(gradients, weight)
            return
        terms = []
        for name, mean in self.first_half.mean.items():
            deviation = _deviation(gradients.get(name), mean)
            gradient, squares = deviation + mean, deviation.square()
            terms.append(
                sums(squares, mean * gradient, self._weights[name] * squares, self._references[name] * gradient)
            )
        inflation = 1 / weight + 1 / self.first_half.weight  # the deviation is from a measured mean
        self._measurements.append((total(terms), inflation))

    def split(self, eps: float, batch_ratio: float = 1.0, centered: Collection[str] = ()) -> None:
        """Ends the first half, and fixes the metric of ``B_adam`` from it.

        Args:
            eps: Adam's epsilon, in units of the gradient.
            batch_ratio: samples of an optimizer step as a multiple of ``batch_size``, which is what ``v`` is of.
            centered: names of the parameters whose ``v`` is the variance, as a centered RMSprop has it.

        Raises:
            RuntimeError: if the first half has fewer than two gradients, or was ended before.
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

    def merge(self, other: NoiseScale) -> None:
        """Adds what another instance with the same ``batch_size`` has seen.

        Both must be in the same half. In the second each keeps being measured against its own first half, which is as
        unbiased as against a common one.
        """
        if (self._weights is None) != (other._weights is None) or self.batch_size != other.batch_size:
            raise ValueError("other must have the same batch_size and be in the same half to be merged")
        self.first_half.merge(other.first_half)
        self._measurements += other._measurements

    def all_reduce(self, group: Any = None) -> None:
        """Merges over all ranks; to be called on every rank, at the end of each half.

        Called before :meth:`split`, the second half is measured against the first half of all ranks.
        """
        if self._weights is None:
            self.first_half.all_reduce(group)
            return
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(
            gathered, [(m.cpu(), inflation) for m, inflation in self._measurements], group=group
        )
        self._measurements = [measurement for of_rank in gathered for measurement in of_rank]

    def all_reduce_shards(self, group: Any = None) -> None:
        """As :meth:`all_reduce`, for ranks that each hold another part of every gradient: one all-reduce of the sums.

        The first half needs nothing of the other ranks. Every rank has seen the same gradients.
        """
        if self._measurements:
            sums = torch.stack([measurement for measurement, _ in self._measurements])
            torch.distributed.all_reduce(sums, group=group)
            inflations = [inflation for _, inflation in self._measurements]
            self._measurements = list(zip(sums.unbind(), inflations, strict=True))

    def simple(self, confidence: float = 0.95) -> NoiseEstimate:
        """``B_simple``, in samples, with its interval."""
        return self._estimate(0, confidence)

    def adam(self, confidence: float = 0.95) -> NoiseEstimate:
        """``B_adam``, in samples, with its interval."""
        return self._estimate(2, confidence)

    def _estimate(self, column: int, confidence: float) -> NoiseEstimate:
        measured = [(m.tolist(), inflation) for m, inflation in self._measurements]
        noise = [numbers[column] / inflation for numbers, inflation in measured]
        signal = [numbers[column + 1] for numbers, _ in measured]
        return ratio_estimate(
            noise, signal, scale=self.batch_size, confidence=confidence, references=self.first_half.weight
        )


def _all_reduced(tensors: Mapping[str, Tensor], group: Any) -> dict[str, Tensor]:
    # One collective for each dtype, however many tensors there are.
    summed: dict[str, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors.values()}:
        of_dtype = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        flat = torch.cat([tensor.reshape(-1) for tensor in of_dtype.values()])
        torch.distributed.all_reduce(flat, group=group)
        parts = flat.split([tensor.numel() for tensor in of_dtype.values()])
        summed |= {n: part.view(of_dtype[n].shape) for n, part in zip(of_dtype, parts, strict=True)}
    return {name: summed[name] for name in tensors}


def _accumulator(tensor: Tensor) -> Tensor:
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return torch.zeros_like(tensor, dtype=dtype, requires_grad=False)


def _deviation(gradient: Tensor | None, mean: Tensor) -> Tensor:
    return -mean if gradient is None else gradient.detach().to(mean.dtype) - mean


def _unbiased_reference(mean: Tensor, variance: Tensor, second_moment: Tensor, eps: float) -> Tensor:
    """``w * mean - variance * dw/dmean``, whose expectation is ``E[w] * E[mean]`` (Stein's lemma for a normal mean).

    Args:
        mean: measured mean.
        variance: of the measured mean.
        second_moment: as :meth:`GradientMoments.second_moment` makes it of the two: it moves with ``mean**2`` above
            ``variance``, and not below.
        eps: Adam's epsilon.
    """
    weight = adam_weight(second_moment, eps)
    # dw/dmean = -weight**2 * mean / sqrt(v), factored so that nothing leaves the range of float32
    slope = torch.where(mean.square() > variance, weight * (mean / second_moment.sqrt()), 0)
    return weight * (mean + variance * slope)
