"""A run with a probe and nothing applied ends in the same bits, whatever module and data hold."""

from __future__ import annotations

import abc
import contextlib
import csv
import dataclasses
import enum
import functools
import gc
import importlib.util
import io
import itertools
import mmap
import multiprocessing
import os
import pickle
import queue
import random
import sqlite3
import sys
import tempfile
import threading
import time
import types
import warnings
import weakref
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.utils.prune
from lightning.pytorch.utilities import CombinedLoader
from support import dataset, events, final_state, fit
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset, default_collate
from torch.utils.tensorboard import SummaryWriter

from lightning_gradhist import OptimizerCalibration
from lightning_gradhist.callbacks.probe import copies, places, silence, stand_ins

GLOBAL_GENERATOR = np.random.default_rng(0)
GLOBAL_COUNT = 0
GLOBAL_CALLS: list[int] = []


class Small(L.LightningModule):
    """What each kind of module is put on. ``seen`` is what training saw, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 3)
        self.seen: list[float] = []
        self.set_up()

    def set_up(self) -> None: ...

    def touch(self, batch: Any, batch_idx: int) -> Any:
        """Returns what is added to the loss."""
        return 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if isinstance(batch, dict):
            batch = batch["a"]
        more = self.touch(batch, batch_idx)
        loss = nn.functional.cross_entropy(self.head(torch.tanh(self.body(batch[0].float()))), batch[1]) + more
        self.seen.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class MomentumEncoder(Small):
    def set_up(self) -> None:
        self.slow = nn.Linear(8, 16).requires_grad_(False)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        for slow, fast in zip(self.slow.parameters(), self.body.parameters(), strict=True):
            slow.data = slow.data * 0.9 + fast.data * 0.1
        return (self.slow(batch[0]) - self.body(batch[0])).square().mean()


class HooksAtTheFirstStep(Small):
    def touch(self, batch: Any, batch_idx: int) -> Any:
        if not self.seen:
            self.body.register_forward_hook(lambda module, inputs, output: output + 0.1 * torch.tanh(output))
            self.head.weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
            nn.utils.prune.l1_unstructured(self.body, "weight", 0.3)
            nn.utils.parametrizations.weight_norm(self.head)
        return 0.0


class HooksAtTheBatch(Small):
    def set_up(self) -> None:
        self.factor, self.numbers = 1.0, []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.factor *= 1.1
        self.numbers.append(batch_idx)
        batch[0].mul_(self.factor)
        GLOBAL_CALLS.append(batch_idx)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return sum(self.numbers) * 1e-3 + len(GLOBAL_CALLS) * 1e-3

    def on_train_end(self) -> None:
        GLOBAL_CALLS.clear()


class Freezes(Small):
    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.body.requires_grad_(batch_idx % 3 > 0)
        self.train(batch_idx % 2 == 0)
        return 0.0


class OtherMemory(Small):
    """Its tensors get another memory, size, dtype or place in the module."""

    def set_up(self) -> None:
        for name in ("one", "two", "three", "four"):
            self.register_buffer(name, torch.zeros(2))
        self.view = self.one[:1]

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.one.set_(self.one + 1)
        self.two.resize_(2 + batch_idx).fill_(batch_idx)
        self.three.data = self.three.double() + 1
        torch.utils.swap_tensors(self.four, self.four + 1)
        self.view += 1
        if batch_idx == 0:
            self.head, self.old = nn.Linear(16, 3), self.head
        return self.one.sum() + self.two.sum() + self.three.sum() + self.four.sum() + self.view.sum()


class OldWeightNorm(Small):
    """Its weight is no leaf, which copy.deepcopy refuses."""

    def set_up(self) -> None:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(self.body)
        self.body(torch.zeros(1, 8))


class HeldByFunctions(Small):
    """State in closures, defaults, partials, bound methods and weak references."""

    def set_up(self) -> None:
        generator, counts, total = np.random.default_rng(1), [0], 0
        self.draw, self.again = generator.random, functools.partial(generator.normal, 0)

        def count(cache: dict[str, int] = {"n": 0}) -> int:  # noqa: B006
            nonlocal total
            count.calls.append(total)
            counts[0] += 1
            cache["n"] += 1
            total += 1
            return counts[0] + cache["n"] + total + len(count.calls)

        count.calls = []
        self.count = count
        self.more = lambda: len(self.seen)
        self.of_body = weakref.ref(self.body)
        self.head.register_forward_hook(lambda module, inputs, output: output + self.count() / 100)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.of_body().bias.add_(0.01)
        return self.draw() + self.again() + self.more()


class Descriptor:
    """Keeps what it counts to itself."""

    def __init__(self) -> None:
        self.value = 0

    def __get__(self, owner: Any, kind: Any) -> int:
        self.value += 1
        return self.value


class HeldByClassAndModule(Small):
    generator = random.Random(3)
    count = 0
    reads = Descriptor()

    def set_up(self) -> None:
        vars(HeldByClassAndModule)["reads"].value = 0
        self.by_parameter = {self.head.bias: 0}

    def touch(self, batch: Any, batch_idx: int) -> Any:
        global GLOBAL_COUNT
        GLOBAL_COUNT += 1
        HeldByClassAndModule.count += 1
        GLOBAL_CALLS.append(batch_idx)
        self.by_parameter[self.head.bias] += 1
        own = self.generator.random() + self.count + self.reads + self.by_parameter[self.head.bias]
        return GLOBAL_GENERATOR.random() + GLOBAL_COUNT + len(GLOBAL_CALLS) + own

    def on_train_end(self) -> None:
        global GLOBAL_COUNT, GLOBAL_GENERATOR
        GLOBAL_COUNT, HeldByClassAndModule.count, GLOBAL_GENERATOR = 0, 0, np.random.default_rng(0)
        HeldByClassAndModule.generator = random.Random(3)
        GLOBAL_CALLS.clear()


@dataclasses.dataclass(slots=True)
class Slots:
    count: int = 0


class InCircles(Small):
    """Its helpers' modules import one another, an object has slots alone, and an attribute of its class is deleted."""

    note: Any = None

    def set_up(self) -> None:
        type(self).note, self.slots = None, Slots()
        one, two = types.ModuleType("one_helper"), types.ModuleType("two_helper")
        vars(one).update(two=two, counts=[0])
        vars(two).update(one=one)
        exec("def count():\n    two.one.counts[0] += 1\n    return two.one.counts[0]", vars(one))
        self.count = vars(one)["count"]

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.slots.count += 1
        noted = "note" in vars(type(self))
        if noted:
            del type(self).note
        return 0.01 * (self.slots.count + self.count() + noted)


