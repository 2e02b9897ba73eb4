"""What the tests of the callbacks share: a small model, a short fit, and the event file read back."""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-8)


class Lookahead(torch.optim.Optimizer):
    """As timm's: it does not call the constructor, has lists of hooks nobody calls, and saves the state of the inner one."""

    def __init__(self, base_optimizer: torch.optim.Optimizer, alpha: float = 0.5, k: int = 6) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self._base_optimizer = base_optimizer
        self.param_groups, self.defaults = base_optimizer.param_groups, base_optimizer.defaults
        self.defaults.update(lookahead_alpha=alpha, lookahead_k=k, lookahead_step=0)
        self.state = defaultdict(dict)
        for group in self.param_groups:
            group.update({name: default for name, default in self.defaults.items() if name not in group})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self._base_optimizer.step(closure)
        for group in self._base_optimizer.param_groups:
            group["lookahead_step"] += 1
            if group["lookahead_step"] % group["lookahead_k"] == 0:
                for param in group["params"]:
                    state = self._base_optimizer.state[param]
                    slow = state.setdefault("lookahead_slow_buff", param.clone())
                    slow.add_(param - slow, alpha=group["lookahead_alpha"])
                    param.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        return self._base_optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self._base_optimizer.load_state_dict(state_dict)
        self.param_groups = self._base_optimizer.param_groups


class Net(L.LightningModule):
    """BatchNorm, dropout, a metric, Python state and logging: all that a probe could leave a trace in."""

    def __init__(self, optimizer: Any = adamw, scheduler: Any = None) -> None:
        super().__init__()
        self.make_optimizer, self.make_scheduler = optimizer, scheduler
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)
        self.accuracy = MulticlassAccuracy(3)
        self.losses: list[float] = []
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, labels = batch
        logits = self.head(self.body(inputs))
        loss = nn.functional.cross_entropy(logits, labels)
        self.accuracy(logits, labels)
        self.log("train_accuracy", self.accuracy)
        self.log_dict({"train_loss": loss, "calls": float(self.calls)})
        self.losses.append(float(loss.detach()))
        self.calls += 1
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "interval": "step"},
        }


def dataset(samples: int = 128) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, 8, generator=generator)
    labels = (inputs @ torch.randn(8, 3, generator=generator)).argmax(1)
    return TensorDataset(inputs, labels)


def loader(batch_size: int = 8, samples: int = 128, **options: Any) -> DataLoader:
    return DataLoader(dataset(samples), batch_size, shuffle=True, **options)


class Batches:
    """An iterable that tells nothing about itself but its length."""

    def __init__(self, batch_size: int, samples: int = 64) -> None:
        self.loader = DataLoader(dataset(samples), batch_size)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class Opaque:
    """A batch whose samples nobody can count."""

    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batch)


class OpaqueBatches(Batches):
    """As Batches, of batches that cannot be counted."""

    def __iter__(self) -> Iterator[Any]:
        return map(Opaque, super().__iter__())


def trainer(folder: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": TensorBoardLogger(folder, name="", version=""),
        "default_root_dir": folder,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(folder: Path, *callbacks: L.Callback, module: Any = None, data: Any = None, **options: Any) -> L.Trainer:
    """Trains from a fixed seed; the module is found at ``trainer.lightning_module``."""
    L.seed_everything(7, verbose=False)
    module = Net() if module is None else module() if callable(module) and not isinstance(module, nn.Module) else module
    made = trainer(folder, *callbacks, **options)
    made.fit(module, loader() if data is None else data)
    return made


def final_state(made: L.Trainer) -> dict[str, Any]:
    module = made.lightning_module
    return {
        "weights": {name: value.clone() for name, value in module.state_dict().items()},
        "optimizer": [optimizer.state_dict() for optimizer in made.optimizers],
        "rng": torch.get_rng_state(),
        "losses": list(getattr(module, "losses", [])),
        "calls": getattr(module, "calls", None),
        "logged": {name: float(value) for name, value in made.callback_metrics.items()},
    }


def events(folder: Path) -> EventAccumulator:
    """What was written so far; read again where more was written since."""
    return _events(folder, tuple((file.name, file.stat().st_size) for file in sorted(folder.glob("events*"))))


@lru_cache(maxsize=4)
def _events(folder: Path, files: tuple[tuple[str, int], ...]) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "images": 0, "tensors": 0})
    return accumulator.Reload()


def logged_counts(folder: Path, tag: str, step: int) -> dict[float, float]:
    """Counts of a logged histogram by the upper edge of their bucket, empty buckets left out."""
    found = next(event for event in events(folder).Histograms(tag) if event.step == step)
    pairs = zip(found.histogram_value.bucket_limit, found.histogram_value.bucket, strict=True)
    return {round(limit, 9): count for limit, count in pairs if count}


