"""Gradient noise: the noise scale at fixed weights and over a run, its interval, and the record that carries it on."""

from lightning_gradhist.noise.interval import NoiseEstimate
from lightning_gradhist.noise.noise_record import NoiseRecord
from lightning_gradhist.noise.run_record import OptimizerRecord, RecordError, RunRecord
from lightning_gradhist.noise.scale import GradientMoments, NoiseScale

__all__ = [
    "GradientMoments",
    "NoiseEstimate",
    "NoiseRecord",
    "NoiseScale",
    "OptimizerRecord",
    "RecordError",
    "RunRecord",
]
