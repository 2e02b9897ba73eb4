"""The callbacks: the only code that knows Lightning."""

from lightning_gradhist.callbacks.calibration import OptimizerCalibration
from lightning_gradhist.callbacks.monitor import GradientHistogramMonitor

__all__ = ["GradientHistogramMonitor", "OptimizerCalibration"]
