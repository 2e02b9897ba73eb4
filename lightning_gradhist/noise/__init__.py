"""Gradient noise: the noise scale at fixed weights and over a run, its interval, and the record that carries it on."""

from lightning_gradhist.noise.interval import NoiseEstimate
from lightning_gradhist.noise.record import OptimizerRecord, RecordError, RunRecord
from lightning_gradhist.noise.scale import GradientMoments, NoiseScale
from lightning_gradhist.noise.series import NoiseRecord

__all__ = [
    "GradientMoments",
    "NoiseEstimate",
    "NoiseRecord",
    "NoiseScale",
    "OptimizerRecord",
    "RecordError",
    "RunRecord",
]
