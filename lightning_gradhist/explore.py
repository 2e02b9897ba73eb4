"""``alpha`` and ``explore_beta`` of adaptor E: the paper's choice, what is legal, what they do to noise.

An optimizer sees ``g + alpha * a`` in place of the gradient ``g``, where ``a`` is the moving average of its change with decay
``explore_beta`` (Zhao et al., "Exploring Landscapes for Better Minima along Valleys", NeurIPS 2025, arXiv 2510.27153).
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, TypeGuard

AUTO = "auto"
_LARGE_BATCH = 1_000
_SMALL_BATCH_CHOICE = (0.5, 0.01)
_LARGE_BATCH_CHOICE = (-5.0, 0.99)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, of NumPy's too; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def explore_choice(batch_size: float | None) -> tuple[float, float]:
    """Choose ``(alpha, explore_beta)`` as the paper does: to exploit below 1,000 samples a step, to explore from there on.

    The samples are those of all devices and accumulated micro-batches, > 0; None is as if small.

    Example:
        >>> explore_choice(256), explore_choice(4096)
        ((0.5, 0.01), (-5.0, 0.99))
    """
    if batch_size is None:
        return _SMALL_BATCH_CHOICE
    if not (is_number(batch_size) and 0 < batch_size < math.inf):
        raise ValueError(
            f"batch_size={batch_size!r} is out of range: it is the number of samples per optimizer step, a finite number > 0, "
            "or None if unknown."
        )
    return _LARGE_BATCH_CHOICE if batch_size >= _LARGE_BATCH else _SMALL_BATCH_CHOICE


def check_explore(alpha: float | str, explore_beta: float | str) -> None:
    """Raise ``ValueError`` unless both are ``"auto"``, or ``0 <= explore_beta < 1`` and ``|alpha| < 1 / (1 - explore_beta)``."""
    if alpha == AUTO and explore_beta == AUTO:
        return
    if not (is_number(alpha) and is_number(explore_beta)):
        raise ValueError(
            f'alpha={alpha!r} and explore_beta={explore_beta!r} do not go together: give two numbers, or leave both "auto".'
        )
    if not 0.0 <= explore_beta < 1.0:
        raise ValueError(
            f"explore_beta={explore_beta!r} is out of range: it must satisfy 0 <= explore_beta < 1. "
            'Choose a decay in that range, or leave both alpha and explore_beta "auto".'
        )
    limit = 1.0 / (1.0 - explore_beta)
    if not abs(alpha) < limit:
        raise ValueError(
            f"alpha={alpha!r} is out of range: at explore_beta={explore_beta!r} it must satisfy |alpha| < 1/(1 - explore_beta) "
            f'= {limit:g}. Move alpha towards 0, raise explore_beta, or leave both "auto".'
        )


def resolve_explore(alpha: float | str, explore_beta: float | str) -> tuple[float, float]:
    """The numbers that are in force, checked: for ``"auto"`` the choice for small batches."""
    check_explore(alpha, explore_beta)
    return explore_choice(None) if alpha == AUTO else (float(alpha), float(explore_beta))


def variance_factor(alpha: float, explore_beta: float) -> float:
    """The variance of ``g + alpha * a`` as a multiple ``q`` of that of ``g``, for noise that is independent between steps.

    ``q = (1 + c)^2 + alpha^2 * (1 - explore_beta)^3 / (1 + explore_beta)``, with ``c = alpha * (1 - explore_beta)``: the
    noise of a batch that is ``q`` times smaller. ``ValueError`` for a pair that :func:`check_explore` refuses, or ``"auto"``.

    Example:
        >>> round(variance_factor(-5.0, 0.99), 2), round(variance_factor(0.5, 0.01), 2)
        (0.9, 2.48)
    """
    if isinstance(alpha, str):
        raise ValueError('alpha="auto" has no variance factor: pass what resolve_explore returns.')
    check_explore(alpha, explore_beta)
    c = alpha * (1.0 - explore_beta)
    return (1.0 + c) ** 2 + alpha**2 * (1.0 - explore_beta) ** 3 / (1.0 + explore_beta)
