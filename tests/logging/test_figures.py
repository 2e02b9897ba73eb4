"""The figures, drawn for real, and what a reader takes from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_gradhist.epsilon import epsilon_range
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging.calibration_result import CalibrationResult
from lightning_gradhist.logging.figures import (
    available,
    epsilon_figure,
    learning_rate_figure,
    magnitude_heatmap,
    tradeoff_figure,
)
from lightning_gradhist.noise.interval import NoiseEstimate


def drawn(figure: Figure) -> Any:
    """Renders the figure, which warnings as errors watch over, and gives its first axes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert np.asarray(canvas.buffer_rgba()).std() > 0
    return figure.axes[0]


def counted(values: dict[str, Tensor]) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(list(values))
    histogram.update(values)
    return histogram


def lognormal(center: float, number: int = 400, seed: int = 0) -> Tensor:
    return 10 ** (center + torch.randn(number, generator=torch.Generator().manual_seed(seed)))


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_matplotlib_is_there() -> None:
    assert available()


# --- heatmap ---------------------------------------------------------------------------------------------------------


def test_heatmap() -> None:
    values = {"first.weight": lognormal(-3), "dead": torch.zeros(9), "last.bias": lognormal(-6, seed=1)}
    values["first.weight"][0] = math.inf
    figure = magnitude_heatmap(counted(values), "step 100")
    axes = drawn(figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first.weight", "last.bias"]
    assert axes.get_title(loc="left") == "step 100" and "log10 |gradient|" in axes.get_xlabel()
    low, high = axes.get_xlim()
    everything = torch.cat([values["first.weight"][1:], values["last.bias"]]).log10()
    assert low <= float(everything.min()) <= low + 0.1 and high - 0.1 <= float(everything.max()) <= high
    assert axes.get_ylim() == (2.0, 0.0)  # the first name on top
    assert len(figure.axes) == 2  # with a colour bar


def test_heatmap_rows_are_densities_with_their_median() -> None:
    values = {"a": lognormal(-2, 3000), "b": lognormal(-5, 500, seed=1)}
    figure = magnitude_heatmap(counted(values), "")
    axes = drawn(figure)
    density = np.asarray(axes.images[0].get_array())
    low, high = axes.get_xlim()
    width = (high - low) / density.shape[1]
    np.testing.assert_allclose(density.sum(1) * width, [1.0, 1.0], rtol=1e-6)
    middles = low + width * (np.arange(density.shape[1]) + 0.5)
    means = (density * middles).sum(1) * width
    np.testing.assert_allclose(means, [float(v.double().log10().mean()) for v in values.values()], atol=0.03)
    _, ticks = axes.collections  # on white ones
    for row, (v, segment) in enumerate(zip(values.values(), ticks.get_segments(), strict=True)):
        assert segment[:, 0] == pytest.approx(float(v.median().log10()), abs=0.06)
        assert segment[:, 1].tolist() == pytest.approx([row + 0.15, row + 0.85])


def test_heatmap_loses_no_name_between_pixels() -> None:
    names = [f"w{i}" for i in range(2500)]
    histogram = MagnitudeHistogram(names)
    histogram.update({name: torch.full((1,), 1.0 if name == "w1201" else 1e-3) for name in names})
    axes = drawn(magnitude_heatmap(histogram, "very many"))
    image = axes.images[0]
    shown = np.asarray(image.get_array())
    assert shown[:, -1].nonzero()[0].tolist() == [400]  # of w1200, w1201, w1202
    assert image.get_extent()[2] == 3 * len(shown) == 2502 and axes.get_ylim() == (2500, 0)


def test_heatmap_is_not_pale_for_a_few_equal_values() -> None:
    layers = {f"layers.{i}.weight": lognormal(-3, 3000, seed=i) for i in range(8)}
    image = drawn(magnitude_heatmap(counted(layers | {"bias": torch.full((3,), 1e-2)}), "")).images[0]
    *weights, bias = np.asarray(image.get_array())
    assert np.max(weights) * 0.7 < image.get_clim()[1] < bias.max() / 2


@pytest.mark.parametrize(
    ("number", "labels"), [pytest.param(1, 1, id="1"), pytest.param(48, 48, id="48"), pytest.param(300, 43, id="300")]
)
def test_heatmap_of_many_names(number: int, labels: int) -> None:
    values = {f"layers.{i}.attention.weight": lognormal(-3 - i / 100, 20, seed=i) for i in range(number)}
    figure = magnitude_heatmap(counted(values), "many")
    axes = drawn(figure)
    found = [label.get_text() for label in axes.get_yticklabels()]
    assert len(found) == labels and found[0] == "layers.0.attention.weight"
    assert axes.images[0].get_array().shape[0] == number
    assert 2.0 <= figure.get_size_inches()[1] <= 14.0
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(lower.y1 <= upper.y0 + 1 for upper, lower in zip(boxes, boxes[1:], strict=False))  # they do not overlap


@pytest.mark.parametrize(
    ("names", "first"),
    [
        pytest.param([f"{i:03d}{'x' * 66}.weight" for i in range(10)], "000xxxxxxxxxxx…", id="told apart at the start"),
        pytest.param([f"{'x' * 60}.{i}.weight" for i in range(10)], "0.weight", id="told apart at the end"),
        pytest.param([f"{'x' * 60}{i}{'y' * 60}" for i in range(10)], "xxxxxxxxxxxxxx…", id="told apart in the middle"),
        pytest.param([f"{'x' * 94}{i:06d}" for i in range(1000)], "xxxxxxxxxxxxxx…", id="a thousand"),
    ],
)
def test_heatmap_of_long_names(names: list[str], first: str) -> None:
    axes = drawn(magnitude_heatmap(counted({name: lognormal(-3, 20, seed=i) for i, name in enumerate(names)}), "long"))
    found = [label.get_text() for label in axes.get_yticklabels()]
    assert found[0].startswith(first) and len(set(found)) == len(found) and max(map(len, found)) <= 60
    box, label = axes.get_window_extent(), axes.get_yticklabels()[0].get_window_extent()
    assert label.x0 >= 0 and label.x1 <= box.x0 and box.width > 300  # pixels: the rows keep their room


def test_heatmap_of_one_bin() -> None:
    axes = drawn(magnitude_heatmap(counted({"w": torch.full((5,), 1e-3)}), "one"))
    low, high = axes.get_xlim()
    assert low <= -3 <= high and high - low == pytest.approx(math.log10(1.125), abs=0.03)


@pytest.mark.parametrize(("center", "there"), [(-7.0, True), (-1.0, False)])
def test_heatmap_marks_where_float16_ends(center: float, there: bool) -> None:
    axes = drawn(magnitude_heatmap(counted({"w": 10 ** torch.linspace(center - 1, center + 1, 50)}), ""))
    assert [text.get_text() for text in axes.texts] == ["float16 min"] * there


def test_heatmap_of_second_moments_shows_each_layers_epsilon() -> None:
    values = {"a": lognormal(-4), "without": lognormal(-3, seed=1), "b": lognormal(-5, seed=2), "zero": lognormal(-3)}
    axes = drawn(magnitude_heatmap(counted(values), "step 9", {"a": 1e-12, "b": 1e2, "zero": 0.0}))
    *_, lines = axes.collections  # on white ones, and those of the medians before them
    there = [segment for segment in lines.get_segments() if len(segment)]
    assert [[list(point) for point in segment] for segment in there] == [[[-12, 0], [-12, 1]], [[2, 2], [2, 3]]]
    low, high = axes.get_xlim()
    assert low < -12 and high > 2
    assert "epsilon" in axes.get_xlabel() and "gradient" not in axes.get_xlabel()
    assert not axes.texts  # of float16


# --- epsilon ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "entries"),
    [
        pytest.param(1e-8, 1e-3, 3, id="both"),
        pytest.param(1e-8, None, 2, id="before"),
        pytest.param(None, 1e2, 2, id="after"),
        pytest.param(None, None, 1, id="neither"),
        pytest.param(0.0, 0.0, 1, id="zero"),
    ],
)
def test_epsilon_figure(before: float | None, after: float | None, entries: int) -> None:
    space = epsilon_range({"a": lognormal(-3), "b": lognormal(-5, seed=1)})
    axes = drawn(epsilon_figure(space, before, after))
    texts = legend(axes)
    assert len(texts) == entries and texts[0] == f"pooled search space {space.pooled_lower:g} to {space.pooled_upper:g}"
    low, high = axes.get_xlim()
    for label, eps in (("before", before), ("after", after)):
        if eps:
            assert low < math.log10(eps) < high
            assert any(text.startswith(f"{label}: {eps:.3g}, damps {space.damped_share(eps):.1%}") for text in texts)
    assert low < math.log10(space.pooled_lower) < math.log10(space.pooled_upper) < high
    areas = [patch.get_data() for patch in axes.patches if hasattr(patch, "get_data")]
    assert float((areas[0].values * np.diff(areas[0].edges)).sum()) == pytest.approx(1.0, rel=1e-6)


