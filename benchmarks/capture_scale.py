"""Bytes that the monitor all-reduces, logs and keeps: a model, its prediction for 70 B parameters, and its check.

``make bench-scale``, or ``python benchmarks/capture_scale.py``; the model is told in ``benchmarks/README.md``. All is
counted in bytes and no time is taken, so that the numbers do not depend on the machine.
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
from capture_turns import trainer
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from reporting import CPU, RESULTS, Row, machine, print_table, write_csv
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram
from lightning_gradhist.histogram import COLUMNS as BINS
from lightning_gradhist.logging.charts import magnitude_report

WORD = 8  # int64, and a number in a checkpoint
MOST_BUCKETS = 512
MOST_MEASUREMENTS = 4096
NUMBERS_A_MEASUREMENT = 6
RANKS = (1, 2, 4, 8)
MEASURED = "all_reduced logged_histograms logged_scalars kept".split()
COLUMNS = [
    *"case ranks tensors parameters steps every_n_steps logged_steps buckets".split(),
    *(f"{what}_bytes{suffix}" for what in MEASURED for suffix in ("", "_measured")),
    *"ring_bytes_a_rank held_bytes_a_rank logged_other_bytes_measured".split(),
    *"date device cpu cores threads python torch lightning tensorboard lightning_gradhist".split(),
]
_FRAME = 16  # around an event: its length in 8 bytes, and a checksum of either in 4


@dataclass(frozen=True)
class Setup:
    """What the bytes depend on.

    Attributes:
        names: of the tensors.
        parameters: how many.
        ranks: how many.
        steps: of the optimizer.
        every_n_steps: from one logged step to the next.
        sharded: whether a rank has its share of the parameters, as under FSDP2, or all of them, as under DDP.
    """

    names: list[str]
    parameters: int
    ranks: int
    steps: int
    every_n_steps: int = 50
    sharded: bool = False

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
    def all_reduced_bytes(self) -> int:
        """Bytes that each rank gives to ``all_reduce`` in the whole run."""
        counts = len(self.logged_steps) * len(self.names) * BINS * WORD
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
        counted = MagnitudeHistogram(self.names)
        counted.table[:, BINS // 2] = 1  # so that every name has something to be logged
        report = magnitude_report(counted, "gradient")
        histograms = sum(
            event_bytes((histogram_bytes(len(tag.encode()), buckets(tag, step)) for tag in report.histograms), step)
            for step in self.logged_steps
        )
        scalars = [scalar_bytes(len(tag.encode())) for tag in report.scalars]
        return {
            "logged_histograms": histograms,
            "logged_scalars": sum(event_bytes(scalars, step) for step in self.logged_steps),
        }

    def predicted(self, buckets: Callable[[str, int], int]) -> Row:
        """The columns that the model fills."""
        names = "ranks parameters steps every_n_steps all_reduced_bytes kept_bytes ring_bytes_a_rank held_bytes_a_rank"
        return {
            **{name: getattr(self, name) for name in names.split()},
            "tensors": len(self.names),
            "logged_steps": len(self.logged_steps),
            **{f"{what}_bytes": number for what, number in self.logged_bytes(buckets).items()},
        }


def event_bytes(values: Iterable[int], step: int) -> int:
    """Bytes of the record of an event in an event file, of the bytes of its values."""
    summary = sum(map(_field_bytes, values))
    return _FRAME + Event(wall_time=1.0, step=step).ByteSize() + _field_bytes(summary)


@functools.cache
def histogram_bytes(tag_bytes: int, buckets: int) -> int:
    """Bytes of a histogram: its tag, five doubles, and two for each bucket."""
    ones = [1.0] * buckets
    histogram = HistogramProto(min=1, max=1, num=1, sum=1, sum_squares=1, bucket_limit=ones, bucket=ones)
    return Summary.Value(tag="a" * tag_bytes, histo=histogram).ByteSize()


@functools.cache
def scalar_bytes(tag_bytes: int) -> int:
    """Bytes of a scalar: its tag, and a float32."""
    return Summary.Value(tag="a" * tag_bytes, simple_value=1.0).ByteSize()


def _field_bytes(size: int) -> int:
    """Bytes of a message within another: its number, its length in pieces of seven bits, and itself."""
    return 1 + max(1, -(-size.bit_length() // 7)) + size


class Small(L.LightningModule):
    """Six layers of 64: 12 tensors, under AdamW."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean square of what comes out."""
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(folder: Path, steps: int, every_n_steps: int) -> dict[str, int]:
    """Train on this rank without the monitor and with it; what it adds to the bytes all-reduced and to the state."""
    monitor = GradientHistogramMonitor(every_n_steps)
    of_lightning = all_reduced(folder / "without", steps, [])  # which asks all ranks whether to stop
    sent = all_reduced(folder / "with", steps, [monitor])
    return {
        "all_reduced": sum(sent) - sum(of_lightning),
        "calls": len(sent) - len(of_lightning),
        "kept": WORD * numbers_in(monitor.state_dict()),
    }


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

    strategy = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(4 * ranks * steps, 64))
    torch.distributed.all_reduce = counting
    try:
        trainer(folder, callbacks, devices=ranks, strategy=strategy, max_steps=steps).fit(Small(), DataLoader(data, 4))
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
    """What is in an event file: bytes by kind, and the buckets of each histogram by tag and step."""

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


