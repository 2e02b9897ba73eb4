"""What it costs to watch gradients while Lightning trains: the monitor, and its peers.

``make bench-capture``, or ``python benchmarks/capture_cost.py``. Three models (``capture_variants.py``): a CNN of 1.1 M
parameters, batch 128 of 32 x 32; a transformer of 25 M, 4 x 128 tokens; and 2,000 small tensors, 1 M parameters, batch
128. They are trained by a Trainer with torch's AdamW, one batch again and again from memory, a TensorBoard logger, and
no progress bar or checkpoints, so that a step is forward, backward, AdamW, and what Lightning does around it.

First a gate: on each model the counts that the monitor logs of some steps are held against numpy's of the gradients in
those steps, and the weights after a training with it must be those after one without it, bit for bit. A failure ends
the run before anything is timed.

Then the variants take turns, once a round, the order moved on by one from round to round. A turn is a Trainer, a module
and a ``fit`` of their own. What a step takes goes from one ``on_train_batch_start`` to the next, in a callback that
comes before all others. On the CPU it is taken in seconds of the processor, of all threads of the process together
(``process_time``), with one thread for torch and numpy: so the work of other threads counts in full, and what other
processes take from the clock does not. The difference on the clock stands beside it. wandb's own process is in neither.
What watching gradients adds does not depend on the batch, but the noise of a step does, which on a shared machine is a
tenth of it; so turns are on batches of 1, and what is added to ``none`` of the same round is held against a step of
``none`` on the whole batch. (A variant that does depend on the batch has one turn of 9 steps on whole batches.) On CUDA
the time is that between two events, and all turns are on whole batches.

The heatmap comes at the 1st, 2nd, 4th, 8th, ... logged step. The steps of a turn from the last but one to the last are
cut in two: the second half has none, and tells what a logged step adds (``logged_ms``), the first one what a heatmap
adds. Of what draws none the second half of the turn counts. ``added_ms`` is what a step adds over the first 10,000 of a
run with as many of both as come there. The default cadence has every 4th step of its turn logged, and every 50th of the
run; off-steps have a variant of their own. Reported are medians over the rounds, with quartiles. ``none, again`` shows
what a difference of nothing looks like, and ``beyond_none_again_ms`` how far the lower quartile of off-steps lies above
the upper one of that. ``end_seconds`` goes from the last batch to the return of ``fit``: work that was put off is done
there.

Memory and log are measured at every logged step of a training of two turns' length on batches of 1:
``memory_bytes`` is the resident memory in the last quarter beyond that of ``none``, ``memory_growth_bytes`` how far it
lies above the quarter before (medians over steps), and the log the bytes of all files that were written, by the number
of logged steps. Times the logged steps of 10,000 that is the size of the log, and not too little, as heatmaps and heads
of files, which become rarer, are in it. wandb's own process is not in the memory.

Alone: counting all gradients once, against reading as many bytes (``Tensor.sum`` of one tensor); and on two gloo ranks,
counting the slice of a rank against counting all, both ranks at it at the same time, in seconds of the processor.

``make peers`` installs the peers. A peer that cannot be run is named in the report and in the CSV, with the reason.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from time import process_time
from typing import Any

import capture_variants
import lightning as L
import numpy as np
import torch
from capture_turns import LEFT_OUT_STEPS, SMALL_BATCH, Memory, Round, fit, take_rounds
from capture_variants import (
    ADD_HISTOGRAM,
    DEFAULT,
    EVERY_STEP,
    NONE,
    NONE_AGAIN,
    OFF_STEPS,
    RUN,
    WANDB,
    Task,
    Variant,
    made,
)
from measuring import installed_version, machine, print_table, read_csv, seconds_per_call, write_csv
from optim_implementations import LeftOut
from ranks import run_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from threadpoolctl import threadpool_limits
from torch import Tensor

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram
from lightning_gradhist.histogram import slice_of

ROUNDS = 5
GATE_STEPS = 3
CALLS = 3
RANKS = 2
MACHINE = "date device cpu cores threads gpu python torch lightning triton lightning_gradhist".split()
PEERS = {"share_of_add_histogram": ADD_HISTOGRAM, "share_of_wandb_watch": WANDB}
MEASURED = [
    *"step_ms step_ms_q25 step_ms_q75 added_ms added_ms_q25 added_ms_q75 added_share added_clock_ms".split(),
    *"logged_ms beyond_none_again_ms".split(),
    *PEERS,
    *"end_seconds log_bytes_per_logged_step log_bytes_in_10000_steps".split(),
    *"memory_bytes memory_growth_bytes".split(),
    *"share_of_read_bandwidth work_of_one_rank_in_two".split(),
]
COLUMNS = [*"model tensors parameters batch variant version rounds".split(), *MEASURED, "note", *MACHINE]
SHOWN = [
    *"model variant step_ms added_ms added_ms_q25 added_ms_q75 added_share added_clock_ms logged_ms".split(),
    *PEERS,
    *"end_seconds log_bytes_in_10000_steps memory_bytes memory_growth_bytes".split(),
    *"share_of_read_bandwidth work_of_one_rank_in_two".split(),
]
ALONE = "counting alone"
Row = dict[str, Any]


# --- the gate ---------------------------------------------------------------------------------------------------------


class Gradients(L.Callback):
    """The gradients of each step, on the host."""

    def __init__(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Copy them."""
        self.steps.append({name: p.grad.cpu().clone().numpy() for name, p in pl_module.named_parameters()})


