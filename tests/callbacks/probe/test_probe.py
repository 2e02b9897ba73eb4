from __future__ import annotations

import logging
import multiprocessing.util
import os
import queue
import random
import signal
import threading
import time
import weakref
from collections import Counter, UserDict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.exceptions import SIGTERMException
from support import Net, dataset, events, final_state, fit, loader
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    default_collate,
)
from torchmetrics.classification import MulticlassAccuracy

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks.batch_size import SampleCount
from lightning_gradhist.callbacks.gradients import loss_scale
from lightning_gradhist.callbacks.probe.probe import Probe, _copy
from lightning_gradhist.callbacks.probe.restore import no_trace
from lightning_gradhist.callbacks.probe.silence import SilentLogger


def silent(**options: Any) -> OptimizerCalibration:
    return OptimizerCalibration(**{"learning_rate": "keep", "probe_batches": 8, "apply": False, **options})


class Stateful(Net):
    """A training step that keeps state in every usual way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(8), persistent=False)
        self.outputs: dict[str, list[int]] = {"sizes": []}
        self.names: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.seen += len(batch[0])
        self.replaced = self.replaced + batch[0].mean(0)
        self.outputs = {"sizes": [*self.outputs["sizes"], len(batch[0])]}
        self.names.add(f"batch {batch_idx}")
        self.latest = float(loss.detach())
        self.logger.experiment.add_scalar("by_hand", self.latest, self.calls)
        assert torch.rand(()) >= 0
        return {"loss": loss * (1 + 0 * torch.rand(())), "other": 1}

    def on_train_start(self) -> None:
        assert not hasattr(self, "latest")
        assert (self.calls, self.losses, self.names, self.outputs) == (0, [], set(), {"sizes": []})


class Frozen(dict):  # type: ignore[type-arg]
    """As configurations of models are kept."""

    def update(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("frozen")

    clear = __setitem__ = update  # type: ignore[assignment]


class Epochs(Sampler):  # type: ignore[type-arg]
    """Another order in each epoch, by a number that it counts itself, and a generator of Python."""

    def __init__(self) -> None:
        self.epoch, self.random = 0, random.Random(5)

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Any:
        self.epoch += 1
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter(sorted(order, key=lambda index: (index % 4, self.random.random())))


class Drawing(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Draws from generators of its own."""

    def __init__(self) -> None:
        self.torch_generator, self.numpy_generator = torch.Generator().manual_seed(2), np.random.default_rng(2)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        inputs, label = dataset(32)[index]
        return inputs + torch.rand(8, generator=self.torch_generator) + self.numpy_generator.random(), label