@functools.cache
def remembered(size: int) -> torch.Tensor:
    return torch.randn(size)


class Remembers(Small):
    """Functions that remember what they have drawn, wherever they are."""

    def set_up(self) -> None:
        self.own = functools.lru_cache(2)(lambda size: torch.randn(size))

    @staticmethod
    @functools.cache
    def of_class(size: int) -> torch.Tensor:
        return torch.randn(size)

    @functools.cache  # noqa: B019
    def of_object(self, size: int) -> torch.Tensor:
        return torch.randn(size)

    @property
    @functools.cache  # noqa: B019
    def drawn(self) -> torch.Tensor:
        return torch.randn(2)

    @drawn.setter
    def drawn(self, value: Any) -> None:
        self.noted = value

    @functools.cache  # noqa: B019
    def __getitem__(self, size: int) -> torch.Tensor:
        return torch.randn(size)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        size = batch_idx % 3 + 1
        self.drawn = size
        draws = (remembered, self.own, self.of_class, self.of_object, self.__getitem__)
        return sum(draw(size).sum() for draw in draws) + self.drawn.sum()

    def on_train_start(self) -> None:
        assert type(self).__getitem__.cache_info().currsize == 0

    def on_train_end(self) -> None:
        type(self).__getitem__.cache_clear()
        remembered.cache_clear()
        self.of_class.cache_clear()


class Once:
    """A singleton."""

    _only: Any = None

    def __new__(cls) -> Any:
        cls._only = cls._only or super().__new__(cls)
        return cls._only


class HasSingleton(Small):
    """An object that its class makes only once, with state."""

    def set_up(self) -> None:
        Once._only = None
        self.once = Once()
        self.once.count = 0

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.once.count += 1
        return 0.01 * self.once.count


class ByName:
    """Pickle knows it by its name."""

    count = 0

    def __reduce__(self) -> str:
        return "BY_NAME"


