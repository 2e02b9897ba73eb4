"""What it costs to watch gradients while Lightning trains: the monitor, and its peers.

``make bench-capture``; how it measures is told in ``benchmarks/README.md``.
"""

import argparse
import gc
import itertools
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

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
from reporting import CPU, Row, parser, peer_version, print_table, print_verdicts, quartiles, report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_gradhist import GradientHistogramMonitor, MagnitudeHistogram, OptimizerCalibration
from lightning_gradhist.callbacks.strategies import slice_of

ROUNDS, GATE_STEPS, CALLS = 5, 2, 3
LEFT_OUT_STEPS, WHOLE_STEPS = 3, 6  # the latter are timed in a turn with whole batches
SMALL_BATCH = 1
PEERS = {"share_of_add_histogram": cases.ADD_HISTOGRAM, "share_of_wandb_watch": cases.WANDB}
MEASURED = [
    *"step_ms step_ms_q25 step_ms_q75 added_ms added_ms_q25 added_ms_q75 added_share added_clock_ms".split(),
    *("beyond_none_again_ms", *PEERS, "log_bytes_in_10000_steps"),
    *"share_of_read_bandwidth work_of_one_rank_in_two probe_in_steps".split(),
]
COLUMNS = [
    *(*"model tensors parameters batch variant version rounds".split(), *MEASURED, "note"),
    *"date device cpu cores threads gpu python torch lightning triton lightning_gradhist".split(),
]
SHOWN = ["model", "variant", *(c for c in MEASURED if c not in ("step_ms_q25", "step_ms_q75", "beyond_none_again_ms"))]
ALONE, PROBE = "counting alone", "calibration's probe"

# seconds of each step of a training, ``[2, steps]``: of the processor or the device, and on the clock
Turn = np.ndarray
Round = tuple[Turn, dict[str, Turn]]  # a turn of none on whole batches, and one of each variant


class Clock(L.Callback):
    """What the steps take, on the clock and of the processor or the device, without waiting for the latter."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.clock, self.work = device, [], []

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock.append(perf_counter())
        if self.device.type == "cpu":
            self.work.append(process_time())
            return
        self.work.append(torch.cuda.Event(enable_timing=True))
        self.work[-1].record()

    def seconds(self) -> list[float]:
        """Of the processor or the device, of each step but the last."""
        if self.device.type == "cpu":
            return np.diff(self.work).tolist()
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(self.work)]


def trainer(folder: Path, callbacks: list[L.Callback], **options: Any) -> L.Trainer:
    """A Trainer with a TensorBoard logger that shows nothing and keeps no checkpoints."""
    quiet = {f"enable_{what}": False for what in ("checkpointing", "model_summary", "progress_bar")}
    usual = {"accelerator": "cpu", "devices": 1, "deterministic": False, **quiet}
    return L.Trainer(callbacks=callbacks, logger=TensorBoardLogger(folder, name="", version=""), **usual | options)


def fit(
    data: tuple[Training, DataLoader], callbacks: list[L.Callback], folder: Path, device: torch.device, **options: Any
) -> Training:
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's on the number of workers, and the peers' on torch
        trainer(folder, callbacks, accelerator=accelerator, max_epochs=1, **options).fit(*data)
    return data[0]


def take_turn(task: Task, variant: Variant, device: torch.device, steps: int, batch_size: int | None = None) -> Turn:
    """Train once, on whole batches if nothing else is said."""
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        fit(made(task, steps + 1, batch_size), [clock, *variant.callbacks(task)], Path(folder), device)
    gc.collect()
    return np.array([clock.seconds(), np.diff(clock.clock)])


def take_rounds(task: Task, some: Sequence[Variant], rounds: int, device: torch.device) -> list[Round]:
    """All variants in each round, the order moved on by one."""
    few, small = LEFT_OUT_STEPS + WHOLE_STEPS, None if device.type == "cuda" else SMALL_BATCH
    none = next(variant for variant in some if variant.name == cases.NONE)

    def turn(variant: Variant) -> Turn:
        slow = device.type == "cuda" and variant.name in PEERS.values()  # seconds a step, and all alike
        return take_turn(task, variant, device, few if slow else variant.steps or task.steps, small)

    done = []
    for index in range(rounds):
        first = index % len(some)
        order = [*some[first:], *some[:first]]
        done.append((take_turn(task, none, device, few), {variant.name: turn(variant) for variant in order}))
        print(f"  round {index + 1} of {rounds}", flush=True)
    return done


def added_in_round(turns: dict[str, Turn], variant: Variant) -> np.ndarray:
    """As :func:`added`, of the processor or the device and on the clock; of a run that measures noise as often as it does.

    In a turn it is measured at every logged step, as in the first 1,000 steps of a run.
    """

    def of(name: str) -> np.ndarray:
        pairs = zip(turns[name], turns[cases.NONE], strict=True)
        return np.array([added(variant, mine, none) for mine, none in pairs])

    beyond = of(variant.name)
    if variant.is_denser_in_turn:
        beyond -= (1 - cases.NOISE_SHARE) * (of(cases.EVERY_STEP) - of(cases.NO_NOISE))
    return beyond


def added(variant: Variant, seconds: Sequence[float], plain: Sequence[float]) -> float:
    """Seconds beyond a training without a callback, a step, over the first 10,000 of a run."""
    beyond = np.array(seconds) - statistics.fmean(plain[LEFT_OUT_STEPS:])
    if not variant.draws:
        start = 0 if variant.steps else len(beyond) // 2  # where the report of the first step is written
        return float(beyond[start:].mean())
    # the first and the second half of the steps from the last heatmap but one to the last
    every = variant.every_n_steps_in_turn
    power = _heatmaps(len(seconds) // every + 1)
    first, last = (every * (4**k - 1) for k in (power - 1, power))
    middle = first + every * (3 * 4 ** (power - 1) // 2)
    logged = every * float(beyond[middle:last].mean())
    drawn = float(beyond[first:middle].sum()) - (middle - first) / every * logged
    reports = cases.RUN // variant.every_n_steps
    return (reports * logged + _heatmaps(reports) * drawn) / cases.RUN


def _heatmaps(reports: int) -> int:
    """How many of the 4th, 16th, 64th, ... logged step there are."""
    return (reports.bit_length() - 1) // 2


def check(task: Task, device: torch.device) -> None:
    """Assert that the logged counts are numpy's, and the weights those of a training without a monitor."""
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
    plain = 1e3 * np.array([np.median(whole[0, LEFT_OUT_STEPS:]) for whole, _ in rounds])
    if variant.name == cases.NONE:
        return {"rounds": len(rounds), **quartiles("step_ms", plain)}
    work, clock = 1e3 * np.array([added_in_round(turns, variant) for _, turns in rounds]).T
    share, on_clock = float(np.median(work) / np.median(plain)), float(np.median(clock))
    return {"rounds": len(rounds), **quartiles("added_ms", work), "added_share": share, "added_clock_ms": on_clock}