class Nested(Net):
    """State where a training step may hide it: nested, in tensors, in weights, and one metric under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.nested: dict[str, Any] = {"losses": [], "deep": {"seen": {0}}, "queue": deque([1, 2], maxlen=3)}
        self.average = torch.zeros(8)
        self.in_place = torch.zeros(8)
        self.array = np.zeros(8)
        self.constant = torch.zeros(1).expand(8)
        self.table = np.broadcast_to(np.zeros(1), (8,))
        self.count: Counter[str] = Counter()
        self.pair = ([0], torch.zeros(1))
        self.adjacency = torch.eye(3).to_sparse()
        self.frozen = Frozen(a=1)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.numpy_generator, self.python_generator = np.random.default_rng(1), random.Random(1)
        self.plain_metrics = {"again": self.accuracy, "apart": MulticlassAccuracy(3)}
        self.register_buffer("wide", torch.ones(1, 1).expand(4, 4))
        self.register_buffer("late", None)
        self.parameters_again = list(self.parameters())
        self.teacher = nn.Linear(8, 16).requires_grad_(False)
        self.embedding = nn.Embedding(4, 16, max_norm=0.5)
        self.also_accuracy = self.accuracy

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.nested["losses"].append(float(loss.detach()))
        self.nested["deep"]["seen"].add(batch_idx)
        self.nested["queue"].append(batch_idx)
        self.average = 0.9 * self.average + batch[0].mean(0)
        self.in_place += batch[0].mean(0)
        self.array += 1
        self.count["steps"] += 1
        self.pair[0].append(batch_idx)
        self.pair[1].add_(1)
        draws = (
            torch.rand((), generator=self.torch_generator).item(),
            self.numpy_generator.random(),
            self.python_generator.random(),
        )
        self.losses.append(sum(draws) + len(self.pair[0]) + float(self.pair[1]))
        for metric in self.plain_metrics.values():
            metric.update(torch.eye(3)[batch[1]], batch[1])
        self.losses.append(float(self.plain_metrics["apart"].update_count))
        if self.late is None:
            self.late = batch[0].mean(0)
            self.register_buffer("later", self.late + 1)
            self.more = nn.Linear(1, 1)
        self.losses.append(float(self.late.sum() + self.later.sum()))
        assert os.path.isdir(os.path.dirname(os.path.join(self.logger.log_dir, "x")))
        with torch.no_grad():
            for slow, fast in zip(self.teacher.parameters(), self.body[0].parameters(), strict=True):
                slow.lerp_(fast, 0.1)
        self.log("also_accuracy", self.also_accuracy)
        return loss + self.embedding(batch[1]).square().mean()

    def on_train_epoch_start(self) -> None:
        self.started = True

    def on_train_batch_end(self, *args: Any) -> None:
        state = (self.average, self.in_place, torch.from_numpy(self.array))
        self.losses.append(self.count["steps"])
        self.losses.append(float(torch.stack([value.double().sum() for value in state]).sum()))
        self.losses.append(sum(self.nested["losses"]) + len(self.nested["deep"]["seen"]) + sum(self.nested["queue"]))


class NeedsTheHooks(Net):
    """A training step that needs what the hooks before it set up."""

    def on_train_start(self) -> None:
        self.weight = 1.0

    def on_train_epoch_start(self) -> None:
        self.outputs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.outputs.append(batch_idx)
        return self.weight * super().training_step(batch, batch_idx)


def _batch_sampler() -> DataLoader:
    sampler = RandomSampler(dataset(64), generator=torch.Generator().manual_seed(3))
    return DataLoader(dataset(64), batch_sampler=BatchSampler(sampler, 8, drop_last=False))


class Augmented(torch.utils.data.Dataset):
    """Draws random numbers for each sample, in the worker or in the main process."""

    def __init__(self) -> None:
        self.data = dataset(64)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.data[index]
        return inputs + 0.1 * torch.randn(8), label


class Stream(IterableDataset):  # type: ignore[type-arg]
    """Samples without a length, from where it stands: as resumable data sets keep their place."""

    def __init__(self, samples: int = 96) -> None:
        self.data, self.place, self.history = dataset(samples), 0, {"read": []}
        self.rounds = 0

    def __iter__(self) -> Any:
        self.rounds += 1
        while self.place < len(self.data):
            self.place += 1
            self.history["read"].append(self.place)
            inputs, label = self.data[self.place - 1]
            yield inputs + self.rounds, label
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "read": self.history["read"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.history["read"] = state["place"], state["read"]


class KeepsItsPlace(DataLoader):  # type: ignore[type-arg]
    """A loader with a state, which Lightning puts into checkpoints."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.read = 0

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            self.read += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


def _fp16() -> Any:
    return [L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))]


