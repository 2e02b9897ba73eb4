"""What leaves the package: histograms, scalars, figures and texts, to the loggers of a Trainer."""

from lightning_gradhist.logging.sinks import Sink, register_sink

__all__ = ["Sink", "register_sink"]
