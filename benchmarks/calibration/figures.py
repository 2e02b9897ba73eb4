"""The figures of the evidence. Each has one panel a workload, at most four."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from evidence import Evidence, Measured
from matplotlib import colormaps
from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _PURPLE, _GREY = "#1f5fa8", "#d9661f", "#3d8f5a", "#8a4fa3", "#8a8f98"
_WORKLOADS = (_BLUE, _ORANGE, _GREEN, _PURPLE)


def loss_curves(losses: Mapping[str, Mapping[int, Measured]]) -> Figure:
    """Excess of the final loss over learning rate, darker for larger batches; rings mark the best rates."""
    figure, panels = _panels(list(losses))
    for axes, by_size in zip(panels, losses.values(), strict=True):
        for shade, (size, measured) in zip(np.linspace(0.35, 1.0, len(by_size)), by_size.items(), strict=True):
            color, curve = colormaps["Blues"](shade), measured.mean()
            finite = np.isfinite(curve.losses)
            rates, excess = 2 ** curve.rates[finite], curve.losses[finite] / curve.losses.min() - 1
            axes.plot(rates, 100 * excess, ".-", color=color, linewidth=1.2, markersize=4, label=f"{size:,}")
            axes.plot([2**curve.best_rate], [0], "o", color=color, markersize=8, fillstyle="none")
        axes.set_xscale("log")
        axes.set_ylim(-2, 60)
        axes.set_xlabel("learning rate")
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.18), "ncols": len(by_size), "columnspacing": 1}
        axes.legend(title="batch size", fontsize=7, title_fontsize=7, frameon=False, handlelength=1, **below)
    panels[0].set_ylabel("loss above the best (%)")
    return figure


def scores_by_law(rows: Sequence[Mapping[str, Any]], names: Sequence[str], kinds: Sequence[str]) -> Figure:
    """Mean excess of the laws from the top, a panel for each kind of transfer, a dot with its interval for each workload."""
    laws, ticks = list(dict.fromkeys(row["law"] for row in rows)), (0.5, 2, 5, 10, 20, 50, 100)
    figure = Figure(figsize=(3.2 * len(kinds) + 2.5, 0.9 + 0.3 * len(laws)), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True)
    for axes, kind in zip(panels, kinds, strict=True):
        for number, (color, name) in enumerate(zip((*_WORKLOADS, _GREY), names, strict=False)):
            at = np.arange(len(laws)) + 0.14 * (number - 2)
            mean, low, high = 100 * np.array([row[name] for row in rows if row["kind"] == kind], float).T
            axes.hlines(at, low, high, color=color, linewidth=1.2)
            axes.plot(mean, at, "o", color=color, markersize=4, label=name)
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_title(f"at equal {kind}" if kind != "across" else kind, fontsize=10, loc="left")
        _bare(axes)
    panels[0].set_yticks(range(len(laws)), laws, fontsize=8)
    panels[0].invert_yaxis()
    panels[0].set_xlabel("mean excess loss (%)")
    panels[-1].legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def growth(found: Mapping[str, Evidence]) -> Figure:
    """The noise scale along runs: at the middle batch size its median over seeds and the span of their intervals."""
    figure, panels = _panels(list(found))
    everything: list[float] = []
    for axes, evidence in zip(panels, found.values(), strict=True):
        by_size = {size: [moments for _, moments in runs] for size, runs in evidence.noise.items()}
        middle = sorted(by_size)[len(by_size) // 2]
        for metric, name, color in (("simple", "B_simple", _ORANGE), ("adam", "B_adam", _BLUE)):
            for size, of_size in sorted(by_size.items()):
                everything += [m[metric] for run in of_size for m in run if 0 < m[metric] < math.inf]
                at, median = _over_seeds(of_size, metric)
                if size != middle:
                    axes.plot(at, median, color=color, linewidth=0.7, alpha=0.45)
                    continue
                low, high = (_over_seeds(of_size, f"{metric}_{end}")[1].clip(1, 1e7) for end in ("lower", "upper"))
                axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
                axes.plot(at, median, color=color, linewidth=2, label=name)
        axes.set_xscale("symlog", linthresh=float(max(of_size[0][1]["samples"] for of_size in by_size.values())))
        axes.set_yscale("log")
        axes.set_xlabel("samples")
    for axes in panels:
        axes.set_ylim(np.quantile(everything, 0.002) / 2, np.quantile(everything, 0.99) * 3)
    panels[0].set_ylabel("noise scale (samples)")
    panels[0].legend(fontsize=8, frameon=False)
    return figure


def _over_seeds(runs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Samples, and the median at them, of runs that were looked at at the same moments."""
    shortest = min(len(run) for run in runs)
    values = np.array([[m[key] for m in run[:shortest]] for run in runs], float)
    return np.array([m["samples"] for m in runs[0][:shortest]], float), np.median(values, 0)


def _panels(titles: Sequence[str]) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(3.0 * len(titles), 3.1), dpi=100, layout="constrained")
    panels = list(np.atleast_1d(figure.subplots(1, len(titles))))
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10, loc="left")
        _bare(axes)
    return figure, panels


def _bare(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
