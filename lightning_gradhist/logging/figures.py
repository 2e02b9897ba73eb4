"""The figures. They need matplotlib, which is optional: ``pip install "lightning-gradhist[plots]"``."""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import numpy
import torch

from lightning_gradhist.epsilon import EpsilonRange
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.learning_rate import PLAIN_LAWS, SURGE, plain_ratio, surge_ratio
from lightning_gradhist.logging.calibration_result import CalibrationResult
from lightning_gradhist.logging.magnitude_report import shown_buckets
from lightning_gradhist.noise.interval import Band
from lightning_gradhist.plan import Plan
from lightning_gradhist.tradeoff import batch_size_tradeoff, critical_batch_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FP16_SMALLEST = math.log10(2.0**-24)
_BLUE, _ORANGE, _GREY, _RED = "#1f5fa8", "#d9661f", "#8a8f98", "#d4143a"
_MAX_LABELS = 48
_MAX_LABEL = 44  # characters
_MAX_ROWS = 1000  # about as many as a figure has pixels for
_CELLS_A_DECADE = 8
_RENDERING = threading.Lock()


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def pixels(figure: Figure) -> numpy.ndarray:
    """A figure as uint8 ``[height, width, 3]``; it may be asked for in several threads at once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with _RENDERING:  # drawing changes a figure, and several loggers show the same one
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return numpy.asarray(canvas.buffer_rgba())[..., :3].copy()


def magnitude_heatmap(histogram: MagnitudeHistogram, title: str, eps: Mapping[str, float] | None = None) -> Figure:
    """Layers by magnitude: one row a name, first on top, darker where more of the layer's values lie, by density per decade.

    Beyond 1,000 names the largest density of neighbours is shown, so that none is lost between pixels. One in twenty cells
    may be beyond the darkest colour: a bias of three values does not make all other layers pale. A row's orange tick is
    the median, and the dashed line is the smallest number that float16 can hold.

    The histogram is of gradients; or, with ``eps``, of roots of second moments: the dashed line is then the epsilon that is
    added to them, by name; names may be missing.
    """
    rows = histogram.counts.any(1).nonzero()[:, 0].tolist()
    names = [histogram.names[row] for row in rows]
    edges = histogram.edges.log10()
    pooled = histogram.counts.sum(0)
    low, high = (float(edge) for edge in shown_buckets(edges, pooled)[0][[0, -1]])
    lines = [math.log10(eps[name]) if eps and eps.get(name) else math.nan for name in names]
    low, high = min([low, *(x - 0.2 for x in lines)]), max([high, *(x + 0.2 for x in lines)])  # NaN compares as False
    number = max(2, math.ceil((high - low) * _CELLS_A_DECADE))
    cells = torch.linspace(low, high, number + 1, dtype=torch.float64, device="cpu")
    density = _density(histogram.counts[rows], edges, cells)

    every = math.ceil(len(names) / _MAX_LABELS)
    labels = _labels(names)[::every]
    width = max(6.2, 4.4 + 0.07 * max(map(len, labels)))  # inches: the labels' and as much for the rows at any length
    height = min(max(2.4, 1.3 + 0.2 * len(names)), 11.0)
    figure = _figure(width, height, layout=None)  # to find margins takes longer than to draw
    left, right = 0.3 + 0.066 * max(map(len, labels)), width - 1.0
    axes = figure.add_axes((left / width, 0.52 / height, (right - left) / width, (height - 1.0) / height))
    rows_each = math.ceil(len(names) / _MAX_ROWS)
    largest = torch.nn.functional.max_pool2d(density[None], (rows_each, 1), ceil_mode=True)[0]
    occupied = density[density > 0].sort().values
    darkest = float(occupied[int(0.95 * (len(occupied) - 1))])
    extent = (low, high, math.ceil(len(names) / rows_each) * rows_each, 0.0)
    image = axes.imshow(largest.numpy(), extent=extent, aspect="auto", cmap="Blues",
                        interpolation="nearest", vmin=0.0, vmax=darkest)  # fmt: skip
    medians, ticks = histogram.quantile(0.5)[rows].log10().tolist(), torch.arange(len(names), device="cpu")
    _on_white(axes, medians, (ticks + 0.15).tolist(), (ticks + 0.85).tolist(), color=_ORANGE)
    if eps is not None:
        _on_white(axes, lines, ticks.tolist(), (ticks + 1).tolist(), color=_RED, linestyle="--")
    elif low < _FP16_SMALLEST < high:
        axes.axvline(_FP16_SMALLEST, color=_GREY, linestyle="--", linewidth=1)
        axes.annotate("float16 min", (_FP16_SMALLEST, 0), xytext=(3, 3), textcoords="offset points",
                      color=_GREY, fontsize=8)  # fmt: skip
    axes.set_yticks([row + 0.5 for row in range(0, len(names), every)], labels, fontsize=8)
    axes.set_xlim(low, high)
    axes.set_ylim(len(names), 0)
    shown = "|gradient|  (orange: median" if eps is None else "sqrt(second moment)  (red: epsilon, orange: median"
    axes.set_xlabel(f"log10 {shown} of the layer)")
    axes.set_title(title, fontsize=10, loc="left", pad=14)
    beside = figure.add_axes(((right + 0.12) / width, 0.52 / height, 0.16 / width, (height - 1.0) / height))
    figure.colorbar(image, cax=beside, extend="max", extendfrac=0.12 / (height - 1.0))
    beside.tick_params(labelsize=8)
    beside.set_ylabel("share of the layer per decade", fontsize=8)
    return figure


def of_calibration(result: CalibrationResult) -> dict[str, Figure]:
    """The figures of a calibration by tag: those for which it has found what they show."""
    figures: dict[str, Figure] = {}
    if result.epsilon_range is not None:
        found = next((c.before for c in result.changes if (c.group, c.name) == (0, "eps")), result.epsilon)
        before = found if isinstance(found, float) else None
        figures["calibration/epsilon_search_space"] = epsilon_figure(result.epsilon_range, before, result.epsilon)
    if result.effective_batch_size and result.reference_batch_size:
        figures["calibration/learning_rate_over_batch_size"] = learning_rate_figure(result)
    if result.tradeoff():
        figures["calibration/steps_and_samples_over_batch_size"] = tradeoff_figure(result)
    return figures


def epsilon_figure(search_space: EpsilonRange, before: float | None, after: float | None) -> Figure:
    """Histogram of the root-mean-square gradient, the pooled search space shaded, epsilon before and after marked."""
    figure, axes = _one_plot("Epsilon among the gradients that it is added to")
    histogram = search_space.histogram.pooled()
    edges, counts = shown_buckets(histogram.edges.log10(), histogram.counts[0])
    density = counts / counts.sum() / edges.diff()
    axes.stairs(density.tolist(), edges.tolist(), color=_BLUE, fill=True, alpha=0.85)
    lower, upper = search_space.pooled_lower, search_space.pooled_upper
    axes.axvspan(math.log10(lower), math.log10(upper), color=_ORANGE, alpha=0.12,
                 label=f"pooled search space {lower:g} to {upper:g}")  # fmt: skip
    if before and before != after:
        axes.axvline(math.log10(before), color=_GREY, linestyle="--", label=_eps_label("before", before, search_space))
    if after:
        when = "kept" if before == after else "after"
        axes.axvline(math.log10(after), color=_ORANGE, label=_eps_label(when, after, search_space))
    axes.set_xlabel("log10 of the root-mean-square gradient, and of epsilon")
    axes.set_ylabel("share per decade")
    _legend(axes)
    return figure


def learning_rate_figure(result: CalibrationResult) -> Figure:
    """The law over batch size with its band, the reference, the present batch size and the alternatives."""
    batch, reference, noise = result.effective_batch_size, result.reference_batch_size, result.noise_scale
    if batch is None or reference is None:
        raise ValueError("the figure needs result.effective_batch_size and result.reference_batch_size")
    figure, axes = _one_plot("Learning rate over batch size")
    low, high = sorted((batch, reference))
    batches = _powers(low / 4, high * 4)
    if noise is not None:

        def ratios(scale: float) -> list[float]:
            from_record = result.noise_source == "record"
            return [surge_ratio(scale, b, reference, from_record, result.equal_samples_share) for b in batches]

        ends = (ratios(noise.lower), ratios(noise.upper))
        axes.fill_between(batches, *ends, color=_BLUE, alpha=0.15, label=f"{noise.confidence:.0%} interval")
        axes.plot(batches, ratios(noise.value), color=_BLUE, label=f"{SURGE} ({result.noise_source})")
    for law, style in zip(PLAIN_LAWS, cycle(("--", (0, (3, 1, 1, 1, 1, 1)), ":", "-.")), strict=False):
        plain = [plain_ratio(law, b, reference) for b in batches]
        axes.plot(batches, plain, color=_GREY, linestyle=style, linewidth=1, label=law.replace("_", " "))
    axes.plot([reference], [1.0], "o", color=_GREY, label=f"reference {reference:g}")
    axes.plot([batch], [result.ratio], "o", color=_ORANGE, label=f"now {batch:g}: times {result.ratio:.3g}")
    _over_batch_size(axes, "learning rate / reference")
    (lowest, highest), root = result.ratio_interval, math.sqrt(batch / reference)
    axes.set_ylim(min(lowest, root, 1.0) / 2, 2 * max(highest, root, 1.0))
    return figure


def tradeoff_figure(result: CalibrationResult) -> Figure:
    """Steps and samples to the same loss over batch size, as multiples of now, with their bands."""
    noise, batch = result.noise_scale, result.effective_batch_size
    ends = [row.factor for row in result.tradeoff()]
    if noise is None or batch is None or not ends:
        raise ValueError(
            "the figure needs the noise scale of a recorded run, with a bounded interval: result.tradeoff()"
        )
    critical = critical_batch_size(noise)
    rows = batch_size_tradeoff(critical, batch, _powers(ends[0], ends[-1]))
    figure, axes = _one_plot("What more GPUs would buy")
    batches = [row.batch_size for row in rows]
    for name, color in (("steps", _BLUE), ("samples", _ORANGE)):
        _band(axes, batches, [getattr(row, name) for row in rows], color, f"{name} to the same loss", "-")
    axes.plot([batch], [1.0], "o", color=_GREY, label=f"now {batch:g}")
    axes.axvspan(critical.lower, critical.upper, color=_GREY, alpha=0.12, label="critical batch size")
    axes.set_xlim(batches[0], batches[-1])
    _over_batch_size(axes, "multiple of now")
    return figure


def plan_figure(plan: Plan) -> Figure:
    """The learning rate, and the steps and samples, over the planned batch sizes, with their bands."""
    rows = sorted(plan.rows, key=lambda row: row.batch_size)
    batches = [row.batch_size for row in rows]
    known = [row for row in rows if not row.is_refused]
    figure = _figure(width=10.0, height=4.0)
    rate, cost = figure.subplots(1, 2)
    label = f"learning rate / {max(plan.learning_rates, default=1):g}"
    _band(rate, [row.batch_size for row in known], [row.ratio for row in known], _BLUE, label)
    rate.set_title(f"{plan.optimizer}: learning rate over batch size", fontsize=10, loc="left")
    for name, color, whole in (("steps", _BLUE, plan.steps), ("samples", _ORANGE, plan.steps * plan.batch_size)):
        bands = [getattr(row, name) for row in rows]
        if None not in bands:
            shares = [Band(b.value / whole, b.lower / whole, b.upper / whole) for b in bands]
            _band(cost, batches, shares, color, f"{name} / {whole:,g}")
    if plan.critical is not None:
        span = (plan.critical.lower, plan.critical.upper)
        cost.axvspan(*span, color=_GREY, alpha=0.12, label="critical batch size")
    cost.set_title("Steps and samples to the same loss", fontsize=10, loc="left")
    for axes in (rate, cost):
        axes.plot([plan.batch_size], [1.0], "o", color=_GREY, label=f"recorded at {plan.batch_size:g}")
        _over_batch_size(axes, "multiple of the recorded run's")
    return figure


def _band(axes: Any, batches: Sequence[float], bands: Sequence[Band], color: str, label: str, line: str = "o-") -> None:
    axes.fill_between(batches, [band.lower for band in bands], [band.upper for band in bands], color=color, alpha=0.15)
    axes.plot(batches, [band.value for band in bands], line, color=color, label=label)


def _powers(first: float, last: float) -> list[float]:
    ends = math.log2(first), math.log2(last)
    found: list[float] = torch.logspace(*ends, 129, base=2, dtype=torch.float64, device="cpu").tolist()
    return found


def _on_white(axes: Any, places: Sequence[float], tops: Any, bottoms: Any, **look: str) -> None:
    axes.vlines(places, tops, bottoms, color="white", linewidth=2.4)
    axes.vlines(places, tops, bottoms, linewidth=1.4, **look)


def _one_plot(title: str) -> tuple[Figure, Any]:
    figure = _figure(width=6.2, height=4.0)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, loc="left")
    return figure, axes


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    from matplotlib.figure import Figure  # not pyplot: no global state, no window, safe in any thread

    return Figure(figsize=(width, height), dpi=130, layout=layout)


def _over_batch_size(axes: Any, ylabel: str) -> None:
    axes.set(xlabel="samples of an optimizer step", ylabel=ylabel)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    _legend(axes)


def _legend(axes: Any) -> None:
    axes.legend(fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)


def _eps_label(when: str, eps: float, search_space: EpsilonRange) -> str:
    return f"{when}: {eps:.3g}, damps {search_space.damped_share(eps):.1%}"


def _labels(names: Sequence[str]) -> list[str]:
    """Names that fit beside a figure: where one is long, without the modules that all share, and without its middle."""
    if max(map(len, names)) <= _MAX_LABEL:
        return list(names)
    shared = os.path.commonprefix(list(names)).rpartition(".")[0]
    rest = [name.removeprefix(f"{shared}.") for name in names]
    short = [name if len(name) <= _MAX_LABEL else f"{name[:14]}…{name[15 - _MAX_LABEL :]}" for name in rest]
    times = Counter(short)
    return [label if times[label] == 1 else f"{label} (row {row})" for row, label in enumerate(short)]


def _density(counts: torch.Tensor, edges: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    # The cumulative share, interpolated at the cells' edges: bins and cells need not coincide.
    cumulative = torch.nn.functional.pad(counts.cumsum(1).double(), (1, 0)) / counts.sum(1, keepdim=True)
    position = torch.searchsorted(edges, cells).clamp_(1, edges.numel() - 1)
    inside = (cells - edges[position - 1]) / (edges[position] - edges[position - 1])
    at_cells = torch.lerp(cumulative[:, position - 1], cumulative[:, position], inside)
    return at_cells.diff(dim=1) / cells.diff()