def check(task: Task, device: torch.device) -> None:
    """Hold the logged counts against numpy's, and the weights against those of a training without a monitor.

    Raises:
        AssertionError: where they differ.
    """
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = fit(task, [], GATE_STEPS, folder / "plain", device)
        watched = fit(
            task, [GradientHistogramMonitor(every_n_steps=1), gradients], GATE_STEPS, folder / "watched", device
        )
        events = EventAccumulator(str(folder / "watched"), {"histograms": 0}).Reload()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), f"{task.name}: the monitor has changed {name}"
    assert len(gradients.steps) == GATE_STEPS
    for step, of_step in enumerate(gradients.steps):
        of_step["all"] = np.concatenate([gradient.ravel() for gradient in of_step.values()])
        for name, gradient in of_step.items():
            if np.abs(gradient).max() >= np.finfo(np.float32).tiny:
                logged = {
                    event.step: event.histogram_value for event in events.Histograms(f"gradient_magnitude/{name}")
                }
                assert step in logged, f"{task.name}: step {step} of {name} was not logged"
                check_counts(logged[step], gradient, f"{task.name}: {name} at step {step}")


def check_counts(logged: Any, gradient: np.ndarray, what: str) -> None:
    """Compare a histogram of TensorBoard with numpy's on edges that are powers of two, each octave cut in eight."""
    octaves, eighths = np.arange(-126, 128)[:, None], 1 + np.arange(8) / 8
    edges = np.append(np.ldexp(eighths, octaves).ravel(), 2.0**128)
    counts, _ = np.histogram(np.abs(gradient.astype(np.float64)), edges)
    below = np.append(0, counts.cumsum())  # of the values below each edge
    at = np.searchsorted(np.log10(edges), np.asarray(logged.bucket_limit) - 1e-9)
    wrong = below[at] != np.cumsum(logged.bucket)
    assert not wrong.any() and sum(logged.bucket) == counts.sum(), f"{what}: the counts differ from numpy's"


# --- turns ------------------------------------------------------------------------------------------------------------