class Itself:
    """Says that it is its own copy, and has slots."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __deepcopy__(self, memo: Any) -> Any:
        return self


class LookedUp(dict):  # type: ignore[type-arg]
    """Found by a function of its module."""

    def __reduce__(self) -> Any:
        return look_up, ("it",), {"count": self.count}


class Kind(enum.Enum):
    """Members with state."""

    ONE, TWO = [0], "two"

    def __init__(self, value: Any) -> None:
        self.calls = 0


class Closed:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def __del__(self) -> None: ...


BY_NAME, LOOKED_UP = ByName(), LookedUp()


def look_up(name: str) -> Any:
    return LOOKED_UP


class HasRegistries(Small):
    """Objects that are their own copies, or hard to copy."""

    def set_up(self) -> None:
        self.kind, self.held = Kind.ONE, [BY_NAME, Itself(), LOOKED_UP, Closed()]

    def touch(self, batch: Any, batch_idx: int) -> Any:
        assert self.held[0] is BY_NAME and self.kind is Kind.ONE
        for one in self.held:
            one.count += 1
        LOOKED_UP[batch_idx] = 1
        self.kind.value[0] += 1
        Kind.TWO.calls += 1
        counts = (*(one.count for one in self.held), len(LOOKED_UP), Kind.ONE.value[0], Kind.TWO.calls)
        return sum(0.01 * 2**i * count for i, count in enumerate(counts))


class Meta(type):
    """Makes one object of a class."""

    made: dict[type, Any] = {}  # noqa: RUF012

    def __call__(cls, *args: Any) -> Any:
        if cls not in cls.made:
            cls.made[cls] = super().__call__(*args)
        return cls.made[cls]


class OfMeta(metaclass=Meta):
    count = 0


COUNTS = {"setter": 0, "cached": 0, "partial": 0, "single": 0}
HELPER = types.ModuleType("a_helper")


class HiddenInDescriptors(Small):
    """State of a metaclass, and of functions in descriptors; none is named in what is called."""

    @property
    def value(self) -> int:
        return 1

    @value.setter
    def value(self, value: int) -> None:
        COUNTS["setter"] += value

    @functools.cached_property
    def cached(self) -> int:
        COUNTS["cached"] += 1
        return COUNTS["cached"]

    def add(self, number: int) -> int:
        COUNTS["partial"] += number
        return sum(COUNTS.values())

    @functools.singledispatchmethod
    def single(self, argument: Any) -> None:
        COUNTS["single"] += 1

    add_one = functools.partialmethod(add, 1)
    del add

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.value = 2
        vars(self).pop("cached", None)
        self.single(self.cached)
        OfMeta().count += 1
        return 0.01 * (self.add_one() + OfMeta().count)


class HeldAsModules(Small):
    """A module in an attribute, one whose function is found by getattr, a class in a list."""

    def set_up(self) -> None:
        self.backend, self.name, self.classes = sys.modules["a_backend"], "tnuoc"[::-1], [*vars(HELPER)["classes"]]

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.classes[0].total += 1
        return 0.01 * (self.backend.count() + getattr(HELPER, self.name)() + self.classes[0].total)


BANK, SHARED = torch.zeros(copies.LARGE), random.Random(3)


def is_shared(generator: Any) -> bool:
    return generator is SHARED


def draw() -> float:
    return SHARED.random()


class KeepsBanks(Small):
    """Tensors of a module and a class that are large and no data; a generator in many places."""

    bank = torch.zeros(copies.LARGE)

    def set_up(self) -> None:
        self.shared = SHARED

    def touch(self, batch: Any, batch_idx: int) -> Any:
        BANK[batch_idx] += 1
        self.bank[batch_idx] += 1
        assert is_shared(self.shared)
        return float(BANK.sum() + self.bank.sum()) / 100 + draw() + self.shared.random()


LARGER = torch.zeros(copies.ALL_SMALL // 4 + 1)


class WritesIntoALargerBank(Small):
    def touch(self, batch: Any, batch_idx: int) -> Any:
        LARGER[batch_idx] += 1
        return float(LARGER[:16].sum()) / 100


class LogsByPackage(Small):
    """As by wandb.log, into a run that is there already."""

    def set_up(self) -> None:
        self.log_metric = sys.modules["mlflow"].log_metric

    def touch(self, batch: Any, batch_idx: int) -> Any:
        import mlflow  # type: ignore[import-not-found]

        mlflow.log_metric("loss", 1.0)
        self.log_metric("loss", 1.0)
        return 0.0

    def on_train_end(self) -> None:
        self.seen.append(len(vars(sys.modules["mlflow"])["points"]))


class LogsFromElsewhere(Small):
    """As hooks of wandb.watch do, in code that nobody looks into."""

    def touch(self, batch: Any, batch_idx: int) -> Any:
        eval("__import__('mlflow').log_metric('loss', 1.0)")
        return 0.0

    def on_train_end(self) -> None:
        self.seen.append(eval("len(__import__('mlflow').points)"))


OPENED: list[Any] = []


def opened() -> Any:
    OPENED.append(open(__file__))
    return OPENED[-1]


@pytest.fixture(autouse=True)
def closes_what_it_opens() -> Iterator[None]:
    """A file that is left to the garbage collector fails whatever test runs then."""
    yield
    while OPENED:
        OPENED.pop().close()


@pytest.fixture(autouse=True)
def leaves_mlflow_as_it_was() -> Iterator[None]:
    """A stand-in that stayed would be found by tests of the real one in the same process."""
    before = sys.modules.get("mlflow")
    yield
    sys.modules.pop("mlflow", None)
    if before is not None:
        sys.modules["mlflow"] = before


def fresh() -> DataLoader:  # type: ignore[type-arg]
    """A loader for a run, before which what modules and classes of this file hold is as at first."""
    BY_NAME.count = LOOKED_UP.count = Kind.ONE.value[0] = Kind.TWO.calls = 0
    LOOKED_UP.clear()
    Meta.made.clear()
    COUNTS.update(dict.fromkeys(COUNTS, 0))
    BANK.zero_()
    LARGER.zero_()
    KeepsBanks.bank.zero_()
    SHARED.seed(3)
    code = "total = [0]\ndef count():\n    total[0] += 1\n    return total[0]\nclass Class:\n    total = 0\nclasses = [Class]"
    code += "\nimport threading\nidle = threading.Thread(target=threading.Event().wait, daemon=True)\nidle.start()"
    for module in (HELPER, types.ModuleType("a_backend")):
        exec(code, vars(module))
        sys.modules[module.__name__] = module
    sys.modules["mlflow"] = mlflow = types.ModuleType("mlflow")
    vars(mlflow).update(points=[], log_metric=lambda *point: mlflow.points.append(point))
    return DataLoader(dataset(96), 8)


class HasHookOfAllModules(Small):
    """An object that torch calls before each module."""

    def on_train_start(self) -> None:
        self.hook = CallCounter()
        self.handle = nn.modules.module.register_module_forward_pre_hook(self.hook)

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.hook.calls / 100

    def on_train_end(self) -> None:
        self.handle.remove()


class CallCounter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1


class HeldWeakly(Small):
    """Weak dictionaries and a weak proxy."""

    def set_up(self) -> None:
        self.keys = weakref.WeakKeyDictionary({self.body: 0})
        self.values = weakref.WeakValueDictionary({"body": self.body})
        object.__setattr__(self, "proxy", weakref.proxy(self.body))

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.keys[self.body] += 1
        with torch.no_grad():
            self.proxy.bias.add_(0.01)
            self.values["body"].weight.mul_(0.99)
        return self.keys[self.body]


class OfTheProcess(Small):
    """The environment, the folder, and variables of a module that is imported late, or named in quotes."""

    def set_up(self) -> None:
        self.folder = os.getcwd()
        sys.modules["counted_elsewhere"] = types.ModuleType("counted_elsewhere")
        vars(sys.modules["counted_elsewhere"])["count"] = 0
        path = Path(tempfile.mkdtemp())
        (path / "a_package").mkdir()
        for name in ("__init__", "within"):
            (path / "a_package" / f"{name}.py").write_text("")
        sys.path.insert(0, str(path))
        import a_package  # type: ignore[import-not-found]  # noqa: F401

    def touch(self, batch: Any, batch_idx: int) -> Any:
        import a_package.within  # type: ignore[import-not-found]
        import counted_elsewhere  # type: ignore[import-not-found]

        assert a_package.within
        counted_elsewhere.count += 1
        os.environ["COUNT"] = str(int(os.environ.get("COUNT", "0")) + 1)
        globals()["QUOTED"] = globals().get("QUOTED", 0) + 1
        os.chdir("/" if os.getcwd() == self.folder else self.folder)
        return counted_elsewhere.count + int(os.environ["COUNT"]) + globals()["QUOTED"] + len(os.getcwd())

    def on_train_end(self) -> None:
        os.chdir(self.folder)
        del sys.path[0], sys.modules["a_package"], sys.modules["a_package.within"]
        del os.environ["COUNT"], globals()["QUOTED"], sys.modules["counted_elsewhere"]


class KnowsAddresses(Small):
    """Looks parameters and layers up by ``id``."""

    def set_up(self) -> None:
        self.weights = {id(self.body.weight): 0.1, id(self.head.weight): 0.2}
        self.some, self.listed, self.named = {id(self.body.bias)}, [id(self.head), "text"], {"head": id(self.head)}

    def touch(self, batch: Any, batch_idx: int) -> Any:
        assert id(self.body.bias) in self.some and id(self.head) in self.listed and id(self.head) == self.named["head"]
        return self.weights[id(self.body.weight)] + self.weights[id(self.head.weight)]


class OddTensors(Small):
    """Tensors that most functions do not take."""

    def set_up(self) -> None:
        self.register_buffer("complex_half", torch.ones(2, dtype=torch.complex32))
        self.register_buffer("quantized", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
        self.nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        self.sparse = torch.eye(3).to_sparse()

    def configure_optimizers(self) -> Any:
        self.unused = nn.Linear(2, 2, device="meta")  # now, as Lightning has moved the others to the device
        return super().configure_optimizers()

    def on_train_end(self) -> None:
        del self.unused

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.nested = self.nested * 2
        self.complex_half = self.complex_half.clone()
        return 0.0


class KeepsWriters(Small):
    """Loggers and writers that the module kept for itself."""

    def on_train_start(self) -> None:
        self.kept = [self.logger]
        self.writer, self.add = self.logger.experiment, self.logger.experiment.add_scalar
        self.own = SummaryWriter(self.logger.log_dir + "/own")

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.writer.add_scalar("kept", 1.0, len(self.seen))
        self.add("bound", 1.0, len(self.seen))
        self.own.add_scalar("own", 1.0, len(self.seen))
        self.kept[0].log_metrics({"logger": 1.0}, len(self.seen))
        return 0.0

    def on_train_end(self) -> None:
        self.own.close()
        self.writer.flush()
        for folder, tag in (("", "kept"), ("", "bound"), ("", "logger"), ("/own", "own")):
            self.seen.extend(event.step for event in events(Path(self.logger.log_dir + folder)).Scalars(tag))


class Counts(L.Callback):
    calls = 0


class ReachesForTheTrainer(Small):
    def touch(self, batch: Any, batch_idx: int) -> Any:
        trainer = self.trainer
        counter = next(callback for callback in trainer.callbacks if isinstance(callback, Counts))
        counter.calls += 1
        trainer.callback_metrics["mine"] = torch.tensor(float(counter.calls))
        trainer.fit_loop.epoch_loop.mine = getattr(trainer.fit_loop.epoch_loop, "mine", 0) + 1
        trainer.limit_val_batches = counter.calls
        trainer.should_stop |= batch_idx == 11
        trainer.train_dataloader.dataset.tensors[0][batch_idx] += 0.1
        self.optimizers().param_groups[0]["lr"] *= 0.99
        self.optimizers().optimizer.state["mine"] = counter.calls
        assert trainer.model is self and trainer.strategy.lightning_module is self
        return counter.calls + trainer.fit_loop.epoch_loop.mine + trainer.global_step


class Resource:
    """An object that refuses to be copied, with a lock."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("there is only one")