def against_peers(rows: dict[str, Row]) -> None:
    """Fill in what the monitor adds as a share of what its peers add, and its off-steps beyond a difference of nothing."""
    for name, row in rows.items():
        if name.startswith("monitor"):
            row |= {col: row["added_ms"] / rows[peer]["added_ms"] for col, peer in PEERS.items() if peer in rows}
    if cases.OFF_STEPS in rows and cases.NONE_AGAIN in rows:
        beyond = rows[cases.OFF_STEPS]["added_ms_q25"] - rows[cases.NONE_AGAIN]["added_ms_q75"]
        rows[cases.OFF_STEPS]["beyond_none_again_ms"] = beyond


def bytes_logged(task: Task, variant: Variant, device: torch.device) -> float:
    """In 10,000 steps: what a training logs at every step, a step, times the logged ones."""
    if variant.name == cases.DEFAULT:  # it logs as often in a turn, where heatmaps and heads of files weigh more
        return bytes_logged(task, cases.monitor(cases.EVERY_STEP, 1), device) / variant.every_n_steps
    steps = 2 * task.steps
    with tempfile.TemporaryDirectory() as folder:
        fit(made(task, steps, SMALL_BATCH), variant.callbacks(task), Path(folder), device)
        files = [path for path in Path(folder).rglob("*") if path.is_file() and not path.is_symlink()]
        return sum(path.stat().st_size for path in files) * cases.RUN / steps


def gradients_of(task: Task, device: torch.device) -> dict[str, Tensor]:
    """Noise in the shapes of a model's gradients."""
    module, _ = made(task, 1)
    return {name: 1e-4 * torch.randn(p.shape, device=device) for name, p in module.named_parameters()}


def median_share(rounds: int, one: Callable[[], float], other: Callable[[], float]) -> float:
    """One time over another: the median over the rounds, before which one warms up."""
    return statistics.median([one() / other() for _ in range(rounds + 1)][1:])