def of_rounds(rounds: list[Round], variant: Variant) -> Row:
    """The columns that come from the turns of a variant."""
    mine = [one for one in rounds if variant.name in one.turns]
    added = [one.added(variant) for one in mine]
    milliseconds = 1e3 * np.array([one.step for one in added])
    plain = 1e3 * np.array([statistics.median(one.whole.seconds[LEFT_OUT_STEPS:]) for one in mine])
    row: Row = {"rounds": len(mine)}
    if variant.name == NONE:
        return row | quartiles("step_ms", plain)
    row |= quartiles("added_ms", milliseconds)
    row["added_share"] = f"{np.median(milliseconds) / np.median(plain):.4g}"
    row["added_clock_ms"] = (
        f"{1e3 * np.median([one.added(variant, attrgetter('clock_seconds')).step for one in mine]):.4g}"
    )
    row["end_seconds"] = f"{np.median([one.turns[variant.name].end_seconds for one in mine]):.3g}"
    if variant.draws:
        row["logged_ms"] = f"{1e3 * np.median([one.logged for one in added]):.4g}"
    return row


def against_peers(rows: dict[str, Row]) -> None:
    """Fill in what the monitor adds as a share of what its peers add, and its off-steps beyond a difference of nothing."""
    for name, row in rows.items():
        if name.startswith("monitor"):
            for column, peer in PEERS.items():
                if peer in rows:
                    row[column] = f"{float(row['added_ms']) / float(rows[peer]['added_ms']):.4g}"
    if OFF_STEPS in rows and NONE_AGAIN in rows:
        beyond = float(rows[OFF_STEPS]["added_ms_q25"]) - float(rows[NONE_AGAIN]["added_ms_q75"])
        rows[OFF_STEPS]["beyond_none_again_ms"] = f"{beyond:.4g}"


def quartiles(column: str, values: Any) -> Row:
    """A median, and the quartiles beside it."""
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {column: f"{middle:.4g}", f"{column}_q25": f"{low:.4g}", f"{column}_q75": f"{high:.4g}"}


# --- memory and log ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """What a training holds in memory, and leaves on the disk."""

    memory: float
    """Bytes, in the last quarter."""
    growth: float
    """Bytes, since the quarter before."""
    log: float
    """Bytes a step."""