def test_epsilon_figure_of_one_value() -> None:
    space = epsilon_range({"w": torch.full((3,), 1e-4)})
    assert space.lower == space.upper == 1e-4
    axes = drawn(epsilon_figure(space, 1e-4, 1e-4))
    low, high = axes.get_xlim()
    assert low < -4 < high
    assert legend(axes) == [
        "pooled search space 0.0001 to 0.0001",
        f"kept: 0.0001, damps {space.damped_share(1e-4):.1%}",
    ]


# --- learning rate ---------------------------------------------------------------------------------------------------


def result(**changes: Any) -> CalibrationResult:
    plain: dict[str, Any] = {
        "applied": True,
        "optimizer": "AdamW",
        "effective_batch_size": 2048.0,
        "reference_batch_size": 256.0,
        "ratio": 2.0,
        "ratio_interval": (1.5, 2.5),
        "law": "surge",
        "noise_scale": NoiseEstimate(1500.0, 900.0, 2500.0, 0.95, 16),
        "noise_source": "record",
    }
    return CalibrationResult(**{**plain, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="record"),
        pytest.param({"noise_source": "probe"}, id="probe"),
        pytest.param({"noise_scale": NoiseEstimate(1500.0, 0.0, math.inf, 0.95, 4)}, id="unbounded"),
        pytest.param({"noise_scale": NoiseEstimate(math.inf, 30.0, math.inf, 0.95, 4)}, id="no-signal"),
        pytest.param({"noise_scale": NoiseEstimate(0.0, 0.0, 0.0, 0.95, 4)}, id="no-noise"),
        pytest.param({"effective_batch_size": 256.0, "ratio": 1.0, "ratio_interval": (1.0, 1.0)}, id="same-batch"),
        pytest.param({"effective_batch_size": 16.0, "ratio": 0.3, "ratio_interval": (0.25, 0.5)}, id="smaller-batch"),
        pytest.param({"law": "linear", "ratio": 8.0, "ratio_interval": (8.0, 8.0)}, id="linear"),
        pytest.param({"effective_batch_size": 1.0, "reference_batch_size": 1.0}, id="one-sample"),
    ],
)
def test_learning_rate_figure(changes: dict[str, Any]) -> None:
    found = result(**changes)
    axes = drawn(learning_rate_figure(found))
    texts = legend(axes)
    batch, reference = found.effective_batch_size, found.reference_batch_size
    assert texts == [
        "95% interval",
        f"surge ({found.noise_source})",
        "sqrt",
        "fourth root",
        "linear",
        "keep",
        f"reference {reference:g}",
        f"now {batch:g}: times {found.ratio:.3g}",
    ]
    assert batch is not None and reference is not None
    (low_x, high_x), (low_y, high_y) = axes.get_xlim(), axes.get_ylim()
    assert low_x < min(batch, reference) and max(batch, reference) < high_x
    for shown in (1.0, found.ratio, *found.ratio_interval):
        assert low_y < shown < high_y