class Average:
    """A moving average as packages for it keep one: in an object of its own, with a state to save and load."""

    def __init__(self, module: nn.Module) -> None:
        self.shadow = [p.detach().clone() for p in module.parameters()]
        self.updates = 0

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        for mine, p in zip(self.shadow, module.parameters(), strict=True):
            mine.lerp_(p.detach() + 1, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


class Meddles(Net):
    """A training step that averages weights, reads and counts steps, and reaches for optimizer, schedule and trainer."""

    def __init__(self) -> None:
        super().__init__(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.9))
        self.average = Average(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.average.update(self)
        self.losses.append(self.average.updates + sum(float(shadow.sum()) for shadow in self.average.shadow))
        group = self.optimizers().param_groups[0]
        group["calls"] = group.get("calls", 0) + 1
        group["lr"] = 1e-2 / (1 + group["calls"] + self.trainer.global_step)
        self.lr_schedulers().last_epoch += 1
        self.trainer.should_stop |= batch_idx == 7
        return loss * (1 + self.trainer.global_step)


class Quiet(Net):
    """What the compiler takes as a whole, which Lightning's own logging is not."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.body(batch[0])), batch[1])


class Compiled(Net):
    """Its layers are compiled, and the rest is not."""

    def __init__(self) -> None:
        super().__init__()
        self.body.compile(backend="aot_eager")


def _own_generator() -> DataLoader:
    sampler = RandomSampler(dataset(64), generator=torch.Generator().manual_seed(3))
    return DataLoader(dataset(64), 8, sampler=sampler, generator=torch.Generator().manual_seed(4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "data", "options"),
    [
        pytest.param(Net, loader, {}, id="BatchNorm, dropout, shuffling, metric"),
        pytest.param(Stateful, loader, {}, id="state in the module"),
        pytest.param(lambda: Net(scheduler=lambda o: OneCycleLR(o, 0.1, total_steps=32)), loader, {}, id="scheduler"),
        pytest.param(Net, loader, {"accumulate_grad_batches": 3}, id="accumulation"),
        pytest.param(Net, loader, {"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param(Net, _own_generator, {}, id="generators of loader and sampler"),
        pytest.param(Net, lambda: DataLoader(Augmented(), 8, shuffle=True), {}, id="augmentation"),
        pytest.param(
            Net,
            lambda: DataLoader(Augmented(), 8, shuffle=True, num_workers=2, persistent_workers=True),
            {},
            id="persistent workers",
        ),
        pytest.param(lambda: Net(ALTO), loader, {}, id="ALTO"),
        pytest.param(Nested, loader, {}, id="nested state, tensors, a teacher, max_norm, a metric twice"),
        pytest.param(NeedsTheHooks, loader, {}, id="hooks of the module"),
        pytest.param(Net, lambda: DataLoader(dataset(64), 8, sampler=Epochs()), {}, id="a sampler that counts epochs"),
        pytest.param(
            Net, lambda: DataLoader(ConcatDataset([Drawing(), Drawing()]), 8), {}, id="generators of datasets"
        ),
        pytest.param(Net, _batch_sampler, {}, id="generator of a sampler within a batch sampler"),
        pytest.param(Net, lambda: DataLoader(Stream(), 8), {}, id="an iterable data set that keeps its place"),
        pytest.param(
            Net,
            lambda: KeepsItsPlace(Stream(48), 4, num_workers=1),
            {},
            id="a stateful loader, iterable data in workers",
        ),
        pytest.param(
            Net,
            loader,
            {"plugins": _fp16, "callbacks": lambda: [L.pytorch.callbacks.EMAWeightAveraging(decay=0.9)]},
            id="16-mixed, EMA of the weights",
            marks=pytest.mark.skipif(
                not hasattr(L.pytorch.callbacks, "EMAWeightAveraging"), reason="Lightning has it from 2.6 on"
            ),
        ),
        pytest.param(Meddles, loader, {}, id="EMA in an object; optimizer, schedule, trainer, global_step"),
        pytest.param(lambda: torch.compile(Quiet(), backend="eager"), loader, {}, id="compiled"),
        pytest.param(Compiled, loader, {"plugins": _fp16}, id="compiled layers, 16-mixed"),
    ],
)
def test_with_apply_false_the_run_is_the_same_to_the_bit(tmp_path, module, data, options) -> None:
    calibration = silent()
    runs = []
    for folder, callbacks in (("a", [calibration]), ("b", [])):
        fresh = {name: value() if callable(value) else value for name, value in options.items()}
        callbacks = [*callbacks, *fresh.pop("callbacks", [])]
        runs.append(fit(tmp_path / folder, *callbacks, module=module, data=data(), max_epochs=2, **fresh))
    with_probe, without = runs
    assert calibration.result is not None and calibration.result.gradients == 8
    expected, got = final_state(without), final_state(with_probe)
    assert got["losses"] == expected["losses"] and got["calls"] == expected["calls"]
    assert got["logged"] == expected["logged"]
    torch.testing.assert_close(got["weights"], expected["weights"], rtol=0, atol=0)
    for one, other in zip(got["optimizer"], expected["optimizer"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)
    assert torch.equal(got["rng"], expected["rng"])
    assert with_probe.global_step == without.global_step
    assert loss_scale(with_probe) == loss_scale(without)
    assert _states(with_probe) == _states(without)


def _states(made: L.Trainer) -> list[Any]:
    schedulers = [config.scheduler for config in made.lr_scheduler_configs]
    things = (made.train_dataloader, made.train_dataloader.dataset, *schedulers)
    return [thing.state_dict() for thing in things if hasattr(thing, "state_dict")]


class Look(L.Callback):
    """Probes by hand, and keeps the gradients."""

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self.gradients: list[dict[str, Any]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        with no_trace(trainer, pl_module) as apart:
            for gradients in Probe(apart).gradients(self.limit):
                self.gradients.append({n: None if g is None else g.clone() for n, g in gradients.items()})


class Linear(L.LightningModule):
    """The gradient of a linear least-squares fit has a closed form."""

    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1, bias=False)
        self.optimizer = optimizer or (lambda p: torch.optim.SGD(p, lr=0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch[0])[:, 0] - batch[1]).square().mean() / 2

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


def closed_form(weight: torch.Tensor, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return ((inputs @ weight.T)[:, 0] - labels) @ inputs / len(labels)


@pytest.mark.parametrize(
    ("optimizer", "decay"),
    [
        pytest.param(lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.3), 0.3, id="SGD: coupled"),
        pytest.param(lambda p: torch.optim.RMSprop(p, 0.1, weight_decay=0.3), 0.3, id="RMSprop: coupled"),
        pytest.param(lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.3), 0.3, id="Adam: coupled"),
        pytest.param(lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.3), 0.0, id="AdamW: decoupled"),
        pytest.param(lambda p: ALTO(p, 0.1, weight_decay=0.3), 0.0, id="ALTO: after the division"),
    ],
)
def test_a_gradient_is_that_of_the_optimizers_objective(tmp_path, optimizer, decay) -> None:
    look = Look()
    data = DataLoader(dataset(64), 8)
    module = Linear(optimizer)
    weight = module.layer.weight.detach().clone()
    fit(tmp_path, look, module=module, data=data, accumulate_grad_batches=2)
    assert len(look.gradients) == 4
    for (inputs, labels), found in zip(data, look.gradients, strict=False):
        expected = closed_form(weight, inputs, labels) + decay * weight[0]
        torch.testing.assert_close(found["layer.weight"][0], expected)


def test_hooks_before_a_training_step_run(tmp_path) -> None:
    class Shifted(Linear):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            self.factor = 3  # which the training step needs
            batch[0].add_(4)
            return -1 if batch_idx == 1 else None

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step((batch[0] * self.factor, batch[1]), batch_idx)

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 1, batch[1]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] * 2, batch[1]

    look = Look(limit=2)
    data = DataLoader(dataset(64), 8)
    module = Shifted()
    weight = module.layer.weight.detach().clone()
    fit(tmp_path, look, module=module, data=data)
    inputs, labels = next(iter(data))
    expected = closed_form(weight, 3 * (2 * (inputs + 1) + 4), labels)
    (found,) = look.gradients  # the second batch is skipped, as in training
    torch.testing.assert_close(found["layer.weight"][0], expected)


def test_gradients_that_were_there_stay(tmp_path) -> None:
    class Check(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            mine = torch.ones_like(pl_module.layer.weight)
            pl_module.layer.weight.grad = mine
            with no_trace(trainer, pl_module) as apart:
                assert len(list(Probe(apart).gradients(3))) == 3
            assert pl_module.layer.weight.grad is mine, "a probe does not touch gradients"
            assert torch.equal(mine, torch.ones_like(mine))

    fit(tmp_path, Check(), module=Linear())


def _step_in_backward(parameter: nn.Parameter) -> None:
    parameter.data.sub_(0.01 * parameter.grad)


def test_hooks_of_the_parameters_do_not_run(tmp_path) -> None:
    class StepsInBackward(Net):
        def on_fit_start(self) -> None:
            for parameter in self.parameters():
                parameter.register_post_accumulate_grad_hook(_step_in_backward)

    states = [
        final_state(fit(tmp_path / str(len(callbacks)), *callbacks, module=StepsInBackward))
        for callbacks in ([], [silent()])
    ]
    torch.testing.assert_close(states[0]["weights"], states[1]["weights"], rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(tmp_path, reentrant: bool) -> None:
    class Checkpointed(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs = batch[0].requires_grad_()
            hidden = torch.utils.checkpoint.checkpoint(self.body, inputs, use_reentrant=reentrant)
            return nn.functional.cross_entropy(self.head(hidden), batch[1])

    calibration = silent()
    with pytest.warns(UserWarning, match="no probe: activation checkpointing") if reentrant else nullcontext():
        fit(tmp_path, calibration, module=Checkpointed)
    assert calibration.result.gradients == (0 if reentrant else 8)


def test_an_error_in_the_middle_leaves_no_trace_either(tmp_path) -> None:
    class Failing(Stateful):
        fail = True

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            if self.fail and batch_idx == 2:
                raise RuntimeError("in the middle")
            return output

    class Check(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            before, loggers = final_state(trainer), trainer.loggers
            with pytest.raises(RuntimeError, match="in the middle"), no_trace(trainer, pl_module) as apart:
                list(Probe(apart).gradients(8))
            after = final_state(trainer)
            torch.testing.assert_close(after["weights"], before["weights"], rtol=0, atol=0)
            assert (after["losses"], after["calls"]) == ([], 0)
            assert torch.equal(after["rng"], before["rng"])
            assert trainer.loggers == loggers and "log" not in vars(pl_module)
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            pl_module.fail = False

    fit(tmp_path, Check(), module=Failing())


def test_a_loss_scale_that_overflows_is_lowered_for_the_probe_alone(tmp_path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    look = Look(limit=4)
    plain = Look(limit=4)
    precision = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)

    class Scale(L.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            assert scaler.get_scale() == 2.0**40

    fit(tmp_path / "a", look, Scale(), module=Linear, plugins=[precision], max_steps=1)
    fit(tmp_path / "b", plain, module=Linear, max_steps=1)
    assert len(look.gradients) == 4
    for scaled, expected in zip(look.gradients, plain.gradients, strict=True):
        torch.testing.assert_close(scaled, expected, rtol=0.1, atol=3e-3)


class Graphs:
    """A batch of a class of its own, as those of graphs are, which no one can take to pieces."""

    def __init__(self, samples: Any) -> None:
        self.inputs, self.labels = default_collate(samples)

    def to(self, *args: Any, **kwargs: Any) -> Graphs:
        return self


class Encoding(UserDict):  # type: ignore[type-arg]
    """A batch that cannot be made anew from what is in it, as those of tokenizers."""

    def __init__(self, samples: Any) -> None:
        super().__init__(enumerate(default_collate(samples)))
        self.inputs, self.labels = self.data.values()

    to = Graphs.to


class Halves(Linear):
    """Spoils its batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch.labels = batch.labels / 2
        return super().training_step((batch.inputs, batch.labels), batch_idx)


@pytest.mark.parametrize("kind", [Graphs, Encoding])
def test_a_batch_of_a_class_of_its_own_is_as_it_came_at_each_try(tmp_path, kind: Any) -> None:
    look, module, data = Look(), Halves(), DataLoader(dataset(64), 8)
    weight = module.layer.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # so that the first batch overflows, again and again
    precision = L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    loader = DataLoader(dataset(64), 8, collate_fn=kind)
    fit(tmp_path, look, module=module, data=loader, plugins=[precision], max_steps=1)
    assert len(look.gradients) == 4
    for (inputs, labels), found in zip(data, look.gradients, strict=False):
        expected = closed_form(weight, inputs, labels / 2)
        torch.testing.assert_close(found["layer.weight"][0], expected, rtol=0.1, atol=3e-3)


@pytest.mark.parametrize("other", [None, threading.Lock()], ids=["copied", "a lock that cannot be copied"])
def test_of_tensors_in_a_batch_no_more_is_copied_than_they_show(other: Any) -> None:
    leaf = torch.ones(2, requires_grad=True)
    batch = {"view": torch.zeros(2**20)[3:5], "leaf": leaf, "in a graph": leaf * 2, "other": other}
    copied = _copy(batch)
    assert copied["view"].untyped_storage().nbytes() == 8
    assert copied["leaf"] is not leaf and copied["leaf"].requires_grad and copied["in a graph"].is_leaf


def test_learning_rate_monitor_and_the_progress_of_the_loops_are_untouched(tmp_path) -> None:
    made = fit(tmp_path, silent(), LearningRateMonitor(), max_epochs=2, log_every_n_steps=1)
    assert made.global_step == 32 and made.current_epoch == 2
    assert made.fit_loop.epoch_loop.batch_progress.total.ready == 32


def test_a_training_step_that_fails_in_the_probe_is_no_end_of_training(tmp_path) -> None:
    class Failing(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if isinstance(self.trainer.loggers[0], SilentLogger):  # in the probe alone
                raise KeyError("table")
            return super().training_step(batch, batch_idx)

    with pytest.warns(UserWarning, match=r"no probe: .* training_step or its gradient raised KeyError\('table'\)"):
        made = fit(tmp_path, silent(), module=Failing, max_steps=3)
    assert made.global_step == 3


def test_a_short_last_batch_is_measured_with_its_samples(tmp_path) -> None:
    calibration = silent()
    fit(tmp_path, calibration, data=loader(8, samples=60), max_steps=1)  # seven full batches, and one of four
    assert calibration.result.gradients == 8 and calibration.result.effective_batch_size == 8


def test_complex_parameters_count_as_pairs_of_real_ones(tmp_path) -> None:
    class Complex(Linear):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.AdamW(p, 0.1))
            self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + (batch[0] * self.phase).sum().abs()

    look, calibration = Look(limit=2), silent()
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, look, calibration, monitor, module=Complex, max_steps=3)
    assert look.gradients[0]["phase"].shape == (8, 2)
    assert "phase" in calibration.result.epsilon_range.per_name
    logged = events(tmp_path).Histograms("gradient_magnitude/phase")
    assert [event.histogram_value.num for event in logged] == [16, 16, 16]


