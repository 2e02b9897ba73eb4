"""The monitor: what is counted and measured while a run trains."""

from lightning_gradhist.callbacks.monitor.monitor import GradientHistogramMonitor

__all__ = ["GradientHistogramMonitor"]
