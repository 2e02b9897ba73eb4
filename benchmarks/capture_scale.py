"""Bytes that the monitor all-reduces, logs and keeps: a model, its prediction for 70 B parameters, and its check.

``make bench-scale``, or ``python benchmarks/capture_scale.py``. All is counted in bytes and no time is taken, so that
the numbers do not depend on the machine.

The model. ``T`` tensors are watched with ``b`` bins an octave, on ``W`` ranks, and ``L`` of the optimizer's steps are
logged:

- *Counted*: the table of a logged step is int64 ``[T, 254 b + 3]``, on every rank, whatever the number of parameters.
- *All-reduced*: that table, once a logged step, 32 bytes for each measurement of the noise scale, 8 at the start, and
  nothing on one rank. With a ring, a rank sends and receives ``2 (W - 1) / W`` of it.
- *Logged* in TensorBoard, by rank zero alone, at a logged step: one event for the histograms of all tensors
  and the pooled one, with 16 bytes for each bucket that is shown (512 at most), and one event for all their scalars. The
  sizes are those of the records of an event file; the tags are asked of ``magnitude_report``, so that nothing is left out. Beside
  these there are the heatmaps and the tables of the worst layers, at the 1st, 2nd, 4th, 8th, ... logged step, and the
  head of the file.
- *Kept* in the checkpoint and in ``calibration.json``: four numbers and a learning rate for each group, and six numbers
  for each measurement of the noise scale, of which there are 4,096 at most: one a logged step under DDP, else one for
  each pair of a logged step and the next one.
- *Held* for the noise scale: under DDP a gradient during a logged step, 4 bytes in fp32 for each parameter; else a
  gradient and a second moment from a logged step to the next one, 8 bytes for each parameter that the rank has. At no
  other time, and not at all with ``noise_scale=False``.

For FSDP2 the model takes each rank to count its own shard, and the table to hold all tensors on every rank.

The check. A small network is trained in one process, and under DDP on 2, 4 and 8 gloo ranks. The bytes that are
all-reduced are counted in each rank around ``torch.distributed.all_reduce``, those that are logged in the event file,
record by record, and the numbers that are kept in the monitor's state. The number of buckets, which the data decide, is
read from the event file for the prediction.
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from measuring import installed_version, machine, write_csv
from ranks import run_ranks
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram
from lightning_gradhist.report.magnitudes import magnitude_report

WORD = 8  # int64, and a number in a checkpoint
MOST_BUCKETS = 512
MOST_MEASUREMENTS = 4096
NUMBERS_A_MEASUREMENT = 6
RANKS = (1, 2, 4, 8)
MEASURED = "all_reduced logged_histograms logged_scalars kept".split()
MACHINE = "date device cpu cores threads python torch lightning tensorboard lightning_gradhist".split()
COLUMNS = [
    *"case ranks tensors parameters bins_per_octave steps every_n_steps logged_steps buckets".split(),
    *(f"{what}_bytes{suffix}" for what in MEASURED for suffix in ("", "_measured")),
    *"ring_bytes_a_rank held_bytes_a_rank logged_other_bytes_measured".split(),
    *MACHINE,
]
Row = dict[str, Any]


# --- the model --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What the bytes depend on."""

    names: list[str]
    """Of the tensors."""
    parameters: int
    ranks: int
    steps: int
    every_n_steps: int = 50
    bins_per_octave: int = 8
    sharded: bool = False
    """Whether a rank has its share of the parameters, as under FSDP2, or all of them, as under DDP."""

    @property
    def logged_steps(self) -> range:
        """The steps that are logged."""
        return range(0, self.steps, self.every_n_steps)

    @property
    def within_steps(self) -> bool:
        """Whether noise is measured within a step, from what each rank has before averaging."""
        return self.ranks > 1 and not self.sharded

    @property
    def measurements(self) -> int:
        """Of the noise scale: one a logged step, or a logged step and the next one, no step in two pairs."""
        if self.within_steps:
            return len(self.logged_steps)
        if self.every_n_steps == 1:
            return self.steps // 2
        return sum(step + 1 < self.steps for step in self.logged_steps)

    @property
    def all_reduces(self) -> int:
        """Calls in the whole run: counts, measurements, and once whether all ranks know the batch size."""
        return len(self.logged_steps) + self.measurements + 1 if self.ranks > 1 else 0

    @property
    def table_bytes(self) -> int:
        """Bytes of the counts of a logged step."""
        return len(self.names) * (254 * self.bins_per_octave + 3) * WORD

    @property
    def all_reduced_bytes(self) -> int:
        """Bytes that each rank gives to ``all_reduce`` in the whole run."""
        counts = len(self.logged_steps) * self.table_bytes
        return counts + WORD * (4 * self.measurements + 1) if self.ranks > 1 else 0

    @property
    def ring_bytes_a_rank(self) -> int:
        """Bytes that each rank sends in the whole run if the all-reduce is a ring."""
        return 2 * (self.ranks - 1) * self.all_reduced_bytes // self.ranks

    @property
    def kept_bytes(self) -> int:
        """Bytes of the numbers in the state, with one optimizer of one group."""
        return WORD * (5 + NUMBERS_A_MEASUREMENT * min(self.measurements, MOST_MEASUREMENTS))

    @property
    def held_bytes_a_rank(self) -> int:
        """Bytes for the noise scale while it is measured, with gradients in fp32."""
        return (4 if self.within_steps else 8) * self.parameters // (self.ranks if self.sharded else 1)

    def logged_bytes(self, buckets: Callable[[str, int], int]) -> dict[str, int]:
        """Bytes of the events of the whole run, histograms and scalars apart.

        Args:
            buckets: how many are shown of a histogram, by its tag and the step.
        """
        counted = MagnitudeHistogram(self.names, self.bins_per_octave)
        counted.table[:, 1 + 127 * self.bins_per_octave] = 1  # so that every name has something to be logged
        report = magnitude_report(counted, "gradient")
        steps = self.logged_steps
        return {
            "logged_histograms": sum(
                event_bytes((histogram_bytes(t, buckets(t, s)) for t in report.histograms), s) for s in steps
            ),
            "logged_scalars": sum(event_bytes(map(scalar_bytes, report.scalars), s) for s in steps),
        }