def check(ranks: int, steps: int = 5, every_n_steps: int = 2) -> Row:
    """Measure on gloo ranks, or in this process for one, and put the prediction beside it.

    Raises:
        AssertionError: where they differ.
    """
    sizes = {name: p.numel() for name, p in Small().named_parameters()}
    setup = Setup(list(sizes), sum(sizes.values()), ranks, steps, every_n_steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), steps, every_n_steps)
        measured = run_ranks(train, ranks, *arguments) if ranks > 1 else [train(*arguments)]
        logged = read_events(Path(folder) / "with")
    shown = logged.buckets
    predicted = setup.predicted(lambda tag, step: shown[tag, step])
    found = {
        "all_reduced": {one["all_reduced"] for one in measured},
        "logged_histograms": {logged.histograms},
        "logged_scalars": {logged.scalars},
        "kept": {one["kept"] for one in measured},
    }
    compare(found, predicted, ranks)
    calls = {one["calls"] for one in measured}
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


def llama_shapes() -> dict[str, tuple[int, ...]]:
    """The 723 tensors of a decoder like Llama 3's of 70 B: 80 layers of width 8,192, and 8 key-value heads of 128."""
    width, keys, hidden, vocabulary = 8192, 1024, 28672, 128256
    layer = {
        **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (width, width)),
        **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (keys, width)),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (hidden, width)),
        "mlp.down_proj": (width, hidden),
        **dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,)),
    }
    layers = {f"model.layers.{i}.{name}.weight": shape for i in range(80) for name, shape in layer.items()}
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, width))
    return {**layers, **ends, "model.norm.weight": (width,)}


def large_rows(ranks: int = 1024, steps: int = 10_000) -> list[Row]:
    """The model of 70 B under FSDP2, at several cadences and numbers of buckets that are shown."""
    shapes = llama_shapes()
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    rows = []
    for every, buckets in [(50, MOST_BUCKETS), (50, 128), (1, 128)]:
        setup = Setup(list(shapes), parameters, ranks, steps, every, sharded=True)
        rows.append({"case": "model", **setup.predicted(lambda _tag, _step, n=buckets: n), "buckets": buckets})
    return rows


def print_large(rows: list[Row], latency: float, bandwidth: float) -> None:
    """Print the table for 70 B, with times that are arithmetic and nothing else."""
    first = rows[0]
    print(
        f"model: {first['parameters'] / 1e9:.1f} B parameters in {first['tensors']} tensors (80 layers, like Llama 3's"
        f" 70 B) on {first['ranks']:,} ranks under FSDP2, {first['steps']:,} steps; bytes of a logged step (all-reduced;"
        " by a rank in a ring; logged), in all (logged; kept), and held on a rank for a step"
    )
    table = []
    for row in rows:
        times, logged = row["logged_steps"], row["logged_histograms_bytes"] + row["logged_scalars_bytes"]
        sizes = {
            "all-reduced": row["all_reduced_bytes"] / times,
            "in a ring": row["ring_bytes_a_rank"] / times,
            "logged": logged / times,
            "logged in all": logged,
            "kept": row["kept_bytes"],
            "held": row["held_bytes_a_rank"],
        }
        cadence = {"every": row["every_n_steps"], "buckets": row["buckets"]}
        table.append({**cadence, **{name: size(number) for name, number in sizes.items()}})
    print_table(table, list(table[0]))
    hops, moved = 2 * (first["ranks"] - 1), first["ring_bytes_a_rank"] / first["logged_steps"]
    seconds = hops * latency + moved / bandwidth
    print(
        f"  arithmetic, not a measurement: a ring all-reduce takes {hops:,} hops x {latency * 1e6:g} us + {size(moved)} /"
        f" {bandwidth / 1e9:g} GB/s = {seconds * 1e3:.1f} ms, or {seconds * 1e3 / first['every_n_steps']:.2f} ms a step at"
        f" every {first['every_n_steps']}, assuming that latency of a hop and bandwidth of a rank, and nothing else on the"
        " network"
    )


def size(number: float) -> str:
    """Bytes for reading."""
    unit, scale = next((u, s) for u, s in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)] if number >= s or s == 1)
    return f"{number / scale:.3g} {unit}"


def main(arguments: list[str] | None = None) -> None:
    """Run the check, and print the model's table."""
    parser = argparse.ArgumentParser(description="Bytes that the monitor all-reduces, logs and keeps.")
    parser.add_argument("--ranks", type=int, nargs="*", default=list(RANKS), help="to measure on (default: 1 2 4 8)")
    parser.add_argument("--steps", type=int, default=5, help="of the measured runs, every second logged (default: 5)")
    parser.add_argument("--latency", type=float, default=10e-6, help="of a hop in seconds, assumed (default: 10e-6)")
    parser.add_argument("--bandwidth", type=float, default=25e9, help="of a rank in bytes/s, assumed (default: 25e9)")
    parser.add_argument("--output", type=Path, default=RESULTS / "capture_scale_cpu.csv")
    args = parser.parse_args(arguments)

    rows: list[Row] = []
    for ranks in args.ranks:
        rows.append(check(ranks, args.steps))
        shown = ", ".join(f"{what} {rows[-1][f'{what}_bytes']:,}" for what in MEASURED)
        print(f"{ranks} ranks: measured bytes equal the predicted ones: {shown}", flush=True)
    large = large_rows()
    print_large(large, args.latency, args.bandwidth)
    described = machine(CPU, "lightning", "tensorboard")
    write_csv(args.output, COLUMNS, [{**row, **described} for row in [*rows, *large]])


if __name__ == "__main__":
    main()
