"""Triton kernels of the optimizers: one launch a phase for all tensors of a step.

The modules hold what :mod:`lightning_gradhist.optim` calls in place of its eager step, with the same names and
signatures: :func:`adam_e.adam_e_step`, :func:`alto.alto_moments` and :func:`alto.alto_apply`. Importing them needs
Triton; importing this package does not.
"""

from __future__ import annotations

import importlib.util

__all__ = ["available"]


def available() -> bool:
    """Whether Triton is installed, so that the modules of this package can be imported."""
    return importlib.util.find_spec("triton") is not None