def event_bytes(values: Iterable[int], step: int) -> int:
    """Bytes of the record of an event in an event file, of the bytes of its values."""
    summary = sum(map(_field_bytes, values))
    return _FRAME + Event(wall_time=1.0, step=step).ByteSize() + _field_bytes(summary)


def histogram_bytes(tag: str, buckets: int) -> int:
    """Bytes of a histogram: five doubles, and two for each bucket."""
    return _histogram_bytes(len(tag.encode()), buckets)


def scalar_bytes(tag: str) -> int:
    """Bytes of a scalar: a float32."""
    return _scalar_bytes(len(tag.encode()))


@functools.cache
def _histogram_bytes(tag_bytes: int, buckets: int) -> int:
    ones = [1.0] * buckets
    histogram = HistogramProto(min=1, max=1, num=1, sum=1, sum_squares=1, bucket_limit=ones, bucket=ones)
    return Summary.Value(tag="a" * tag_bytes, histo=histogram).ByteSize()


@functools.cache
def _scalar_bytes(tag_bytes: int) -> int:
    return Summary.Value(tag="a" * tag_bytes, simple_value=1.0).ByteSize()


def _field_bytes(size: int) -> int:
    """Bytes of a message within another: its number, its length in pieces of seven bits, and itself."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


_FRAME = 16  # around an event: its length in 8 bytes, and a checksum of either in 4


# --- the check --------------------------------------------------------------------------------------------------------


class Small(L.LightningModule):
    """Six layers of 64: 12 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean square of what comes out."""
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, which has a second moment."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Measured:
    """What one rank has seen."""

    all_reduced_bytes: int
    all_reduce_calls: int
    kept_bytes: int


def train(folder: Path, steps: int, every_n_steps: int, bins_per_octave: int) -> Measured:
    """Train on this rank without the monitor and with it, and count the bytes that it adds to those all-reduced."""
    monitor = GradientHistogramMonitor(every_n_steps, bins_per_octave)
    of_lightning = all_reduced(folder / "without", steps, [])  # which asks all ranks whether to stop
    sent = all_reduced(folder / "with", steps, [monitor])
    bytes_sent, calls = sum(sent) - sum(of_lightning), len(sent) - len(of_lightning)
    return Measured(bytes_sent, calls, WORD * numbers_in(monitor.state_dict()))


def all_reduced(folder: Path, steps: int, callbacks: list[L.Callback]) -> list[int]:
    """Train on this rank, and list the bytes of each call of ``torch.distributed.all_reduce``.

    The averaging of the gradients is not among them, as DDP does it in C++.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sent: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *arguments, **options)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto",
        max_steps=steps,
        callbacks=callbacks,
        logger=TensorBoardLogger(folder, name="", version=""),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4 * ranks * steps, 64))
    torch.distributed.all_reduce = counting
    try:
        trainer.fit(Small(), DataLoader(data, 4))
    finally:
        torch.distributed.all_reduce = all_reduce
    return sent


