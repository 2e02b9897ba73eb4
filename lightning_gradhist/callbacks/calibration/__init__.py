"""The calibration: epsilon and learning rate, set before the first step."""

from lightning_gradhist.callbacks.calibration.calibration import OptimizerCalibration

__all__ = ["OptimizerCalibration"]
