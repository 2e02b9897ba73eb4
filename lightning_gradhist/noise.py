"""Gradient noise: how many samples a batch needs before its gradient is more signal than noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_gradhist.intervals import NoiseEstimate, average, ratio_estimate

METRICS = ("simple", "adam")
_MAX_WINDOWS = 8
_MIN_WINDOW = 8
_WAITING = 64  # bounds what a record holds of the device
_BATCH = 2**17  # of float32, which stay in a core's cache


class GradientMoments:
    """Streaming mean and variance of gradients, coordinate by coordinate (Welford; merged as Chan et al. 1983).

    Args:
        like: names and tensors whose shapes and devices the gradients have. Kept in float32, or float64 for float64.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.count = 0
        self.mean = {name: _accumulator(tensor) for name, tensor in like.items()}
        self.sum_of_squares = {name: _accumulator(tensor) for name, tensor in like.items()}

    def update(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Adds one gradient; a parameter that is missing or None has gradient zero."""
        self.count += 1
        for name, mean in self.mean.items():
            deviation = _deviation(gradients.get(name), mean)
            mean.add_(deviation, alpha=1 / self.count)
            self.sum_of_squares[name].addcmul_(deviation, deviation, value=(self.count - 1) / self.count)

    def merge(self, other: GradientMoments) -> None:
        """Adds the gradients that another instance has seen."""
        total = self.count + other.count
        if total == 0:
            return
        for name, mean in self.mean.items():
            difference = other.mean[name] - mean
            weight = self.count * other.count / total
            self.sum_of_squares[name].add_(other.sum_of_squares[name]).addcmul_(difference, difference, value=weight)
            mean.add_(difference, alpha=other.count / total)
        self.count = total

    def all_reduce(self, group: Any = None) -> None:
        """Merges the instances of all ranks; to be called on every rank, which then hold the same."""
        device = next(iter(self.mean.values())).device
        count = torch.tensor(self.count, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(count, group=group)
        total = int(count)
        share = self.count / max(total, 1)
        pooled = _all_reduced({name: mean * share for name, mean in self.mean.items()}, group)
        for name, mean in self.mean.items():
            difference = mean - pooled[name]
            self.sum_of_squares[name].addcmul_(difference, difference, value=self.count)
        self.mean, self.sum_of_squares, self.count = pooled, _all_reduced(self.sum_of_squares, group), total

    def variance(self) -> dict[str, Tensor]:
        """Unbiased variance of one gradient; needs two."""
        return {name: squares / (self.count - 1) for name, squares in self.sum_of_squares.items()}

    def second_moment(self, batch_ratio: float = 1.0) -> dict[str, Tensor]:
        r"""Expected squared gradient :math:`\mu^2 + \sigma^2 / k` of a batch ``k = batch_ratio`` times as large.

        The square of the measured mean is larger than :math:`\mu^2` by :math:`\sigma^2 / n`, which is taken off.
        """
        variance = self.variance()
        return {
            name: mean.square().sub_(variance[name] / self.count).clamp_(min=0).add_(variance[name] / batch_ratio)
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
    ``sum(w * (g - mean)**2) / (1 + 1/n)``. As ``w`` is smaller where the measured mean is larger, ``w * mean`` comes out
    too small; Stein's lemma says by how much, and that is added. The interval is Fieller's for the ratio of the averages;
    the error of the first half is bounded by that of the second. It is the interval of ``B_adam`` in the metric that the
    first half gave, which differs from the metric of the exact :math:`v` by a few percent.

    Args:
        like: names and tensors whose shapes and devices the gradients have, such as the parameters.
        batch_size: number of samples of each gradient, in samples.

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

    def update(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Adds one gradient: to the first half, or after :meth:`split` to the second.

        Args:
            gradients: names and gradients; a parameter that is missing or None has gradient zero.
        """
        if self._weights is None:
            self.first_half.update(gradients)
            return
        terms = []
        for name, mean in self.first_half.mean.items():
            deviation = _deviation(gradients.get(name), mean)
            gradient, squares = deviation + mean, deviation.square()
            terms.append(
                _sums(squares, mean * gradient, self._weights[name] * squares, self._references[name] * gradient)
            )
        inflation = 1 + 1 / self.first_half.count  # the deviation is from a measured mean
        self._measurements.append((_total(terms), inflation))

    def split(self, eps: float, batch_ratio: float = 1.0) -> None:
        """Ends the first half, and fixes the metric of ``B_adam`` from it.

        Args:
            eps: Adam's epsilon, in units of the gradient.
            batch_ratio: samples of an optimizer step as a multiple of ``batch_size``, which is what ``v`` is of.

        Raises:
            RuntimeError: if the first half has fewer than two gradients, or was ended before.
        """
        if self._weights is not None:
            raise RuntimeError("split() ends the first half and can be called once")
        if self.first_half.count < 2:
            raise RuntimeError(f"the first half needs two gradients for a variance, got {self.first_half.count}")
        second_moment, variance = self.first_half.second_moment(batch_ratio), self.first_half.variance()
        self._weights = {name: adam_weight(v, eps) for name, v in second_moment.items()}
        self._references = {
            name: _unbiased_reference(mean, variance[name] / self.first_half.count, second_moment[name], eps)
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
            noise, signal, scale=self.batch_size, confidence=confidence, references=self.first_half.count
        )


class NoiseRecord:
    """Noise scale over a run, at no extra backward pass.

    Within a step, a gradient ``g`` and the mean ``p`` over one of its ``n`` parts (a micro-batch, a rank) give the noise
    ``sum(w * (p - g)**2) / (n - 1)`` and the signal ``sum(w * g**2)`` less that noise, both without bias
    (:func:`measure_part`).

    Else, gradients of successive steps give the signal ``sum(w * g1 * g2)`` and the noise ``sum(w * (g1 - g2)**2) / 2``
    (:func:`measure_pair`). Their bias: the weights of the second gradient are one step further, which the first gradient
    took part in (by ``1 - beta1`` of its length under momentum), so that the signal comes out a little small and the
    noise scale a little large.

    Args:
        samples: plain numbers, in the order of the steps, as :attr:`samples` gives them.
        most: beyond this number of samples, neighbours are averaged, so that a record does not grow for ever.
    """

    def __init__(self, samples: Sequence[Mapping[str, Any]] = (), most: int = 4096) -> None:
        self._samples: list[dict[str, Any]] = [dict(sample) for sample in samples]
        self._waiting: list[tuple[int, float, Tensor]] = []
        self._most = most

    def __len__(self) -> int:
        return len(self._samples) + len(self._waiting)

    def add(self, step: int, batch_size: float, measurement: Tensor) -> None:
        """Adds one measurement, without waiting for the device that makes it; every 64th waits for those before it.

        Args:
            step: optimizer step of the gradient, of a pair that of the first.
            batch_size: samples of the gradient.
            measurement: of :func:`measure_part` or :func:`measure_pair`; what is not finite is recorded as None.
        """
        if len(self._waiting) == _WAITING:
            self._take_down()
        self._waiting.append((step, batch_size, measurement))

    @property
    def samples(self) -> list[dict[str, Any]]:
        """What was measured, as numbers: ``step``, ``batch_size``, and noise and signal in each metric."""
        self._take_down()
        return self._samples

    def _take_down(self) -> None:
        for step, batch_size, measurement in self._waiting:
            numbers = [number if math.isfinite(number) else None for number in measurement.tolist()]
            keys = [f"{kind}_{metric}" for metric in METRICS for kind in ("noise", "signal")]
            self._samples.append({"step": step, "batch_size": batch_size, **dict(zip(keys, numbers, strict=True))})
        self._waiting.clear()
        while len(self._samples) > self._most:
            self._samples = [_average_sample(pair) for pair in _cut(self._samples, -(-len(self._samples) // 2))]

    def estimate(self, metric: str = "adam", confidence: float = 0.95) -> NoiseEstimate:
        """The noise scale averaged over the run, in samples.

        It grows during a run, so the run is cut into windows of equal length, each gives a ratio with Fieller's
        interval, and the ratios are averaged, errors in quadrature. There are as many windows, up to eight, as leave
        every interval bounded.

        Args:
            metric: ``"simple"`` or ``"adam"``.
            confidence: of the interval.
        """
        samples = self._known(metric)
        for number in range(max(1, min(_MAX_WINDOWS, len(samples) // _MIN_WINDOW)), 0, -1):
            windows = [_of_window(window, metric, confidence) for window in _cut(samples, number)]
            if all(math.isfinite(window.upper) for window in windows):
                return _average(windows)
        return windows[0]

    def recent(self, metric: str = "adam", confidence: float = 0.95) -> NoiseEstimate:
        """The noise scale of late, in samples: over the last quarter of the measurements, and at least the last eight.

        Args:
            metric: ``"simple"`` or ``"adam"``.
            confidence: of the interval, which has no bound while there are fewer than eight measurements.
        """
        known = self._known(metric)
        window = _of_window(known[-max(_MIN_WINDOW, len(known) // 4) :], metric, confidence)
        return window if window.measurements >= _MIN_WINDOW else replace(window, lower=0.0, upper=math.inf)

    def _known(self, metric: str) -> list[dict[str, Any]]:
        if metric not in METRICS:
            raise ValueError(f"metric must be one of {METRICS}, got {metric!r}")
        return [s for s in self.samples if None not in (s[f"noise_{metric}"], s[f"signal_{metric}"])]


def _average_sample(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    averaged: dict[str, Any] = {"step": samples[0]["step"]}
    for key in samples[0].keys() - {"step"}:
        known = [sample[key] for sample in samples if sample[key] is not None]
        averaged[key] = average(known) if known else None
    return {key: averaged[key] for key in samples[0]}


def _of_window(samples: Sequence[Mapping[str, Any]], metric: str, confidence: float) -> NoiseEstimate:
    # Times the batch size sample by sample, so that a batch size that changes in mid-run does no harm.
    noise = [sample[f"noise_{metric}"] * sample["batch_size"] for sample in samples]
    signal = [sample[f"signal_{metric}"] for sample in samples]
    return ratio_estimate(noise, signal, scale=1.0, confidence=confidence)


def _average(windows: Sequence[NoiseEstimate]) -> NoiseEstimate:
    value = average([window.value for window in windows])
    below = math.hypot(*(window.value - window.lower for window in windows)) / len(windows)
    above = math.hypot(*(window.upper - window.value for window in windows)) / len(windows)
    measurements = sum(window.measurements for window in windows)
    return NoiseEstimate(value, max(value - below, 0.0), value + above, windows[0].confidence, measurements)


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
        for one, other, weight in _pieces(joined(some), joined(some, others), _joined_weights(some, weights)):
            noise, signal = noise_and_signal(one.float(), other.float())
            terms.append(_sums(noise, signal, weight * noise, weight * signal))
    return _total(terms) if terms else torch.full((4,), math.nan, dtype=torch.float64)


def batches(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors of one dtype and device at a time, as many as have 131,072 values in all, or one that has more."""
    filling: dict[Any, tuple[dict[str, Tensor], int]] = {}
    for name, tensor in tensors.items():
        kind = tensor.dtype, tensor.device
        batch, size = filling.get(kind, ({}, 0))
        if batch and size + tensor.numel() > _BATCH:
            yield batch
            batch, size = {}, 0
        batch[name] = tensor
        filling[kind] = batch, size + tensor.numel()
    yield from (batch for batch, _ in filling.values())


def joined(batch: Mapping[str, Tensor], tensors: Mapping[str, Tensor] | None = None) -> Tensor:
    """The tensors of a batch one after another, ``[values]``, or others of the same names; zeros where one is missing.

    To compute something of 100 small tensors takes hardly longer than of one, if they lie side by side.
    """
    parts = (
        batch if tensors is None else {n: tensors[n] if n in tensors else torch.zeros_like(g) for n, g in batch.items()}
    )
    flat = [tensor.reshape(-1) for tensor in parts.values()]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of tensors, those of small ones side by side."""
    return _by_batch(lambda batch: joined(batch) if len(batch) > 1 else joined(batch).clone(), tensors)


def elementwise(function: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A function of each value; it must return new tensors, of the shape that it gets."""
    return _by_batch(lambda batch: _in_pieces(function, joined(batch)), tensors)


def _by_batch(make: Callable[[Mapping[str, Tensor]], Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is made of the values of each batch, ``[values]``, in the shapes of its tensors."""
    found: dict[str, Tensor] = {}
    for batch in batches(tensors):
        parts = make(batch).split([tensor.numel() for tensor in batch.values()])
        found |= {name: part.view(batch[name].shape) for name, part in zip(batch, parts, strict=True)}
    return found


def _in_pieces(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    (first,), *others = _pieces(values)
    made = function(first)
    if not others:
        return made
    found = torch.empty(values.shape, dtype=made.dtype, device=made.device)
    into, *rest = found.split(_BATCH)
    into.copy_(made)
    for (piece,), into in zip(others, rest, strict=True):
        into.copy_(function(piece))
    return found


def _pieces(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors ``[n]`` side by side, on a CPU in pieces that stay in a core's cache with what is computed of them."""
    if values[0].device.type != "cpu" or values[0].numel() <= _BATCH:
        return iter([values])
    return zip(*(tensor.split(_BATCH) for tensor in values), strict=True)


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


def _joined_weights(batch: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None) -> Tensor:
    if weights is None:
        first = next(iter(batch.values()))
        return torch.full((), math.nan, device=first.device).expand(sum(tensor.numel() for tensor in batch.values()))
    return joined(batch, weights)


def _sums(*tensors: Tensor) -> Tensor:
    return torch.stack([tensor.sum() for tensor in tensors])


def _total(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([term.to(terms[0].device, torch.float64) for term in terms]).sum(0)


def _cut(samples: Sequence[Any], number: int) -> list[Sequence[Any]]:
    cuts = [i * len(samples) // number for i in range(number + 1)]
    return [samples[low:high] for low, high in zip(cuts[:-1], cuts[1:], strict=True)]
