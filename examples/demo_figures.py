"""The two pictures of the demo."""

from __future__ import annotations

import math
from statistics import mean

from matplotlib.figure import Figure

from lightning_gradhist import MagnitudeHistogram

BLUE, ORANGE, GREY = "#1f5fa8", "#d9661f", "#8a8f98"


def epsilon_figure(gradients: MagnitudeHistogram, unit: tuple[float, float, float, float]) -> Figure:
    """Gradients beside epsilon, before and after the calibration."""
    scale, frozen, rescued, eps = unit
    figure = Figure(figsize=(9.6, 3.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    histogram = gradients.pooled()
    edges = histogram.edges.log10()
    shown = histogram.counts[0].unflatten(0, (-1, 4)).sum(1)
    edges = edges[::4]
    for axes, epsilon, accuracy, color, title in (
        (panels[0], 1e-8, frozen, ORANGE, "AdamW as it is: every gradient is lost beside epsilon"),
        (panels[1], eps, rescued, BLUE, "with OptimizerCalibration(): epsilon is out of the way"),
    ):
        axes.stairs((shown / shown.sum() / edges.diff()).tolist(), edges.tolist(), color=GREY, alpha=0.7, fill=True)
        axes.axvline(math.log10(epsilon), color=color, linewidth=2)
        axes.annotate(
            f"epsilon {epsilon:g}\naccuracy {accuracy:.1%}",
            (math.log10(epsilon), 0.95),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            color=color,
        )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(f"log10 of the root-mean-square gradient, loss times {scale:g}")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share per decade")
    occupied = shown.nonzero()[:, 0]
    panels[0].set_xlim(min(math.log10(eps) - 2.4, float(edges[occupied[0]])), -7.5)
    return figure


def rate_figure(
    title: str,
    grid: list[float],
    by_rate: list[list[float]],
    rules: dict[str, float],
    by_rule: dict[str, list[float]],
) -> Figure:
    """Loss over the learning rate, with a mark for each rule."""
    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.fill_between(grid, [min(loss) for loss in by_rate], [max(loss) for loss in by_rate], color=GREY, alpha=0.25)
    axes.plot(grid, [mean(loss) for loss in by_rate], color=GREY)
    for (name, rate), marker in zip(rules.items(), "v^s>o", strict=True):
        ours = name == "from the record"
        loss = mean(by_rule[name])
        axes.plot(
            [rate],
            [loss],
            marker,
            color=BLUE if ours else ORANGE,
            markeredgecolor="white",
            markersize=10 if ours else 8,
            label=f"{name}: {loss:.3f}",
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss after the epoch")
    axes.set_title(f"{title}: mean of the seeds and their range", fontsize=10, loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