class RefusesCopies(Small):
    def set_up(self) -> None:
        self.resource, self.lock, self.lines = Resource(), threading.RLock(), (line for line in "abc")
        self.inner = Uncopied()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        with self.lock:
            return self.inner(batch[0]).mean()


class Uncopied(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 1)

    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("not this one")

    def __getstate__(self) -> Any:
        raise TypeError("not this one")


class Closing:
    """Closes what the original still needs when it goes."""

    def __init__(self) -> None:
        self.file = io.StringIO("x" * 1000)
        self.held: list[Any] = [self.file]

    def __del__(self) -> None:
        self.held[0].close()
        CLOSED.append(self)


CLOSED: list[Any] = []


class Closes(Small):
    def set_up(self) -> None:
        self.closing = Closing()
        CLOSED.clear()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return float(len(self.closing.file.read(1))) + len(CLOSED)

    def on_train_end(self) -> None:
        self.seen.append(len(CLOSED))


OPTIMIZED_AFTER_A_RUN = """
def loss(inputs):
    scaled = torch.sigmoid(inputs) * torch.tanh(inputs).sum(1, keepdim=True)
    return torch.tanh(torch.layer_norm(scaled, [scaled.size(1)])).square().mean()
"""  # its gradient has other bits from its second run on


class Traced(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        scaled = torch.sigmoid(inputs) * torch.tanh(inputs).sum(1, keepdim=True)
        return nn.functional.gelu(nn.functional.layer_norm(scaled, [16])).square().mean()


class Scripted(Small):
    """Parts that copy themselves in ways of their own."""

    def set_up(self) -> None:
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
        self.recurrent = nn.LSTM(8, 4)
        self.compiled = torch.compile(nn.Linear(8, 4), backend="eager")
        self.of_step = torch.compile(self.inner, backend="eager")
        self.extra = nn.Parameter(torch.ones(4))
        self.again = self.extra

        self.optimized = torch.jit.CompilationUnit(OPTIMIZED_AFTER_A_RUN).loss  # new ones, that have not run
        self.of_module = torch.jit.trace(Traced(), torch.zeros(2, 16))

    def inner(self, inputs: torch.Tensor) -> Any:
        return self.extra * inputs.mean()

    def touch(self, batch: Any, batch_idx: int) -> Any:
        more = self.optimized(self.body(batch[0])), self.of_module(self.body(batch[0]))
        parts = (
            *more,
            self.scripted(batch[0]),
            self.recurrent(batch[0])[0],
            self.compiled(batch[0]),
            self.of_step(batch[0]),
        )
        return sum(part.mean() for part in parts)


class ParametersElsewhere(Small):
    """The optimizer steps what the module does not know, and tied weights."""

    def set_up(self) -> None:
        self.elsewhere = [torch.ones(3, requires_grad=True)]
        self.tied = nn.Linear(8, 16)
        self.tied.weight = self.body.weight
        self.body.weight.mark = [0]
        self.body.weight.register_hook(lambda gradient: gradient * (1 + 0 * self.seen[-1] if self.seen else 1))

    def touch(self, batch: Any, batch_idx: int) -> Any:
        self.body.weight.mark[0] += 1
        return self.elsewhere[0].square().mean() + self.tied(batch[0]).mean() + self.body.weight.mark[0]

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([*self.parameters(), *self.elsewhere], lr=1e-2)


class ChildOfTheOwnKind(Small):
    """Modules of Lightning within, registered and not."""

    def set_up(self) -> None:
        if type(self) is ChildOfTheOwnKind:
            self.child = Small()
            self.hidden = [Small()]

    def touch(self, batch: Any, batch_idx: int) -> Any:
        return self.child.training_step(batch, batch_idx) + self.hidden[0].training_step(batch, batch_idx)


MODULES = [
    MomentumEncoder,
    HooksAtTheFirstStep,
    HooksAtTheBatch,
    Freezes,
    OtherMemory,
    OldWeightNorm,
    HeldByFunctions,
    HeldByClassAndModule,
    InCircles,
    Remembers,
    HeldWeakly,
    HasSingleton,
    HasRegistries,
    HiddenInDescriptors,
    HeldAsModules,
    KeepsBanks,
    HasHookOfAllModules,
    LogsByPackage,
    LogsFromElsewhere,
    KnowsAddresses,
    OfTheProcess,
    OddTensors,
    KeepsWriters,
    ReachesForTheTrainer,
    RefusesCopies,
    Closes,
    Scripted,
    ParametersElsewhere,
    ChildOfTheOwnKind,
]


class Plain(Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.data = dataset(64)
        self.set_up()

    def set_up(self) -> None: ...

    def touch(self, index: int) -> float:
        return 0.0

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.data[index]
        return inputs + self.touch(index), label


class Drawing(Plain):
    """Generators in lists, dicts and objects, and one that the system's own functions hide."""

    def set_up(self) -> None:
        self.held = {"deep": [np.random.default_rng(1), torch.Generator(), random.Random(1), np.random.RandomState(1)]}
        self.legacy = self.held["deep"][3].rand

    def touch(self, index: int) -> float:
        new, of_torch, of_python, _ = self.held["deep"]
        return new.random() + float(torch.rand((), generator=of_torch)) + of_python.random() + self.legacy()


class Counting(Plain):
    """Counts and caches in every usual container, and how it came to know them."""

    def set_up(self) -> None:
        self.reads: dict[int, int] = {}
        self.difficulty, self.objects = np.zeros(64), np.array([[0], "name"], dtype=object)
        self.numbers, self.cycle = itertools.count(), itertools.cycle([0.1, 0.2, 0.3])
        self.shared = torch.zeros(64).share_memory_()

    def touch(self, index: int) -> float:
        self.reads[index] = self.reads.get(index, 0) + 1
        self.difficulty[index] += 0.1
        self.objects[0][0] += 1
        self.shared[index] += 1
        return self.reads[index] + self.difficulty[index] + self.objects[0][0] + next(self.numbers) + next(self.cycle)


class Lines(IterableDataset):  # type: ignore[type-arg]
    """Samples from an iterator."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Any]:
        return iter(self.source)


class Around:
    """Any wrapper."""

    def __init__(self, inner: Any) -> None:
        self.parts = {"inner": [inner]}

    def __iter__(self) -> Iterator[Any]:
        return iter(self.parts["inner"][0])


class OfFile(Plain):
    def set_up(self) -> None:
        self.file = open(__file__)  # noqa: SIM115

    def touch(self, index: int) -> float:
        return float(len(self.file.readline()))

    def __del__(self) -> None:
        self.file.close()


class OpensEachTime(Plain):
    def touch(self, index: int) -> float:
        with open(__file__) as file:
            return float(len(file.readline()))


class Large(Plain):
    """More than is copied."""

    def set_up(self) -> None:
        self.tensor, self.array = torch.zeros(64, copies.LARGE // 64), np.zeros((64, copies.LARGE // 64))

    def touch(self, index: int) -> float:
        return float(self.tensor[index, 0]) + float(torch.from_numpy(self.array[index])[0])


class LargeTensorWritten(Large):
    def touch(self, index: int) -> float:
        self.tensor[index] += 1
        return super().touch(index)


class LargeArrayWritten(Large):
    def touch(self, index: int) -> float:
        torch.from_numpy(self.array[index]).add_(1)
        return super().touch(index)


class ViewOfLargeWritten(Plain):
    def set_up(self) -> None:
        self.rows = [row[:4] for row in torch.zeros(64, copies.LARGE // 64)]

    def touch(self, index: int) -> float:
        self.rows[index] += 1
        return float(self.rows[index][0])


class Table(Plain):
    """Numbers and lists in a table of pandas."""

    def set_up(self) -> None:
        import pandas  # type: ignore[import-untyped]

        self.table = pandas.DataFrame({"number": np.zeros(64), "list": [[] for _ in range(64)]})

    def touch(self, index: int) -> float:
        self.table.loc[index, "number"] += 1
        self.table["list"].iloc[index].append(1)
        return self.table["number"].iloc[index] + len(self.table["list"].iloc[index])


class LargeTensorWrittenByNumpy(Large):
    def touch(self, index: int) -> float:
        np.asarray(self.tensor[index])[0] += 1
        return super().touch(index)


class SharedCount(Plain):
    """A count that the workers and this process have in common."""

    def set_up(self) -> None:
        self.count = multiprocessing.Value("i", 0)

    def touch(self, index: int) -> float:
        with self.count.get_lock():
            self.count.value += 1
        return float(self.count.value)


def within(nested: Any) -> Any:
    return within(nested[0]) if isinstance(nested, list) else nested


class ReadAhead(IterableDataset):  # type: ignore[type-arg]
    """A thread fills a queue: one for all epochs, held or not, or one for each."""

    def __init__(self, kind: str, seconds: float = 0.0, timeout: float | None = None) -> None:
        self.kind, self.seconds, self.timeout = kind, seconds, timeout
        self.queue: Any = None
        if kind != "each":
            self.start()

    def start(self) -> None:
        self.queue = queue.Queue(2)
        into = [[[[[self.queue]]]]] if self.kind == "deep" else self.queue
        thread = threading.Thread(target=type(self).work, args=(None, into, self.seconds), daemon=True)
        thread.start()
        if self.kind == "held":
            self.thread = thread
        while not (self.queue.not_full._waiters or self.seconds or self.kind == "each"):  # type: ignore[attr-defined]
            time.sleep(0.001)

    def work(self, into: Any, seconds: float) -> None:
        for one in itertools.cycle(dataset(64)):
            time.sleep(seconds)
            within(into).put(one)

    def __iter__(self) -> Iterator[Any]:
        if self.kind == "each":
            self.start()
        with ThreadPoolExecutor(1) as pool:  # a thread that has no part in the queue
            if self.kind == "pool":
                pool.submit(abs, 0)
            for _ in range(64):
                yield self.get()

    def get(self) -> Any:
        with contextlib.suppress(queue.Empty):
            return self.queue.get(timeout=self.timeout)
        return self.get()


class Prefetching(DataLoader):  # type: ignore[type-arg]
    """As by the package prefetch_generator, around workers."""

    def __iter__(self) -> Any:
        into: Any = queue.Queue(1)
        iterator = super().__iter__()
        threading.Thread(target=lambda: [into.put(batch) for batch in iterator], daemon=True).start()
        return (into.get() for _ in range(len(self)))


class StartsWhenCopied(Plain):
    """Starts a thread wherever it comes to be."""

    def set_up(self) -> None:
        self.__setstate__(vars(self))

    def __getstate__(self) -> Any:
        return vars(self).copy()

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class ReadsInPool(TensorDataset):
    """Reads the samples of a batch in several threads, as from a slow place."""

    def __init__(self) -> None:
        super().__init__(*dataset(64).tensors)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(self.__getitem__, indices))


class HandsOn(TensorDataset):
    """Its samples have what is shared between processes, of which a worker has no copy."""

    def __init__(self) -> None:
        super().__init__(*dataset(64).tensors)
        self.manager = multiprocessing.Manager()
        self.shared = self.manager.list()

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(self[index], self.shared) for index in indices]


def without_shared(samples: list[Any]) -> Any:
    batch = Shared(default_collate([sample for sample, _ in samples]))
    batch.shared = samples[0][1]
    return batch


class Shared(list):  # type: ignore[type-arg]
    """A batch with more in it than tensors."""

    shared: Any


class Forgiving(Dataset):  # type: ignore[type-arg]
    """Has others in the place of bad samples, again and again, or zeros."""

    def __init__(self, again: bool, errors: Any = Exception) -> None:
        self.file, self.again, self.errors = tempfile.TemporaryFile("w+"), again, errors

    def __del__(self) -> None:
        self.file.close()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        while True:
            try:
                self.file.seek(0)
                return dataset(64)[index]
            except self.errors:
                if not self.again:
                    return torch.zeros(8), torch.tensor(0)


class OwnPlace(IterableDataset):  # type: ignore[type-arg]
    """Keeps its place, and wants more than a state_dict has as arguments."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        for inputs, label in dataset(64):
            self.place += 1
            yield inputs + self.place, label

    def state_dict(self, samples: int, workers: int) -> Any:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Endless(DataLoader):  # type: ignore[type-arg]
    """Holds one iterator for all epochs."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        return iter([next(self.iterator) for _ in range(len(self))])


class History(Sampler):  # type: ignore[type-arg]
    """Batches that depend on those before, by a function that others hold, too."""

    def __init__(self) -> None:
        self.given: list[int] = []
        generator = np.random.default_rng(4)
        self.choose = lambda: generator.permutation(64)[:8].tolist()

    def __len__(self) -> int:
        return 8

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(8):
            chosen = [(index + len(self.given)) % 64 for index in self.choose()]
            self.given.extend(chosen)
            yield chosen


class OwnIterator:
    """A loader that is its own iterator."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return 16

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        self.place = (self.place + 8) % 64
        inputs, labels = dataset(64).tensors
        return inputs[self.place : self.place + 8], labels[self.place : self.place + 8]


class Using(Plain):
    """Has something, and uses it for each sample."""

    def __init__(self, make: Any, use: Any) -> None:
        self.thing, self.use = make(), use
        super().__init__()

    def touch(self, index: int) -> float:
        return float(self.use(self.thing))


class Deleted(Plain):
    def __del__(self) -> None:
        CLOSED.append(0)


def filled(made: Any, put: Any = None) -> Any:
    for number in range(200):
        (put or made.put)(number)
    return made


def pipe() -> Any:
    reader, writer = multiprocessing.Pipe(duplex=False)
    return filled([reader, writer], writer.send)


def database() -> Any:
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute("create table numbers (number)")
    connection.executemany("insert into numbers values (?)", [(number,) for number in range(500)])
    return connection.execute("select number from numbers")


def archive() -> Any:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("member", bytes(range(250)))
    return zipfile.ZipFile(packed).open("member")


def mapped() -> Any:
    memory = mmap.mmap(-1, 500)
    memory[:] = bytes(range(250)) * 2
    return memory


def byte(file: Any) -> int:
    return (file.read(1) or b"\0")[0]


def collating() -> Any:
    generator = torch.Generator()

    def collate(samples: list[Any]) -> Any:
        inputs, labels = torch.stack([one for one, _ in samples]), torch.stack([label for _, label in samples])
        return inputs * (torch.rand(inputs.shape, generator=generator) > 0.2), labels

    return collate


def combined() -> Any:
    both = Drawing()
    return CombinedLoader({"a": DataLoader(both, 8), "b": DataLoader(both, 8)}, "max_size_cycle")


def batches() -> Iterator[Any]:
    inputs, labels = dataset(128).tensors
    yield from zip(inputs.split(8), labels.split(8), strict=True)


EACH_TIME = r"make it where it is used, as in each __getitem__ or __iter__\. "  # and not: let a worker do it
REFUSED, THREAD = "cannot be copied", "which may read on when the probe has ended"
LOADERS = [
    pytest.param(lambda: DataLoader(Drawing(), 8, shuffle=True), None, id="generators at any depth"),
    pytest.param(lambda: DataLoader(Counting(), 8, shuffle=True), None, id="counts and caches"),
    pytest.param(lambda: DataLoader(Counting(), 8, num_workers=2), None, id="memory shared with workers"),
    pytest.param(
        lambda: DataLoader(Lines(Around(Around(iter(list(dataset(128)))))), 8), None, id="an iterator, wrapped twice"
    ),
    pytest.param(
        lambda: DataLoader(Lines(Around(Around(one for one in dataset(128)))), 8),
        r"train_dataloader.dataset.source.parts\['inner'\]\[0\].parts\['inner'\]\[0\] is a generator",
        id="a generator, wrapped twice",
    ),
    pytest.param(
        lambda: DataLoader(Lines(map(tuple, (one for one in dataset(128)))), 8),
        "train_dataloader.dataset.source.* is a generator",
        id="a generator in a map",
    ),
    pytest.param(
        lambda: DataLoader(Lines(one for one in dataset(128)), 8, num_workers=1), None, id="a generator for a worker"
    ),
    pytest.param(lambda: DataLoader(ReadAhead("each"), 8), THREAD, id="a thread for each epoch"),
    pytest.param(lambda: DataLoader(ReadAhead("each"), 8, num_workers=1), None, id="a thread of a worker"),
    pytest.param(lambda: Prefetching(dataset(96), 8, num_workers=1), THREAD, id="a thread around workers"),
    pytest.param(lambda: DataLoader(StartsWhenCopied(), 8), THREAD, id="a thread that a copy starts"),
    pytest.param(lambda: DataLoader(ReadAhead("held"), 8), "thread is a running thread", id="a running thread"),
    pytest.param(
        lambda: DataLoader(ReadAhead("hidden"), 8), "another thread waits for it", id="a queue of a running thread"
    ),
    pytest.param(lambda: DataLoader(ReadAhead("hidden", 2e-3), 8), "or fills it", id="a queue of a slow thread"),
    pytest.param(lambda: DataLoader(ReadAhead("deep", 2e-3), 8), "or fills it", id="a queue deep in what a thread has"),
    pytest.param(lambda: DataLoader(ReadAhead("deep", 2e-3, 0.5), 8), "or fills it", id="a queue that is asked again"),
    pytest.param(
        lambda: DataLoader(ReadAhead("pool", 2e-3), 8), "or fills it", id="a queue beside a thread of its own"
    ),
    pytest.param(lambda: DataLoader(ReadsInPool(), 8, shuffle=True), None, id="threads of a pool"),
    pytest.param(
        lambda: DataLoader(HandsOn(), 8, num_workers=1, collate_fn=without_shared, timeout=20),
        None,
        id="what is shared in a sample of a worker",
    ),
    pytest.param(lambda: DataLoader(Forgiving(True), 8), REFUSED, id="other samples for bad ones"),
    pytest.param(lambda: DataLoader(Forgiving(False), 8), REFUSED, id="zeros for bad samples"),
    pytest.param(lambda: DataLoader(Forgiving(False, BaseException), 8), REFUSED, id="zeros for everything"),
    pytest.param(lambda: DataLoader(Forgiving(False), 8, num_workers=1), REFUSED, id="zeros from a worker"),
    pytest.param(lambda: DataLoader(Forgiving(True), 8, num_workers=1), REFUSED, id="others from a worker"),
    pytest.param(batches, "train_dataloader is a generator", id="a generator in place of a loader"),
    pytest.param(
        lambda: DataLoader(OfFile(), 8), f"dataset.file is a TextIOWrapper, .* {EACH_TIME}", id="an open file"
    ),
    pytest.param(
        lambda: DataLoader(OfFile(), 8, num_workers=1), f"{REFUSED}.* {EACH_TIME}", id="an open file for a worker"
    ),
    pytest.param(lambda: DataLoader(OpensEachTime(), 8), None, id="a file opened for each sample"),
    pytest.param(lambda: DataLoader(OpensEachTime(), 8, num_workers=1), None, id="a file opened in a worker"),
    pytest.param(lambda: DataLoader(SharedCount(), 8, num_workers=1), REFUSED, id="a count between processes"),
    pytest.param(lambda: DataLoader(Large(), 8), None, id="large and read"),
    pytest.param(lambda: DataLoader(LargeTensorWritten(), 8), "too large to be copied", id="large and written"),
    pytest.param(lambda: DataLoader(LargeArrayWritten(), 8), "too large to be copied", id="large, written as a tensor"),
    pytest.param(lambda: DataLoader(LargeTensorWrittenByNumpy(), 8), "too large to be copied", id="large, by numpy"),
    pytest.param(lambda: DataLoader(ViewOfLargeWritten(), 8), "too large to be copied", id="a view of what is large"),
    pytest.param(
        lambda: DataLoader(Table(), 8),
        None,
        id="a table",
        marks=pytest.mark.skipif(not importlib.util.find_spec("pandas"), reason="there is no pandas"),
    ),
    pytest.param(lambda: DataLoader(OwnPlace(), 8), None, id="a place, and a state_dict with arguments"),
    pytest.param(lambda: Endless(Drawing(), 8, shuffle=True), None, id="a loader that never ends"),
    pytest.param(lambda: Endless(dataset(64), 8, shuffle=True, num_workers=1), None, id="a worker that never ends"),
    pytest.param(lambda: DataLoader(Drawing(), batch_sampler=History()), None, id="a batch sampler with a history"),
    pytest.param(OwnIterator, None, id="its own iterator"),
    pytest.param(lambda: DataLoader(dataset(64), 8, collate_fn=collating()), None, id="a generator closed over"),
    pytest.param(combined, None, id="two loaders of one data set"),
]

THINGS = [
    pytest.param(opened, lambda file: len(file.readline()), "refused", None, id="file"),
    pytest.param(lambda: csv.reader(opened()), lambda file: len(next(file)), "refused", "refused", id="csv of a file"),
    pytest.param(
        lambda: csv.reader(["a" * n for n in range(500)]),
        lambda file: len(next(file)[0:1]),
        "refused",
        None,
        id="csv",
    ),
    pytest.param(lambda: io.BytesIO(bytes(range(250))), byte, "same", None, id="BytesIO"),
    pytest.param(archive, byte, "same", None, id="zip"),
    pytest.param(mapped, byte, "refused", None, id="mmap"),
    pytest.param(database, lambda cursor: cursor.fetchone()[0], "refused", None, id="sqlite3"),
    pytest.param(
        lambda: filled(multiprocessing.Queue()), lambda one: one.get(), "refused", "refused", id="Queue of processes"
    ),
    pytest.param(
        lambda: filled(multiprocessing.SimpleQueue()),
        lambda one: one.get(),
        "refused",
        None,
        id="SimpleQueue of processes",
    ),
    pytest.param(pipe, lambda ends: ends[0].recv(), "refused", "refused", id="Pipe"),
    pytest.param(
        lambda: multiprocessing.Event(), lambda one: one.is_set() or one.set() or 0, "refused", None, id="Event"
    ),
    pytest.param(
        lambda: multiprocessing.Lock(), lambda lock: lock.acquire() and (lock.release() or 0), "same", "same", id="Lock"
    ),
    pytest.param(lambda: filled(queue.SimpleQueue()), lambda one: one.get(), "refused", None, id="SimpleQueue"),
    pytest.param(
        lambda: itertools.groupby(itertools.count(), lambda n: n // 2),
        lambda one: next(one)[0],
        "same",
        None,
        id="itertools",
    ),
    pytest.param(
        lambda: np.random.SeedSequence(1), lambda one: one.spawn(1)[0].entropy, "same", None, id="SeedSequence"
    ),
]
PLACES = [  # in this process, and where it is told in a worker
    pytest.param(*thing.values[:2], outcome, workers, id=f"{thing.id}, {workers} workers")
    for thing in THINGS
    for workers, outcome in enumerate(thing.values[2:])
    if outcome
]


def runs(tmp_path: Any, module: Any, data: Any, **options: Any) -> tuple[OptimizerCalibration, L.Trainer, L.Trainer]:
    """The same run with a probe and without."""
    calibration = OptimizerCalibration(learning_rate="keep", probe_batches=6, apply=False, batch_size=8)
    made = []
    for folder, callbacks in (("with", [calibration]), ("without", [])):
        L.seed_everything(3, verbose=False)
        folder = tmp_path / folder
        made.append(fit(folder, *callbacks, Counts(), module=module, data=data(), max_epochs=2, **options))
    assert calibration.result is not None
    return calibration, *made


def assert_same(with_probe: L.Trainer, without: L.Trainer) -> None:
    got, expected = final_state(with_probe), final_state(without)
    assert with_probe.lightning_module.seen == without.lightning_module.seen != []
    assert got["logged"] == expected["logged"] and torch.equal(got["rng"], expected["rng"])
    assert got["weights"].keys() == expected["weights"].keys()
    for name, value in got["weights"].items():
        assert bits(value) == bits(expected["weights"][name]), name
    for one, other in zip(got["optimizer"], expected["optimizer"], strict=True):
        assert one["param_groups"] == other["param_groups"]
    assert with_probe.global_step == without.global_step > 0


def bits(tensor: torch.Tensor) -> Any:
    if tensor.is_meta:
        return tensor.shape
    plain = tensor.int_repr() if tensor.is_quantized else tensor
    return plain.dtype, plain.shape, bytes(plain.contiguous().untyped_storage())


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*ComplexHalf", "ignore:.*jit.(script|trace).* is deprecated", "ignore:.*quantiz", "ignore:.*nested"
)
@pytest.mark.parametrize("module", MODULES)
def test_the_run_is_the_same_whatever_the_module_does(tmp_path, module) -> None:
    calibration, *made = runs(tmp_path, module, fresh)
    assert_same(*made)
    assert calibration.result.gradients == 6 and calibration.result.problems == ()


def test_what_is_too_large_to_be_copied_and_written_in_a_training_step_ends_the_probe(tmp_path) -> None:
    with pytest.warns(UserWarning, match=r"no probe: .*test_no_trace.LARGER is written into .* too large to be copied"):
        _, *made = runs(tmp_path, WritesIntoALargerBank, fresh)
    assert_same(*made)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*this process is multi-threaded")
@pytest.mark.parametrize(("data", "refused"), LOADERS)
def test_the_run_is_the_same_whatever_the_loader_does(monkeypatch, tmp_path, data, refused) -> None:
    monkeypatch.setattr(stand_ins, "_PATIENCE", 2.0)
    caught = pytest.warns(UserWarning, match=f"no probe: .*{refused}") if refused else None
    if caught is None:
        calibration, *made = runs(tmp_path, Small, data, logger=False)
    else:
        with caught:
            calibration, *made = runs(tmp_path, Small, data, logger=False)
    assert_same(*made)
    assert calibration.result.gradients == (0 if refused else 6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*unclosed", "ignore:.*this process is multi-threaded")
@pytest.mark.parametrize(("make", "use", "outcome", "workers"), PLACES)
def test_what_has_a_place_keeps_it(tmp_path, make, use, outcome, workers) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no probe")
        calibration, *made = runs(
            tmp_path, Small, lambda: DataLoader(Using(make, use), 8, num_workers=workers), max_steps=12
        )
    assert_same(*made)
    assert bool(calibration.result.gradients) == (outcome == "same")
    assert calibration.result.gradients or "dataset.thing" in calibration.result.problems[0]


def test_a_copy_whose_class_closes_things_goes_to_a_worker() -> None:
    """A spawned one, for which it is pickled."""
    copied = copies.Copier().copy(Deleted())
    sent = pickle.loads(pickle.dumps(copied))
    assert type(sent) is type(copied) is not Deleted and sent.__reduce_ex__(4)[1][1] == (Deleted,)


class AsksWhetherGarbageIsCollected(Plain):
    found: bool | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        type(self).found = gc.isenabled()
        return super().__reduce_ex__(protocol)


def test_many_objects_are_copied_without_collections_of_garbage(tmp_path) -> None:
    runs(tmp_path, Small, lambda: DataLoader(AsksWhetherGarbageIsCollected(), 8))
    assert AsksWhetherGarbageIsCollected.found is False and gc.isenabled()


def test_of_lists_and_dictionaries_nothing_is_asked(monkeypatch) -> None:
    """There may be millions of them."""
    monkeypatch.delattr(copies, "is_a")
    value = {"one": [{"box": [0.5, 1.0]}], "two": ({1, 2}, [[]])}
    copied = copies.Copier().copy(value)
    assert copied == value and copied["one"][0]["box"] is not value["one"][0]["box"]


TOLD: list[Any] = []


class Metaclass(abc.ABCMeta):
    def __init__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args)
        TOLD.append(cls)


class Listed(Deleted, metaclass=Metaclass):
    def __init_subclass__(cls, *, name: str) -> None:
        TOLD.append(name)


class Named(Listed, name="named"):
    pass


def test_classes_and_metaclasses_that_keep_lists_are_not_told_of_a_copy_whose_class_closes_things() -> None:
    original = Named()
    copied = copies.Copier().copy(original)
    assert isinstance(copied, Named) and type(copied) is not Named
    assert TOLD == [Listed, "named", Named]
    del copied
    gc.collect()
    assert Named.__subclasses__() == []


@pytest.mark.parametrize(
    ("space", "users"),
    [
        pytest.param(vars(torch.ops), False, id="a part without a file"),
        pytest.param(
            {"__name__": "one", "__file__": "/base/lib/site-packages/one.py"}, False, id="another environment"
        ),
        pytest.param({"__name__": "one", "__file__": "/home/project/one.py"}, True, id="a project"),
    ],
)
def test_the_users_code_is_what_is_not_installed(space, users) -> None:
    assert places._is_users(space) == users


def test_what_pip_put_into_a_folder_of_its_own_is_installed(tmp_path) -> None:
    """As ``pip install --target`` does, also where the user's code lies beside it."""
    (tmp_path / "theirs-1.0.dist-info").mkdir()
    (tmp_path / "theirs-1.0.dist-info" / "RECORD").write_text("theirs/__init__.py,,\ntheirs/part.py,,\nalone.py,,\n")
    files = {"theirs": "theirs/__init__.py", "alone": "alone.py", "mine": "mine.py", "ours": "ours/__init__.py"}
    spaces = {name: {"__name__": name, "__file__": str(tmp_path / file)} for name, file in files.items()}
    assert [name for name, space in spaces.items() if places._is_users(space)] == ["mine", "ours"]
    assert [silence.is_own_code("", str(tmp_path / file)) for file in ("theirs/part.py", "mine.py")] == [False, True]


def test_nothing_that_reads_ahead_is_left(tmp_path) -> None:
    """A thread around a loader with workers: neither is there when training begins."""
    left: list[Any] = []

    class Looks(L.Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            reading = [thread for thread in threading.enumerate() if "lambda" in thread.name]
            left.append((len(reading), len(multiprocessing.active_children())))

    with pytest.warns(UserWarning, match=f"no probe: .*{THREAD}"):
        fit(
            tmp_path,
            OptimizerCalibration(apply=False, batch_size=8),
            Looks(),
            module=Small,
            data=Prefetching(dataset(96), 8, num_workers=1),
            max_steps=1,
        )
    assert left == [(1, 1)]  # those of training
