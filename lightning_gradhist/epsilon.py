"""Where Adam's epsilon matters, and the second moment that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_gradhist.explore import AUTO, is_number, resolve_explore
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.tensors import widened

IDLE_SHARE = 0.02  # the share of coordinates that an epsilon may damp and still count as idle
HALF_PRECISION_EPSILON = 1e-7  # the smallest power of ten that float16 can hold, whose smallest positive number is 6e-8
FAMILIES = ("adam", "rmsprop", "adabelief", "adamomentum", "adame", "alto")  # the optimizers of the paper, and ours


@dataclass(frozen=True)
class EpsilonRange:
    r"""The search spaces of epsilon, in the units of the gradient, as :func:`epsilon_range` finds them.

    A bias before a normalization, whose gradient is rounding noise, widens the authors' by decades, and the pooled one only
    where such coordinates are more than 2% of all.

    Attributes:
        lower: of the authors', a power of ten. Below it an epsilon is idle in every tensor, up to the rounding.
        upper: of the authors', a power of ten. Above it Adam is momentum SGD with step ``lr / eps``.
        pooled_lower: of the pooled one, a power of ten.
        pooled_upper: of the pooled one, a power of ten.
        lower_unrounded: smallest of the tensors' lower quantiles.
        upper_unrounded: largest of the tensors' upper quantiles.
        per_name: lower and upper quantile of each tensor that has a value other than zero.
        zero_share: share of the coordinates that are exactly zero; they are left out of everything else.
    """

    lower: float
    upper: float
    pooled_lower: float
    pooled_upper: float
    lower_unrounded: float
    upper_unrounded: float
    per_name: dict[str, tuple[float, float]]
    zero_share: float
    histogram: MagnitudeHistogram = field(repr=False, compare=False)

    def damped_share(self, eps: float) -> float:
        r"""Share of the coordinates with :math:`\sqrt{\hat v} < \epsilon`, whose step is less than half of Adam's.

        Of all that are not zero, from 0 to 1 and exact to one bin; ``eps`` is a positive number.
        """
        return float(self.histogram.pooled().share_below(eps)[0])


def epsilon_range(
    rms: Mapping[str, Tensor] | MagnitudeHistogram, lower: float = IDLE_SHARE, upper: float = 1 - IDLE_SHARE
) -> EpsilonRange:
    r"""Finds where epsilon matters: between two quantiles of :math:`r = \sqrt{\hat v}`.

    Epsilon multiplies a coordinate's step by :math:`r / (r + \epsilon)`. Per tensor, zeros are dropped and ``r`` is sorted
    ascending; the ends are ``r[int(lower * n)]`` and ``r[int(upper * n)]``. The authors' search space goes from the
    smallest lower end to the largest upper end over all tensors, each rounded to ``10 ** round(log10(.))``. The pooled
    one, which is narrower, goes between the same quantiles of all coordinates together, rounded alike.

    Source: Silva and Rodriguez, "Fine-tuning adaptive stochastic optimizers: determining the optimal hyperparameter
    epsilon via gradient magnitude histogram analysis", Neural Computing and Applications 2024 (arXiv 2311.11532).

    Args:
        rms: names and tensors of :math:`\sqrt{\hat v}`, any shapes; or a histogram of them, exact to one bin.
        lower: quantile of the lower end, in [0, 1]; 0.02 by default.
        upper: quantile of the upper end, in [0, 1], not below ``lower``; 0.98 by default.

    Raises:
        ValueError: for quantiles out of range, for non-finite values, and where every value is zero.

    Example:
        >>> import torch
        >>> found = epsilon_range({"weight": torch.logspace(-6, -2, 1001), "bias": torch.zeros(8)})
        >>> found.lower, found.upper
        (1e-06, 0.01)
        >>> round(found.damped_share(1e-4), 2)
        0.5
    """
    if not 0.0 <= lower <= upper <= 1.0:
        raise ValueError(f"lower and upper must satisfy 0 <= lower <= upper <= 1, got {lower!r} and {upper!r}")
    if isinstance(rms, MagnitudeHistogram):
        histogram = MagnitudeHistogram.from_table(rms.names, rms.table.clone())
        ends = zip(rms.quantile(lower).tolist(), rms.quantile(upper).tolist(), strict=True)
        per_name = {name: pair for name, pair in zip(rms.names, ends, strict=True) if not math.isnan(pair[0])}
        pooled = tuple(float(rms.quantile(q, pooled=True)) for q in (lower, upper))
    else:
        histogram = MagnitudeHistogram(list(rms))
        histogram.update(rms)
        per_name = {name: _sorted_ends(values, lower, upper) for name, values in rms.items() if values.any()}
        if per_name:
            pooled = _sorted_ends(torch.cat([values.detach().flatten().cpu() for values in rms.values()]), lower, upper)
    if int((histogram.infs + histogram.nans).sum()):
        raise ValueError("rms must be finite; leave out the gradients that are not")
    if not per_name:
        raise ValueError("rms must hold a value other than zero; every coordinate is zero")
    lows, highs = zip(*per_name.values(), strict=True)
    low, high = min(lows), max(highs)
    return EpsilonRange(
        lower=_power_of_ten(low),
        upper=_power_of_ten(high),
        pooled_lower=_power_of_ten(pooled[0]),
        pooled_upper=_power_of_ten(pooled[1]),
        lower_unrounded=low,
        upper_unrounded=high,
        per_name=per_name,
        zero_share=int(histogram.zeros.sum()) / int(histogram.total().sum()),
        histogram=histogram,
    )


def without_rounding_noise(rms: MagnitudeHistogram, unit: float) -> MagnitudeHistogram:
    r"""A copy of a histogram in which what is zero but for rounding counts as zero.

    The gradient of a bias before a normalization, or of an attention's keys, is a sum of terms that cancel, each about as
    large as the layer's largest gradient. What was left was 0.02 to 9 units in the last place of that one in float32, 0.01
    to 2 in bfloat16. Noise is what lies below 16 of them; in 16-bit arithmetic below 1, as true gradients are not far above.
    A layer is what comes before the last dot of a name; ``unit`` is the arithmetic's ``torch.finfo(dtype).eps``.
    """
    layers = [name.rpartition(".")[0] or name for name in rms.names]
    largest: dict[str, float] = {}
    for layer, peak in zip(layers, rms.quantile(1.0).nan_to_num(0.0).tolist(), strict=True):
        largest[layer] = max(peak, largest.get(layer, 0.0))
    noise_units = (16 if unit < 1e-6 else 1) * unit
    limits = torch.tensor([noise_units * largest[layer] for layer in layers], dtype=torch.float64, device="cpu")
    noise = rms.counts * (rms.edges[1:] <= limits[:, None].to(rms.table.device))
    table = rms.table.clone()
    table[:, 1:-2] -= noise
    table[:, 0] += noise.sum(1)
    return MagnitudeHistogram.from_table(rms.names, table)


def choose_epsilon(current: float, search_space: EpsilonRange) -> float:
    """The current epsilon while it is idle, else the largest power of ten that is; so it is never raised.

    It is idle while it halves the step, or more, of at most 2% of all coordinates together.
    """
    if search_space.damped_share(current) <= IDLE_SHARE:
        return current
    highest = math.floor(math.log10(float(search_space.histogram.quantile(IDLE_SHARE, pooled=True))))
    powers = (float(f"1e{exponent}") for exponent in (highest, highest - 1))  # the first may lie in the quantile's bin
    return next(eps for eps in powers if search_space.damped_share(eps) <= IDLE_SHARE)


class SecondMoment:
    r"""What epsilon is compared with: :math:`r = \sqrt{\hat v}` of a sequence of gradients, in the form of the optimizer.

    .. math::
        g \leftarrow g + \lambda \theta, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) x_t^2, \qquad
        r = \sqrt{v_t / (1 - \beta_2^t)}

    with ``x`` by family:

    - ``"adam"``, ``"rmsprop"``: the gradient ``g``;
    - ``"adabelief"``: ``g - m``, and ``"adamomentum"``: ``m``, with :math:`m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t`;
    - ``"adame"``, ``"alto"``: ``g + alpha * a``, with :math:`a_t = (1 - b)(g_t - e_{t-1})` and
      :math:`e_t = b e_{t-1} + (1 - b) g_t`, where ``b`` is ``explore_beta``.

    With the gradients of an epoch at frozen weights, ``epsilon_range(moment.rms())`` is the search space exactly as the
    authors of the rule find it (Silva and Rodriguez 2024, arXiv 2311.11532). AdaBelief adds its epsilon inside the root: its
    search space is that of ``r ** 2``, and of ``(1 - beta2) * r ** 2`` where it adds it at every step, as its authors do.

    Args:
        family: one of those above.
        beta1: decay of ``m``, in [0, 1).
        beta2: decay of ``v``, in [0, 1).
        weight_decay: :math:`\lambda`, coupled: added to the gradient; from 0 up. Leave out a decoupled one, as AdamW's.
        alpha: of adaptor E, ``"auto"`` for its choice for small batches.
        explore_beta: of adaptor E, likewise.

    Raises:
        ValueError: for another family, and for a number out of its range.

    Memory: one tensor a parameter, two for the last four families; float32, or float64 for float64.

    Example:
        >>> import torch
        >>> from lightning_gradhist import epsilon_range
        >>> moment, generator = SecondMoment(), torch.Generator().manual_seed(0)
        >>> for _ in range(100):
        ...     moment.update({"weight": 1e-4 * torch.randn(50, 50, generator=generator)})
        >>> found = epsilon_range(moment.rms())
        >>> found.lower, found.upper  # all coordinates are alike
        (0.0001, 0.0001)
    """

    def __init__(
        self,
        family: str = "adam",
        beta1: float = 0.9,
        beta2: float = 0.999,
        weight_decay: float = 0.0,
        alpha: float | str = AUTO,
        explore_beta: float | str = AUTO,
    ) -> None:
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {FAMILIES}, got {family!r}")
        for name, decay in (("beta1", beta1), ("beta2", beta2)):
            if not (is_number(decay) and 0.0 <= decay < 1.0):
                raise ValueError(f"{name} must satisfy 0 <= {name} < 1, got {decay!r}")
        if not (is_number(weight_decay) and weight_decay >= 0.0):
            raise ValueError(f"weight_decay must be from 0 up, got {weight_decay!r}")
        self.family = family
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.alpha, self.explore_beta = resolve_explore(alpha, explore_beta)
        self._steps: dict[str, int] = {}
        self._average: dict[str, Tensor] = {}  # m, or e of adaptor E
        self._squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor] | None = None) -> None:
        """Adds the gradients of one step; ``weight_decay`` needs the parameters, else ``ValueError``.

        One that is missing or None is skipped, as optimizers do.
        """
        if self.weight_decay and parameters is None:
            raise ValueError(
                f"weight_decay={self.weight_decay!r} is added to the gradient times the parameters: pass them"
            )
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            g = widened(gradient)
            if self.weight_decay and parameters is not None:
                g = g.add(parameters[name], alpha=self.weight_decay)
            if name not in self._squares:
                self._steps[name], self._squares[name] = 0, torch.zeros_like(g)
            self._steps[name] += 1
            self._squares[name].mul_(self.beta2).add_(self._squared(name, g).square(), alpha=1 - self.beta2)

    def rms(self) -> dict[str, Tensor]:
        """``r`` by name, in the shapes of the gradients."""
        return {name: (v / (1 - self.beta2 ** self._steps[name])).sqrt() for name, v in self._squares.items()}

    def _squared(self, name: str, g: Tensor) -> Tensor:
        """What is squared, with the average it takes moved on."""
        if self.family in ("adam", "rmsprop"):
            return g
        before = self._average.setdefault(name, torch.zeros_like(g))
        if self.family in ("adame", "alto"):
            adapted = g + self.alpha * (1 - self.explore_beta) * (g - before)
            before.lerp_(g, 1 - self.explore_beta)
            return adapted
        m = before.lerp_(g, 1 - self.beta1)
        return g - m if self.family == "adabelief" else m


def _sorted_ends(values: Tensor, lower: float, upper: float) -> tuple[float, float]:
    ascending = values.detach()[values != 0].abs().sort().values
    number = ascending.numel()
    low, high = (float(ascending[min(int(q * number), number - 1)]) for q in (lower, upper))
    return low, high


def _power_of_ten(value: float) -> float:
    return float(f"1e{round(math.log10(value))}")
