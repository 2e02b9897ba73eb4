"""The second moment that adaptive optimizers divide by, as it builds up over a sequence of gradients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_gradhist.explore import AUTO, resolve_explore

FAMILIES = ("adam", "rmsprop", "adabelief", "adamomentum", "adame", "alto")


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
    authors of the rule find it (Silva and Rodriguez 2024, arXiv 2311.11532). AdaBelief adds its epsilon to ``v``, inside
    the root: its search space is that of ``r ** 2``, and of ``(1 - beta2) * r ** 2`` where the epsilon is added at every
    step to the running average, as AdaBelief's authors do.

    Args:
        family: one of ``"adam"``, ``"rmsprop"``, ``"adabelief"``, ``"adamomentum"``, ``"adame"`` and ``"alto"``.
        beta1: decay of ``m``, in [0, 1).
        beta2: decay of ``v``, in [0, 1).
        weight_decay: :math:`\lambda`, coupled: added to the gradient; from 0 up. Leave out a decoupled one, as AdamW's.
        alpha: of adaptor E, ``"auto"`` for its choice for small batches.
        explore_beta: of adaptor E, likewise.

    Memory: one tensor a parameter, two for the last four families; float32, or float64 for float64.

    Raises:
        ValueError: for another family, and for a number out of its range.

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
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"{name} must satisfy 0 <= {name} < 1, got {decay!r}")
        if not weight_decay >= 0.0:
            raise ValueError(f"weight_decay must be from 0 up, got {weight_decay!r}")
        self.family = family
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.alpha, self.explore_beta = resolve_explore(alpha, explore_beta)
        self._steps: dict[str, int] = {}
        self._average: dict[str, Tensor] = {}  # m, or e of adaptor E
        self._squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, gradients: Mapping[str, Tensor | None], parameters: Mapping[str, Tensor] | None = None) -> None:
        """Adds the gradients of one step.

        Args:
            gradients: names and gradients; a parameter that is missing or None is skipped, as optimizers do.
            parameters: names and parameters, for ``weight_decay``.

        Raises:
            ValueError: where ``weight_decay`` is not 0 and there are no parameters.
        """
        if self.weight_decay and parameters is None:
            raise ValueError(
                f"weight_decay={self.weight_decay!r} is added to the gradient times the parameters: pass them"
            )
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
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