def hold(task: Task, variant: Variant, device: torch.device) -> Held:
    """Train for two turns' length, of one that logs every step, or nothing."""
    memory, steps = Memory(), 2 * task.steps
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [*capture_variants.callbacks_of(variant, task), memory]
        fit(task, callbacks, steps, Path(folder), device, SMALL_BATCH)
        files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
        written = sum(path.stat().st_size for path in files)
    before, last = (statistics.median(memory.bytes[k * steps // 4 : (k + 1) * steps // 4]) for k in (2, 3))
    return Held(last, last - before, written / steps)


def of_memory_and_log(task: Task, some: list[Variant], device: torch.device) -> dict[str, Row]:
    """The columns on memory and log, by variant; for those where they are compared."""
    compared = [variant for variant in some if variant.name in (NONE, EVERY_STEP, *PEERS.values())]
    held = {variant.name: hold(task, variant, device) for variant in compared}
    rows: dict[str, Row] = {}
    for variant in compared:
        mine = held[variant.name]
        beyond, growth = mine.memory - held[NONE].memory, mine.growth
        rows[variant.name] = {"memory_bytes": f"{beyond:.4g}", "memory_growth_bytes": f"{growth:.4g}"}
        rows[variant.name] |= of_log(mine.log, variant) if variant.logs else {}
    for default in (variant for variant in some if variant.name == DEFAULT and EVERY_STEP in held):
        rows[DEFAULT] = of_log(held[EVERY_STEP].log, default)
    return rows


def of_log(bytes_a_logged_step: float, variant: Variant) -> Row:
    """The columns on the size of the log."""
    return {
        "log_bytes_per_logged_step": f"{bytes_a_logged_step:.0f}",
        "log_bytes_in_10000_steps": f"{bytes_a_logged_step * RUN / variant.every_n_steps:.4g}",
    }


# --- counting alone ---------------------------------------------------------------------------------------------------


def gradients_of(task: Task, device: torch.device) -> dict[str, Tensor]:
    """Noise in the shapes of a model's gradients."""
    module, _ = made(task, 1)
    return {name: 1e-4 * torch.randn(p.shape, device=device) for name, p in module.named_parameters()}


def share_of_read_bandwidth(task: Task, rounds: int, device: torch.device) -> float:
    """Time of a read of the gradients' bytes over the time of counting them: the median over the rounds."""
    gradients = gradients_of(task, device)
    with device:
        histogram = MagnitudeHistogram(list(gradients))
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    shares = []
    for _ in range(rounds + 1):
        read = seconds_per_call(flat.sum, CALLS, device)
        shares.append(read / seconds_per_call(lambda: histogram.update(gradients), CALLS, device))
    return statistics.median(shares[1:])  # the first one warms up


def slice_share(name: str, scale: float, rounds: int) -> float:
    """On a rank: time of counting its slice over the time of counting all, with the other ranks at the same."""
    gradients = gradients_of(
        next(task for task in capture_variants.tasks(scale) if task.name == name), torch.device("cpu")
    )
    histogram = MagnitudeHistogram(list(gradients))
    sizes = {key: gradient.numel() for key, gradient in gradients.items()}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares = []
    for _ in range(rounds + 1):
        torch.distributed.barrier()
        cut = work_of(lambda: histogram.update(dict(slice_of(gradients, sizes, rank, ranks))))
        torch.distributed.barrier()
        shares.append(cut / work_of(lambda: histogram.update(gradients)))
    return statistics.median(shares[1:])


def work_of(function: Callable[[], object]) -> float:
    """Seconds of the processor that some calls take."""
    start = process_time()
    for _ in range(CALLS):
        function()
    return process_time() - start


def alone(task: Task, scale: float, rounds: int, device: torch.device) -> Row:
    """The row on counting without a training."""
    row: Row = {"variant": ALONE, "rounds": rounds}
    row["share_of_read_bandwidth"] = f"{share_of_read_bandwidth(task, rounds, device):.4g}"
    if device.type == "cpu":
        row["work_of_one_rank_in_two"] = f"{max(run_ranks(slice_share, RANKS, task.name, scale, rounds)):.4g}"
    return row


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What a cell of the CSV should be, on every model; None where there is no target."""

    variant: str
    column: str
    cpu: float | None
    cuda: float | None
    what: str
    at_least: bool = False

    def verdicts(self, rows: list[Row], device: str, measured_on: str) -> list[str]:
        """Compare with what was measured, a line a model."""
        limit = getattr(self, device)
        if limit is None:
            return []
        wanted = f"  {device:4}  {self.what} {'>=' if self.at_least else '<='} {limit:g}"
        if device != measured_on:
            return [f"{wanted}: not measured: {command(device)}"]
        mine = [row for row in rows if row["variant"] == self.variant] or [{}]
        return [f"{wanted}, {row.get('model', 'all models')}: {self._found(row, limit)}" for row in mine]

    def _found(self, row: Row, limit: float) -> str:
        if not row.get(self.column):
            return f"not measured: {row.get('note') or 'the row or that of its peer is missing'}"
        value = float(row[self.column])
        met = value >= limit if self.at_least else value <= limit
        return f"{value:g}, {'met' if met else 'NOT MET'}"


TARGETS = [
    Target(DEFAULT, "added_share", 0.01, 0.005, "default cadence, added share of a step"),
    Target(EVERY_STEP, "added_share", 0.15, 0.03, "every step, added share of a step"),
    Target(EVERY_STEP, "share_of_add_histogram", 0.2, 0.05, "every step, share of add_histogram's added time"),
    Target(EVERY_STEP, "share_of_wandb_watch", 0.2, 0.05, "every step, share of wandb.watch's added time"),
    Target(OFF_STEPS, "beyond_none_again_ms", 0, 0, "off-steps, lower quartile beyond the upper one of none, again"),
    Target(ALONE, "share_of_read_bandwidth", None, 0.8, "counting, share of the bandwidth of a read", at_least=True),
    Target(ALONE, "work_of_one_rank_in_two", 0.55, None, "counting on a rank of two, share of one rank's work"),
]


def command(device: str) -> str:
    """What fills the cells of a device."""
    return f"python benchmarks/capture_cost.py --device {device}"


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    scale: float = 1.0
    rounds: int = ROUNDS
    models: list[str] | None = None
    only: list[str] | None = None


def split(task: Task, only: list[str] | None) -> tuple[list[Variant], list[Row]]:
    """The variants that can be made, and a row with the reason for each that cannot."""
    good: list[Variant] = []
    left_out: list[Row] = []
    for variant in capture_variants.variants():
        if only is None or variant.name in (NONE, *only):
            try:
                variant.callback(task)
            except LeftOut as reason:
                print(f"  left out: {variant.name} ({reason})")
                left_out.append({"variant": variant.name, "note": f"left out: {reason}"})
            else:
                good.append(variant)
    return good, left_out


def measure(task: Task, options: Options, device: torch.device) -> list[Row]:
    """Measure everything on one model."""
    parameters = [p.numel() for p in made(task, 1)[0].parameters()]
    of_model = {
        "model": task.name,
        "tensors": len(parameters),
        "parameters": sum(parameters),
        "batch": task.batch_shape,
    }
    print(f"{task.name}: {len(parameters):,} tensors, {sum(parameters):,} parameters, {task.batch_shape}", flush=True)
    some, left_out = split(task, options.only)
    rows = {variant.name: {"variant": variant.name, "version": variant.version} for variant in some}
    of_long = of_memory_and_log(task, some, device)
    rounds = take_rounds(task, some, options.rounds, device)
    for variant in some:
        rows[variant.name] |= of_long.get(variant.name, {}) | of_rounds(rounds, variant)
    against_peers(rows)
    counted = alone(task, options.scale, options.rounds, device)
    return [{**of_model, **row} for row in [*rows.values(), counted, *left_out]]


def run(options: Options, device: torch.device) -> Iterator[list[Row]]:
    """Check everything, then measure; the rows of the CSV, but for the machine, of one model after another."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks = [t for t in capture_variants.tasks(options.scale) if options.models is None or t.name in options.models]
    for task in tasks:
        check(task, device)
        print(f"correct: {task.name}: logged counts are numpy's, weights are those without a monitor", flush=True)
    gc.freeze()  # a collection between two turns then does not go through all that is imported
    with threadpool_limits(1 if device.type == "cpu" else None):
        for task in tasks:
            yield measure(task, options, device)
    gc.unfreeze()


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    names = [task.name for task in capture_variants.tasks()]
    variants = [variant.name for variant in capture_variants.variants()]
    parser = argparse.ArgumentParser(description="What it costs to watch gradients while Lightning trains.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the models' size, for a try-out (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"{', '.join(names)}; the rows of others that the output has are kept",
    )
    parser.add_argument(
        "--only", nargs="+", choices=variants, metavar="NAME", help="beside none: " + "; ".join(variants[1:])
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/capture_cost_<device>.csv")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # several wait for one another in a loop, which is time of the processor
    output = args.output or Path(__file__).parent / "results" / f"capture_cost_{args.device}.csv"

    described = {**machine(device), "lightning": installed_version("lightning")}
    print("  ".join(f"{name}: {value}" for name, value in described.items() if value), flush=True)
    options = Options(args.scale, args.rounds, args.models, args.only)
    rows: list[Row] = []
    kept = read_csv(output)
    for of_model in run(options, device):
        rows += [{**row, **described} for row in of_model]
        measured = {row["model"] for row in rows}
        kept = [row for row in kept if row["model"] not in measured]
        write_csv([*kept, *rows], COLUMNS, output)  # after each model: it takes long
    print_table(rows, SHOWN)
    print(f"targets (for models of full size; this run: {args.scale:g} of it)")
    for on in ("cpu", "cuda"):
        print("\n".join(line for target in TARGETS for line in target.verdicts(rows, on, args.device)))


if __name__ == "__main__":
    main()
