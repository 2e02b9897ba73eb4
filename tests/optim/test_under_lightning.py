"""AdamE, ALTO and EAdaptor under Lightning's Trainer, against a loop written by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from support import dataset, fit, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_gradhist.optim import ALTO, AdamE
from lightning_gradhist.optim.e_adaptor import EAdaptor

EXPLORE: dict[str, float] = {"alpha": -5.0, "explore_beta": 0.9}
BATCHES = 10
OVERFLOW_AT = 3

OPTIMIZERS = pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: AdamE(p, lr=0.02, weight_decay=0.1, **EXPLORE), id="AdamE"),
        pytest.param(lambda p: ALTO(p, lr=0.02, **EXPLORE), id="ALTO"),
        pytest.param(lambda p: EAdaptor(torch.optim.SGD(p, lr=0.1, momentum=0.9), **EXPLORE), id="EAdaptor"),
    ],
)


class Batches:
    """Ten fixed batches."""

    def __init__(self) -> None:
        self.batches = list(zip(*(tensor.split(8) for tensor in dataset(8 * BATCHES).tensors), strict=True))

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Small(L.LightningModule):
    def __init__(self, make: Any, overflow_at: int | None = None) -> None:
        super().__init__()
        self.make, self.overflow_at = make, overflow_at
        self.net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))

    def loss(self, batch: Any) -> Tensor:
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        return loss * torch.inf if batch_idx == self.overflow_at else loss

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class Manual(Small):
    """The same by hand, inside Lightning; ``with_closure`` leaves backward to the optimizer's step."""

    def __init__(self, make: Any, with_closure: bool) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.with_closure = with_closure

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, torch.optim.Optimizer)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        if self.with_closure:
            optimizer.step(closure)
        else:
            closure()
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
            optimizer.step()


