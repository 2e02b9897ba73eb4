"""What it costs to watch gradients while Lightning trains: the monitor, and its peers.

``make bench-capture``, or ``python benchmarks/capture_cost.py``; how it measures is told in ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, NamedTuple

import capture_variants as cases
import lightning as L
import numpy as np
import torch
from capture_variants import Task, Training, Variant, made
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.loggers import TensorBoardLogger
from measuring import seconds_per_call
from optim_implementations import built
from ranks import run_ranks
from reporting import CPU, RESULTS, Row, machine, print_table, print_verdicts, quartiles, read_csv, write_csv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram
from lightning_gradhist.callbacks.strategies import slice_of

ROUNDS, GATE_STEPS, CALLS = 5, 2, 3
LEFT_OUT_STEPS, WHOLE_STEPS = 3, 6  # the latter are timed in a turn with whole batches
SMALL_BATCH = 1
PEERS = {"share_of_add_histogram": cases.ADD_HISTOGRAM, "share_of_wandb_watch": cases.WANDB}
MEASURED = [
    *"step_ms step_ms_q25 step_ms_q75 added_ms added_ms_q25 added_ms_q75 added_share added_clock_ms".split(),
    *("logged_ms", "beyond_none_again_ms", *PEERS),
    *"end_seconds log_bytes_per_logged_step log_bytes_in_10000_steps".split(),
    *"memory_bytes memory_growth_bytes share_of_read_bandwidth work_of_one_rank_in_two".split(),
]
COLUMNS = [
    *(*"model tensors parameters batch variant version rounds".split(), *MEASURED, "note"),
    *"date device cpu cores threads gpu python torch lightning triton lightning_gradhist".split(),
]
HIDDEN = ("step_ms_q25", "step_ms_q75", "beyond_none_again_ms", "log_bytes_per_logged_step")
SHOWN = ["model", "variant", *(column for column in MEASURED if column not in HIDDEN)]
ALONE = "counting alone"


class Clock(L.Callback):
    """What the steps take, on the clock and of the processor or the device, without waiting for the latter."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock, self.work, self.end = device, [], [], 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Take the times."""
        self.clock.append(perf_counter())
        if self.device.type == "cpu":
            self.work.append(process_time())
            return
        self.work.append(torch.cuda.Event(enable_timing=True))
        self.work[-1].record()

    def on_train_batch_end(self, *_: Any) -> None:
        """Take the time of the last one."""
        self.end = perf_counter()

    def seconds(self) -> list[float]:
        """Of the processor or the device, of each step but the last."""
        if self.device.type == "cpu":
            return np.diff(self.work).tolist()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(self.work)]


def trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A Trainer with a TensorBoard logger that shows nothing and keeps no checkpoints."""
    quiet = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    logger = TensorBoardLogger(folder, name="", version="")
    return L.Trainer(callbacks=callbacks, logger=logger, **{"accelerator": "cpu", "devices": 1, **quiet, **options})


def fit(
    data: tuple[Training, DataLoader], callbacks: list[L.Callback], folder: Path, device: torch.device, **options: Any
) -> Training:
    """Train a module for an epoch of a loader."""
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    made_for = trainer(folder, callbacks, accelerator=accelerator, max_epochs=1, **{"deterministic": False, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's on the number of workers, and the peers' on torch
        made_for.fit(*data)
    return data[0]


class Turn(NamedTuple):
    """What the steps of one training have taken: seconds of the processor or the device, and on the clock."""

    seconds: list[float]
    clock_seconds: list[float]
    end_seconds: float


def take_turn(task: Task, variant: Variant, device: torch.device, steps: int, batch_size: int | None = None) -> Turn:
    """Train once, on whole batches if nothing else is said."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        fit(made(task, steps + 1, batch_size), [clock, *variant.callbacks(task)], Path(folder), device)
        returned = perf_counter()
    gc.collect()
    return Turn(clock.seconds(), np.diff(clock.clock).tolist(), returned - clock.end)


class Round(NamedTuple):
    """A turn of each variant, and one of none on whole batches."""

    whole: Turn
    turns: dict[str, Turn]

    def added(self, variant: Variant, times: str = "seconds") -> Added:
        """What a variant has added to a step, by the times of a turn that are named."""
        plain = self.whole if variant.depends_on_batch else self.turns[cases.NONE]
        return added(variant, getattr(self.turns[variant.name], times), getattr(plain, times))