def test_lazy_parameters_are_refused(tmp_path) -> None:
    class Lazy(Linear):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.AdamW(p, 0.1))
            self.layer = nn.LazyLinear(1, bias=False)

    with pytest.warns(UserWarning, match="no probe: the model has lazy parameters"):
        fit(tmp_path, silent(), module=Lazy, max_steps=2)


def test_data_that_fail_in_the_probe_are_refused(tmp_path) -> None:
    class Once(Drawing):
        def __getitem__(self, index: int) -> Any:
            if isinstance(self.module.trainer.loggers[0], SilentLogger):
                raise OSError("gone")
            return super().__getitem__(index)

    module, data = Net(), Once()
    data.module = module
    with pytest.warns(UserWarning, match="no probe: the training data, training_step or its gradient raised OSError"):
        made = fit(tmp_path, silent(), module=module, data=DataLoader(data, 4))
    assert made.global_step == 8


def _out_of_memory(kind: str) -> Exception:
    if kind == "host":
        return RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class Heavy(Net):
    """Some batches, in the probe alone, find no memory."""

    def __init__(self, kind: str, every: int) -> None:
        super().__init__()
        self.kind, self.every = kind, every
        HELD.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if isinstance(self.trainer.loggers[0], SilentLogger):
            assert not any(graph() for graph in HELD), "the graph of a batch that failed is still there"
            if batch_idx % self.every == 0:
                HELD.append(weakref.ref(loss))
                raise _out_of_memory(self.kind)
        return loss