class Counts(dict[float, float]):
    """Counts by the upper edge of their bin; equal to those of any buckets that these bins fill up, each bin once."""

    def __eq__(self, logged: object) -> bool:
        assert isinstance(logged, dict)
        merged: dict[float, float] = {}
        for edge, count in self.items():
            bucket = min((limit for limit in logged if limit >= edge), default=math.nan)
            merged[bucket] = merged.get(bucket, 0.0) + count
        return dict.__eq__(merged, logged)

    __hash__ = None  # type: ignore[assignment]


def expected_counts(gradient: Tensor, bins_per_octave: int = 8) -> Counts:
    """The same for a whole tensor, counted by numpy's way: exponent and mantissa."""
    mantissa, exponent = torch.frexp(gradient.double().abs()[gradient != 0])
    upper = torch.floor((2 * mantissa - 1) * bins_per_octave) + 1
    limits = torch.ldexp(1 + upper / bins_per_octave, exponent - 1).log10()
    values, counts = limits.unique(return_counts=True)
    return Counts(
        (round(limit, 9), float(count)) for limit, count in zip(values.tolist(), counts.tolist(), strict=True)
    )


def collectives(job: Any) -> tuple[Any, list[tuple[int, str]]]:
    """What a job returns, and the sums over ranks that it asked for."""
    original, asked = torch.distributed.all_reduce, []

    def all_reduce(tensor: Tensor, *rest: Any, **options: Any) -> Any:
        asked.append((tensor.numel(), str(tensor.dtype)))
        return original(tensor, *rest, **options)

    torch.distributed.all_reduce = all_reduce
    try:
        return job(), asked
    finally:
        torch.distributed.all_reduce = original


class TwoOptimizers(L.LightningModule):
    """Manual optimization; the second optimizer steps every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(8, 4), nn.Linear(4, 3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        loss = nn.functional.cross_entropy(self.two(self.one(inputs)), labels)
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        if batch_idx % 2 == 0:
            second.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.one.parameters(), lr=1e-3), torch.optim.SGD(self.two.parameters(), lr=1e-2)


class GradientSpy(L.Callback):
    """Keeps the gradients that reach the optimizer, in whole, as one process sees them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.seen.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if id(p) in mine and p.grad is not None}
        )


@dataclass
class StateSeen:
    """Weights and the root of Adam's bias-corrected second moment, in whole: before each step, and at the end."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    roots: list[dict[str, Tensor]] = field(default_factory=list)

    def ratio(self, step: int, *names: str) -> float:
        """The norm of a step's change of these parameters over their norm before it."""
        before, after = (torch.cat([self.weights[step + i][name].flatten() for name in names]) for i in (0, 1))
        return float((after - before).norm() / before.norm())


class StateSpy(L.Callback):
    """Looks at what an optimizer has before each of its steps, and at the end."""

    def __init__(self) -> None:
        self.seen = StateSeen()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        decay = {
            id(p): group["betas"][1] for group in optimizer.param_groups for p in group["params"] if "betas" in group
        }
        self.seen.weights.append({name: _whole(p.detach()).double() for name, p in pl_module.named_parameters()})
        self.seen.roots.append({})
        for name, p in pl_module.named_parameters():
            state = optimizer.state.get(p, {})
            if "exp_avg_sq" in state:
                correction = 1 - decay[id(p)] ** float(_whole(state["step"]))
                self.seen.roots[-1][name] = (
                    (_whole(state.get("max_exp_avg_sq", state["exp_avg_sq"])) / correction).float().sqrt()
                )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.on_before_optimizer_step(trainer, pl_module, trainer.optimizers[0])


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def assert_state_is_logged(folder: Path, seen: StateSeen, steps: list[int], eps: float) -> None:
    """What the monitor logs of each parameter, against what is found in the optimizer."""
    for step in steps:
        for name, root in seen.roots[step + 1].items():
            assert logged_counts(folder, f"optimizer_second_moment/{name}", step) == expected_counts(root), (name, step)
            damped = float((root[root > 0] < eps).float().mean())
            assert logged_scalars(folder, f"optimizer_damped_share/{name}")[step] == pytest.approx(damped), (name, step)
            if seen.weights[step][name].any():
                ratio = logged_scalars(folder, f"optimizer_update_ratio/{name}")[step]
                assert ratio == pytest.approx(seen.ratio(step, name), rel=1e-5), (name, step)
        ratio = logged_scalars(folder, "optimizer_update_ratio/all")[step]
        assert ratio == pytest.approx(seen.ratio(step, *seen.roots[step + 1]), rel=1e-5)
    assert list(logged_scalars(folder, "optimizer_update_ratio/all")) == steps


def logged_scalars(folder: Path, tag: str) -> dict[int, float]:
    """Values of a logged scalar by step; none where it was never logged."""
    found = events(folder)
    return {event.step: event.value for event in found.Scalars(tag)} if tag in found.Tags()["scalars"] else {}