def take_rounds(task: Task, some: Sequence[Variant], rounds: int, device: torch.device) -> list[Round]:
    """All variants in each round, those that depend on the batch, and take long, in the first one only."""
    few, small = LEFT_OUT_STEPS + WHOLE_STEPS, None if device.type == "cuda" else SMALL_BATCH
    none = next(variant for variant in some if variant.name == cases.NONE)

    def turn(variant: Variant) -> Turn:
        if variant.depends_on_batch:
            return take_turn(task, variant, device, few)
        slow = device.type == "cuda" and variant.name in PEERS.values()  # seconds a step, and all alike
        return take_turn(task, variant, device, few if slow else variant.steps or task.steps, small)

    done = []
    for index in range(rounds):
        first = index % len(some)
        order = [v for v in [*some[first:], *some[:first]] if index == 0 or not v.depends_on_batch]
        done.append(Round(take_turn(task, none, device, few), {v.name: turn(v) for v in order}))
        print(f"  round {index + 1} of {rounds}", flush=True)
    return done


class Added(NamedTuple):
    """Seconds beyond a training without a callback."""

    logged: float  # a logged step; any step of what logs none
    drawn: float  # a heatmap; 0 where none is drawn
    step: float  # a step, over the first 10,000 of a run


def added(variant: Variant, seconds: Sequence[float], plain: Sequence[float]) -> Added:
    """Compare the steps of a variant with those of none."""
    beyond = np.array(seconds) - statistics.fmean(plain[LEFT_OUT_STEPS:])
    if not variant.draws:
        start = 0 if variant.steps else len(beyond) // 2  # where the report of the first step is written
        each = float(beyond[start:].mean())
        return Added(each, 0.0, each)
    # the first and the second half of the steps from the last heatmap but one to the last
    every = variant.every_n_steps_in_turn
    power = _heatmaps(len(seconds) // every + 1)
    first, last = (every * (4**k - 1) for k in (power - 1, power))
    middle = first + every * (3 * 4 ** (power - 1) // 2)
    logged = every * float(beyond[middle:last].mean())
    drawn = float(beyond[first:middle].sum()) - (middle - first) / every * logged
    reports = cases.RUN // variant.every_n_steps
    return Added(logged, drawn, (reports * logged + _heatmaps(reports) * drawn) / cases.RUN)


def _heatmaps(reports: int) -> int:
    """How many of the 4th, 16th, 64th, ... logged step there are."""
    return (reports.bit_length() - 1) // 2


def check(task: Task, device: torch.device) -> None:
    """Hold the logged counts against numpy's, and the weights against those of a training without a monitor.

    Raises:
        AssertionError: where they differ.
    """
    steps: list[dict[str, np.ndarray]] = []

    def keep(trainer: Any, module: Any, optimizer: Any) -> None:
        steps.append({name: p.grad.cpu().clone().numpy() for name, p in module.named_parameters()})

    callbacks = [GradientHistogramMonitor(every_n_steps=1), LambdaCallback(on_before_optimizer_step=keep)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # a GPU adds gradients up in another order at every run, if it may
        plain = fit(made(task, GATE_STEPS), [], folder / "plain", device, deterministic="warn")
        watched = fit(made(task, GATE_STEPS), callbacks, folder / "watched", device, deterministic="warn")
        events = EventAccumulator(str(folder / "watched"), {"histograms": 0}).Reload()
    for name, weight in plain.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), f"{task.name}: the monitor has changed {name}"
    assert len(steps) == GATE_STEPS
    for step, of_step in enumerate(steps):
        of_step["all"] = np.concatenate([gradient.ravel() for gradient in of_step.values()])
        for name, gradient in of_step.items():
            if np.abs(gradient).max() >= np.finfo(np.float32).tiny:
                logged = {e.step: e.histogram_value for e in events.Histograms(f"gradient_magnitude/{name}")}
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


def of_rounds(rounds: list[Round], variant: Variant) -> Row:
    """The columns that come from the turns of a variant."""
    mine = [one for one in rounds if variant.name in one.turns]
    plain = 1e3 * np.array([statistics.median(one.whole.seconds[LEFT_OUT_STEPS:]) for one in mine])
    if variant.name == cases.NONE:
        return {"rounds": len(mine), **quartiles("step_ms", plain)}
    added = [one.added(variant) for one in mine]
    milliseconds = 1e3 * np.array([one.step for one in added])
    clock = [one.added(variant, "clock_seconds").step for one in mine]
    row = {"rounds": len(mine), **quartiles("added_ms", milliseconds), "added_clock_ms": float(1e3 * np.median(clock))}
    row["added_share"] = float(np.median(milliseconds) / np.median(plain))
    row["end_seconds"] = statistics.median(one.turns[variant.name].end_seconds for one in mine)
    return row | ({"logged_ms": 1e3 * statistics.median(one.logged for one in added)} if variant.draws else {})


def against_peers(rows: dict[str, Row]) -> None:
    """Fill in what the monitor adds as a share of what its peers add, and its off-steps beyond a difference of nothing."""
    for name, row in rows.items():
        if name.startswith("monitor"):
            row |= {col: row["added_ms"] / rows[peer]["added_ms"] for col, peer in PEERS.items() if peer in rows}
    if cases.OFF_STEPS in rows and cases.NONE_AGAIN in rows:
        beyond = rows[cases.OFF_STEPS]["added_ms_q25"] - rows[cases.NONE_AGAIN]["added_ms_q75"]
        rows[cases.OFF_STEPS]["beyond_none_again_ms"] = beyond


def hold(task: Task, variant: Variant, device: torch.device) -> tuple[float, float, float]:
    """Bytes of memory in the last quarter of a training of two turns' length, since the quarter before, and of a step's log."""
    page, steps = os.sysconf("SC_PAGE_SIZE"), 2 * task.steps
    resident: list[int] = []  # as Linux tells it
    memory = LambdaCallback(
        on_train_batch_end=lambda *_: resident.append(page * int(Path("/proc/self/statm").read_text().split()[1]))
    )
    with tempfile.TemporaryDirectory() as folder:
        fit(made(task, steps, SMALL_BATCH), [*variant.callbacks(task), memory], Path(folder), device)
        files = (path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink())
        written = sum(path.stat().st_size for path in files)
    before, last = (statistics.median(resident[k * steps // 4 : (k + 1) * steps // 4]) for k in (2, 3))
    return last, last - before, written / steps


def of_memory_and_log(task: Task, some: list[Variant], device: torch.device) -> dict[str, Row]:
    """The columns on memory and log, by variant; for those where they are compared."""
    compared = [variant for variant in some if variant.name in (cases.NONE, cases.EVERY_STEP, *PEERS.values())]
    held = {variant.name: hold(task, variant, device) for variant in compared}
    rows: dict[str, Row] = {}
    for variant in some:
        if variant.name in held:
            memory, growth, _ = held[variant.name]
            rows[variant.name] = {"memory_bytes": memory - held[cases.NONE][0], "memory_growth_bytes": growth}
        logs = held.get(cases.EVERY_STEP if variant.name == cases.DEFAULT else variant.name)
        if logs and variant.logs:
            in_all = logs[2] * cases.RUN / variant.every_n_steps
            log = {"log_bytes_per_logged_step": round(logs[2]), "log_bytes_in_10000_steps": in_all}
            rows[variant.name] = rows.get(variant.name, {}) | log
    return rows


def gradients_of(task: Task, device: torch.device) -> dict[str, Tensor]:
    """Noise in the shapes of a model's gradients."""
    module, _ = made(task, 1)
    return {name: 1e-4 * torch.randn(p.shape, device=device) for name, p in module.named_parameters()}


def share_of_read_bandwidth(task: Task, rounds: int, device: torch.device) -> float:
    """Time of a read of the gradients' bytes over the time of counting them: the median over the rounds."""
    gradients = gradients_of(task, device)
    histogram = MagnitudeHistogram(list(gradients), device)
    flat = torch.cat([gradient.flatten() for gradient in gradients.values()])
    shares = []
    for _ in range(rounds + 1):
        read = seconds_per_call(flat.sum, CALLS, device)
        shares.append(read / seconds_per_call(lambda: histogram.update(gradients), CALLS, device))
    return statistics.median(shares[1:])  # the first one warms up


def slice_share(name: str, scale: float, rounds: int) -> float:
    """On a rank: time of counting its slice over the time of counting all, with the other ranks at the same."""
    gradients = gradients_of(next(task for task in cases.tasks(scale) if task.name == name), CPU)
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
    share = share_of_read_bandwidth(task, rounds, device)
    row: Row = {"variant": ALONE, "rounds": rounds, "share_of_read_bandwidth": share}
    if device.type == "cpu":
        row["work_of_one_rank_in_two"] = max(run_ranks(slice_share, 2, task.name, scale, rounds))
    return row


def split(task: Task, only: list[str] | None) -> tuple[list[Variant], list[Row]]:
    """The variants that can be made, and a row with the reason for each that cannot."""
    wanted = [variant for variant in cases.variants() if only is None or variant.name in (cases.NONE, *only)]
    good, reasons = built(wanted, lambda variant: variant.callbacks(task))
    return good, [{"variant": name, "note": note} for name, note in reasons.items()]


def measure(task: Task, args: argparse.Namespace, device: torch.device) -> list[Row]:
    """Measure everything on one model."""
    sizes = [p.numel() for p in made(task, 1)[0].parameters()]
    of_model = {"model": task.name, "tensors": len(sizes), "parameters": sum(sizes), "batch": task.batch_shape}
    print(f"{task.name}: {len(sizes):,} tensors, {sum(sizes):,} parameters, {task.batch_shape}", flush=True)
    some, left_out = split(task, args.only)
    rows: dict[str, Row] = {variant.name: {"variant": variant.name, "version": variant.version} for variant in some}
    of_long = of_memory_and_log(task, some, device) if device.type == "cpu" else {}  # of the host
    rounds = take_rounds(task, some, args.rounds, device)
    for variant in some:
        rows[variant.name] |= of_long.get(variant.name, {}) | of_rounds(rounds, variant)
    against_peers(rows)
    counted = alone(task, args.scale, args.rounds, device)
    return [{**of_model, **row} for row in [*rows.values(), counted, *left_out]]


def run(args: argparse.Namespace, device: torch.device) -> Iterator[list[Row]]:
    """Check and measure one model after another: the rows of the CSV, but for the machine."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tasks = [task for task in cases.tasks(args.scale) if task.name in args.models and task.only_on in ("", device.type)]
    gc.freeze()  # a collection between two turns then does not go through all that is imported
    with threadpool_limits(1 if device.type == "cpu" else None):
        for task in tasks:
            if not task.only_on:  # what is there is another one in large, which numpy would take minutes for
                check(task, device)
                print(f"correct: {task.name}: counts are numpy's, weights those without a monitor", flush=True)
            yield measure(task, args, device)
    gc.unfreeze()


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    names = [task.name for task in cases.tasks()]
    variants = [variant.name for variant in cases.variants()]
    kept, beside = f"{', '.join(names)}; the rows of others that the output has are kept", "; ".join(variants[1:])
    parser = argparse.ArgumentParser(description="What it costs to watch gradients while Lightning trains.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of the models' size, for a try-out (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--models", nargs="+", choices=names, default=names, metavar="NAME", help=kept)
    parser.add_argument("--only", nargs="+", choices=variants, metavar="NAME", help=f"beside none: {beside}")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/capture_cost_<device>.csv")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # several wait for one another in a loop, which is time of the processor
    output = args.output or RESULTS / f"capture_cost_{args.device}.csv"

    described = machine(device, "lightning", "triton")
    print("  ".join(f"{name}: {value}" for name, value in described.items() if value), flush=True)
    rows: list[Row] = []
    for of_model in run(args, device):
        rows += [{**row, **described} for row in of_model]
        measured = {row["model"] for row in rows}
        others = [row for row in read_csv(output) if row["model"] not in measured]
        write_csv(output, COLUMNS, [*others, *rows])  # after each model: it takes long
    print_table(rows, SHOWN)
    print(f"targets (for models of full size; this run: {args.scale:g} of it)")
    print_verdicts("capture_cost", rows, "variant", args.device)


if __name__ == "__main__":
    main()