def test_learning_rate_figure_without_noise_scale() -> None:
    texts = legend(drawn(learning_rate_figure(result(noise_scale=None, noise_source=None, law="keep"))))
    assert texts[0] == "sqrt" and not any("surge" in text for text in texts)


@pytest.mark.parametrize("missing", ["effective_batch_size", "reference_batch_size"])
def test_learning_rate_figure_needs_both_sizes(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        learning_rate_figure(result(**{missing: None}))


# --- what more GPUs would buy ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "noise",
    [
        pytest.param(NoiseEstimate(1500.0, 900.0, 2500.0, 0.95, 16), id="near"),
        pytest.param(NoiseEstimate(1e7, 1e6, 1e8, 0.95, 16), id="far-above"),
        pytest.param(NoiseEstimate(3.0, 0.0, 9.0, 0.95, 16), id="far-below"),
    ],
)
def test_tradeoff_figure(noise: NoiseEstimate) -> None:
    found = result(noise_scale=noise)
    axes = drawn(tradeoff_figure(found))
    assert legend(axes) == [
        "steps to the same loss",
        "samples to the same loss",
        "now 2048",
        "critical batch size",
    ]
    lines = {line.get_label(): line for line in axes.lines}
    for row in found.tradeoff():
        for name, band in (("steps", row.steps), ("samples", row.samples)):
            x, y = lines[f"{name} to the same loss"].get_data()
            assert np.exp(np.interp(math.log(row.batch_size), np.log(x), np.log(y))) == pytest.approx(
                band.value, rel=1e-3
            )
    assert axes.get_xlim() == pytest.approx((256, 131_072))
    assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.parametrize("changes", [{"noise_source": "probe"}, {"noise_scale": None}, {"effective_batch_size": None}])
def test_tradeoff_figure_needs_a_record(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the figure needs the noise scale of a recorded run"):
        tradeoff_figure(result(**changes))


def test_figures_do_not_stay_open() -> None:
    drawn(magnitude_heatmap(counted({"w": torch.ones(2)}), ""))
    assert pyplot.get_fignums() == []