def numbers_in(state: Any) -> int:
    """How many numbers there are in nested dicts and lists; one that was not finite is None, and counts."""
    if isinstance(state, dict):
        return sum(map(numbers_in, state.values()))
    if isinstance(state, list):
        return sum(map(numbers_in, state))
    return 1


@dataclass
class Logged:
    """What is in an event file: bytes, and the buckets of each histogram by tag and step."""

    histograms: int = 0
    scalars: int = 0
    other: int = 0
    buckets: dict[tuple[str, int], int] = field(default_factory=dict)


def read_events(folder: Path) -> Logged:
    """Add up the records of the event file in a folder by their kind."""
    [path] = folder.glob("events.out.tfevents.*")
    logged = Logged()
    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        kinds = {value.WhichOneof("value") for value in event.summary.value}
        record_bytes = _FRAME + len(record)
        if kinds == {"histo"}:
            logged.histograms += record_bytes
            logged.buckets |= {(value.tag, event.step): len(value.histo.bucket) for value in event.summary.value}
        elif kinds == {"simple_value"}:
            logged.scalars += record_bytes
        else:
            logged.other += record_bytes
    return logged


def check(ranks: int, steps: int = 5, every_n_steps: int = 2, bins_per_octave: int = 8) -> Row:
    """Measure on gloo ranks, or in this process for one, and put the prediction beside it.

    Raises:
        AssertionError: where they differ.
    """
    module = Small()
    names = [name for name, _ in module.named_parameters()]
    parameters = sum(p.numel() for p in module.parameters())
    setup = Setup(names, parameters, ranks, steps, every_n_steps, bins_per_octave)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), steps, every_n_steps, bins_per_octave)
        measured = run_ranks(train, ranks, *arguments) if ranks > 1 else [train(*arguments)]
        logged = read_events(Path(folder) / "with")
    shown = logged.buckets
    predicted = predict(setup, lambda tag, step: shown[tag, step])
    found = {
        "all_reduced": {one.all_reduced_bytes for one in measured},
        "logged_histograms": {logged.histograms},
        "logged_scalars": {logged.scalars},
        "kept": {one.kept_bytes for one in measured},
    }
    compare(found, predicted, ranks)
    calls = {one.all_reduce_calls for one in measured}
    assert calls == {setup.all_reduces}, f"{sorted(calls)} all-reduces on {ranks} ranks"
    return {
        "case": "measured",
        **predicted,
        **{f"{what}_bytes_measured": values.pop() for what, values in found.items()},
        "logged_other_bytes_measured": logged.other,
        "buckets": round(sum(shown.values()) / len(shown)),
    }


def compare(found: Mapping[str, set[int]], predicted: Row, ranks: int) -> None:
    """Hold what the ranks have measured against the prediction; all must be equal to it."""
    for what, values in found.items():
        expected = predicted[f"{what}_bytes"]
        assert values == {expected}, f"{what} on {ranks} ranks: measured {sorted(values)} bytes, predicted {expected}"


def predict(setup: Setup, buckets: Callable[[str, int], int]) -> Row:
    """The columns that the model fills."""
    return {
        "ranks": setup.ranks,
        "tensors": len(setup.names),
        "parameters": setup.parameters,
        "bins_per_octave": setup.bins_per_octave,
        "steps": setup.steps,
        "every_n_steps": setup.every_n_steps,
        "logged_steps": len(setup.logged_steps),
        "all_reduced_bytes": setup.all_reduced_bytes,
        **{f"{what}_bytes": number for what, number in setup.logged_bytes(buckets).items()},
        "kept_bytes": setup.kept_bytes,
        "ring_bytes_a_rank": setup.ring_bytes_a_rank,
        "held_bytes_a_rank": setup.held_bytes_a_rank,
    }


# --- 70 B parameters --------------------------------------------------------------------------------------------------


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """The 723 tensors of a decoder like Llama 3's of 70 B: 80 layers of width 8,192, and 8 key-value heads of 128."""
    width, keys, hidden, vocabulary = 8192, 1024, 28672, 128256
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (hidden, width),
        "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(80) for name, shape in layer.items()}
    ends = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }
    return {**layers, **ends}