HELD: list[Any] = []


@pytest.mark.parametrize(
    ("kind", "every", "used", "message"),
    [
        pytest.param("device", 4, 6, r"2 of 8 batches of the probe ran out of memory .*, and were left out", id="some"),
        pytest.param("host", 1, 0, r"4 of 4 batches of the probe ran out of memory", id="all"),
    ],
)
def test_batches_that_run_out_of_memory_are_left_out(tmp_path, kind: str, every: int, used: int, message: str) -> None:
    calibration = silent()
    with pytest.warns(UserWarning, match=message):
        made = fit(tmp_path, calibration, module=Heavy(kind, every), max_steps=2)
    assert calibration.result.gradients == used and made.global_step == 2


def test_batches_of_workers_with_the_same_samples_are_left_out(tmp_path) -> None:
    class Unsplit(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(dataset(64))

    calibration = silent()
    with pytest.warns(
        UserWarning, match="4 of 8 batches of the probe had the same samples as another.*get_worker_info"
    ):
        fit(tmp_path, calibration, data=DataLoader(Unsplit(), 8, num_workers=2), max_steps=1)
    assert calibration.result.gradients == 4


def test_the_workers_of_the_probe_end_by_themselves(tmp_path) -> None:
    there = tmp_path / "there"
    there.mkdir()

    def begin(index: int) -> None:  # what is to be done at the end is left out where a worker is killed
        mark = there / str(os.getpid())
        mark.touch()
        multiprocessing.util.Finalize(None, mark.unlink, exitpriority=10)

    fit(tmp_path, silent(), data=loader(num_workers=2, worker_init_fn=begin), max_steps=1)
    assert list(there.iterdir()) == []


@pytest.mark.parametrize("where", ["calibration.evidence.NoiseScale", "probe.run.no_trace"])
def test_no_memory_for_the_probes_own_copies_is_a_refusal(tmp_path, monkeypatch, where: str) -> None:
    def full(*args: Any) -> Any:
        raise _out_of_memory("device")

    monkeypatch.setattr(f"lightning_gradhist.callbacks.{where}", full)
    calibration = silent()
    with pytest.warns(UserWarning, match="no probe: .*out of memory"):
        made = fit(tmp_path, calibration, max_steps=2)
    assert calibration.result.gradients == 0 and made.global_step == 2


class Sizes(Callback):
    """What a probe finds its batches to have."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            counted = SampleCount(None)
            with no_trace(trainer, pl_module) as apart:
                probe = Probe(apart, partial(counted.count, trainer))
                self.found = [probe.samples for _ in probe.gradients(8)]


def test_batches_are_counted_wherever_their_sizes_come_from(tmp_path) -> None:
    by_hand = torch.arange(60).split([8, 3, 8, 8, 8, 8, 8, 9])
    spy = Sizes()
    fit(tmp_path, spy, data=DataLoader(dataset(60), batch_sampler=[part.tolist() for part in by_hand]))
    assert spy.found == [len(part) for part in by_hand]


def counted(samples: int, start: float) -> DataLoader:  # type: ignore[type-arg]
    """A loader of numbered samples, which does not tell its length."""

    class Numbers(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return ((torch.full((8,), float(start + i)), torch.tensor(0)) for i in range(samples))

    return DataLoader(Numbers(), 1)


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle"])
def test_batches_are_those_of_training_where_loaders_are_combined(tmp_path, mode: str) -> None:
    class Noted(Linear):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            numbers = {name: None if one is None else float(one[0][0, 0]) for name, one in batch.items()}
            with (tmp_path / type(self.trainer.loggers[0]).__name__).open("a") as file:
                file.write(f"{numbers}\n")
            return super().training_step(batch["a"] or batch["b"], batch_idx)

    both = CombinedLoader({"a": counted(4, 0), "b": counted(6, 100)}, mode)
    module = Noted(lambda p: torch.optim.AdamW(p, 0.1))
    fit(tmp_path / "run", silent(batch_size=1), module=module, data=both)
    probe, training = ((tmp_path / name).read_text() for name in ("SilentLogger", "TensorBoardLogger"))
    assert probe == training and probe.count("\n") == (4 if mode == "min_size" else 6)


def test_a_thread_of_a_callback_is_no_obstacle(tmp_path) -> None:
    class Watches(Callback):
        def __init__(self) -> None:
            self.done, self.queue = threading.Event(), queue.Queue()  # type: ignore[var-annotated]
            self.thread = threading.Thread(target=self.done.wait, daemon=True)
            self.thread.start()

        def teardown(self, *args: Any, **kwargs: Any) -> None:
            self.done.set()

    calibration = silent()
    fit(tmp_path, calibration, Watches(), max_steps=2)
    assert calibration.result.gradients == 8


def test_data_that_hold_a_generator_are_refused(tmp_path) -> None:
    class Once(IterableDataset):  # type: ignore[type-arg]
        def __init__(self) -> None:
            self.samples = (sample for sample in dataset(64))

        def __iter__(self) -> Any:
            return self.samples

    with pytest.warns(
        UserWarning, match=r"no probe: train_dataloader.dataset.samples is a generator, .* DataLoader\(num_w"
    ):
        made = fit(tmp_path, silent(batch_size=8), data=DataLoader(Once(), 8))
    assert made.global_step == 8


class Interrupted(L.Callback):
    """What Lightning's handling of Ctrl-C finds."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = final_state(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.exception, self.after, self.loggers = exception, final_state(trainer), trainer.loggers


def test_ctrl_c_in_the_middle_ends_the_run_as_it_was_before_the_probe(tmp_path) -> None:
    class Stopped(Stateful):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                with torch.no_grad():
                    self.head.weight.add_(1)
                signal.raise_signal(signal.SIGINT)
            return output

    seen, calibration, module = Interrupted(), OptimizerCalibration(learning_rate="keep"), Stopped()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, seen, calibration, module=module)
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert isinstance(seen.exception, KeyboardInterrupt) and module.trainer.interrupted
    torch.testing.assert_close(seen.after["weights"], seen.before["weights"], rtol=0, atol=0)
    assert torch.equal(seen.after["rng"], seen.before["rng"])
    assert seen.after["losses"] == [] and not any(isinstance(logger, SilentLogger) for logger in seen.loggers)
    assert calibration.result is None and calibration.state_dict()["report"] is None


