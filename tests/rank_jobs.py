"""What runs on every rank in the distributed tests. Each job is a function of a folder, and writes what it found there."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from ranks import start_ranks
from support import GradientSpy, Net, StateSpy, collectives, dataset, final_state, fit, loader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, TensorDataset

from lightning_gradhist import ALTO, GradientHistogramMonitor, MagnitudeHistogram, NoiseScale, OptimizerCalibration
from lightning_gradhist.callbacks import gradients
from lightning_gradhist.callbacks.calibration import evidence
from lightning_gradhist.callbacks.monitor import observer, updates
from lightning_gradhist.metric import MagnitudeHistogramMetric
from lightning_gradhist.noise import GradientMoments


def exit_codes(job: Callable[[Path], Any], ranks: int, folder: Path) -> list[int | None]:
    """Runs a job on gloo ranks, each to its own end, and returns how they ended; None for one that hangs."""
    started = start_ranks(job, ranks, folder, folder).processes
    for process in started:
        process.join(timeout=120)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def ddp(ranks: int, **options: Any) -> dict[str, Any]:
    return {"devices": ranks, "strategy": DDPStrategy(process_group_backend="gloo", **options)}


def _world() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def numbers(folder: Path) -> Any:
    """The numbers that know ranks, without Lightning: each rank holds its own part of known data."""
    rank, ranks = _world()
    whole = torch.randn(ranks, 1001, generator=torch.Generator().manual_seed(0))
    names = ["a", "b"]
    histogram = MagnitudeHistogram(names)
    histogram.update({"a": whole[rank]} if rank else {"a": whole[rank], "b": whole[rank, :7]})
    metric = MagnitudeHistogramMetric(names)
    metric.update({"a": whole[rank]} if rank else {"a": whole[rank], "b": whole[rank, :7]})
    calls = [size for size, _ in collectives(histogram.all_reduce)[1]]

    gradients = torch.randn(ranks, 6, 50, generator=torch.Generator().manual_seed(1)) + 3
    mine = gradients[rank, : 6 - rank]  # not equally many on every rank
    moments = GradientMoments({"w": mine[0]})
    noise = NoiseScale({"w": mine[0]}, batch_size=4)
    for gradient in mine:
        moments.update({"w": gradient})
        noise.update({"w": gradient})
    moments.all_reduce()
    noise.all_reduce()
    noise.split(eps=1e-8)
    for gradient in mine + 0.1:
        noise.update({"w": gradient})
    noise.all_reduce()
    return {
        "whole": whole,
        "calls": calls,
        "reduced": histogram.table,
        "of_metric": metric.compute().table,
        "gradients": [gradients[r, : 6 - r] for r in range(ranks)],
        "moments": (moments.count, moments.mean["w"], moments.variance()["w"]),
        "noise": (noise.simple(), noise.adam(), noise.measurements),
    }


class Unused(Net):
    """A head that only some ranks use, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(16, 3)
        self.never = nn.Linear(2, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + self.extra(self.body(batch[0])).square().mean() if self.global_rank == 0 else loss


class ChannelsLast(L.LightningModule):
    """Gradients that are not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images = batch[0][:, :3, None, None].expand(-1, 3, 4, 5).contiguous(memory_format=torch.channels_last)
        return nn.functional.cross_entropy(self.head(self.layer(images).mean((2, 3))), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def own_gradients(module: type[L.LightningModule]) -> type[L.LightningModule]:
    """A module that takes its own gradients by itself, without a collective, beside those that Lightning asks for."""

    class Own(module):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            parameters = dict(self.named_parameters())
            share = loss / self.trainer.accumulate_grad_batches
            gradients = torch.autograd.grad(share, [*parameters.values()], retain_graph=True, allow_unused=True)
            self.taken.append({n: g.clone() for n, g in zip(parameters, gradients, strict=True) if g is not None})
            return loss

        def on_train_start(self) -> None:
            self.taken: list[dict[str, Tensor]] = []

    return Own


def monitored(folder: Path) -> Any:
    """The whole gradients of each step, and each rank's own, beside what the monitors log from slices and copies."""
    _, ranks = _world()
    found = {}
    cases: dict[str, Any] = {
        "plain": ({"module": Net}, {}),
        "accumulated": ({"module": Net, "accumulate_grad_batches": 2}, {}),
        "buckets": ({"module": Net}, {"gradient_as_bucket_view": True}),
        "unused": ({"module": Unused}, {"find_unused_parameters": True}),
        "channels_last": ({"module": ChannelsLast}, {}),
    }
    for name in cases if ranks == 2 else ("plain", "unused"):  # what differs with a third rank is the slices
        options, strategy = cases[name]
        spy, state = GradientSpy(), StateSpy()
        monitor = GradientHistogramMonitor(every_n_steps=2, optimizer_state=name in ("unused", "channels_last"))
        before_averaging = GradientHistogramMonitor(every_n_steps=2, noise_scale=False, when="local")
        options["module"] = own_gradients(options["module"])
        made = fit(
            folder / name, monitor, before_averaging, spy, state, data=loader(4), **options, **ddp(ranks, **strategy)
        )
        found[name] = {
            "gradients": spy.seen[::2],
            "state": state.seen,
            "own": made.lightning_module.taken,
            "samples": [record.samples for record in monitor.noise_records],
            "steps": made.global_step,
            "batch_size": monitor.noise_records[0].samples[0]["batch_size"],
        }
    return found


def calibrated(folder: Path) -> Any:
    """Calibrations that are applied: what every rank ends with."""
    _, ranks = _world()

    def eps_too_large(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-1)

    probe = OptimizerCalibration(reference_batch_size=ranks, probe_batches=8)
    made = fit(folder / "probe", probe, module=lambda: Net(eps_too_large), data=loader(4), **ddp(ranks))
    found = {"probe": (_group(made), probe.result, _parameters(made))}

    fit(
        folder / "run",
        GradientHistogramMonitor(every_n_steps=1),
        data=loader(4, samples=256),
        max_epochs=2,
        **ddp(ranks),
    )
    record = OptimizerCalibration(reference=str(folder / "run" / "calibration.json"), probe_batches=4)
    data = loader(512, samples=512 * 4 * ranks)
    made = fit(folder / "record", record, module=lambda: Net(ALTO), data=data, **ddp(ranks))
    found["record"] = (_group(made), record.result, _parameters(made))

    return found


def zero(folder: Path) -> Any:
    """An AdamW whose state ZeRO spreads over the ranks: what each steps with, and the noise in Adam's metric."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which warns of torch's own torch.jit.script

    def spread(parameters: Any) -> Any:
        return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=1e-2, eps=1e-1)

    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8)
    monitor = GradientHistogramMonitor(every_n_steps=1, optimizer_state=True)
    _, ranks = _world()
    made = fit(folder, calibration, monitor, module=lambda: Net(spread), data=loader(4), **ddp(ranks))
    (record,) = monitor.noise_records
    return made.optimizers[0].optim.param_groups[0]["eps"], calibration.result, record.estimate("adam")


def hostile_record(folder: Path) -> Any:
    """A record with a number that no run has: what each rank is told."""
    rank, ranks = _world()
    path = folder / "hostile.json"
    if rank == 0:
        shapes = {name: list(p.shape) for name, p in Net().named_parameters()}
        entry = {"name": "AdamW", "learning_rates": [-0.01], "batch_size": 8, "noise": {}, "samples": []}
        path.write_text(json.dumps({"schema_version": 1, "model": shapes, "steps": 5, "optimizers": [entry]}))
    try:
        fit(folder, OptimizerCalibration(reference=str(path)), data=loader(4), **ddp(ranks))
    except MisconfigurationException as error:
        return str(error)


def _parameters(made: L.Trainer) -> dict[str, Any]:
    # not the buffers: DDP leaves BatchNorm's running averages to each rank
    return {name: p.detach().clone() for name, p in made.lightning_module.named_parameters()}


def _group(made: L.Trainer) -> dict[str, Any]:
    return {name: value for name, value in made.optimizers[0].param_groups[0].items() if name != "params"}


class Drawing(Dataset):  # type: ignore[type-arg]
    """Counts, and draws from a generator deep in it, anew for each run."""

    def __init__(self) -> None:
        self.held = {"deep": [np.random.default_rng(1), [0]]}

    def __len__(self) -> int:
        return 128

    def __getitem__(self, index: int) -> Any:
        generator, count = self.held["deep"]
        count[0] += 1
        inputs, label = dataset()[index]
        return inputs + generator.random() + count[0] / 1000, label


class Restless(Net):
    """A teacher of whole tensors, hooks put on at the first step, a function with a generator, a collective."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = nn.Linear(8, 16).requires_grad_(False)
        self.draw = np.random.default_rng(_world()[0]).random

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for slow, fast in zip(self.slow.parameters(), self.body[0].parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
        if self.calls == 0:
            self.head.register_forward_hook(lambda module, inputs, output: output * (1 + self.calls / 100))
        loss = super().training_step(batch, batch_idx) + (self.slow(batch[0]) - self.body[0](batch[0])).square().mean()
        return loss * (1 + self.draw()) + 0 * self.all_gather(loss.detach()).sum()

    def on_train_start(self) -> None:
        self.trainer.train_dataloader.dataset.held = Drawing().held


def invisible(folder: Path) -> Any:
    """The same run with a calibration that is not applied, and without it."""
    _, ranks = _world()
    found = {}
    cases: dict[str, Any] = {
        "plain": ({"module": Net}, {}),
        "accumulated": ({"module": Net, "accumulate_grad_batches": 2}, {}),
        "unused": ({"module": Unused}, {"find_unused_parameters": True}),
        "static_graph": ({"module": Net}, {"static_graph": True}),
        "restless": ({"module": Restless, "data": DataLoader(Drawing(), 4, shuffle=True)}, {}),
    }
    for name, (options, strategy) in cases.items():
        data = options.pop("data", loader(4))
        calibration = OptimizerCalibration(reference_batch_size=ranks, probe_batches=6, apply=False)
        states = []
        for callbacks in ([calibration], []):
            folder_of = folder / name / str(len(callbacks))
            made = fit(folder_of, *callbacks, data=data, max_epochs=2, **options, **ddp(ranks, **strategy))
            states.append(final_state(made))
        found[name] = (*states, calibration.result.gradients)
    return found


def uneven(folder: Path) -> Any:
    """One rank sees only losses that are not finite: collectives still meet, and all decide the same."""
    rank, ranks = _world()

    class Broken(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if rank == ranks - 1 else loss

    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=4)
    made = fit(folder / "uneven", calibration, module=Broken, data=loader(4), max_steps=2, **ddp(ranks))
    return _group(made), calibration.result.problems, calibration.result.gradients, len(dataset())


def apart(folder: Path) -> Any:
    """A process group, and a Trainer for itself on each rank, or on one alone: nothing may be added up."""
    rank, _ = _world()
    spy = GradientSpy()
    fit(folder / str(rank), GradientHistogramMonitor(every_n_steps=4), spy, devices=1)
    if rank == 0:
        fit(folder / "alone", GradientHistogramMonitor(every_n_steps=4), devices=1)
    return spy.seen[::4]


def short_of_memory(folder: Path) -> Any:
    """One rank has no memory for what the monitor does at one logged step; by what fails, what rank zero is told."""
    rank, ranks = _world()
    found = {}
    for name, owner, attribute, options in (
        ("count", MagnitudeHistogram, "update", {}),
        ("part", observer, "own_parts", {}),
        ("copy", gradients, "local_gradient", {"when": "local"}),
        ("state", updates, "_sums", {"optimizer_state": True}),
        ("table", MagnitudeHistogram, "__init__", {"optimizer_state": True}),
    ):
        spy, original = GradientSpy(), getattr(owner, attribute)

        def fails(*args: Any, spy: Any = spy, original: Any = original, **kwargs: Any) -> Any:
            if rank == 1 and len(spy.seen) in (4, 5):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*args, **kwargs)

        setattr(owner, attribute, fails)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch = GradientHistogramMonitor(every_n_steps=4, **options)
            fit(folder / name, watch, spy, data=loader(4), max_steps=9, **ddp(ranks))
        setattr(owner, attribute, original)
        said = [str(one.message) for one in caught if "could not" in str(one.message)]
        found[name] = said, sum(gradient.count_nonzero() for gradient in spy.seen[8].values())
    return found


class Samples(IterableDataset):  # type: ignore[type-arg]
    """From whatever can be iterated over."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Any:
        return iter(self.source)


def _batches(*sizes: int) -> list[Any]:
    """Batches of samples that no other has, on no rank."""
    first = 64 * _world()[0]
    own = (tensor[first : first + sum(sizes)].split(sizes) for tensor in dataset(128).tensors)
    return list(zip(*own, strict=True))


def out_of_step(folder: Path) -> Any:
    """Ranks that differ: in their number of batches, in what fails, in what overflows. None may wait for ever."""
    rank, ranks = _world()
    found = {}

    class Gathers(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.all_gather(loss.detach())  # as contrastive losses do: a forward pass is a collective
            return loss * 1e3 if rank == 0 and self.probing else loss

        @property
        def probing(self) -> bool:
            return type(self.trainer.loggers[0]).__name__ == "SilentLogger"

    class FailsOnOne(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if rank == 1 and type(self.trainer.loggers[0]).__name__ == "SilentLogger":
                raise RuntimeError("here alone")
            return super().training_step(batch, batch_idx)

    class Heavy(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if rank == 1 and batch_idx == 1 and type(self.trainer.loggers[0]).__name__ == "SilentLogger":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().training_step(batch, batch_idx)

    few = loader(4, samples=12 if rank == 0 else 64)
    one_short = _batches(4, 4, 3 if rank == 0 else 4, 4, 4, 4, 4, 4)
    alike = [*zip(*(tensor.split(4) for tensor in dataset(32).tensors), strict=True)]  # on both ranks
    samples = (sample for sample in dataset()) if rank == 1 else list(dataset())
    stream = DataLoader(Samples(samples), 4)
    for name, module, data, more in (
        ("stream", Net, stream, {"use_distributed_sampler": False}),
        ("uneven", Net, few, {"use_distributed_sampler": False}),
        ("fails", FailsOnOne, loader(4), {}),
        ("overflows", Gathers, loader(4), {"plugins": [_fp16()]}),
        ("heavy", Heavy, loader(4), {}),
        ("short", Gathers, DataLoader(one_short, batch_size=None), {"use_distributed_sampler": False}),
        ("alike", Gathers, DataLoader(alike, batch_size=None), {"use_distributed_sampler": False}),
        ("no room", Net, loader(4), {}),
    ):
        if name == "no room" and rank == 0:
            evidence.NoiseScale = NoRoom
        calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8)
        fit(folder / name, calibration, module=module, data=data, max_steps=2, **ddp(ranks), **more)
        found[name] = (calibration.result.gradients, calibration.result.problems)
    monitor = GradientHistogramMonitor(group_by=lambda name: "ab"[(len(name) + rank) % 2])
    try:
        fit(folder / "groups", monitor, max_steps=2, **ddp(ranks))
    except MisconfigurationException as error:
        found["groups"] = str(error)
    return found


def fails_in_measuring(folder: Path) -> Any:
    """One rank has no memory for what is measured; by what fails, how the calibration and the run end on each."""
    rank, ranks = _world()
    found = {}
    for name, owner, attribute, call in (
        ("a gradient", NoiseScale, "update", 2),
        ("of the second half", NoiseScale, "update", 5),
        ("second moment", GradientMoments, "second_moment", 1),
        ("histogram", MagnitudeHistogram, "update", 1),
    ):
        original, calls = getattr(owner, attribute), [0]

        def fails(*args: Any, original: Any = original, calls: Any = calls, call: int = call, **options: Any) -> Any:
            calls[0] += 1
            if rank == ranks - 1 and calls[0] == call:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*args, **options)

        setattr(owner, attribute, fails)
        calibration = OptimizerCalibration(reference_batch_size=4, probe_batches=8)
        made = fit(folder / name, calibration, data=loader(4), max_steps=2, gradient_clip_val=0.1, **ddp(ranks))
        setattr(owner, attribute, original)
        found[name] = (calibration.result.problems[0], _group(made), made.global_step)
    return found


def unlike_batches(folder: Path) -> Any:
    """Batches vary on one rank alone, or contradict the loader there: what each decides on."""
    rank, ranks = _world()
    found = {}
    for name, own in (("varies", (4, 4, 3, 2, 4, 3, 2, 4)), ("time first", (4, 4, 8, 8, 8, 8, 8, 8))):
        sizes = own if rank else (4,) * 8
        data = DataLoader(_batches(*sizes), batch_size=None)
        data.__dict__["batch_size"] = 4
        calibration = OptimizerCalibration(reference_batch_size=2, probe_batches=8, learning_rate="sqrt")
        options = {"use_distributed_sampler": False, "max_steps": 2}
        made = fit(folder / name, calibration, data=data, **options, **ddp(ranks))
        found[name] = (_group(made), calibration.result.effective_batch_size)
    return found


def told_to_stop(folder: Path) -> Any:
    """The ranks are told to stop in the middle of a probe; how many batches they saw, and what was calibrated."""
    rank, ranks = _world()

    class Told(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with (folder / f"{rank}.txt").open("a") as file:
                file.write("x")
            if batch_idx == 1:
                signal.raise_signal(signal.SIGTERM)  # on all: Lightning's handler calls a collective
            return super().training_step(batch, batch_idx)

    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8)
    try:
        fit(folder, calibration, module=Told, data=loader(4), **ddp(ranks))
    except SystemExit as error:
        return type(error).__name__, (folder / f"{rank}.txt").read_text(), calibration.state_dict()["report"]


class NoRoom:
    """In place of the noise scale, on a rank that has no memory left for it."""

    def __init__(self, *args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")


def not_averaged(folder: Path) -> Any:
    """A communication hook that leaves each rank its own gradients; what rank zero is told, and the noise."""

    def own(state, bucket):  # type: ignore[no-untyped-def] # torch looks at the annotations
        future = torch.futures.Future()  # type: ignore[var-annotated]
        future.set_result(bucket.buffer())
        return future

    class OwnGradients(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            trainer.strategy.model.register_comm_hook(None, own)

    found = {}
    for when in ("before_clip", "after_clip", "local"):
        monitor = GradientHistogramMonitor(every_n_steps=2, when=when)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(folder / when, monitor, OwnGradients(), data=loader(4), max_steps=6, **ddp(2))
        said = [str(one.message) for one in caught if "GradientHistogramMonitor" in str(one.message)]
        found[when] = said, [sample["noise_simple"] for sample in monitor.noise_records[0].samples]
    return found


class Stream(IterableDataset):
    """The same samples on every rank, or each rank its own; some values are missing where it is ``gappy``."""

    def __init__(self, is_split: bool, gappy: bool = False) -> None:
        self.is_split, self.gappy = is_split, gappy

    def __iter__(self) -> Any:
        rank, ranks = _world()
        for place, (inputs, label) in enumerate(dataset(64)):
            if not self.is_split or place % ranks == rank:
                yield inputs, label, math.nan if self.gappy else 1.0


class OfStream(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch[:2], batch_idx)


def streamed(folder: Path) -> Any:
    """How many steps were measured of data that are not split between ranks, and that are."""
    found = []
    for place, (data, accumulate) in enumerate(
        [(Stream(False), 1), (Stream(False), 2), (Stream(True), 1), (Stream(True, gappy=True), 1)]
    ):
        monitor = GradientHistogramMonitor(every_n_steps=1)
        options = {"max_steps": 4, "accumulate_grad_batches": accumulate, **ddp(2)}
        fit(folder / str(place), monitor, module=OfStream, data=DataLoader(data, 4), **options)
        found.append(monitor.noise_records[0].estimate("simple").measurements)
    for place, is_split in enumerate((False, True)):
        calibration = OptimizerCalibration(epsilon="auto", probe_batches=8, apply=False)
        fit(folder / f"probe {place}", calibration, module=OfStream, data=DataLoader(Stream(is_split), 4), **ddp(2))
        found.append(calibration.result.gradients)
    return found


class Fours(BatchSampler):
    """Batches of a class of one's own, in which Lightning puts its sampler."""


class Crops(Dataset[Any]):
    """Places drawn at random, whatever the index; the generator begins alike on all ranks."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        return dataset(256)[int(torch.randint(256, ()))]


def dealt_out(folder: Path) -> Any:
    """Steps measured and gradients of a probe, of a dataset that holds a sample many times, and of random places."""
    alike = TensorDataset(*(torch.cat([one[:8], one[:1].repeat_interleave(56, 0)]) for one in dataset(8).tensors))
    by_sampler = DataLoader(alike, batch_sampler=Fours(SequentialSampler(alike), 4, drop_last=False))
    both = {"a": DataLoader(Crops(), 4), "b": DataLoader(Crops(), 4)}
    found = []
    for place, (data, is_dealt) in enumerate(
        [
            (DataLoader(alike, 4), True),
            (by_sampler, True),
            (DataLoader(alike, 4), False),
            (both["a"], True),
            (both, True),
        ]
    ):
        monitor = GradientHistogramMonitor(every_n_steps=1, batch_size=4)
        calibration = OptimizerCalibration(epsilon="auto", probe_batches=8, apply=False, batch_size=4)
        options = {"max_steps": 4, "use_distributed_sampler": is_dealt, **ddp(2)}
        module = OfTwo() if data is both else None
        fit(folder / str(place), monitor, calibration, module=module, data=data, **options)
        found.append((monitor.noise_records[0].estimate("simple").measurements, calibration.result.gradients))
    return found


class OfTwo(Net):
    """Its batches are those of two loaders."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step([torch.cat(pair) for pair in zip(*batch.values(), strict=True)], batch_idx)


class ClipsInBackward(L.LightningModule):
    """Within backward, so that what ranks have averaged is not what their own gradients add up to; of noise scale 4."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2000))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        generator = torch.Generator().manual_seed(2 * batch_idx + self.global_rank)
        return self.weight @ (1 + 2 * torch.randn(4, 2000, generator=generator)).mean(0)

    def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


class Clips(L.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        nn.utils.clip_grad_norm_(pl_module.parameters(), 0.2)


def clipped(folder: Path) -> Any:
    """Noise where backward clips, and steps measured where a callback before the monitor does, and none."""
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(folder / "backward", monitor, module=ClipsInBackward, data=loader(4), **ddp(2))
    found = [monitor.noise_records[0].estimate("simple").value]
    for callbacks in ([Clips()], []):
        fit(folder / f"{len(callbacks)}", *callbacks, monitor, data=loader(4), **ddp(2))
        found.append(monitor.noise_records[0].estimate("simple").measurements)
    return found


def killed(folder: Path) -> Any:
    """One rank dies in the middle of training; the other says what became of it."""

    class Dies(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 7 and self.global_rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        fit(folder, GradientHistogramMonitor(every_n_steps=2), module=Dies, data=loader(4), **ddp(2))
    except Exception as error:
        (folder / "error.txt").write_text(repr(error))
        os._exit(3)  # the process group can no longer be taken down


def _fp16() -> Any:
    return L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