def slice_share(name: str, scale: float, rounds: int) -> float:
    """On a rank: work of counting its slice over that of counting all, with the other ranks at the same."""
    gradients = gradients_of(next(task for task in cases.tasks(scale) if task.name == name), CPU)
    histogram, sizes = MagnitudeHistogram(list(gradients)), {key: g.numel() for key, g in gradients.items()}
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def work(values: Callable[[], dict[str, Tensor]]) -> float:
        torch.distributed.barrier()
        return seconds_per_call(lambda: histogram.update(values()), CALLS, CPU, process_time)

    own = partial(slice_of, gradients, sizes, rank, ranks)
    return median_share(rounds, lambda: work(lambda: dict(own())), lambda: work(lambda: gradients))


def alone(task: Task, scale: float, rounds: int, device: torch.device) -> Row:
    """The row on counting without a training, held against a read of the gradients' bytes, and a rank's slice against all."""
    gradients = gradients_of(task, device)
    histogram, flat = MagnitudeHistogram(list(gradients), device), torch.cat([g.flatten() for g in gradients.values()])
    timed = partial(seconds_per_call, calls=CALLS, device=device)
    share = median_share(rounds, lambda: timed(flat.sum), lambda: timed(lambda: histogram.update(gradients)))
    row: Row = {"variant": ALONE, "rounds": rounds, "share_of_read_bandwidth": share}
    if device.type == "cpu":
        row["work_of_one_rank_in_two"] = max(run_ranks(slice_share, 2, task.name, scale, rounds))
    return row


def probe_row(task: Task, rounds: int, device: torch.device) -> Row:
    """What the calibration's probe takes, in as many training steps as it has batches: the median over the rounds."""
    batches = OptimizerCalibration().probe_batches
    none = next(variant for variant in cases.variants() if variant.name == cases.NONE)
    probe = Variant(PROBE, lambda task: [OptimizerCalibration(reference_batch_size=task.batch_size)])
    shares = []
    for _ in range(rounds):
        plain, probed = (take_turn(task, variant, device, batches + 1)[0] for variant in (none, probe))
        step = statistics.median(plain[LEFT_OUT_STEPS:])
        shares.append((probed[0] - step) / (batches * step))  # the probe is made before the first step
    return {"variant": PROBE, "rounds": rounds, "probe_in_steps": statistics.median(shares)}


def split(task: Task, only: list[str] | None) -> tuple[list[Variant], list[Row]]:
    """The variants that can be made, and a row with the reason for each that cannot."""
    there = cases.variants()
    names = {one.name for one in there if only is None or one.name in (cases.NONE, *only)}
    if any(one.is_denser_in_turn for one in there if one.name in names):
        names |= {cases.EVERY_STEP, cases.NO_NOISE}
    wanted = [one for one in there if one.name in names]
    good, reasons = built(wanted, lambda variant: variant.callbacks(task))
    return good, [{"variant": name, "note": note} for name, note in reasons.items()]


def measure(task: Task, args: argparse.Namespace, device: torch.device) -> list[Row]:
    sizes = [p.numel() for p in made(task, 1)[0].parameters()]
    of_model = {"model": task.name, "tensors": len(sizes), "parameters": sum(sizes), "batch": task.batch_shape}
    print(f"{task.name}: {len(sizes):,} tensors, {sum(sizes):,} parameters, {task.batch_shape}", flush=True)
    some, left_out = split(task, args.only)
    rows: dict[str, Row] = {v.name: {"variant": v.name, "version": peer_version(v.distribution)} for v in some}
    if device.type == "cpu":  # of the host
        for variant in (one for one in some if one.name in (cases.DEFAULT, cases.EVERY_STEP, *PEERS.values())):
            rows[variant.name]["log_bytes_in_10000_steps"] = bytes_logged(task, variant, device)
    rounds = take_rounds(task, some, args.rounds, device)
    for variant in some:
        rows[variant.name] |= of_rounds(rounds, variant)
    against_peers(rows)
    apart = [alone(task, args.scale, args.rounds, device)]
    if device.type == "cpu":  # of the host
        apart.append(probe_row(task, args.rounds, device))
    return [{**of_model, **row} for row in [*rows.values(), *apart, *left_out]]


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
    models, names = ([one.name for one in some] for some in (cases.tasks(), cases.variants()))
    options = parser("What it costs to watch gradients while Lightning trains.", models, names, "capture_cost")
    options.add_argument("--scale", type=float, default=1.0, help="share of the models' size, for a try-out")
    options.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    args = options.parse_args(arguments)
    device = torch.device(args.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # several wait for one another in a loop, which is time of the processor
    rows = report(args, "capture_cost", COLUMNS, run(args, device), "lightning", "triton")
    print_table(rows, SHOWN)
    print(f"targets (for models of full size; this run: {args.scale:g} of it)")
    print_verdicts("capture_cost", rows, "variant", args.device)


if __name__ == "__main__":
    main()
