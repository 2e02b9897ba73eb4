"""What arrives in a logger, read back from its files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_ndarray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging import sinks as module
from lightning_gradhist.logging.event_file import _write_record
from lightning_gradhist.logging.magnitude_report import Distribution, MagnitudeReport, magnitude_report
from lightning_gradhist.logging.sinks import (
    LoggerSink,
    Sink,
    SummarySink,
    TensorBoardSink,
    quantiles,
    register_sink,
    sink_of,
)


def reported(values: dict[str, Tensor]) -> MagnitudeReport:
    histogram = MagnitudeHistogram(list(values))
    histogram.update(values)
    return magnitude_report(histogram, "gradient")


def shown(edges: list[float], counts: list[int]) -> Distribution:
    return Distribution(torch.tensor(edges, dtype=torch.float64), torch.tensor(counts), {0.5: 1e-3})


def raw_histograms(folder: Path) -> dict[str, Any]:
    """Histograms as they stand in the event file, before TensorBoard re-bins them."""
    (file,) = folder.glob("events.*")
    found = {}
    for event in LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("histo"):
                found[value.tag] = (event.step, value.histo)
    return found


SUMMARY_SINKS = [pytest.param(TensorBoardSink, id="torch"), pytest.param(SummarySink, id="any")]


@pytest.mark.parametrize("kind", SUMMARY_SINKS)
def test_a_histogram_in_the_event_file(tmp_path: Path, kind: Any) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        kind(writer).histograms({"h": shown([-4.0, -3.5, -3.0, -2.0], [5, 0, 3])}, step=7)
    step, histo = raw_histograms(tmp_path)["h"]
    assert step == 7
    assert list(histo.bucket_limit) == [-3.5, -3.0, -2.0] and list(histo.bucket) == [5.0, 0.0, 3.0]
    assert (histo.min, histo.max, histo.num) == (-4.0, -2.0, 8)
    assert histo.sum == 5 * -3.75 + 3 * -2.5 and histo.sum_squares == 5 * 3.75**2 + 3 * 2.5**2


@pytest.mark.parametrize("kind", SUMMARY_SINKS)
def test_everything_arrives_in_tensorboard(tmp_path: Path, kind: Any) -> None:
    from matplotlib.figure import Figure

    with SummaryWriter(str(tmp_path)) as writer:
        sink = kind(writer)
        sink.scalars({"a": 1.5, "b": -2.0}, step=3)
        sink.histograms({"h": shown([0.0, 1.0, 2.0], [1, 2])}, step=4)
        figure = Figure(figsize=(2, 1))
        figure.add_subplot().plot([0, 1])
        sink.figure("f", figure, step=5)
        sink.figure("f", figure, step=6)  # a second logger may want it
        sink.text("t", "| a | b |\n|---|---|\n| 1 | 2 |", step=6)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    assert tags["scalars"] == ["a", "b"] and tags["histograms"] == ["h"] and tags["images"] == ["f"]
    assert [(e.step, e.value) for e in events.Scalars("a")] == [(3, 1.5)]
    assert sum(events.Histograms("h")[0].histogram_value.bucket) == 3
    assert [(i.step, i.width > 0) for i in events.Images("f")] == [(5, True), (6, True)]
    (text,) = events.Tensors("t/text_summary")
    assert make_ndarray(text.tensor_proto).item().decode().startswith("| a | b |")


def values_of_events(folder: Path) -> list[list[Any]]:
    """The values of each event of the event files in a folder, with its step."""
    events = [event for file in sorted(folder.glob("events.*")) for event in LegacyEventFileLoader(str(file)).Load()]
    return [[(event.step, value) for value in event.summary.value] for event in events if event.HasField("summary")]


def test_a_step_is_two_events_with_the_same_values_as_one_for_each(tmp_path: Path) -> None:
    """Of so many tensors, that the events are large ones; a reader would end at a wrong checksum."""
    generator = torch.Generator().manual_seed(0)
    values = {f"layer{i}": 10 ** torch.empty(5000).normal_(-4, 2, generator=generator) for i in range(100)}
    for kind in (TensorBoardSink, SummarySink):
        with SummaryWriter(str(tmp_path / kind.__name__)) as writer:
            for step in (0, 50):
                report = reported(
                    {**values, "dead": torch.zeros(3), "one": torch.ones(1) + step, "none": torch.ones(0)}
                )
                kind(writer).scalars(report.scalars, step)
                kind(writer).histograms(report.histograms, step)
                kind(writer).scalars({}, step)
                kind(writer).histograms({}, step)
    together, apart = (values_of_events(tmp_path / kind.__name__) for kind in (TensorBoardSink, SummarySink))
    assert [len(event) for event in together] == [len(report.scalars), len(report.histograms)] * 2
    assert len(apart) == 2 * (len(report.scalars) + 102) and len(report.scalars) > 100
    for (step, value), [(other_step, other)] in zip(sum(together, []), apart, strict=True):
        for rounded in ("sum", "sum_squares"):  # the same terms, added in another order
            assert getattr(value.histo, rounded) == pytest.approx(getattr(other.histo, rounded), rel=1e-12)
            if other.HasField("histo"):
                setattr(value.histo, rounded, getattr(other.histo, rounded))
        assert (step, value) == (other_step, other)
    (file,) = (tmp_path / "TensorBoardSink").glob("events.*")
    assert file.stat().st_size > 2 * 75_000


def test_a_writer_that_was_closed_is_opened_again(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoardSink(writer)
    for step in (0, 1):
        sink.scalars({"a": float(step)}, step)
        writer.close()
    assert sorted((step, value.simple_value) for [(step, value)] in values_of_events(tmp_path)) == [(0, 0.0), (1, 1.0)]


@pytest.mark.parametrize("size", [0, 1, 7, 100_001])
def test_records_are_written_as_tensorboard_writes_them_and_it_need_not_take_the_checksums(
    tmp_path: Path, size: int
) -> None:
    """Fails where the way into the writer, which is private, has another name; all would go on, but slowly."""
    data = bytes(torch.randint(256, (size,), generator=torch.Generator().manual_seed(size)).tolist())
    theirs, ours = io.BytesIO(), io.BytesIO()
    RecordWriter(theirs).write(data)
    _write_record(ours, data)
    assert ours.getvalue() == theirs.getvalue()
    writer = SummaryWriter(str(tmp_path))
    for step in (0, 1):  # the second time into another file
        TensorBoardSink(writer).scalars({"a": 1.0}, step)
        assert vars(writer.file_writer.event_writer._async_writer._writer)["write"].func is _write_record
        writer.close()


# --- which sink ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        pytest.param(lambda path: TensorBoardLogger(path), TensorBoardSink, id="TensorBoardLogger"),
        pytest.param(lambda path: SummaryWriter(path), TensorBoardSink, id="SummaryWriter"),
        pytest.param(lambda path: CSVLogger(path), LoggerSink, id="CSVLogger"),
    ],
)
def test_sinks(tmp_path: Path, make: Callable[[str], Any], kind: type) -> None:
    logger = make(str(tmp_path))
    sink = sink_of(logger)
    assert type(sink) is kind
    assert sink.background == sink.shows_figures == (kind is TensorBoardSink)
    sink.scalars(reported({"w": torch.ones(3)}).scalars, 0)
    logger.close() if isinstance(logger, SummaryWriter) else logger.finalize("success")


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KINDS", list(module._KINDS))


class Quiet(CSVLogger):
    pass


class QuietSink(Sink):
    def __init__(self, logger: Any) -> None:
        self.logger = logger


@pytest.mark.usefixtures("kinds")
@pytest.mark.parametrize(
    "matches",
    [pytest.param(Quiet, id="class"), pytest.param(lambda logger: type(logger) is Quiet, id="function")],
)
def test_a_sink_of_a_third_party(tmp_path: Path, matches: Any) -> None:
    register_sink(matches, QuietSink)
    logger = Quiet(str(tmp_path))
    mine, other = sink_of(logger), sink_of(CSVLogger(str(tmp_path)))
    assert type(mine) is QuietSink and mine.logger is logger and type(other) is LoggerSink
    mine.scalars({"a": 1.0}, 0)
    mine.histograms({"a": shown([0.0, 1.0], [1])}, 0)
    mine.figure("f", None, 0)
    mine.text("t", "", 0)
    assert not mine.background and not mine.shows_figures


@pytest.mark.usefixtures("kinds")
def test_the_last_registered_comes_first(tmp_path: Path) -> None:
    register_sink(Quiet, QuietSink)
    register_sink(Quiet, LoggerSink)
    assert type(sink_of(Quiet(str(tmp_path)))) is LoggerSink


# --- quantiles in place of histograms --------------------------------------------------------------------------------


def test_quantiles_by_tag() -> None:
    one = Distribution(torch.zeros(2), torch.ones(1), {0.01: 1e-9, 0.5: 1e-3, 0.99: 2.0})
    assert quantiles({"g_magnitude/a.b": one, "plain": one}) == {
        **{"g_magnitude_p01/a.b": 1e-9, "g_magnitude_p50/a.b": 1e-3, "g_magnitude_p99/a.b": 2.0},
        **{"plain_p01": 1e-9, "plain_p50": 1e-3, "plain_p99": 2.0},
    }


def test_scalars_and_quantiles_in_a_csv(tmp_path: Path) -> None:
    logger = CSVLogger(str(tmp_path))
    sink = LoggerSink(logger)
    for step in (0, 50):
        report = reported({"w": torch.full((4,), 2.0**-step)})
        sink.scalars(report.scalars, step)
        sink.histograms(report.histograms, step)
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "50"}
    columns = {f"gradient_magnitude_p{p}/{name}" for p in ("01", "25", "50", "75", "99") for name in ("w", "all")}
    lost = {"gradient_fp16_loss_share/w"}  # at the second step, in a column of its own
    assert set(rows[0]) == {"step"} | set(report.scalars) | columns | lost
    for column in ("gradient_median/all", "gradient_magnitude_p01/w", "gradient_magnitude_p99/all"):
        assert [float(row[column]) for row in rows if row[column]] == pytest.approx([1.0, 2.0**-50], rel=0.07)