def start(make: Any) -> Small:
    """The module as :func:`support.fit` makes it."""
    L.seed_everything(7, verbose=False)
    return Small(make)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def by_hand(
    module: Small,
    *,
    accumulate: int = 1,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    dtype: torch.dtype | None = None,
    skip: int | None = None,
    average: AveragedModel | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One epoch without Lightning: the weights and the optimizer's state."""
    optimizer = module.configure_optimizers()
    params = list(module.parameters())
    for k, batch in enumerate(Batches()):
        if k == skip:
            continue
        autocast = torch.autocast("cpu", dtype, cache_enabled=False) if dtype else contextlib.nullcontext()
        with autocast:
            loss = module.loss(batch)
        (loss / accumulate).backward()
        if (k + 1) % accumulate and k + 1 < BATCHES:
            continue
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(params, clip_norm)
        if clip_value is not None:
            nn.utils.clip_grad_value_(params, clip_value)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(module)
    return weights(module), optimizer.state_dict()


def assert_same(one: Any, other: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@OPTIMIZERS
@pytest.mark.parametrize(
    ("options", "by_hands"),
    [
        pytest.param({}, {}, id="plain"),
        pytest.param({"accumulate_grad_batches": 4}, {"accumulate": 4}, id="accumulation"),
        pytest.param({"gradient_clip_val": 0.1}, {"clip_norm": 0.1}, id="clip-norm"),
        pytest.param(
            {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, {"clip_value": 0.01}, id="clip-value"
        ),
        pytest.param({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}, id="bf16-mixed"),
        pytest.param(
            {"precision": "bf16-mixed", "accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
            {"dtype": torch.bfloat16, "accumulate": 4, "clip_norm": 0.1},
            id="all",
        ),
    ],
)
def test_automatic_optimization(tmp_path: Path, make: Any, options: Any, by_hands: Any) -> None:
    made = fit(tmp_path, module=lambda: Small(make), data=Batches(), logger=False, **options)
    got = weights(made.lightning_module), made.optimizers[0].state_dict()
    want = by_hand(start(make), **by_hands)
    assert_same(got[0], want[0])
    assert_same(got[1]["state"], want[1]["state"])
    assert made.global_step == (3 if "accumulate" in by_hands else BATCHES)


@OPTIMIZERS
@pytest.mark.parametrize("with_closure", [True, False])
def test_manual_optimization(tmp_path: Path, make: Any, with_closure: bool) -> None:
    made = fit(tmp_path, module=lambda: Manual(make, with_closure), data=Batches(), logger=False)
    want, state = by_hand(start(make), clip_norm=None if with_closure else 0.1)
    assert_same(weights(made.lightning_module), want)
    wrapped = made.lightning_module.optimizers()
    assert wrapped.param_groups is made.optimizers[0].param_groups
    assert_same(wrapped.state_dict()["state"], state["state"])
    assert repr(wrapped) and wrapped.state and wrapped.defaults
    calls: list[Any] = []
    made.optimizers[0].register_state_dict_post_hook(lambda hooked, _: calls.append(hooked))
    wrapped.state_dict()
    assert len(calls) == 1


def test_the_adaptor_is_not_idle_as_the_authors_is(tmp_path: Path) -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    runs = []
    for make in (sgd, lambda p: EAdaptor(sgd(p), **EXPLORE)):
        runs.append(fit(tmp_path, module=lambda make=make: Small(make), data=Batches(), logger=False))
    one, other = (weights(made.lightning_module)["net.0.weight"] for made in runs)
    assert (one - other).abs().max() > 1e-3


class Spy(L.Callback):
    """The optimizer's state and the weights before and after each batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append([self.now(trainer, pl_module)])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen[-1].append(self.now(trainer, pl_module))

    def now(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        return weights(pl_module), copy.deepcopy(trainer.optimizers[0].state_dict()["state"])


@OPTIMIZERS
@pytest.mark.parametrize("clip", [None, 0.1])
def test_fp16_with_a_scaler_that_skips_a_step(tmp_path: Path, make: Any, clip: float | None) -> None:
    spy = Spy()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    made = fit(
        tmp_path,
        spy,
        module=lambda: Small(make, OVERFLOW_AT),
        data=Batches(),
        logger=False,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
        gradient_clip_val=clip,
    )
    assert scaler.get_scale() == 2.0**7
    for k, (before, after) in enumerate(spy.seen):
        if k == OVERFLOW_AT:
            assert_same(before, after)
        else:
            assert not torch.equal(before[0]["net.0.weight"], after[0]["net.0.weight"])
    want, _ = by_hand(start(make), dtype=torch.float16, clip_norm=clip, skip=OVERFLOW_AT)
    assert_same(weights(made.lightning_module), want, 5e-3)  # the scale moves fp16's rounding of small gradients


def test_an_adapted_fused_optimizer_may_be_clipped_under_fp16(tmp_path: Path) -> None:
    """Lightning refuses to clip a fused one, which unscales by itself; under EAdaptor the scaler does."""

    def make(parameters: Any, fused: bool = True) -> torch.optim.Optimizer:
        return EAdaptor(torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, fused=fused), **EXPLORE)

    ends = []
    for fused in (True, False):
        precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))
        made = fit(
            tmp_path,
            module=lambda fused=fused: Small(lambda p: make(p, fused), OVERFLOW_AT),
            data=Batches(),
            logger=False,
            plugins=[precision],
            gradient_clip_val=0.1,
        )
        ends.append(weights(made.lightning_module))
    assert_same(*ends, 1e-4)


class Resumable(Small):
    """Takes its batches by ``global_step``: Lightning starts the loader over in the middle of an epoch."""

    first_step: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.first_step = self.global_step if self.first_step is None else self.first_step
        return self.loss(Batches().batches[self.global_step % BATCHES])


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint")
@OPTIMIZERS
@pytest.mark.parametrize("stop_at", [4, 13])
def test_resume_in_mid_epoch_is_bit_for_bit(tmp_path: Path, make: Any, stop_at: int) -> None:
    def with_schedule(parameters: Any) -> Any:
        return {
            "optimizer": (optimizer := make(parameters)),
            "lr_scheduler": {
                "scheduler": OneCycleLR(optimizer, max_lr=0.05, total_steps=2 * BATCHES + 1),
                "interval": "step",
            },
        }

    options: dict[str, Any] = {"logger": False, "max_epochs": 2}
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop_at, save_top_k=-1)
    whole = fit(
        tmp_path,
        saving,
        module=lambda: Resumable(with_schedule),
        data=Batches(),
        **options,
        enable_checkpointing=True,
    )
    made = trainer(tmp_path, **options)
    module = Resumable(with_schedule)
    made.fit(module, Batches(), ckpt_path=tmp_path / f"step={stop_at}.ckpt")
    assert module.first_step == stop_at
    assert made.global_step == 2 * BATCHES
    assert_same(weights(made.lightning_module), weights(whole.lightning_module))
    one, other = made.optimizers[0].state_dict(), whole.optimizers[0].state_dict()
    assert_same(one["state"], other["state"])
    assert one["param_groups"] == other["param_groups"]


@OPTIMIZERS
def test_one_cycle_and_learning_rate_monitor(tmp_path: Path, make: Any) -> None:
    class Scheduled(Small):
        def configure_optimizers(self) -> Any:
            optimizer = self.make(self.parameters())
            self.scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=BATCHES + 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler, "interval": "step"}}

    monitor = LearningRateMonitor(logging_interval="step", log_momentum=True)
    logger = CSVLogger(tmp_path, name="", version="")
    made = fit(tmp_path, monitor, module=lambda: Scheduled(make), data=Batches(), logger=logger, log_every_n_steps=1)
    name = f"lr-{type(made.optimizers[0]).__name__}"
    rows = [row for row in logger.experiment.metrics if name in row] or _rows(tmp_path, name)
    rates, momenta = ([float(row[key]) for row in rows] for key in (name, f"{name}-momentum"))

    expected_rates, expected_momenta = [], []
    optimizer = make([nn.Parameter(torch.zeros(2))])
    scheduler = OneCycleLR(optimizer, max_lr=0.05, total_steps=BATCHES + 1)
    for _ in range(BATCHES):
        group = optimizer.param_groups[0]
        expected_rates.append(group["lr"])
        expected_momenta.append(group["betas"][0] if "betas" in group else group["momentum"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected_rates, rel=1e-5)
    assert momenta == pytest.approx(expected_momenta, rel=1e-5)
    assert max(rates) > 2 * min(rates) and max(momenta) > min(momenta) + 0.05


def _rows(folder: Path, name: str) -> list[dict[str, str]]:
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    return [row for row in rows if row[name]]


@OPTIMIZERS
def test_ema_weight_averaging(tmp_path: Path, make: Any) -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    averaging = callbacks.EMAWeightAveraging(decay=0.8)
    made = fit(tmp_path, averaging, module=lambda: Small(make), data=Batches(), logger=False)
    module = start(make)
    average = AveragedModel(module, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    last, _ = by_hand(module, average=average)
    assert_same(weights(made.lightning_module), weights(average.module), 1e-5)  # lerp in another order
    assert not torch.equal(weights(average.module)["net.0.weight"], last["net.0.weight"])


class Boring(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])


class Adapted(Boring):
    """How EAdaptor, which takes an optimizer rather than parameters, comes to the command line."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD, alpha: float = -5.0, explore_beta: float = 0.9):
        super().__init__()
        self.make, self.explore = optimizer, (alpha, explore_beta)

    def configure_optimizers(self) -> Any:
        return EAdaptor(self.make(self.parameters()), *self.explore)


def command_line(tmp_path: Path, module: Any, *arguments: str) -> torch.optim.Optimizer:
    trainer_arguments = [
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    cli = LightningCLI(
        module,
        args=[*arguments, *trainer_arguments],
        run=False,
        save_config_callback=None,
        seed_everything_default=1,
    )
    cli.trainer.fit(cli.model, Batches())
    optimizer: torch.optim.Optimizer = cli.trainer.optimizers[0]
    return optimizer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own use of jsonargparse
@pytest.mark.parametrize(
    ("name", "own"), [("AdamE", "decoupled_weight_decay"), ("ALTO", "layerwise")], ids=["AdamE", "ALTO"]
)
def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, own: str) -> None:
    monkeypatch.setattr("sys.argv", ["program"])
    optimizer = command_line(
        tmp_path,
        Boring,
        f"--optimizer=lightning_gradhist.optim.{name}",
        "--optimizer.lr=0.25",
        "--optimizer.betas=[0.8, 0.9]",
        "--optimizer.alpha=-5",
        "--optimizer.explore_beta=0.9",
        f"--optimizer.{own}=false",
        "--optimizer.foreach=null",
    )
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == name
    assert (group["lr"], group["betas"], group["alpha"], group["explore_beta"]) == (0.25, (0.8, 0.9), -5.0, 0.9)
    assert group[own] is False and group["foreach"] is None
    assert len(optimizer.state) == 2
    defaults = command_line(tmp_path, Boring, f"--optimizer=lightning_gradhist.optim.{name}").param_groups[0]
    assert (defaults["alpha"], defaults["explore_beta"]) == ("auto", "auto")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_command_line_with_the_adaptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["program"])
    optimizer = command_line(
        tmp_path, Adapted, "--model.optimizer=SGD", "--model.optimizer.lr=0.25", "--model.alpha=-2"
    )
    assert isinstance(optimizer, EAdaptor) and isinstance(optimizer.inner, torch.optim.SGD)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["alpha"], group["explore_beta"]) == (0.25, -2.0, 0.9)
