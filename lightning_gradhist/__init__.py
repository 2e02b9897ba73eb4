"""Gradient-magnitude histograms for PyTorch Lightning, epsilon and learning rate from them, and ALTO and AdamE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_gradhist._version import __version__
from lightning_gradhist.epsilon import EpsilonRange, SecondMoment, epsilon_range
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.learning_rate import SurgeLaw
from lightning_gradhist.noise import NoiseScale
from lightning_gradhist.noise.interval import NoiseEstimate
from lightning_gradhist.optim import ALTO, AdamE, EAdaptor, no_decay_groups
from lightning_gradhist.tradeoff import batch_size_tradeoff, critical_batch_size

if TYPE_CHECKING:
    from lightning_gradhist.callbacks import GradientHistogramMonitor, OptimizerCalibration


__all__ = [
    "ALTO",
    "AdamE",
    "EAdaptor",
    "EpsilonRange",
    "GradientHistogramMonitor",
    "MagnitudeHistogram",
    "NoiseEstimate",
    "NoiseScale",
    "OptimizerCalibration",
    "SecondMoment",
    "SurgeLaw",
    "__version__",
    "batch_size_tradeoff",
    "critical_batch_size",
    "epsilon_range",
    "no_decay_groups",
]


def __getattr__(name: str) -> Any:
    # The callbacks need Lightning and nothing else does, so they are imported when they are asked for.
    if name in ("GradientHistogramMonitor", "OptimizerCalibration"):
        from lightning_gradhist import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
