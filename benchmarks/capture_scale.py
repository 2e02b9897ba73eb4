"""Bytes that the monitor all-reduces, logs and keeps: a model, its prediction for 70 B parameters, and its check.

``make bench-scale``; the model is told in ``benchmarks/README.md``. No time is taken: the numbers are those of any machine.
"""

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from capture_cost import trainer
from capture_variants import Training
from lightning.pytorch.strategies import DDPStrategy
from ranks import run_ranks
from reporting import CPU, RESULTS, Row, machine, print_table, write_csv
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram
from lightning_gradhist.histogram import COLUMNS as BINS
from lightning_gradhist.logging.magnitude_report import magnitude_report
from lightning_gradhist.logging.noise_report import noise_margins
from lightning_gradhist.noise.sample import Sample

WORD = 8  # int64, and a number in a checkpoint
MOST_BUCKETS = 64
LENGTH = 3 + 17  # planned steps, those made, warm-up, and the rate at the ends of sixteenths of the run
MOST_MEASUREMENTS, NUMBERS_A_MEASUREMENT = 4096, 6
FRAME = 16  # around an event in its file: its length in 8 bytes, and a checksum of either in 4
MEASURED = ("all_reduced", "kept")
COLUMNS = [
    *"case ranks tensors parameters steps every_n_steps logged_steps".split(),
    *(f"{what}_bytes{suffix}" for what in MEASURED for suffix in ("", "_measured")),
    *"ring_bytes_a_rank held_bytes_a_rank logged_histograms_bytes logged_scalars_bytes".split(),
    *"date device cpu cores threads python torch lightning tensorboard lightning_gradhist".split(),
]


def _measurements(logged: Sequence[int], steps: int, within_steps: bool) -> int:
    """How often noise is measured: within a step, or from a pair of steps, and after 1,000 at most every tenth time."""
    count = earliest = 0
    for step in logged:
        if step >= earliest and (within_steps or step + 1 < steps):
            count += 1
            earliest = step + (10 if step >= 1000 else 1 if within_steps else 2)
    return count