def test_sigterm_ends_the_probe_and_the_run_as_soon_as_a_batch_ends(tmp_path) -> None:
    batches = tmp_path / "batches"  # a count in Python would be that of the copy

    class Told(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with batches.open("a") as file:
                file.write("x")
            if batch_idx == 2:
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    calibration, module = OptimizerCalibration(learning_rate="keep"), Told()
    with pytest.raises(SIGTERMException):
        fit(tmp_path, calibration, module=module)
    assert batches.read_text() == "xxx" and module.calls == 0
    assert calibration.result is None and calibration.state_dict()["report"] is None


HEARD: list[int] = []  # a probe has a copy


def _hear(number: int, frame: Any) -> None:
    HEARD.append(number)


@pytest.mark.parametrize(
    ("number", "steps"), [pytest.param(signal.SIGUSR1, 3, id="SIGUSR1"), pytest.param(signal.SIGTERM, 0, id="SIGTERM")]
)
def test_a_signal_is_heard_when_the_probe_has_ended(tmp_path, number: int, steps: int) -> None:
    class Signalled(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and isinstance(self.trainer.loggers[0], SilentLogger):
                signal.raise_signal(number)
                assert not HEARD
            return super().training_step(batch, batch_idx)

    HEARD.clear()
    module, before = Signalled(), signal.signal(number, _hear)
    try:
        with nullcontext() if steps else pytest.raises(SIGTERMException):
            fit(tmp_path, silent(probe_batches=4), module=module, max_steps=3)
        assert signal.getsignal(number) is _hear
    finally:
        signal.signal(number, before)
    assert number in HEARD and module.calls == steps


def test_of_a_batch_what_no_tensor_hangs_on_is_not_copied() -> None:
    """As an object that the module knows by itself, and what a training step asks for by ``is``."""

    class Sample:
        def __init__(self, **parts: Any) -> None:
            self.parts = parts

    known, missing = Sample(name="a"), object()
    batch = [Sample(x=torch.ones(2), of=known), (known, missing), ["a"]]
    batch[0].itself = batch[0]
    copied = _copy(batch)
    assert copied[0] is not batch[0] and copied[0].itself is copied[0] and copied[2] is not batch[2]
    assert copied[0].parts["x"] is not batch[0].parts["x"] and torch.equal(copied[0].parts["x"], torch.ones(2))
    assert copied[0].parts["of"] is known and copied[1] == (known, missing)


def test_a_handler_of_sigterm_that_the_user_set_in_the_run_decides_whether_it_ends(tmp_path) -> None:
    class Own(Net):
        def on_train_start(self) -> None:
            signal.signal(signal.SIGTERM, _hear)  # in place of Lightning's

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 1 and isinstance(self.trainer.loggers[0], SilentLogger):
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    HEARD.clear()
    module, before = Own(), signal.getsignal(signal.SIGTERM)
    try:
        fit(tmp_path, silent(probe_batches=4), module=module, max_steps=3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert HEARD == [signal.SIGTERM] and module.calls == 3


class TooSlow(Exception):  # noqa: N818
    """Raised by an alarm."""


def test_an_alarm_of_the_data_is_heard_in_the_probe(tmp_path) -> None:
    class Patient(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> Any:
            signal.setitimer(signal.ITIMER_REAL, 0.02 if index == 20 else 5)
            try:
                time.sleep(1.0 if index == 20 else 0.0)
            except TooSlow:
                index = 0
            signal.setitimer(signal.ITIMER_REAL, 0)
            return dataset(64)[index]

    def raise_error(number: int, frame: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, raise_error)
    try:
        calibration = silent()
        fit(tmp_path, calibration, data=DataLoader(Patient(), 8), max_steps=2)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert calibration.result.problems == () and calibration.result.gradients == 8


def test_log_records_of_the_probe_go_nowhere(tmp_path, caplog) -> None:
    """But for those of others: other threads, and packages that may warn once."""

    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logging.getLogger("own").error("step")
            if isinstance(self.trainer.loggers[0], SilentLogger):
                package("warns", logging.WARNING)
                package("informs", logging.INFO)
                with ThreadPoolExecutor() as pool:
                    pool.submit(logging.getLogger("own").info, "thread").result()
            return super().training_step(batch, batch_idx)

    def package(text: str, level: int) -> None:
        logger = logging.getLogger("package")
        logger.handle(logger.makeRecord("package", level, "/lib/site-packages/one.py", 1, text, (), None))

    caplog.set_level(logging.INFO)
    handle = logging.Logger.handle
    fit(tmp_path, silent(probe_batches=4), module=Logs, max_steps=3)
    found = Counter(record.message for record in caplog.records if record.name in ("own", "package"))
    assert found == {"step": 3, "warns": 4, "thread": 4} and logging.Logger.handle is handle


def test_layers_within_a_checkpoint_wrapper_are_copied_too(tmp_path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    class Wrapped(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[1] = checkpoint_wrapper(self.body[1])  # a BatchNorm, which a pass changes

    plain = final_state(fit(tmp_path / "a", module=Wrapped, max_steps=3))
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=8, apply=False)
    made = final_state(fit(tmp_path / "b", calibration, module=Wrapped, max_steps=3))
    assert calibration.result.gradients == 8
    torch.testing.assert_close(made["weights"], plain["weights"], rtol=0, atol=0)