def large_rows(ranks: int = 1024, steps: int = 10_000) -> list[Row]:
    """The model of 70 B under FSDP2, at several cadences, widths of the bins, and numbers of buckets that are shown."""
    shapes = llama_shapes()
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    rows = []
    for every, bins, buckets in [
        (50, 8, MOST_BUCKETS),
        (50, 8, 128),
        (1, 8, 128),
        (50, 1, 64),
        (50, 128, MOST_BUCKETS),
    ]:
        setup = Setup(list(shapes), parameters, ranks, steps, every, bins, sharded=True)
        rows.append({"case": "model", **predict(setup, lambda _tag, _step, n=buckets: n), "buckets": buckets})
    return rows


def print_large(rows: list[Row], latency: float, bandwidth: float) -> None:
    """Print the table for 70 B, with times that are arithmetic and nothing else."""
    first = rows[0]
    print(
        f"model: {first['parameters'] / 1e9:.1f} B parameters in {first['tensors']} tensors (80 layers, like Llama 3's"
        f" 70 B) on {first['ranks']:,} ranks under FSDP2, {first['steps']:,} steps"
    )
    table = [
        ["every", "bins an", "buckets a", "all-reduced", "ring, a rank", "logged", "logged", "kept", "held, a rank"],
        [
            "",
            "octave",
            "histogram",
            "a logged step",
            "a logged step",
            "a logged step",
            "in all",
            "in all",
            "for a step",
        ],
    ]
    for row in rows:
        logged, times = row["logged_histograms_bytes"] + row["logged_scalars_bytes"], row["logged_steps"]
        sizes = [row["all_reduced_bytes"] / times, row["ring_bytes_a_rank"] / times, logged / times, logged]
        sizes += [row["kept_bytes"], row["held_bytes_a_rank"]]
        table.append([*(str(row[name]) for name in ("every_n_steps", "bins_per_octave", "buckets")), *map(size, sizes)])
    for line in table:
        print("  " + "".join(cell.ljust(15) for cell in line).rstrip())
    hops, moved = 2 * (first["ranks"] - 1), first["ring_bytes_a_rank"] / first["logged_steps"]
    seconds = hops * latency + moved / bandwidth
    print(
        f"  arithmetic, not a measurement: a ring all-reduce at {first['bins_per_octave']} bins an octave takes {hops:,} hops"
        f" x {latency * 1e6:g} us + {size(moved)} / {bandwidth / 1e9:g} GB/s = {seconds * 1e3:.1f} ms, or"
        f" {seconds * 1e3 / first['every_n_steps']:.2f} ms a step at every {first['every_n_steps']}, assuming that latency"
        " of a hop and bandwidth of a rank, and nothing else on the network"
    )


def size(number: float) -> str:
    """Bytes for reading."""
    unit, scale = next((u, s) for u, s in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)] if number >= s or s == 1)
    return f"{number / scale:.3g} {unit}"


# --- the run ----------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Run the check, and print the model's table."""
    parser = argparse.ArgumentParser(description="Bytes that the monitor all-reduces, logs and keeps.")
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS), help="to measure on (default: 1 2 4 8)")
    parser.add_argument("--steps", type=int, default=5, help="of the measured runs, every second logged (default: 5)")
    parser.add_argument("--latency", type=float, default=10e-6, help="of a hop in seconds, assumed (default: 10e-6)")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="of a rank in bytes/s, assumed (default: 25e9)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/capture_scale_cpu.csv")
    args = parser.parse_args(arguments)
    output = args.output or Path(__file__).parent / "results" / "capture_scale_cpu.csv"

    rows: list[Row] = []
    for ranks in args.ranks:
        rows.append(check(ranks, args.steps))
        shown = ", ".join(f"{what} {rows[-1][f'{what}_bytes']:,}" for what in MEASURED)
        print(f"{ranks} ranks: measured bytes equal the predicted ones: {shown}", flush=True)
    large = large_rows()
    print_large(large, args.latency, args.bandwidth)
    versions = {name: installed_version(name) for name in ("lightning", "tensorboard")}
    known = {**machine(torch.device("cpu")), **versions}
    described = {name: known[name] for name in MACHINE}
    write_csv([{**row, **described} for row in [*rows, *large]], COLUMNS, output)


if __name__ == "__main__":
    main()
