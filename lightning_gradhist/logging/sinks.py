"""Where reports go: one small interface over the loggers of a Trainer."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import Any

from lightning_gradhist.logging import event_file
from lightning_gradhist.logging.figures import pixels
from lightning_gradhist.logging.magnitude_report import Distribution


class Sink:
    """Takes what is reported to one logger, by optimizer step.

    A sink of your own overrides what its logger can show; :func:`register_sink` puts it to use. What is not overridden is
    left out, but for histograms.
    """

    background: bool = False
    """Whether the methods may run in another thread while the training thread uses the logger; else that one waits."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers by tag."""

    def histograms(self, histograms: Mapping[str, Distribution], step: int) -> None:
        """Histograms by tag, all of a step together; where they cannot be shown, :func:`quantiles` as scalars."""
        self.scalars(quantiles(histograms), step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """A matplotlib figure. Other sinks show it too: take its :func:`lightning_gradhist.logging.figures.pixels`."""

    def text(self, tag: str, markdown: str, step: int) -> None:
        """A text in Markdown."""

    def margins(self, title: str, charts: Mapping[str, tuple[str, str, str]]) -> None:
        """Charts to be shown under a title: by name the tags of a value and of the lower and upper end of its interval."""

    @property
    def shows_figures(self) -> bool:
        """Whether it is of use to draw a figure."""
        return type(self).figure is not Sink.figure


class SummarySink(Sink):
    """Writes to any ``SummaryWriter``, as tensorboardX's; they queue what they get under a lock."""

    background = True

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Scalars page."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def histograms(self, histograms: Mapping[str, Distribution], step: int) -> None:
        """Histograms and Distributions pages."""
        if histograms:
            for value in event_file.histogram_summary(histograms).value:
                h = value.histo
                sums = h.min, h.max, h.num, h.sum, h.sum_squares
                self.writer.add_histogram_raw(value.tag, *sums, list(h.bucket_limit), list(h.bucket), step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Images page."""
        self.writer.add_image(tag, pixels(figure), step, dataformats="HWC")

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text page."""
        self.writer.add_text(tag, markdown, step)

    def margins(self, title: str, charts: Mapping[str, tuple[str, str, str]]) -> None:
        """Custom scalars page."""
        self.writer.add_custom_scalars({title: {name: ["Margin", list(tags)] for name, tags in charts.items()}})


class TensorBoardSink(SummarySink):
    """Writes to a ``SummaryWriter`` of torch: all scalars of a step as one event, and all histograms."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Scalars page."""
        if values:
            event_file.write(self.writer, event_file.scalar_summary(values), step)

    def histograms(self, histograms: Mapping[str, Distribution], step: int) -> None:
        """Histograms and Distributions pages."""
        if histograms:
            event_file.write(self.writer, event_file.histogram_summary(histograms), step)


class LoggerSink(Sink):
    """Any Lightning logger: scalars, and the quantiles of histograms.

    Not in the background: ``CSVLogger``, for one, loses rows, and raises in the training thread, when two threads log.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """The logger's own ``log_metrics``."""
        self.logger.log_metrics(dict(values), step=step)


class WandbSink(LoggerSink):
    """Writes to a ``WandbLogger``, with its prefix, over its ``trainer/global_step``.

    A call of ``run.log`` without a step becomes one message to the process of W&B, which numbers them: two threads may call.
    """

    background = True

    def histograms(self, histograms: Mapping[str, Distribution], step: int) -> None:
        """Native histograms, all in one row."""
        import wandb

        def native(shown: Distribution) -> Any:
            return wandb.Histogram(np_histogram=(shown.counts.numpy(), shown.edges.numpy()))

        self.scalars({tag: native(shown) for tag, shown in histograms.items()}, step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """An image."""
        import wandb

        self.scalars({tag: wandb.Image(pixels(figure))}, step)  # type: ignore[dict-item]

    def text(self, tag: str, markdown: str, step: int) -> None:
        """The text as it is, for W&B shows no Markdown that is logged."""
        import wandb

        self.scalars({tag: wandb.Html(f"<pre>{html.escape(markdown)}</pre>")}, step)  # type: ignore[dict-item]


class MLflowSink(LoggerSink):
    """Writes to an ``MLFlowLogger``, which sends each call to its server or file store by itself.

    MLflow has no histograms: quantiles are metrics. Figures and texts are artifacts, ``<tag>/step_<step>``.
    """

    background = True

    def __init__(self, logger: Any) -> None:
        super().__init__(logger)
        self.client, self.run_id = logger.experiment, logger.run_id

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """An artifact, PNG."""
        self.client.log_image(self.run_id, pixels(figure), f"{tag}/step_{step}.png")

    def text(self, tag: str, markdown: str, step: int) -> None:
        """An artifact, Markdown."""
        self.client.log_text(self.run_id, markdown, f"{tag}/step_{step}.md")


class CometSink(LoggerSink):
    """Writes to a ``CometLogger``, in the training thread: an experiment keeps the step of an image in an attribute.

    It gets quantiles: Comet's histograms count on bins of their own, a tenth of the value wide, and are an upload each.
    """

    def figure(self, tag: str, figure: Any, step: int) -> None:
        """Graphics page."""
        self.logger.experiment.log_image(pixels(figure), name=tag, step=step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Text page."""
        self.logger.experiment.log_text(markdown, step=step, metadata={"tag": tag})


def quantiles(histograms: Mapping[str, Distribution]) -> dict[str, float]:
    """Quantiles as scalars: ``<kind>_p01/<name>`` to ``<kind>_p99/<name>`` for a histogram ``<kind>/<name>``."""
    found: dict[str, float] = {}
    for tag, shown in histograms.items():
        kind, slash, name = tag.partition("/")
        found |= {f"{kind}_p{100 * share:02.0f}{slash}{name}": value for share, value in shown.quantiles.items()}
    return found


def register_sink(matches: type | Callable[[Any], bool], make: Callable[[Any], Sink]) -> None:
    """Says how to report to a kind of logger; what was registered last is asked first, before the built-in sinks.

    Under a strategy that spawns processes this is to be called where they import it.

    Args:
        matches: a class of loggers, or a function that tells whether a logger is of the kind.
        make: makes the sink of a logger; called in the training thread, once a run.

    Example:
        >>> from lightning_gradhist.logging import Sink, register_sink
        >>> from lightning_gradhist.logging.sinks import sink_of
        >>> class Lines(list):
        ...     "A logger."
        >>> class LinesSink(Sink):
        ...     background = True  # one thread may append while another does
        ...
        ...     def __init__(self, logger):
        ...         self.logger = logger
        ...
        ...     def scalars(self, values, step):
        ...         self.logger.extend(f"{step} {tag} {value}" for tag, value in values.items())
        >>> register_sink(Lines, LinesSink)
        >>> logger = Lines()
        >>> sink_of(logger).scalars({"gradient_norm/all": 0.5}, step=50)
        >>> logger
        ['50 gradient_norm/all 0.5']
    """
    is_of_kind = (lambda logger: isinstance(logger, matches)) if isinstance(matches, type) else matches
    _KINDS.insert(0, (is_of_kind, make))


def sink_of(logger: Any) -> Sink:
    """The sink of a logger of a Trainer, or of a ``SummaryWriter``."""
    return next(make(logger) for matches, make in _KINDS if matches(logger))


def _named(name: str) -> Callable[[Any], bool]:
    # By name, so that nothing has to be imported that the user does not use.
    return lambda logger: any(kind.__name__ == name for kind in type(logger).__mro__)


def _writer(logger: Any) -> Any:
    # Lightning's logger wraps a writer in `experiment`; a bare SummaryWriter is taken as it is.
    return getattr(logger, "experiment", logger)


def _summary_sink(writer: Any) -> Sink:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardSink(writer) if isinstance(writer, SummaryWriter) else SummarySink(writer)


_KINDS: list[tuple[Callable[[Any], bool], Callable[[Any], Sink]]] = [
    (_named("WandbLogger"), WandbSink),
    (_named("MLFlowLogger"), MLflowSink),
    (_named("CometLogger"), CometSink),
    (lambda logger: hasattr(_writer(logger), "add_histogram_raw"), lambda logger: _summary_sink(_writer(logger))),
    (lambda logger: True, LoggerSink),
]
