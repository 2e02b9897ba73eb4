"""Triton kernels: one launch a phase for all tensors of a step, and one for all tensors of a histogram.

The modules hold what :mod:`lightning_gradhist.optim` and :mod:`lightning_gradhist.histogram` call in place of their eager
code, with the same names and signatures: :func:`adam_e.adam_e_step`, :func:`alto.alto_moments`, :func:`alto.alto_apply`
and :func:`histogram.add_magnitudes`. Importing them needs Triton; importing this package does not.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["available", "run_on"]


@functools.cache
def available() -> bool:
    """Whether Triton is installed, so that the modules of this package can be imported."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a stand-in for it without a spec
        return False


def run_on(device: torch.device) -> bool:
    """Whether kernels are to be tried on a device: on CUDA, or for tests on the CPU in Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # which does not find its way in a GPU's memory
    return device.type == ("cpu" if interpreted else "cuda") and available()
