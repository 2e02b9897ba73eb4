"""What arrives in a logger, read back from its files."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.report.loggers import ScalarSink, TensorBoardSink, log_magnitudes, shown_buckets, sinks


def counted(values: dict[str, Tensor]) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(list(values))
    histogram.update(values)
    return histogram


def raw_histograms(folder: Path) -> dict[str, Any]:
    """Histograms as they stand in the event file, before TensorBoard re-bins them."""
    (file,) = folder.glob("events.*")
    found = {}
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("histo"):
                found[value.tag] = (event.step, value.histo)
    return found


def test_a_histogram_in_the_event_file(tmp_path: Path) -> None:
    edges, counts = torch.tensor([-4.0, -3.5, -3.0, -2.0], dtype=torch.float64), torch.tensor([5, 0, 3])
    with SummaryWriter(str(tmp_path)) as writer:
        TensorBoardSink(writer).histogram("h", edges, counts, step=7)
    step, histo = raw_histograms(tmp_path)["h"]
    assert step == 7
    assert list(histo.bucket_limit) == [-3.5, -3.0, -2.0] and list(histo.bucket) == [5.0, 0.0, 3.0]
    assert (histo.min, histo.max, histo.num) == (-4.0, -2.0, 8)
    assert histo.sum == 5 * -3.75 + 3 * -2.5 and histo.sum_squares == 5 * 3.75**2 + 3 * 2.5**2


def test_everything_arrives_in_tensorboard(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    with SummaryWriter(str(tmp_path)) as writer:
        sink = TensorBoardSink(writer)
        sink.scalars({"a": 1.5, "b": -2.0}, step=3)
        sink.histogram("h", torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1, 2]), step=4)
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([0, 1])
        sink.figure("f", figure, step=5)
        sink.figure("f", figure, step=6)  # the figure is not closed, a second logger may want it
        sink.text("t", "| a | b |\n|---|---|\n| 1 | 2 |", step=6)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert tags["scalars"] == ["a", "b"] and tags["histograms"] == ["h"] and tags["images"] == ["f"]
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(3, 1.5)]
    assert sum(events.Histograms("h")[0].histogram_value.bucket) == 3
    assert [(i.step, i.width > 0) for i in events.Images("f")] == [(5, True), (6, True)]
    (text,) = events.Tensors("t/text_summary")
    assert make_ndarray(text.tensor_proto).item().decode().startswith("| a | b |")


# --- log_magnitudes --------------------------------------------------------------------------------------------------

TAGS = ["median", "norm", "zero_share", "nonfinite_share", "fp16_loss_share"]


class Recorder:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}
        self.histograms: dict[str, tuple[Tensor, Tensor]] = {}
        self.steps: set[int] = set()

    def scalars(self, values: Any, step: int) -> None:
        assert not self.numbers.keys() & values.keys()
        self.numbers.update(values)
        self.steps.add(step)

    def histogram(self, tag: str, edges: Tensor, counts: Tensor, step: int) -> None:
        self.histograms[tag] = (edges, counts)
        self.steps.add(step)

    def figure(self, tag: str, figure: Any, step: int) -> None:
        raise AssertionError("no figure is due")

    def text(self, tag: str, markdown: str, step: int) -> None:
        raise AssertionError("no text is due")


def logged(values: dict[str, Tensor]) -> Recorder:
    recorder = Recorder()
    log_magnitudes(recorder, counted(values), "gradient", 11)
    assert recorder.steps <= {11}
    return recorder


def test_tags_and_values() -> None:
    weight = 10 ** torch.linspace(-9, 1, 5001, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 1.0, math.nan, math.inf])
    found = logged({"weight": weight, "bias": bias, "unused": torch.empty(0), "dead": torch.zeros(3)})
    names = ["weight", "bias", "dead", "all"]
    assert set(found.numbers) == {f"gradient_{tag}/{name}" for tag in TAGS for name in names}
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.numbers.values())
    assert set(found.histograms) == {f"gradient_magnitude/{name}" for name in ("weight", "bias", "all")}
    edges, counts = found.histograms["gradient_magnitude/weight"]
    assert edges[0] <= -9 <= edges[1] and edges[-2] <= 1 <= edges[-1] and int(counts.sum()) == 5001
    assert found.numbers["gradient_median/weight"] == pytest.approx(1e-4, rel=0.13)
    assert found.numbers["gradient_norm/weight"] == pytest.approx(float(weight.norm()), rel=0.01)
    assert found.numbers["gradient_zero_share/bias"] == pytest.approx(0.4)
    assert found.numbers["gradient_nonfinite_share/bias"] == pytest.approx(0.4)
    assert found.numbers["gradient_median/dead"] == found.numbers["gradient_norm/dead"] == 0.0
    assert found.numbers["gradient_zero_share/dead"] == 1.0
    assert found.numbers["gradient_zero_share/all"] == pytest.approx(5 / 5009)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(torch.logspace(-12, 8, 20_000, base=10, dtype=torch.float64), id="wide"),
        pytest.param(torch.tensor([2.0**-26, 2.0**-24, 1.0, 70_000.0]), id="few"),
        pytest.param(torch.cat([torch.zeros(5), torch.full((5,), 1e-9)]), id="zeros-and-lost"),
        pytest.param(torch.ones(4), id="none"),
    ],
)
def test_fp16_loss_share_is_what_a_cast_loses(values: Tensor) -> None:
    half = values.to(torch.float16)
    lost = ((half == 0) & (values != 0)) | (half.isinf() & values.isfinite())
    share = float(lost.double().mean())
    assert logged({"w": values}).numbers["gradient_fp16_loss_share/w"] == pytest.approx(share, abs=2e-3)


def test_nothing_was_counted() -> None:
    found = logged({"a": torch.empty(0), "b": torch.empty(0)})
    assert found.numbers == {} and found.histograms == {}


# --- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "occupied",
    [
        pytest.param([0], id="first"),
        pytest.param([2031], id="last"),
        pytest.param([0, 2031], id="both-ends"),
        pytest.param([5, 516], id="exactly-512"),
        pytest.param([5, 517], id="one-more"),
        pytest.param([1000, 1001, 1300, 2030, 2031], id="up-to-the-end"),
        pytest.param(list(range(2032)), id="all"),
    ],
)
@pytest.mark.parametrize("most", [1, 2, 100, 512])
def test_shown_buckets(occupied: list[int], most: int) -> None:
    histogram = MagnitudeHistogram(["x"])
    edges, counts = histogram.edges.log10(), torch.zeros(2032, dtype=torch.int64)
    counts[occupied] = torch.arange(1, len(occupied) + 1)
    shown_edges, shown = shown_buckets(edges, counts, most)
    assert len(shown) <= most and len(shown_edges) == len(shown) + 1
    assert shown_edges.diff().gt(0).all() and torch.isin(shown_edges, edges).all()
    assert int(shown.sum()) == int(counts.sum())
    assert shown_edges[0] == edges[occupied[0]] and shown_edges[-1] >= edges[occupied[-1] + 1]
    assert shown[0] > 0 and shown[-1] > 0
    for low, high, number in zip(shown_edges[:-1], shown_edges[1:], shown, strict=True):
        assert number == counts[(edges[:-1] >= low) & (edges[:-1] < high)].sum()
    if occupied[-1] - occupied[0] < most:
        assert torch.equal(shown, counts[occupied[0] : occupied[-1] + 1])


def test_buckets_of_the_default_size() -> None:
    histogram = counted({"x": torch.tensor([1e-37, 1e37])})
    assert len(shown_buckets(histogram.edges, histogram.counts[0])[1]) <= 512


# --- which sink ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(lambda path: TensorBoardLogger(path), TensorBoardSink, id="TensorBoardLogger"),
        pytest.param(lambda path: SummaryWriter(path), TensorBoardSink, id="SummaryWriter"),
        pytest.param(lambda path: CSVLogger(path), ScalarSink, id="CSVLogger"),
    ],
)
def test_sinks(tmp_path: Path, make: Callable[[str], Any], kind: type) -> None:
    logger = make(str(tmp_path))
    (sink,) = sinks([logger])
    assert type(sink) is kind
    log_magnitudes(sink, counted({"w": torch.ones(3)}), "gradient", 0)
    logger.close() if isinstance(logger, SummaryWriter) else logger.finalize("success")


def test_no_logger() -> None:
    assert sinks([]) == []


def test_scalars_in_a_csv(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    sink = ScalarSink(logger)
    for step in (0, 50):
        log_magnitudes(sink, counted({"w": torch.full((4,), 2.0**-step)}), "gradient", step)
    sink.figure("f", None, 50)
    sink.text("t", "text", 50)
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "50"}
    assert set(rows[0]) == {"step"} | {f"gradient_{tag}/{name}" for tag in TAGS for name in ("w", "all")}
    medians = [float(row["gradient_median/w"]) for row in rows if row["gradient_median/w"]]
    assert medians == pytest.approx([1.0, 2.0**-50], rel=0.07)