def predicted(sizes: Mapping[str, int], ranks: int, steps: int, every_n_steps: int, sharded: bool = False) -> Row:
    """The model: bytes of a whole run with one group and gradients in fp32, under DDP, or ``sharded`` as under FSDP2."""
    logged = range(0, steps, every_n_steps)
    within_steps = ranks > 1 and not sharded  # noise is measured from what each rank has before averaging
    measurements = _measurements(logged, steps, within_steps)
    # counts with a checksum of two words, measurements with sizes, checksum and digest, and once whether all ranks have memory
    counts = len(logged) * (len(sizes) * BINS + 2)
    reduced = WORD * (counts + (10 + ranks) * measurements + 1) if ranks > 1 else 0
    sampled = _sampled(size // (ranks if sharded else 1) for size in sizes.values())
    return {
        **{"ranks": ranks, "tensors": len(sizes), "parameters": sum(sizes.values())},
        **{"steps": steps, "every_n_steps": every_n_steps, "logged_steps": len(logged)},
        "all_reduces": len(logged) + measurements + 1 if ranks > 1 else 0,
        "all_reduced_bytes": reduced,
        "ring_bytes_a_rank": 2 * (ranks - 1) * reduced // ranks,
        "kept_bytes": WORD * (5 + LENGTH + NUMBERS_A_MEASUREMENT * min(measurements, MOST_MEASUREMENTS)),
        "held_bytes_a_rank": (4 if within_steps else 8) * sampled,
    }


def _sampled(sizes: Iterable[int]) -> int:
    """About how many values of tensors of such sizes noise is measured of."""
    named = {str(place): size for place, size in enumerate(sizes)}
    strides = Sample.at(0, named).strides
    return sum(size // strides.get(name, 1) for name, size in named.items())


def logged(names: Sequence[str], steps: Sequence[int]) -> Row:
    """Bytes of the records of an event file where each histogram has all its buckets, and each row its norm."""
    counted = MagnitudeHistogram(names)
    counted.table[:, BINS // 2] = 1  # so that every name has something to be logged
    report, ones = magnitude_report(counted, "gradient"), [1.0] * MOST_BUCKETS
    proto = HistogramProto(min=1, max=1, num=1, sum=1, sum_squares=1, bucket_limit=ones, bucket=ones)
    noise = [tag for tags in noise_margins().values() for tag in tags]
    noise += [f"noise_scale/{kind}batch_size" for kind in ("", "critical_")]
    histograms = [Summary.Value(tag=tag, histo=proto) for tag in report.histograms]
    scalars = ([Summary.Value(tag=tag, simple_value=1.0) for tag in tags] for tags in (report.scalars, noise))
    return {
        "logged_histograms_bytes": _records(histograms, steps),
        "logged_scalars_bytes": sum(_records(values, steps) for values in scalars),
    }


def _records(values: Sequence[Summary.Value], steps: Sequence[int]) -> int:
    """Bytes of one event at each step, all with the same values."""
    summary = Event(summary=Summary(value=values)).ByteSize()
    return sum(FRAME + summary + Event(wall_time=1.0, step=step).ByteSize() for step in steps)


def small() -> nn.Module:
    """Six layers of 64: 12 tensors."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(6)))


def train(folder: Path, steps: int, every_n_steps: int) -> dict[str, int]:
    """Train on this rank without the monitor and with it; what it adds to the bytes all-reduced and to the state."""
    monitor = GradientHistogramMonitor(every_n_steps)
    of_lightning = all_reduced(folder / "without", steps, [])  # which asks all ranks whether to stop
    sent = all_reduced(folder / "with", steps, [monitor])
    return {
        "all_reduced_bytes": sum(sent) - sum(of_lightning),
        "all_reduces": len(sent) - len(of_lightning),
        "kept_bytes": WORD * _numbers_in(monitor.state_dict()),
    }


def all_reduced(folder: Path, steps: int, callbacks: list[L.Callback]) -> list[int]:
    """Train on this rank, and list the bytes of each ``torch.distributed.all_reduce``; DDP averages gradients elsewhere."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    sent: list[int] = []
    all_reduce = torch.distributed.all_reduce

    def counting(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *arguments, **options)

    strategy = DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
    torch.manual_seed(0)
    samples = 4 * ranks * steps
    data = DataLoader(TensorDataset(torch.randn(samples, 64), torch.randint(64, (samples,))), 4)
    torch.distributed.all_reduce = counting
    try:
        trainer(folder, callbacks, devices=ranks, strategy=strategy, max_steps=steps).fit(Training(small()), data)
    finally:
        torch.distributed.all_reduce = all_reduce
    return sent


def _numbers_in(state: Any) -> int:
    """How many numbers there are in nested dicts and lists; one that was not finite is None, and counts."""
    if isinstance(state, dict):
        return sum(map(_numbers_in, state.values()))
    return sum(map(_numbers_in, state)) if isinstance(state, list) else int(not isinstance(state, str))


def check(ranks: int, steps: int = 5, every_n_steps: int = 2) -> Row:
    """Measure on gloo ranks, or in this process for one, and put the prediction beside it; an error where they differ."""
    expected = predicted({n: p.numel() for n, p in Training(small()).named_parameters()}, ranks, steps, every_n_steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder), steps, every_n_steps)
        of_ranks = run_ranks(train, ranks, *arguments, seconds=600) if ranks > 1 else [train(*arguments)]
    for of_rank in of_ranks:
        compare(of_rank, expected, ranks)
    return {"case": "measured", **expected, **{f"{name}_measured": number for name, number in of_ranks[0].items()}}


def compare(measured: Mapping[str, int], expected: Row, ranks: int) -> None:
    """Hold what a rank has measured against what is predicted of it; they must be equal."""
    for name in ("all_reduces", *(f"{what}_bytes" for what in MEASURED)):
        got, wanted = measured.get(name, 0), expected.get(name, 0)
        assert got == wanted, f"{name} on {ranks} ranks: measured {got}, predicted {wanted}"


def llama_sizes() -> dict[str, int]:
    """The 723 tensors of a decoder like Llama 3's of 70 B: 80 layers of width 8,192, and 8 key-value heads of 128."""
    width, keys, hidden, vocabulary = 8192, 1024, 28672, 128256
    layer = dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), width * width)
    layer |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), keys * width)
    layer |= dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), hidden * width)
    layer |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), width)
    layers = {f"model.layers.{i}.{name}.weight": size for i in range(80) for name, size in layer.items()}
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), vocabulary * width)
    return {**layers, **ends, "model.norm.weight": width}


def large_rows(ranks: int = 1024, steps: int = 10_000) -> list[Row]:
    sizes = llama_sizes()
    of_cadence = {every: predicted(sizes, ranks, steps, every, sharded=True) for every in (50, 1)}
    return [{"case": "model", **row, **logged([*sizes], range(0, steps, n))} for n, row in of_cadence.items()]


def main() -> None:
    rows: list[Row] = []
    for ranks in (1, 2, 4, 8):
        rows.append(check(ranks))
        shown = ", ".join(f"{what} {rows[-1][f'{what}_bytes']:,}" for what in MEASURED)
        print(f"{ranks} ranks: measured bytes equal the predicted ones: {shown}", flush=True)
    rows += large_rows()
    print_table(rows, COLUMNS[: COLUMNS.index("date")])
    described = machine(CPU, "lightning", "tensorboard")
    write_csv(RESULTS / "capture_scale_cpu.csv", COLUMNS, [{**row, **described} for row in rows])


if __name__ == "__main__":
    main()
