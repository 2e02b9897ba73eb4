from __future__ import annotations

import gc
import math
import re
import threading
import time
import warnings
import weakref
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import GradientAccumulationScheduler, LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import (
    GradientSpy,
    Lookahead,
    Net,
    OpaqueBatches,
    TwoOptimizers,
    dataset,
    events,
    expected_counts,
    final_state,
    fit,
    loader,
    logged_counts,
    logged_scalars,
    trainer,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.utils.data import DataLoader, IterableDataset, Sampler, TensorDataset, get_worker_info

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.callbacks import gradients
from lightning_gradhist.callbacks.monitor import noise, observer, updates
from lightning_gradhist.callbacks.strategies import Replicas, own_parts
from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.run_record import RunRecord


def assert_counts(folder, spy: GradientSpy, every: int, steps: list[int]) -> None:
    for step in steps:
        gradients = spy.seen[step]
        for name, gradient in gradients.items():
            if gradient.any():
                assert logged_counts(folder, f"gradient_magnitude/{name}", step) == expected_counts(gradient), (
                    name,
                    step,
                )
        pooled = torch.cat([gradient.flatten() for gradient in gradients.values()])
        assert logged_counts(folder, "gradient_magnitude/all", step) == expected_counts(pooled)
    assert [event.step for event in events(folder).Histograms("gradient_magnitude/all")] == steps


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"accumulate_grad_batches": 3}, id="accumulation with a short last window"),
        pytest.param({"gradient_clip_val": 1e-3}, id="clipping"),
        pytest.param({"precision": "bf16-mixed"}, id="bf16-mixed"),
        pytest.param({"precision": "bf16-true"}, id="bf16-true"),
    ],
)
def test_counts_are_those_of_the_gradient_before_clipping(tmp_path, options: dict[str, Any]) -> None:
    spy = GradientSpy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_clip_val.*")
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=3), spy, **options)
    assert len(spy.seen) == made.global_step
    assert_counts(tmp_path, spy, 3, list(range(0, made.global_step, 3)))


class _ScaleSpy(L.Callback):
    """The gradients as they are, divided by the scale of the moment if the optimizer has to do that itself."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
        scale = trainer.precision_plugin.scaler.get_scale() if scaled else 1.0
        self.seen.append({n: p.grad.clone() / scale for n, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("fused", [pytest.param(False, id="unscaled by Lightning"), pytest.param(True, id="fused")])
def test_a_loss_scale_is_taken_off(tmp_path, fused: bool) -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    assert getattr(optimizer([nn.Parameter(torch.zeros(1))]), "_step_supports_amp_scaling", False) == fused
    spy = _ScaleSpy()
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))
    made = fit(
        tmp_path,
        GradientHistogramMonitor(every_n_steps=4),
        spy,
        module=Net(optimizer),
        plugins=[precision],
        max_steps=9,
    )
    assert made.global_step == 9
    assert_counts(tmp_path, spy, 4, [0, 4, 8])  # type: ignore[arg-type]


@pytest.mark.parametrize("fused", [pytest.param(False, id="by the scaler"), pytest.param(True, id="by the optimizer")])
def test_a_skipped_step_is_counted_apart(tmp_path, fused: bool) -> None:
    spy, monitor = _ScaleSpy(), GradientHistogramMonitor(every_n_steps=1)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3))
    made = fit(
        tmp_path,
        monitor,
        spy,
        module=lambda: Net(lambda p: torch.optim.AdamW(p, lr=1e-2, fused=fused)),
        plugins=[precision],
    )
    taken = [all(g.isfinite().all() for g in gradients.values()) for gradients in spy.seen]
    assert 3 < sum(taken) < len(taken) - 3
    found = events(tmp_path)
    assert [e.step for e in found.Histograms("gradient_magnitude/all")] == [i for i, took in enumerate(taken) if took]
    skipped = [event.value for event in found.Scalars("gradient_skipped_steps")]
    assert skipped == [float(i + 1 - sum(taken[: i + 1])) for i in range(len(taken))]
    assert monitor.state_dict()["optimizers"][0]["skipped"] == skipped[-1]
    samples = monitor.noise_records[0].samples
    assert samples and all(taken[sample["step"]] for sample in samples)
    assert all((sample["noise_simple"] is not None) == taken[sample["step"] + 1] for sample in samples)
    made.save_checkpoint(tmp_path / "one.ckpt")
    made = trainer(tmp_path / "more", monitor, max_epochs=2, plugins=[precision])
    made.fit(Net(lambda p: torch.optim.AdamW(p, fused=fused)), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert events(tmp_path / "more").Scalars("gradient_skipped_steps")[0].value >= skipped[-1]


class Recorder(torch.optim.AdamW):
    """Keeps the gradients that it steps by."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__(parameters, lr=1e-2, **options)
        self.seen: list[list[torch.Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.seen.append([p.grad.clone() for p in self.param_groups[0]["params"]])
        super().step()
        return loss


class ByHand(TwoOptimizers):
    """Two optimizers, one of whose gradients are clipped."""

    def configure_optimizers(self) -> Any:
        return Recorder(self.one.parameters()), Recorder(self.two.parameters())

    def manual_backward(self, loss: Any) -> None:
        super().manual_backward(loss)
        self.clip_gradients(self.optimizers()[0], gradient_clip_val=1e-2, gradient_clip_algorithm="value")


class OwnClipping(Net):
    def configure_gradient_clipping(self, optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        for p in self.head.parameters():
            p.grad.mul_(0.37)


def _fp16() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**12))


@pytest.mark.parametrize(
    ("module", "options"),
    [
        pytest.param(lambda: Net(Recorder), {"gradient_clip_val": 1e-2}, id="norm"),
        pytest.param(
            lambda: Net(Recorder),
            {"gradient_clip_val": 1e-2, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 3},
            id="value, with accumulation",
        ),
        pytest.param(lambda: Net(Recorder), {"gradient_clip_val": 1e-2, "plugins": _fp16}, id="16-mixed"),
        pytest.param(
            lambda: Net(lambda p: Recorder(p, maximize=True, foreach=True)), {"precision": "bf16-mixed"}, id="maximize"
        ),
        pytest.param(lambda: OwnClipping(Recorder), {}, id="the module's own"),
        pytest.param(ByHand, {}, id="manual, two optimizers"),
    ],
)
def test_counts_after_clipping_are_those_of_what_the_optimizer_uses(tmp_path, module: Any, options: Any) -> None:
    options = {name: [value()] if callable(value) else value for name, value in options.items()}
    before = GradientHistogramMonitor(every_n_steps=4, noise_scale=False)
    after = GradientHistogramMonitor(every_n_steps=4, noise_scale=False, when="after_clip")
    made = fit(tmp_path, before, after, module=module, **options)
    several = len(made.optimizers) > 1
    for index, optimizer in enumerate(made.optimizers):
        tag = f"all_{index}" if several else "all"
        seen = [torch.cat([gradient.flatten() for gradient in gradients]) for gradients in optimizer.seen[::4]]
        logged = [e.step for e in events(tmp_path).Histograms(f"gradient_clipped_magnitude/{tag}")]
        assert len(logged) == len(seen) > 0
        for step, gradient in zip(logged, seen, strict=True):
            assert logged_counts(tmp_path, f"gradient_clipped_magnitude/{tag}", step) == expected_counts(gradient)
    tag = "all_0" if several else "all"
    clipped = logged_counts(tmp_path, f"gradient_clipped_magnitude/{tag}", 0)
    unclipped = logged_counts(tmp_path, f"gradient_magnitude/{tag}", 0)
    assert (clipped == unclipped) == (several or "precision" in options)  # clipped before, or not at all


def test_training_is_the_same_with_and_without(tmp_path) -> None:
    without = final_state(fit(tmp_path / "a"))
    with_monitor = final_state(fit(tmp_path / "b", GradientHistogramMonitor(every_n_steps=1)))
    assert without["losses"] == with_monitor["losses"]
    torch.testing.assert_close(without["weights"], with_monitor["weights"], rtol=0, atol=0)
    assert torch.equal(without["rng"], with_monitor["rng"])


class Partial(Net):
    """One frozen layer, and one that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.body[0].requires_grad_(False)


def test_frozen_and_unused_layers_are_left_out(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=5), module=Partial())
    tags = events(tmp_path).Tags()["histograms"]
    assert "gradient_magnitude/head.weight" in tags
    assert not [tag for tag in tags if "unused" in tag or "body.0" in tag]


def test_groups_add_up_and_filters_leave_out(tmp_path) -> None:
    spy = GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=8, noise_scale=False, group_by=1, exclude="BatchNorm1d|head.bias")
    fit(tmp_path, monitor, spy)
    tags = events(tmp_path).Tags()["histograms"]
    assert tags == [f"gradient_magnitude/{name}" for name in ("body", "head", "all")]
    for step in (0, 8):
        body, head = (
            torch.cat([spy.seen[step][name].flatten() for name in names])
            for names in (("body.0.weight", "body.0.bias"), ("head.weight",))
        )
        for name, gradient in (("body", body), ("head", head), ("all", torch.cat([body, head]))):
            assert logged_counts(tmp_path, f"gradient_magnitude/{name}", step) == expected_counts(gradient)


def test_an_optimizer_of_which_nothing_is_counted_logs_nothing(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=4, include="one", batch_size=8)
    fit(tmp_path, monitor, module=TwoOptimizers)
    tags = events(tmp_path).Tags()
    assert {tag.partition("/")[2] for tag in tags["histograms"]} == {"one.weight", "one.bias", "all_0"}
    assert not [tag for tag in tags["scalars"] if "two" in tag or "all_1" in tag]
    assert [len(record) for record in monitor.noise_records] == [4, 2]  # measured of all


def test_a_filter_that_matches_nothing_stops_the_run_at_its_start(tmp_path) -> None:
    with pytest.raises(
        MisconfigurationException, match="exclude='Conv2d' matches no.*body.0.weight.*BatchNorm1d, Linear"
    ):
        fit(tmp_path, GradientHistogramMonitor(exclude="Conv2d"))


def test_many_histograms_are_pointed_out(tmp_path, caplog) -> None:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.many = nn.ParameterList(torch.zeros(1) for _ in range(200))

    for monitor in (GradientHistogramMonitor(), GradientHistogramMonitor(group_by=1)):
        with caplog.at_level("INFO"):
            fit(tmp_path, monitor, module=Wide, max_steps=1, logger=DummyLogger())
    assert [r.message for r in caplog.records if "GradientHistogramMonitor logs 206 histograms" in r.message]
    assert len([r for r in caplog.records if "group_by=1" in r.message]) == 1


def test_two_optimizers_are_told_apart(tmp_path) -> None:
    spy = GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=4, batch_size=8)
    fit(tmp_path, monitor, spy, module=TwoOptimizers())
    histograms = events(tmp_path).Histograms
    assert len(histograms("gradient_magnitude/one.weight")) == 4  # 16 steps
    assert len(histograms("gradient_magnitude/two.weight")) == 2  # 8 steps
    first = histograms("gradient_magnitude/two.weight")[0]
    assert first.histogram_value.num == spy.seen[1]["two.weight"].numel()
    tags = events(tmp_path).Tags()
    assert {"gradient_magnitude/all_0", "gradient_magnitude/all_1"} < set(tags["histograms"])
    assert tags["images"] == ["gradient_magnitude_by_layer_0", "gradient_magnitude_by_layer_1"]
    record = RunRecord.load(tmp_path / "calibration.json")
    assert [entry.name for entry in record.optimizers] == ["AdamW", "SGD"]
    assert record.optimizers[0].noise["adam"].measurements == 3  # the first pair came before there was a second moment
    assert record.optimizers[1].noise["adam"].measurements == 0  # SGD has none
    assert record.optimizers[1].noise["simple"].measurements == 2


def test_noise_is_measured_from_successive_gradients(tmp_path) -> None:
    spy = GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=4)
    fit(tmp_path, monitor, spy, data=loader(batch_size=8))
    samples = monitor.noise_records[0].samples
    assert [sample["step"] for sample in samples] == [0, 4, 8, 12]
    for sample in samples:
        one, two = (torch.cat([g.flatten() for g in spy.seen[sample["step"] + i].values()]).double() for i in (0, 1))
        assert sample["batch_size"] == 8
        assert sample["noise_simple"] == pytest.approx(float((one - two).square().sum()) / 2, rel=1e-5)
        assert sample["signal_simple"] == pytest.approx(float(one @ two), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("accumulate", "expected"), [(1, [0, 2, 4, 14]), (2, [0, 1, 2, 3, 4, 14])])
def test_noise_is_measured_less_often_after_a_while(
    tmp_path, monkeypatch: pytest.MonkeyPatch, accumulate: int, expected: list[int]
) -> None:
    monkeypatch.setattr(noise, "_AS_OFTEN_AS_LOGGED", 4)
    monitor = GradientHistogramMonitor(every_n_steps=1)
    data = loader(batch_size=8, samples=8 * 17 * accumulate)
    fit(tmp_path, monitor, data=data, accumulate_grad_batches=accumulate)
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == expected


def test_noise_is_measured_within_a_step_of_several_micro_batches(tmp_path) -> None:
    class Micro(L.Callback):
        """The accumulated gradient after each micro-batch, and Adam's metric before each step."""

        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []
            self.weights: list[torch.Tensor] = []

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            self.seen.append(torch.cat([p.grad.flatten().double() for p in pl_module.parameters()]))

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            state = [optimizer.state[p] for p in pl_module.parameters()]
            if all(state):
                steps = float(state[0]["step"])
                moments = [s["exp_avg_sq"].flatten().double() / (1 - 0.999**steps) for s in state]
                moments = [v + v.mean() / steps for v in moments]  # one more gradient of the mean square
                self.weights.append(1 / (torch.cat(moments).sqrt() + 1e-8))

    micro, monitor = Micro(), GradientHistogramMonitor(every_n_steps=2)
    fit(tmp_path, monitor, micro, data=loader(8, samples=96), accumulate_grad_batches=3)
    samples = monitor.noise_records[0].samples
    assert [(sample["step"], sample["batch_size"]) for sample in samples] == [(0, 24), (2, 24)]
    for sample in samples:
        first, whole = (micro.seen[3 * sample["step"] + i] for i in (0, 2))
        noise = (3 * first - whole).square() / 2
        assert sample["noise_simple"] == pytest.approx(float(noise.sum()), rel=1e-5)
        assert sample["signal_simple"] == pytest.approx(float((whole.square() - noise).sum()), rel=1e-4)
    weight, noise_adam = micro.weights[1], samples[1]["noise_adam"]
    assert samples[0]["noise_adam"] is None  # there was no second moment
    assert noise_adam == pytest.approx(float((weight * noise).sum()), rel=1e-4)


class Wide(L.LightningModule):
    """The gradient of a sample is N(1, 2) in each of 1.2 million values: 4 samples of noise scale."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Parameter(torch.zeros(1200, 1000)), nn.Parameter(torch.zeros(100))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs = (1 + 2 * torch.randn(len(batch[0]), *p.shape) for p in self.parameters())
        return sum((one * p).sum() for one, p in zip(inputs, self.parameters(), strict=True)) / len(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-9)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_of_a_large_model_a_sample_tells_noise_and_signal(tmp_path, accumulated: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, monitor, module=Wide, data=loader(2, samples=24), accumulate_grad_batches=accumulated)
    samples, values, effective = monitor.noise_records[0].samples, 1_200_100, 2 * accumulated
    for sample in samples:
        assert sample["noise_simple"] == pytest.approx(values * 4 / effective, rel=0.02)
        assert sample["signal_simple"] == pytest.approx(values, rel=0.05)
    assert monitor.noise_records[0].estimate("adam").value == pytest.approx(4, rel=0.25)


class Still(Net):
    """Noise that can be told from all samples: the weights stay, and a hook of the test's own is called."""

    def __init__(self, after_backward: Any = None, skips: Any = lambda batch: False) -> None:
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.0))
        self.hook, self.skips = after_backward, skips
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if self.skips(batch_idx) else super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self.hook is not None:
            self.hook(self)


def clip_a_little(module: Any) -> None:
    nn.utils.clip_grad_norm_(module.parameters(), 0.2)


class ClipEarly(L.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        clip_a_little(pl_module)


@pytest.mark.parametrize(
    ("callbacks", "hook"),
    [
        pytest.param([], clip_a_little, id="after backward"),
        pytest.param([ClipEarly()], None, id="by a callback before"),
        pytest.param([], lambda module: [p.grad.mul_(0.9) for p in module.head.parameters()], id="in mid-accumulation"),
    ],
)
def test_gradients_that_somebody_changes_are_not_taken_for_noise(tmp_path, callbacks: Any, hook: Any) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    options = {"accumulate_grad_batches": 4, "max_epochs": 3}
    with pytest.warns(
        UserWarning, match="measured the noise scale at 0 of 12 steps.*clip with Trainer.gradient_clip_val"
    ):
        fit(tmp_path / "changed", *callbacks, monitor, module=Still(hook), **options)
    fit(tmp_path / "clipped after", monitor, module=Still(), gradient_clip_val=0.2, **options)
    assert monitor.noise_records[0].estimate("simple").measurements == 12
    fit(
        tmp_path / "unchanged",
        monitor,
        module=Still(lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e3)),
        **options,
    )
    assert monitor.noise_records[0].estimate("simple").measurements == 12


@pytest.mark.parametrize("accumulate", [1, 4])
def test_of_gradients_that_are_clipped_at_some_steps_the_small_ones_are_not_chosen(tmp_path, accumulate: int) -> None:
    limit = {1: 0.85, 4: 0.65}[accumulate]
    clips = Still(lambda module: norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), limit))))
    monitor, norms = GradientHistogramMonitor(every_n_steps=1), []
    with pytest.warns(UserWarning, match="measured the noise scale at 0 of .*were changed"):
        fit(tmp_path, monitor, module=clips, accumulate_grad_batches=accumulate, max_epochs=6)
    assert 0 < sum(norm > limit for norm in norms) < len(norms)
    assert any(sample["noise_simple"] is not None for sample in monitor.noise_records[0].samples)


def test_gradients_that_somebody_changes_are_not_taken_for_noise_in_pairs_either(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    with pytest.warns(UserWarning, match="measured the noise scale at 0 of 24 steps.*clip with Trainer"):
        fit(tmp_path / "changed", monitor, module=Still(clip_a_little), max_epochs=3)
    fit(tmp_path / "clipped after", monitor, module=Still(), gradient_clip_val=0.2, max_epochs=3)
    assert monitor.noise_records[0].estimate("simple").measurements == 24


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GradientHistogramMonitor measured the noise scale at")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize(("accumulate", "size"), [(1, 8), (1, 32), (2, 8)])
def test_gradients_of_the_step_before_are_not_taken_for_those_of_one(
    tmp_path, accumulate: int, size: int, set_to_none: bool
) -> None:
    class Leaves(Still):
        every = 1

        def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
            if self.trainer.global_step % self.every == 0:
                optimizer.zero_grad(set_to_none)

    class EverySecond(Leaves):
        every = 2

    counts = []
    for module in (Leaves, EverySecond):
        monitor = GradientHistogramMonitor(every_n_steps=1)
        data = loader(size, samples=size * 24 * accumulate)
        fit(tmp_path, monitor, module=module, data=data, accumulate_grad_batches=accumulate)
        counts.append(monitor.noise_records[0].estimate("simple").measurements)
    assert counts == {(1, 8): [12, 0], (1, 32): [23, 1], (2, 8): [24, 12]}[accumulate, size]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:.*at 0 of 0 steps.*not made from one backward pass for each batch")
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_micro_batch_without_a_loss_is_not_taken_for_noise(tmp_path, accumulate: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    module = Still(skips=lambda batch: batch % (2 * accumulate) == 2 * accumulate - 1)
    fit(tmp_path, monitor, module=module, accumulate_grad_batches=accumulate)
    measured = [sample["step"] for sample in monitor.noise_records[0].samples if sample["noise_simple"] is not None]
    assert measured == ([] if accumulate == 1 else list(range(0, 16 // accumulate, 2)))


def test_steps_on_the_same_few_batches_are_not_measured(tmp_path, caplog) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    with caplog.at_level("INFO"):
        fit(tmp_path, monitor, overfit_batches=2, max_epochs=6, data=DataLoader(dataset(), 8))
    assert not len(monitor.noise_records[0]) and not (tmp_path / "calibration.json").exists()
    assert len([record for record in caplog.records if "overfit_batches trains on the same" in record.message]) == 1


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("epochs", [6, 50])
def test_steps_of_epochs_of_one_batch_are_no_pairs(tmp_path, epochs: int, every: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=every)
    with pytest.warns(UserWarning, match="at 0 of 0 steps.*epochs of 10 batches or fewer have the same samples"):
        fit(tmp_path, monitor, module=Still, data=loader(8, samples=8), max_epochs=epochs)


class Unsplit(IterableDataset):
    """The same samples in every worker, or each its own."""

    def __init__(self, is_split: bool) -> None:
        self.is_split = is_split

    def __iter__(self) -> Any:
        worker = get_worker_info()
        step = worker.num_workers if self.is_split and worker is not None else 1
        return iter([*dataset(64)][worker.id if step > 1 else 0 :: step])


@pytest.mark.parametrize(("accumulate", "measured"), [(1, 8), (2, 8), (4, 4)])
def test_workers_with_the_same_samples_tell_of_no_noise(tmp_path, accumulate: int, measured: int) -> None:
    options = {"module": Still, "accumulate_grad_batches": accumulate}
    alike, apart = (GradientHistogramMonitor(every_n_steps=1) for _ in range(2))
    with pytest.warns(UserWarning, match="at 0 of .* steps.*ranks or workers have the same samples: split"):
        fit(tmp_path / "alike", alike, data=DataLoader(Unsplit(False), 4, num_workers=2), **options)
    fit(tmp_path / "apart", apart, data=DataLoader(Unsplit(True), 4, num_workers=2), **options)
    assert apart.noise_records[0].estimate("simple").measurements == measured


def test_samples_that_a_sampler_draws_twice_are_independent(tmp_path) -> None:
    class Twice(Sampler):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 64

        def __iter__(self) -> Any:
            return (index // 2 for index in range(64))

    monitor = GradientHistogramMonitor(every_n_steps=1)
    data = DataLoader(dataset(64), 1, sampler=Twice())
    fit(tmp_path, monitor, module=Still, data=data, accumulate_grad_batches=8)
    assert monitor.noise_records[0].estimate("simple").measurements == 8


@pytest.mark.parametrize("compresses", [True, False])
def test_what_a_communication_hook_loses_is_not_taken_for_noise(tmp_path, caplog, compresses: bool) -> None:
    class Hook(L.Callback):
        def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            power = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
            pair = (power, powerSGD_hook.powerSGD_hook) if compresses else (None, default_hooks.fp16_compress_hook)
            trainer.strategy.model.register_comm_hook(*pair)  # type: ignore[union-attr, operator]

    monitor = GradientHistogramMonitor(every_n_steps=1)
    strategy = DDPStrategy(process_group_backend="gloo")
    with caplog.at_level("INFO"):
        fit(tmp_path, monitor, Hook(), data=loader(8), devices=1, strategy=strategy)
    said = [record for record in caplog.records if "powerSGD_hook changes the gradients" in record.message]
    assert (len(said), bool(len(monitor.noise_records[0]))) == ((1, False) if compresses else (0, True))


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
@pytest.mark.parametrize("callback", [GradientHistogramMonitor, OptimizerCalibration])
def test_without_an_optimizer_there_is_nothing_to_do_and_a_warning(tmp_path, callback: Any) -> None:
    class Own(Net):
        def configure_optimizers(self) -> None:
            return None

    with pytest.warns(UserWarning, match="configure_optimizers returned no optimizer"):
        assert fit(tmp_path, callback(), module=Own, data=loader(4), max_epochs=1).global_step > 0


def test_a_slow_disk_holds_up_no_epoch_and_has_the_newest_record_in_the_end(tmp_path, monkeypatch) -> None:
    save, seconds = RunRecord.save, time.monotonic()

    def slow(self: RunRecord, path: Any) -> None:
        time.sleep(0.5)
        save(self, path)

    monkeypatch.setattr(RunRecord, "save", slow)
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, monitor, data=loader(8, samples=32), max_epochs=30)
    assert time.monotonic() - seconds < 10
    (path,) = tmp_path.rglob("calibration.json")
    assert len(RunRecord.load(path).optimizers[0].samples) == len(monitor.noise_records[0])


def test_the_record_knows_the_run(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=2)
    schedule = {"scheduler": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=40)}
    made = fit(tmp_path, monitor, module=Net(**schedule), max_epochs=2, accumulate_grad_batches=2)
    record = RunRecord.load(tmp_path / "calibration.json")
    assert record.steps == made.global_step == 16
    assert record.model == {name: list(p.shape) for name, p in made.lightning_module.named_parameters()}
    (entry,) = record.optimizers
    assert (entry.name, entry.batch_size, entry.learning_rates) == ("AdamW", 16, [pytest.approx(0.03)])
    assert entry.noise["simple"].measurements == len(entry.samples) == 8


def test_resume_goes_on_where_it_was(tmp_path) -> None:
    whole = GradientHistogramMonitor(every_n_steps=3)
    fit(tmp_path / "whole", whole, max_epochs=2)

    first = GradientHistogramMonitor(every_n_steps=3)
    made = fit(tmp_path / "first", first, max_epochs=1)
    made.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)  # nothing in it that needs trust

    second = GradientHistogramMonitor(every_n_steps=3)
    made = trainer(tmp_path / "second", second, max_epochs=2)
    made.fit(Net(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [e.step for e in events(tmp_path / "second").Histograms("gradient_magnitude/all")] == [18, 21, 24, 27, 30]
    steps = [sample["step"] for sample in second.noise_records[0].samples]
    assert steps == [0, 3, 6, 9, 12, 18, 21, 24, 27, 30]  # the pair of steps 15 and 16 spans the checkpoint
    assert [sample["step"] for sample in whole.noise_records[0].samples] == [*steps[:5], 15, *steps[5:]]


MEASURED = dict.fromkeys(["batch_size", "noise_simple", "signal_simple", "noise_adam", "signal_adam"], 8.0)
WATCHED = {"steps": 9, "logged": 2, "samples": [{"step": 0} | MEASURED], "learning_rates": [0.1], "batch_size": 8}


def test_state_survives_a_round_trip() -> None:
    monitor = GradientHistogramMonitor()
    state = {"optimizers": [WATCHED | {"skipped": 3}], "run": "of before"}
    monitor.load_state_dict(state)
    assert monitor.state_dict() == state


@pytest.mark.parametrize(
    "state",
    [
        pytest.param({}, id="empty"),
        pytest.param({"optimizers": 3}, id="number"),
        pytest.param({"optimizers": [WATCHED]}, id="a key less"),
        pytest.param({"optimizers": [WATCHED | {"skipped": "many"}]}, id="word for number"),
        pytest.param({"optimizers": [WATCHED | {"skipped": 0, "samples": [{"step": 0}]}]}, id="half a measurement"),
        pytest.param({"optimizers": [WATCHED | {"skipped": 0, "samples": [7]}]}, id="number for measurement"),
    ],
)
def test_a_state_that_cannot_be_read_is_said_and_begun_anew(tmp_path, state: Any) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=4)
    made = fit(tmp_path / "first", monitor)
    made.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    checkpoint["callbacks"][monitor.state_key] = state | {"more": 1}
    torch.save(checkpoint, tmp_path / "one.ckpt")
    with pytest.warns(UserWarning, match="cannot read its state in the checkpoint, and begins anew"):
        trainer(tmp_path / "second", monitor, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [16, 20, 24, 28]  # nothing of before


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_resumed_run_with_other_arguments_loses_nothing(tmp_path) -> None:
    first = [GradientHistogramMonitor(every_n_steps=4), GradientHistogramMonitor(8, include="head")]
    made = fit(tmp_path / "first", *first)
    made.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    of_release_0_1 = (
        "GradientHistogramMonitor[every_n_steps=8,bins_per_octave=8,group_by=None,include='head',exclude=None]"
    )
    checkpoint["callbacks"][of_release_0_1] = checkpoint["callbacks"].pop(first[1].state_key)
    torch.save(checkpoint, tmp_path / "old.ckpt")
    second = [GradientHistogramMonitor(2, include="head", batch_size=8), GradientHistogramMonitor(2, group_by=1)]
    trainer(tmp_path / "second", *second, max_epochs=2).fit(Net(), loader(), ckpt_path=tmp_path / "old.ckpt")
    found = [[sample["step"] for sample in one.noise_records[0].samples] for one in second]
    assert found == [[0, 8, *range(16, 32, 2)], [0, 4, 8, 12, *range(16, 32, 2)]]


def test_instances_have_keys_of_their_own() -> None:
    options: list[dict[str, Any]] = [{}, {"group_by": 1}, {"group_by": "1"}, {"group_by": str.upper}]
    options += [{"include": "a"}, {"exclude": "a"}, {"when": "after_clip"}, {"when": "local"}]
    keys = [GradientHistogramMonitor(**arguments).state_key for arguments in options]
    assert len(set(keys)) == len(keys)
    alike = GradientHistogramMonitor(every_n_steps=2, batch_size=3, optimizer_state=True, noise_scale=False)
    assert alike.state_key == keys[0]  # nothing is lost where such an argument changes
    two = [GradientHistogramMonitor(group_by=lambda name: name[:4], name=name) for name in ("first", "second")]
    assert two[0].state_key != two[1].state_key and GradientHistogramMonitor(name=None).state_key == keys[0]
    assert "0x" not in "".join(keys)  # an address in memory would be another one in the next process


def test_the_heatmap_comes_at_doubling_distances_and_at_the_end(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), max_steps=11)
    images = events(tmp_path).Images("gradient_magnitude_by_layer")
    assert [image.step for image in images] == [3, 10]


def test_no_tag_is_used_for_two_kinds_of_data(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=4))
    tags = events(tmp_path).Tags()
    names = [name for kind in ("scalars", "histograms", "images", "tensors") for name in tags[kind]]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"every_n_steps": 0}, "every_n_steps must be an integer from 1 up, got 0", id="zero"),
        pytest.param({"every_n_steps": -5}, "every_n_steps must be .* got -5", id="negative"),
        pytest.param({"every_n_steps": 2.5}, "every_n_steps must be .* got 2.5", id="fraction"),
        pytest.param({"batch_size": 0}, "batch_size must be a positive", id="batch size"),
        pytest.param({"batch_size": True}, "batch_size must be a positive .* got True", id="batch size flag"),
        pytest.param({"batch_size": "8"}, "batch_size must be a positive .* got '8'", id="batch size text"),
        pytest.param({"batch_size": math.nan}, "batch_size must be a positive .* got nan", id="batch size NaN"),
        pytest.param({"group_by": 0}, "group_by must be None, a depth .* got 0", id="depth"),
        pytest.param({"when": "later"}, "when must be one of .* got 'later'", id="when"),
        pytest.param({"group_by": True}, "group_by must be None, a depth .* got True", id="flag"),
        pytest.param({"group_by": "("}, "group_by must be a regular expression, got '\\('", id="group"),
        pytest.param({"include": "*"}, "include must be a regular expression, got '\\*'", id="include"),
        pytest.param({"exclude": 3}, "exclude must be a regular expression, got 3", id="exclude"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        GradientHistogramMonitor(**options)


def test_without_a_logger_it_warns_once_and_keeps_the_record(tmp_path) -> None:
    with pytest.warns(UserWarning, match="has no logger to write histograms to; use Trainer") as caught:
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), logger=False)
    assert len([w for w in caught if "GradientHistogramMonitor" in str(w.message)]) == 1
    assert RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run_writes_nothing_and_asks_for_nothing(tmp_path, logger: bool) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), fast_dev_run=3, logger=logger)
    assert not list(tmp_path.rglob("*"))


def test_a_monitor_that_writes_no_record_names_none(tmp_path) -> None:
    monitors = [GradientHistogramMonitor(every_n_steps=4, name=name) for name in ("first", "second")]
    with pytest.warns(UserWarning, match="has no logger to write histograms to") as caught:
        fit(tmp_path, *monitors, logger=False)
    named = ["noise scale goes into" in str(w.message) for w in caught if "has no logger" in str(w.message)]
    assert named == [True, False]


@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize(
    "sizes", [pytest.param((8, 16, 4), id="grows first"), pytest.param((16, 4, 8), id="shrinks first")]
)
def test_a_loader_of_another_batch_size_for_each_epoch_is_believed_anew(
    tmp_path, sizes: tuple[int, ...], is_counted: bool
) -> None:
    class Changing(L.LightningDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(dataset(), sizes[self.trainer.current_epoch])

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch if is_counted else (batch, torch.zeros(3))

    class Of(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch if is_counted else batch[0], batch_idx)

    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, monitor, module=Of, data=Changing(), max_epochs=3, reload_dataloaders_every_n_epochs=1)
    samples, end = monitor.noise_records[0].samples, 0
    for size in sizes:
        start, end = end, end + len(dataset()) // size
        within = [sample["batch_size"] for sample in samples if start < sample["step"] < end - 2]
        assert within and {*within} == {size}


@pytest.mark.parametrize("factor", [2, 0.5])
def test_a_sampler_whose_batch_size_is_set_between_epochs_is_believed_anew(tmp_path, factor: float) -> None:
    class Sets(L.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.train_dataloader.batch_sampler.batch_size = int(8 * factor)

    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, monitor, Sets(), max_epochs=2)
    assert {sample["batch_size"] for sample in monitor.noise_records[0].samples} == {8, 8 * factor}


def test_steps_of_many_backward_passes_are_not_asked_to_be_more(tmp_path) -> None:
    module = Net(lambda parameters: torch.optim.LBFGS(parameters, lr=1e-3, max_iter=2))
    with pytest.warns(UserWarning, match="most steps that were logged were not made from one backward pass for each"):
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), module=module, max_epochs=3)


def test_an_unknown_batch_size_is_said_and_can_be_given(tmp_path) -> None:
    batches = OpaqueBatches(8)
    with pytest.warns(UserWarning, match=r"GradientHistogramMonitor\(batch_size=\.\.\.\)"):
        fit(tmp_path / "a", GradientHistogramMonitor(every_n_steps=1), data=batches)
    assert not (tmp_path / "a" / "calibration.json").exists()
    fit(tmp_path / "b", GradientHistogramMonitor(every_n_steps=1, batch_size=8), data=batches)
    assert RunRecord.load(tmp_path / "b" / "calibration.json").optimizers[0].batch_size == 8


def test_under_manual_optimization_nothing_is_said_of_loader_and_batch(tmp_path) -> None:
    with pytest.warns(UserWarning, match="no noise scale: under manual optimization nobody but you knows") as caught:
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), module=TwoOptimizers, max_steps=2)
    assert not [one for one in caught if "cannot be read" in str(one.message)]


class Sizes:
    """Batches of other samples in each epoch, of the sizes that it is told; nobody but the batches tells."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.generator = sizes, torch.Generator().manual_seed(0)

    def __iter__(self) -> Any:
        draw = partial(torch.randn, generator=self.generator, device="cpu")
        for size in self.sizes:
            inputs = draw(size, 4)
            yield inputs, inputs.sum(1, keepdim=True) + draw(size, 1)


class Sized(Sizes):
    def __len__(self) -> int:
        return len(self.sizes)


class Frozen(L.LightningModule):
    """Linear regression at weights that hardly move: of a known noise scale."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        nn.init.zeros_(self.layer.weight), nn.init.zeros_(self.layer.bias)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-9)


class Stepped(Frozen):
    """Whose optimizer has its state already, so that it makes none on another device."""

    def configure_optimizers(self) -> Any:
        with torch.device("cpu"):
            optimizer = torch.optim.AdamW(self.parameters(), 1e-3)
            self.training_step(next(iter(Sizes(8))), 0).backward()
            optimizer.step()
        return optimizer


@pytest.mark.slow
@pytest.mark.parametrize(("size", "accumulate"), [(32, 1), (8, 1), (8, 2)])
def test_a_default_device_is_not_that_of_what_it_makes(tmp_path, size: int, accumulate: int) -> None:
    found = []
    for device in ("cpu", "meta"):
        monitor, data = GradientHistogramMonitor(every_n_steps=1, optimizer_state=True), Sized(*[size] * 24)
        made = trainer(tmp_path / device, monitor, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
        L.seed_everything(7, verbose=False)
        with torch.device("cpu"):
            module = Stepped()
        with torch.device(device):
            made.fit(module, data)
        tags = events(tmp_path / device).Tags()
        scalars = [logged_scalars(tmp_path / device, tag) for tag in tags["scalars"]]
        found.append((tags, scalars, monitor.noise_records[0].samples))
    assert found[0] == found[1] and len(found[0][2]) >= 11


@cache
def noise_scale_of_regression() -> float:
    """The gradient of a sample is -2 y (x, 1), with y = sum(x) + noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(10**6, 4, generator=generator)
    targets = inputs.sum(1, keepdim=True) + torch.randn(10**6, 1, generator=generator)
    each = -2 * targets * torch.cat([inputs, torch.ones(10**6, 1)], dim=1)
    return float(each.var(0).sum() / each.mean(0).square().sum())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GradientHistogramMonitor has no logger")
@pytest.mark.parametrize(
    ("sizes", "accumulated", "effective"),
    [
        pytest.param((8,) * 4, 1, 8, id="equal"),
        pytest.param((2, 30, 8, 8), 1, 12, id="of many sizes"),
        pytest.param((30, 2), 1, 30, id="two batches an epoch"),
        pytest.param((2,), 1, 2, id="less than a batch"),
        pytest.param((8, 8, 8), 2, 16, id="a short last window in a short epoch"),
        pytest.param((2, 30, 8, 4) * 2, 4, 44, id="accumulated, of many sizes"),
        pytest.param((8, 8), 4, 16, id="more accumulation than batches"),
    ],
)
def test_steps_of_any_size_give_the_noise_scale(tmp_path, sizes: Any, accumulated: int, effective: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    data = (Sizes if sizes == (30, 2) else Sized)(*sizes)
    options = {"logger": False, "max_epochs": 400, "max_steps": 300, "accumulate_grad_batches": accumulated}
    fit(tmp_path, monitor, module=Frozen, data=data, **options)
    found = monitor.noise_records[0].estimate("simple")
    assert found.value == pytest.approx(noise_scale_of_regression(), rel=0.4)
    saved = RunRecord.load(tmp_path / "calibration.json").optimizers[0]
    assert saved.batch_size == pytest.approx(effective, rel=0.05)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:GradientHistogramMonitor (has no logger|measured the noise scale at 0)")
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("size", [pytest.param(8, id="pairs"), pytest.param(32, id="halves")])
@pytest.mark.parametrize(
    ("times", "precision"),
    [(1e-22, "32-true"), (1e15, "32-true"), (1e22, "32-true"), (1e-100, "64-true"), (1e100, "64-true")],
)
def test_the_scale_of_the_loss_changes_no_noise_scale(
    tmp_path, times: float, precision: Any, size: int, changed: bool
) -> None:
    class Of(Frozen):
        times = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([part.to(self.dtype) for part in batch], batch_idx) * self.times

        def on_after_backward(self) -> None:
            if changed:
                self.layer.weight.grad.mul_(0.5)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class Scaled(Of):
        pass

    Scaled.times = times
    found = []
    for module in (Of, Scaled):
        monitor = GradientHistogramMonitor(every_n_steps=1)
        fit(tmp_path, monitor, module=module, data=Sized(*[size] * 24), precision=precision, logger=False)
        found.append(monitor.noise_records[0].estimate("simple"))
    if (times, precision) == (1e22, "32-true"):  # the squares fit no float32, and nobody can tell
        assert found[1].measurements == 0
        return
    for end in ("value", "lower", "upper"):
        assert getattr(found[1], end) == pytest.approx(getattr(found[0], end), rel=1e-3)
    assert found[0].measurements == found[1].measurements == (0 if changed else 12 if size == 8 else 23)


def test_runs_without_a_logger_have_records_of_their_own_and_say_where(tmp_path, caplog) -> None:
    with warnings.catch_warnings(), caplog.at_level("INFO"):
        warnings.filterwarnings("ignore", message="GradientHistogramMonitor has no logger")
        for _ in range(2):
            fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), logger=False)
    names = sorted(path.name for path in tmp_path.glob("*.json"))
    assert names == ["calibration-1.json", "calibration.json"]
    for name in names:
        assert re.search(
            rf"noise scale .* samples \(.*\) over \d+ measurements: {re.escape(str(tmp_path / name))}\n", caplog.text
        )
        assert RunRecord.load(tmp_path / name).optimizers[0].parameters


class Meanwhile(L.Callback):
    """Another run begins and ends while this one has recorded nothing yet."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        fit(Path(trainer.default_root_dir), GradientHistogramMonitor(every_n_steps=1), logger=False, max_steps=4)


@pytest.mark.filterwarnings("ignore:GradientHistogramMonitor has no logger")
def test_runs_at_the_same_time_in_one_directory_have_records_of_their_own(tmp_path) -> None:
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), Meanwhile(), logger=False, max_steps=8)
    steps = [RunRecord.load(tmp_path / f"calibration{number}.json").steps for number in ("", "-1")]
    assert steps == [4, 8]


def test_a_run_in_a_fixed_directory_leaves_the_record_there_that_it_reads(tmp_path) -> None:
    path = tmp_path / "calibration.json"
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), max_steps=4)
    before = path.read_bytes()
    calibration = OptimizerCalibration(reference=str(path), learning_rate="sqrt", epsilon="keep")
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), calibration, max_steps=8)
    assert path.read_bytes() == before and RunRecord.load(tmp_path / "calibration-1.json").steps == 8


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_resumed_run_goes_on_with_its_own_record(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where another run could have a record of the same relative path
    relative = Path("runs")
    fit(relative, GradientHistogramMonitor(every_n_steps=4)).save_checkpoint("half.ckpt")
    fit(relative, GradientHistogramMonitor(every_n_steps=1), max_steps=2)
    for folder, epochs in ((relative, 2), (tmp_path / "b", 3)):
        made = trainer(folder, GradientHistogramMonitor(every_n_steps=4), max_epochs=epochs)
        made.fit(Net(), loader(), ckpt_path="half.ckpt")
    records = {str(path.relative_to(tmp_path)): RunRecord.load(path).steps for path in tmp_path.rglob("*.json")}
    assert records == {"runs/calibration.json": 32, "runs/calibration-1.json": 2, "b/calibration.json": 48}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_runs_at_one_url_have_records_of_their_own(tmp_path) -> None:
    for steps in (2, 3):
        fit(
            tmp_path,
            GradientHistogramMonitor(every_n_steps=1),
            logger=CSVLogger("memory://one", "", "v"),
            max_steps=steps,
        )
    found = [RunRecord.load(f"memory://one/v/calibration{number}.json").steps for number in ("", "-1")]
    assert found == [2, 3]


def test_a_log_directory_that_is_a_url_gets_the_record(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    logger = CSVLogger("memory://bucket/logs")
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), logger=logger)
    assert RunRecord.load(f"{logger.log_dir}/calibration.json").optimizers[0].samples
    assert not list(tmp_path.rglob("calibration.json")) and not (tmp_path / "memory:").exists()


def test_a_logger_that_fails_costs_one_warning(tmp_path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("gradient_") for name in metrics):
                raise OSError(28, "No space left on device")
            super().log_metrics(metrics, step)

    with pytest.warns(UserWarning, match="could not log, training goes on.*No space left") as caught:
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), logger=Broken(tmp_path), max_steps=6)
    assert made.global_step == 6
    assert len([w for w in caught if "could not log" in str(w.message)]) == 1


def test_other_loggers_get_the_scalars(tmp_path) -> None:
    made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), logger=CSVLogger(tmp_path))
    header = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()[0]
    assert "gradient_norm/head.weight" in header and "gradient_zero_share/all" in header
    assert made.global_step == 16


def test_an_interrupted_run_leaves_its_record(tmp_path) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 9:
                raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=2), Interrupt())
    assert len(RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples) == 4


def test_every_step_of_lbfgs_is_one_step(tmp_path) -> None:
    module = Net(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=5))
    made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=1, noise_scale=False), module=module, max_steps=4)
    assert made.global_step == 4
    assert [event.step for event in events(tmp_path).Histograms("gradient_magnitude/all")] == [0, 1, 2, 3]


class Falls(L.Callback):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] *= 0.5


class Rises(L.Callback):
    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = 1e-3 * (1 + trainer.global_step)


class FloorInStep(torch.optim.lr_scheduler.CosineAnnealingLR):
    """It does not tell the rate that it has set at last."""

    def step(self, epoch: Any = None) -> None:
        super().step()
        for group in self.optimizer.param_groups:
            group["lr"] = max(group["lr"], 5e-3)


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")
@pytest.mark.parametrize(
    ("callback", "scheduler", "recorded"),
    [
        pytest.param(Falls(), None, [1e-2], id="it falls"),
        pytest.param(Rises(), None, [], id="it is raised by hand"),
        pytest.param(L.Callback(), lambda optimizer: FloorInStep(optimizer, 48), [1e-2], id="a floor"),
        pytest.param(StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2), None, [1e-2], id="SWA"),
        pytest.param(
            StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2),
            lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, 0.1),
            [1e-2],
            id="SWA takes the scheduler's place",
        ),
    ],
)
def test_the_recorded_rate_is_the_highest_of_its_own_schedule(
    tmp_path, callback: Any, scheduler: Any, recorded: list[float]
) -> None:
    module = Net(scheduler=scheduler)
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), callback, module=module, max_epochs=3)
    assert RunRecord.load(tmp_path / "calibration.json").optimizers[0].learning_rates == recorded


def test_a_step_with_fewer_samples_is_not_measured(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path / "a", monitor, data=loader(8, samples=60), max_epochs=2)  # seven full batches, and one of four
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [0, 2, 4, 8, 10, 12]
    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path / "b", monitor, data=loader(8, samples=56), accumulate_grad_batches=2)  # a last window of one batch
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [0, 1, 2]


def test_a_short_window_of_data_without_a_length_is_not_measured(tmp_path) -> None:
    class Unsized(IterableDataset):
        def __iter__(self) -> Any:
            return iter([dataset(56)[index] for index in range(56)])

    monitor = GradientHistogramMonitor(every_n_steps=1)
    fit(tmp_path, monitor, data=DataLoader(Unsized(), 8), accumulate_grad_batches=4, max_epochs=2)
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [
        0,
        2,
    ]  # of four batches, and not of three


class WithoutLength(IterableDataset):
    def __iter__(self) -> Any:
        return iter(dataset())


def test_data_without_a_length_of_which_some_batches_are_taken_are_monitored(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    made = fit(tmp_path, monitor, data=DataLoader(WithoutLength(), 8), limit_train_batches=6, max_epochs=2)
    assert made.global_step == 12
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [0, 2, 4, 6, 8, 10]


def test_a_fresh_run_starts_a_fresh_record(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=4)
    made = fit(tmp_path / "a", monitor)
    made.save_checkpoint(tmp_path / "one.ckpt")
    made = trainer(tmp_path / "b", monitor, max_epochs=2)
    made.fit(Net(), loader(), ckpt_path=tmp_path / "one.ckpt")
    assert len(monitor.noise_records[0].samples) == 8
    fit(tmp_path / "c", monitor)
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [0, 4, 8, 12]


def test_nothing_of_the_model_is_held_after_training(tmp_path) -> None:
    class Interrupt(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 5:
                self.optimizer, self.watching = trainer.optimizers[0], weakref.ref(monitor._optimizers[0])
                raise ZeroDivisionError("boom")

    monitor, interrupt = GradientHistogramMonitor(every_n_steps=4), Interrupt()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, monitor, interrupt)
    assert not interrupt.optimizer._optimizer_step_pre_hooks and not interrupt.optimizer._optimizer_step_post_hooks
    gc.collect()
    assert interrupt.watching() is None


def test_a_record_is_bounded() -> None:
    record = NoiseRecord(most=64)
    for step in range(1000):
        record.add(step, 8, torch.tensor([1.0 + step, 2.0, math.nan, 3.0], dtype=torch.float64))
    samples = record.samples
    assert 32 <= len(samples) <= 64 and samples[0]["step"] == 0
    assert [sample["step"] for sample in samples] == sorted(sample["step"] for sample in samples)
    assert samples[0]["noise_adam"] is None and {sample["signal_adam"] for sample in samples} == {3.0}


def test_of_several_monitors_the_first_that_measures_noise_writes_the_record(tmp_path) -> None:
    none = GradientHistogramMonitor(every_n_steps=1, noise_scale=False, when="after_clip")
    first, second = GradientHistogramMonitor(every_n_steps=2), GradientHistogramMonitor(every_n_steps=4, name="second")
    fit(tmp_path, none, first, second)
    assert len(RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples) == len(
        first.noise_records[0].samples
    )


def test_steps_logged_before_noise_was_measured_are_none_that_could_not_be(tmp_path, caplog) -> None:
    first = fit(tmp_path, GradientHistogramMonitor(every_n_steps=1, noise_scale=False), max_epochs=3)
    first.save_checkpoint(tmp_path / "half.ckpt")
    with caplog.at_level("INFO"):
        made = trainer(tmp_path, GradientHistogramMonitor(every_n_steps=4), max_epochs=4)
        made.fit(Net(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert "lower every_n_steps=4, or train longer" in caplog.text


class Remote(DummyLogger):
    """A logger that has no directory of its own for a run."""

    def __init__(self, folder: Path, version: str) -> None:
        super().__init__()
        self.folder, self.of_run = folder, version

    log_dir = None
    name = property(lambda self: "runs")
    version = property(lambda self: self.of_run)
    save_dir = property(lambda self: str(self.folder))


def test_a_logger_without_a_directory_of_its_own_gets_one_for_each_run(tmp_path) -> None:
    for version in ("one", "two"):
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), logger=Remote(tmp_path, version))
    assert [(tmp_path / "runs" / version / "calibration.json").exists() for version in ("one", "two")] == [True, True]


def test_a_logger_that_cannot_tell_its_directory_costs_the_record_alone(tmp_path) -> None:
    class Offline(Remote):
        @property
        def log_dir(self) -> Any:
            raise ConnectionError("no server")

    with pytest.warns(UserWarning, match="could not find the logger's directory, training goes on.*no server"):
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), logger=Offline(tmp_path, "one"))
    assert made.global_step == 16 and not list(tmp_path.rglob("calibration.json"))


def test_barebones_leaves_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monitor = GradientHistogramMonitor(every_n_steps=1, batch_size=1)
    L.Trainer(barebones=True, accelerator="cpu", max_steps=3, callbacks=[monitor]).fit(BoringModel())
    assert len(monitor.noise_records[0]) == 1
    assert not list(tmp_path.rglob("*"))


def test_a_group_added_in_mid_run_is_seen(tmp_path) -> None:
    class Growing(Net):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.late = nn.Linear(8, 3)
                self.trainer.optimizers[0].add_param_group({"params": list(self.late.parameters())})

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss + nn.functional.cross_entropy(self.late(batch[0]), batch[1]) if self.current_epoch else loss

    fit(tmp_path, GradientHistogramMonitor(every_n_steps=8), module=Growing, max_epochs=2)
    assert [event.step for event in events(tmp_path).Histograms("gradient_magnitude/late.weight")] == [16, 24]


def test_sparse_gradients_and_tied_weights(tmp_path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=1e-2))
            self.one = nn.Embedding(4, 16, sparse=True)
            self.two = self.one

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + self.two(batch[1]).square().mean()

    fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), module=Tied)
    found = events(tmp_path)
    assert "gradient_magnitude/two.weight" not in found.Tags()["histograms"]
    counted = found.Histograms("gradient_magnitude/one.weight")[0].histogram_value.num
    zero_share = found.Scalars("gradient_zero_share/one.weight")[0].value
    assert counted == pytest.approx(64 * (1 - zero_share)) and zero_share >= 0.25  # the row that no label asks for


@pytest.mark.parametrize(
    ("module", "options"),
    [
        pytest.param(Net, {"accumulate_grad_batches": 3, "plugins": _fp16}, id="16-mixed, with accumulation"),
        pytest.param(TwoOptimizers, {}, id="manual, two optimizers"),
    ],
)
def test_on_one_device_local_gradients_are_the_gradients(tmp_path, module: Any, options: Any) -> None:
    options = {name: [value()] if callable(value) else value for name, value in options.items()}
    monitors = [
        GradientHistogramMonitor(every_n_steps=2, noise_scale=False, when=when) for when in ("before_clip", "local")
    ]
    made = fit(tmp_path, *monitors, module=module, limit_train_batches=9, **options)
    found = events(tmp_path)
    for tag in ["all"] if len(made.optimizers) == 1 else ["all_0", "all_1"]:
        usual, local = (found.Histograms(f"gradient{kind}_magnitude/{tag}") for kind in ("", "_local"))
        assert len(usual) >= 2
        assert [(e.step, e.histogram_value) for e in usual] == [(e.step, e.histogram_value) for e in local]
    assert not any(p._post_accumulate_grad_hooks for p in made.lightning_module.parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_local_gradients_that_were_thrown_away_are_not_counted(tmp_path, set_to_none: bool) -> None:
    class Twice(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(self.two(self.one(batch[0])).square().mean())
            optimizer.zero_grad(set_to_none)
            self.manual_backward(self.one(batch[0]).square().mean())
            optimizer.step()
            optimizer.zero_grad(set_to_none)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitors = [GradientHistogramMonitor(2, noise_scale=False, when=when) for when in ("before_clip", "local")]
    fit(tmp_path, *monitors, module=Twice)
    found = events(tmp_path)
    usual, local = (found.Histograms(f"gradient{kind}_magnitude/all") for kind in ("", "_local"))
    assert len(usual) == 8 and [e.histogram_value for e in usual] == [e.histogram_value for e in local]
    assert "gradient_local_magnitude/two.weight" not in found.Tags()["histograms"]


class Lazy(Net):
    """Layers that get their shape from the first batch, and one that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.never = nn.Sequential(nn.LazyLinear(16), nn.Tanh()), nn.LazyLinear(4)


@pytest.mark.parametrize("when", ["before_clip", "local"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lazy_layers_are_counted_from_their_first_step(tmp_path, accumulate: int, when: Any) -> None:
    spy, monitor = GradientSpy(), GradientHistogramMonitor(every_n_steps=1, when=when, optimizer_state=True)
    fit(tmp_path, monitor, spy, module=Lazy, accumulate_grad_batches=accumulate, limit_train_batches=8)
    kind = "gradient_local" if when == "local" else "gradient"
    for step, seen in enumerate(spy.seen):
        assert set(seen) == {"body.0.weight", "body.0.bias", "head.weight", "head.bias"}
        for name, gradient in seen.items():
            assert logged_counts(tmp_path, f"{kind}_magnitude/{name}", step) == expected_counts(gradient)
    samples = monitor.noise_records[0].samples
    assert samples and all(sample["noise_simple"] is not None for sample in samples)


def test_lazily_conjugated_gradients_are_counted(tmp_path) -> None:
    class Complex(Net):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.SGD(p, lr=0.0))
            self.factor = nn.Parameter(torch.randn(8, dtype=torch.complex64))
            self.factor.register_hook(lambda gradient: gradient.conj())

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(((batch[0] * self.factor).abs(), batch[1]), batch_idx)

    spy = GradientSpy()
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), spy, module=Complex)  # a warning is an error
    whole = torch.view_as_real(spy.seen[4]["factor"].resolve_conj())
    assert logged_counts(tmp_path, "gradient_magnitude/factor", 4) == expected_counts(whole)


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(self.body, backend="eager")


def test_compiled_layers_have_the_names_of_the_layers(tmp_path) -> None:
    spy = GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=8)
    fit(tmp_path, monitor, spy, module=Compiled)
    spy.seen = [{name.replace("_orig_mod.", ""): g for name, g in seen.items()} for seen in spy.seen]
    assert_counts(tmp_path, spy, 8, [0, 8])
    assert "body.0.weight" in RunRecord.load(tmp_path / "calibration.json").model


def test_a_layer_frozen_in_mid_run_is_left_out_from_then_on(tmp_path) -> None:
    class Freezing(Net):
        def on_train_epoch_start(self) -> None:
            self.head.requires_grad_(self.current_epoch == 0)

    monitor = GradientHistogramMonitor(every_n_steps=3, when="local")
    fit(tmp_path, monitor, module=Freezing, max_epochs=2, limit_train_batches=6)
    histograms = events(tmp_path).Histograms
    assert [event.step for event in histograms("gradient_local_magnitude/head.weight")] == [0, 3]
    assert [event.step for event in histograms("gradient_local_magnitude/body.0.weight")] == [0, 3, 6, 9]


class Unfreezes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.body.requires_grad_(False)

    def on_train_epoch_start(self) -> None:
        self.body.requires_grad_(self.current_epoch == 1)


def test_a_layer_unfrozen_before_a_logged_step_is_in_its_copies(tmp_path) -> None:
    local = GradientHistogramMonitor(every_n_steps=2, when="local")
    averaged = GradientHistogramMonitor(every_n_steps=2)
    fit(tmp_path, local, averaged, module=Unfreezes, max_epochs=2, limit_train_batches=8, accumulate_grad_batches=2)
    for tag in ("gradient_magnitude/body.0.weight", "gradient_local_magnitude/body.0.weight"):
        assert [event.step for event in events(tmp_path).Histograms(tag)] == [4, 6]
    counts = [logged_counts(tmp_path, f"gradient_{kind}magnitude/all", 4) for kind in ("", "local_")]
    assert counts[0] == counts[1]


def test_a_run_within_a_run_and_a_second_fit_are_each_counted_once(tmp_path) -> None:
    outer, inner = GradientSpy(), GradientSpy()

    class Nested(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 5:
                fit(tmp_path / "inner", GradientHistogramMonitor(every_n_steps=4), inner, max_steps=5)

    made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), outer, Nested(), limit_train_batches=6)
    made.fit_loop.max_epochs = 2
    made.fit(made.lightning_module, loader())
    assert_counts(tmp_path, outer, 4, [0, 4, 8])
    assert_counts(tmp_path / "inner", inner, 4, [0, 4])


class FineTunes(LearningRateFinder):
    """Tries rates where epochs start, as Lightning's documentation has it."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("is_first", [True, False])
def test_rates_tried_where_epochs_start_are_no_unseen_steps(tmp_path, is_first: bool) -> None:
    module, monitor = Still(), GradientHistogramMonitor(every_n_steps=1)
    module.lr = 0.1
    callbacks = [monitor, FineTunes(num_training_steps=3)]
    made = fit(tmp_path, *(callbacks if is_first else callbacks[::-1]), module=module, max_epochs=2)
    assert made.global_step == monitor._progress[0].logged >= 29  # Lightning 2.5.0 takes some of these for its own
    assert monitor._progress[0].logged_before == 0


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_within_an_epoch_goes_on_with_its_steps(tmp_path) -> None:
    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")

    fit(tmp_path / "first", GradientHistogramMonitor(every_n_steps=3), Saving(), max_steps=8)
    monitor = GradientHistogramMonitor(every_n_steps=3)
    made = trainer(tmp_path / "second", monitor)
    made.fit(Net(), loader(), ckpt_path=tmp_path / "seven.ckpt")
    assert made.global_step == 16
    assert [e.step for e in events(tmp_path / "second").Histograms("gradient_magnitude/all")] == [9, 12, 15]
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [
        0,
        3,
        9,
        12,
    ]  # 6 and 7 span the checkpoint


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_without_a_state_logs_multiples(tmp_path) -> None:
    class Saving(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 7:
                trainer.save_checkpoint(tmp_path / "seven.ckpt")

    fit(tmp_path / "first", Saving(), max_steps=8)
    made = trainer(tmp_path / "second", GradientHistogramMonitor(every_n_steps=3))
    made.fit(Net(), loader(), ckpt_path=tmp_path / "seven.ckpt")
    assert [e.step for e in events(tmp_path / "second").Histograms("gradient_magnitude/all")] == [9, 12, 15]


def test_another_model_begins_another_record(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=4)
    made = fit(tmp_path, monitor)
    for module, measured in ((made.lightning_module, [0, 4, 8, 12, 16, 20, 24, 28]), (Net(), [32, 36, 40, 44])):
        made.fit_loop.max_epochs += 1
        made.fit(module, loader())
        assert [sample["step"] for sample in monitor.noise_records[0].samples] == measured


def test_parts_of_all_ranks_lie_in_one_order() -> None:
    parameters = {"a": torch.zeros(3), "b": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    one = {name: torch.randn(p.shape) for name, p in parameters.items()}
    other = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in one.items()}
    other["b"] = other["b"].to(memory_format=torch.channels_last)
    for tensors in (one, other):
        parts = [own_parts(tensors, parameters, Replicas(rank, 5)) for rank in range(5)]
        joined = torch.cat([part["b"] for part in parts])
        assert torch.equal(joined, one["b"].permute(0, 2, 3, 1).reshape(-1))
        assert torch.equal(torch.cat([part["a"] for part in parts]), one["a"])
        assert {sum(piece.numel() for piece in part.values()) for part in parts} <= {24, 25}
        assert parts[4]["a"].numel() == 0


def test_strategies_that_cut_gradients_up_are_refused_by_name(tmp_path) -> None:
    like_deepspeed = type("DeepSpeedStrategy", (DDPStrategy,), {})(process_group_backend="gloo")
    with pytest.warns(UserWarning, match="is off.*DeepSpeedStrategy.*stages 1, 2 and 3.*use one of them") as caught:
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), strategy=like_deepspeed, max_steps=2)
    assert made.global_step == 2 and "histograms" not in [k for k, v in events(tmp_path).Tags().items() if v]
    assert len([w for w in caught if "GradientHistogramMonitor" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the parser's own, about itself
@pytest.mark.parametrize("group_by", [2, r"layers\.(\d+)"])
def test_the_command_line_takes_the_arguments(group_by: Any) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(GradientHistogramMonitor, "monitor")
    words = [
        f"--monitor.group_by={group_by}",
        "--monitor.include=Linear",
        "--monitor.exclude=bias",
        "--monitor.when=local",
        "--monitor.optimizer_state=true",
    ]
    monitor = parser.instantiate_classes(parser.parse_args(words)).monitor
    assert (monitor.group_by, monitor.include, monitor.exclude, monitor.when) == (group_by, "Linear", "bias", "local")
    assert monitor.optimizer_state is True


@pytest.mark.parametrize("local", [pytest.param(False, id="averaged"), pytest.param(True, id="local")])
def test_a_run_restored_in_its_middle_goes_on_and_is_monitored(tmp_path, local: bool) -> None:
    class Tuned(Net):
        def __init__(self) -> None:
            super().__init__(lambda p: torch.optim.AdamW(p, lr=self.lr))
            self.lr = 1e-3

    class InMidRun(LearningRateFinder):
        def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
            pass

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    monitor = GradientHistogramMonitor(every_n_steps=4, when="local" if local else "before_clip")
    finder = InMidRun(num_training_steps=10)
    made = fit(tmp_path, monitor, finder, module=Tuned, max_epochs=2, limit_train_batches=8)
    assert made.global_step == 16
    tag = f"gradient_{'local_' if local else ''}magnitude/all"
    assert [event.step for event in events(tmp_path).Histograms(tag)] == [0, 4, 8, 12]
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [0, 4, 8, 12]


class NewOptimizers(L.Callback):
    """Makes optimizers anew at the second epoch, one more than there were if told."""

    def __init__(self, more: bool) -> None:
        self.more = more

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            trainer.strategy.setup_optimizers(trainer)
            if self.more:
                trainer.strategy.optimizers = [*trainer.optimizers, torch.optim.SGD(pl_module.two.parameters(), lr=0.1)]


class OneAlone(TwoOptimizers):
    """The second optimizer does not step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, _ = self.optimizers()
        first.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self.two(self.one(batch[0])), batch[1]))
        first.step()


def test_a_record_leaves_out_an_optimizer_that_has_not_stepped(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1, batch_size=8)
    fit(tmp_path, monitor, module=OneAlone, max_epochs=2)
    assert "SGD" not in (tmp_path / "calibration.json").read_text()
    assert RunRecord.load(tmp_path / "calibration.json").optimizers[0].batch_size == 8


class AllInTurn(TwoOptimizers):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.two(self.one(batch[0])).square().mean())
            optimizer.step()


def test_optimizers_made_in_mid_run_are_monitored(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=4)
    fit(tmp_path / "anew", monitor, NewOptimizers(more=False), max_epochs=2, limit_train_batches=8)
    histograms = events(tmp_path / "anew").Histograms("gradient_magnitude/all")
    assert [event.step for event in histograms] == [0, 4, 8, 12]
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == [0, 4, 8, 12]
    assert monitor.state_dict()["optimizers"][0]["skipped"] == 0
    monitor = GradientHistogramMonitor(every_n_steps=4, batch_size=8)
    fit(tmp_path / "more", monitor, NewOptimizers(more=True), module=AllInTurn(), max_epochs=2, limit_train_batches=8)
    histograms = events(tmp_path / "more").Histograms("gradient_magnitude/all_2")
    assert [event.step for event in histograms] == [18, 30]


def test_steps_that_it_does_not_see_are_said(tmp_path) -> None:
    class PastLightning(AllInTurn):
        def optimizers(self, use_pl_optimizer: bool = True) -> Any:
            return super().optimizers(use_pl_optimizer=False)

    with pytest.warns(UserWarning, match="does not see the steps of") as caught:
        fit(tmp_path, GradientHistogramMonitor(batch_size=8), module=PastLightning())
    assert len([one for one in caught if "does not see" in str(one.message)]) == 1


class FirstAndSecond(torch.optim.SGD):
    """Steps in two halves, as SAM is often written."""

    def first_step(self) -> None:
        self.zero_grad()

    def second_step(self) -> None:
        super().step()


class ByHalves(AllInTurn):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        for half in (self.optimizers().first_step, self.optimizers().second_step):
            self.manual_backward(self.two(self.one(batch[0])).square().mean())
            half()

    def configure_optimizers(self) -> Any:
        return FirstAndSecond(self.parameters(), lr=0.1)


class WithinBackward(AllInTurn):
    """Each parameter has an optimizer of its own, which steps as soon as there is a gradient; Lightning's has none."""

    def on_fit_start(self) -> None:
        for parameter in self.parameters():
            parameter.register_post_accumulate_grad_hook(self.step)

    def step(self, parameter: Any) -> None:
        torch.optim.SGD([parameter], lr=0.1).step()
        parameter.grad = None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.two(self.one(batch[0])).square().mean())
        self.optimizers().step()


@pytest.mark.parametrize("module", [ByHalves, WithinBackward])
def test_steps_of_which_it_sees_no_gradient_are_said(tmp_path, module: Any) -> None:
    with pytest.warns(UserWarning, match="does not see the steps of .*first_step.*within the backward pass") as caught:
        fit(tmp_path, GradientHistogramMonitor(batch_size=8), module=module, max_epochs=2)
    assert len([one for one in caught if "does not see" in str(one.message)]) == 1


def test_an_optimizer_that_makes_no_step_is_not_said_to_be_unseen(tmp_path) -> None:
    class OneOnly(TwoOptimizers):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.one(batch[0]).square().mean())
            self.optimizers()[0].step()

    fit(tmp_path, GradientHistogramMonitor(batch_size=8), module=OneOnly)  # a warning is an error


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("owner", "attribute", "options"),
    [
        pytest.param(gradients, "dense", {}, id="gradients"),
        pytest.param(observer, "own_parts", {}, id="parts"),
        pytest.param(observer, "ready_gradients", {"when": "after_clip"}, id="after clipping"),
        pytest.param(gradients, "local_gradient", {"when": "local"}, id="local copies"),
        pytest.param(updates, "damping_epsilons", {"optimizer_state": True}, id="state"),
        pytest.param(updates, "UpdateReport", {"optimizer_state": True}, id="report"),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_fails_costs_one_warning_and_not_the_run(
    tmp_path, monkeypatch, owner: Any, attribute: str, options: dict[str, Any], accumulate: int
) -> None:
    monkeypatch.setattr(owner, attribute, _raises)
    monitor = GradientHistogramMonitor(every_n_steps=1, **options)
    with pytest.warns(UserWarning, match="could not .*, training goes on.*OutOfMemory") as caught:
        made = fit(tmp_path, monitor, accumulate_grad_batches=accumulate, limit_train_batches=6)
    assert made.global_step == 6 // accumulate
    told = [str(one.message) for one in caught if "GradientHistogramMonitor" in str(one.message)]
    assert len(told) == len({*told})


def test_a_failure_hides_no_other_one(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "measure_pair", _raises)
    monkeypatch.setattr(updates, "damping_epsilons", _raises)
    with pytest.warns(UserWarning, match="GradientHistogramMonitor") as caught:
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=1, optimizer_state=True), limit_train_batches=4)
    for task in ("measure noise", "look at the optimizer's step"):
        assert len([one for one in caught if f"could not {task}" in str(one.message)]) == 1


class WithoutInputs(Net):
    """A layer for columns that these data do not have, whose weight has no values."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.none = nn.Linear(0, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.none(batch[0][:, :0]).square().mean()


@pytest.mark.parametrize(("size", "accumulate", "measured"), [(64, 1, 11), (8, 1, 6), (8, 2, 6)])
def test_parameters_without_values_are_left_out(tmp_path, size: int, accumulate: int, measured: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1, optimizer_state=True)
    data = loader(size, samples=size * 12)
    fit(tmp_path, monitor, module=WithoutInputs, data=data, accumulate_grad_batches=accumulate)
    assert len(monitor.noise_records[0]) == measured


def test_a_group_function_that_raises_costs_one_warning(tmp_path) -> None:
    with pytest.warns(UserWarning, match="group_by raises for 'body.0.weight'.*OutOfMemory") as caught:
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=4, group_by=_raises), limit_train_batches=5)
    assert len([one for one in caught if "group_by" in str(one.message)]) == 1
    assert len(events(tmp_path).Histograms("gradient_magnitude/head.weight")) == 2


def test_a_row_that_two_optimizers_have_is_told_apart(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=4, group_by="one|two|weight", optimizer_state=True, batch_size=8)
    fit(tmp_path / "apart", monitor, module=TwoOptimizers())
    tags = events(tmp_path / "apart").Tags()["histograms"]
    assert {"gradient_magnitude/one", "gradient_magnitude/two"} < set(tags)  # no other optimizer has them
    monitor = GradientHistogramMonitor(every_n_steps=4, group_by=lambda name: "net", optimizer_state=True, batch_size=8)
    fit(tmp_path / "shared", monitor, module=TwoOptimizers())
    histograms = events(tmp_path / "shared").Histograms
    for index in (0, 1):
        mine, pooled = (histograms(f"gradient_magnitude/{name}_{index}") for name in ("net", "all"))
        assert [event.step for event in mine] == [event.step for event in pooled]
        assert mine[0].histogram_value.num == pooled[0].histogram_value.num
        assert logged_scalars(tmp_path / "shared", f"optimizer_update_ratio/net_{index}")
    assert "gradient_magnitude/net" not in events(tmp_path / "shared").Tags()["histograms"]


class StepInGroup(torch.optim.Optimizer):
    """The steps in the group, as fused optimizers of other packages have them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state["exp_avg_sq"] = p.grad.square().lerp_(state.get("exp_avg_sq", torch.zeros_like(p)), 0.999)
                p.addcdiv_(p.grad, state["exp_avg_sq"].sqrt() + group["eps"], value=-group["lr"])
        return loss


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_with_another_state_than_adam_has_simple_noise(tmp_path, accumulate: int) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=2, optimizer_state=True)
    fit(tmp_path, monitor, module=Net(StepInGroup), accumulate_grad_batches=accumulate)  # a warning is an error
    samples = monitor.noise_records[0].samples
    assert len(samples) >= 4 and all(sample["noise_simple"] is not None for sample in samples)
    assert all(sample["noise_adam"] is None for sample in samples)
    assert logged_scalars(tmp_path, "optimizer_update_ratio/all")


@pytest.mark.parametrize("schedule", [{0: 4, 1: 1}, {0: 1, 1: 4}])
def test_accumulation_may_change_between_epochs(tmp_path, schedule: dict[int, int]) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    made = fit(tmp_path, monitor, GradientAccumulationScheduler(schedule), max_epochs=2)  # a warning is an error
    assert made.global_step == 20
    assert any(sample["batch_size"] == 32 for sample in monitor.noise_records[0].samples)


def test_every_fit_may_warn_anew(tmp_path, monkeypatch) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    monkeypatch.setattr(observer, "own_parts", _raises)
    for folder in ("first", "second"):
        with pytest.warns(UserWarning, match="could not .*, training goes on.*OutOfMemory"):
            fit(tmp_path / folder, monitor, max_steps=2)


class Wrapper(torch.optim.Optimizer):
    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


@pytest.mark.parametrize("wrapper", [Wrapper, Lookahead])
def test_an_optimizer_without_step_hooks_turns_it_off(tmp_path, wrapper: Any) -> None:
    with pytest.warns(UserWarning, match=f"is off: {wrapper.__name__} has no step hooks"):
        module = Net(lambda p: wrapper(torch.optim.AdamW(p)))
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=4), module=module)
    assert made.global_step == 16 and not events(tmp_path).Tags()["histograms"]


def test_the_record_is_written_at_the_end_of_an_epoch_that_has_something_new(tmp_path, monkeypatch) -> None:
    saved = []
    save = RunRecord.save
    monkeypatch.setattr(RunRecord, "save", lambda record, path: (saved.append(record.steps), save(record, path)))
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=10), limit_train_batches=1, max_epochs=30)
    assert saved[0] == 2 and saved[-1] == 30
    assert set(saved) <= {2, 10, 12, 22, 30}  # 10 is the second logged step; one that still waits gives way to the next
    assert RunRecord.load(tmp_path / "calibration.json").steps == 30


def test_training_does_not_wait_for_the_record_and_is_told_what_it_raised(tmp_path, monkeypatch) -> None:
    threads: list[str] = []

    def save(record: RunRecord, path: Path) -> None:
        threads.append(threading.current_thread().name)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunRecord, "save", save)
    with pytest.warns(UserWarning, match="could not write calibration.json, training goes on.*No space left") as caught:
        made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=2), max_epochs=2)
    assert made.global_step == 32 and len(threads) > 3
    assert threading.main_thread().name not in threads
    assert len([one for one in caught if "could not write" in str(one.message)]) == 1


class Sixteen(L.LightningModule):
    """Eight layers, sixteen tensors."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [8, 16, 16, 16, 16, 16, 16, 16, 3]
        layers = [part for ends in zip(sizes, sizes[1:], strict=False) for part in (nn.Linear(*ends), nn.Tanh())]
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def test_sixteen_tensors_make_no_more_than_forty_charts_with_the_noise_scale_among_them(tmp_path) -> None:
    made = fit(tmp_path, GradientHistogramMonitor(every_n_steps=1), module=Sixteen, max_epochs=4)
    found = events(tmp_path)
    tags = found.Tags()["scalars"]
    assert len([tag for tag in tags if tag != "epoch"]) <= 40, tags
    assert len([tag for tag in tags if tag.startswith("gradient_norm/")]) == 17
    assert not [
        tag for tag in tags if tag.startswith(("gradient_median/", "gradient_fp8")) and not tag.endswith("/all")
    ]
    record = RunRecord.load(tmp_path / "calibration.json").optimizers[0]
    scales = logged_scalars(tmp_path, "noise_scale/simple")
    assert 4 < len(scales) < made.global_step / 2 and max(scales) > made.global_step / 2
    assert list(scales.values())[-1] == pytest.approx(record.noise["simple"].value, rel=0.5)
    ends = [logged_scalars(tmp_path, f"noise_scale/simple_{end}") for end in ("lower", "upper")]
    assert ends[0].keys() == ends[1].keys() == scales.keys()  # else TensorBoard refuses to draw the chart
    assert all(ends[0][step] <= scale <= ends[1][step] for step, scale in scales.items())
    assert logged_scalars(tmp_path, "noise_scale/batch_size")[max(scales)] == 8
    layout = str(found.Tensors("custom_scalars__config__")[0].tensor_proto)
    assert "noise_scale/adam_lower" in layout and "noise_scale/simple_upper" in layout


@pytest.mark.parametrize(("clip", "algorithm"), [(1e-2, "norm"), (1e6, "norm"), (1e-2, "value"), (None, None)])
def test_how_much_the_trainer_clips_is_logged_where_it_clips_by_norm(tmp_path, clip: Any, algorithm: Any) -> None:
    options = {"gradient_clip_val": clip, "gradient_clip_algorithm": algorithm, "max_steps": 6}
    spy = GradientSpy()
    fit(tmp_path, GradientHistogramMonitor(every_n_steps=2), spy, module=Sixteen, **options)
    found = logged_scalars(tmp_path, "gradient_clip_factor")
    if algorithm != "norm":
        assert found == {}
        return
    assert list(found) == [0, 2, 4]
    for step, factor in found.items():
        norm = torch.cat([gradient.flatten() for gradient in spy.seen[step].values()]).norm()
        assert factor == pytest.approx(min(1.0, clip / float(norm)), rel=0.02)


@pytest.mark.parametrize(("gradient", "factor"), [(0.9, 1.0), (1.0, 1.0), (1.06, 1.0), (2.0, 0.5), (2.24, 0.45)])
def test_no_clipping_is_told_of_that_the_bins_of_a_few_values_cannot_tell(
    tmp_path, gradient: float, factor: float
) -> None:
    class One(Net):
        def __init__(self) -> None:
            super().__init__(lambda _: torch.optim.SGD([self.weight], 0.1))
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return gradient * self.weight

    monitor = GradientHistogramMonitor(every_n_steps=1, include="^weight")
    fit(tmp_path, monitor, module=One, gradient_clip_val=1.0, max_steps=2)
    assert logged_scalars(tmp_path, "gradient_clip_factor")[0] == pytest.approx(factor, rel=0.07 if factor < 1 else 0)


@pytest.mark.parametrize(
    ("module", "exclude"),
    [
        pytest.param(Sixteen, "bias", id="not all gradients are counted"),
        pytest.param(OwnClipping, None, id="the module clips itself"),
    ],
)
def test_no_clip_factor_where_it_is_not_known(tmp_path, module: Any, exclude: str | None) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1, exclude=exclude)
    fit(tmp_path, monitor, module=module, gradient_clip_val=1e-2, max_steps=2)
    assert "gradient_clip_factor" not in events(tmp_path).Tags()["scalars"]


def test_a_second_monitor_of_local_gradients_changes_nothing_of_the_first(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1)
    local = GradientHistogramMonitor(every_n_steps=1, noise_scale=False, when="local")
    fit(tmp_path, local, monitor, accumulate_grad_batches=2)
    assert [sample["step"] for sample in monitor.noise_records[0].samples] == list(range(8))


@pytest.mark.parametrize("how", ["backward", "hook"])
def test_clipping_within_backward_is_not_taken_for_noise_under_accumulation(tmp_path, how: str) -> None:
    """What is clipped while micro-batches add up differs from the sum by more than noise: two steps are compared."""

    class Plain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 8)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    class InBackward(Plain):
        def backward(self, loss: Any, *args: Any, **kwargs: Any) -> None:
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 2.0)

    class InHook(Plain):
        def configure_optimizers(self) -> Any:
            for parameter in self.net.parameters():
                parameter.register_post_accumulate_grad_hook(self.clip)
            return super().configure_optimizers()

        @staticmethod
        def clip(parameter: Any) -> None:
            parameter.grad.mul_(min(1, 2.0 / float(parameter.grad.norm())))

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2048, 8, generator=generator)
    targets = inputs @ torch.randn(8, 8, generator=generator) + 4 * torch.randn(2048, 8, generator=generator)
    found = []
    for module in (Plain, InBackward if how == "backward" else InHook):
        monitor = GradientHistogramMonitor(every_n_steps=1)
        data = DataLoader(TensorDataset(inputs, targets), 8)
        fit(tmp_path / module.__name__, monitor, module=module, data=data, accumulate_grad_batches=8)
        found.append(monitor.noise_records[0].estimate("simple").value)
    assert found[1] == pytest.approx(found[0], rel=0.6)


class ClipsByHand(L.LightningModule):
    """Manual optimization of frozen weights, with one step or several on a batch; of a sample the noise scale is 4."""

    def __init__(self, clip: float | None = None, steps: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight, self.clip, self.steps = nn.Parameter(torch.zeros(2000)), clip, steps

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, gradient = self.optimizers(), (1 + 2 * torch.randn(8, 2000)).mean(0)
        for _ in range(self.steps):
            optimizer.zero_grad()
            self.manual_backward(self.weight @ gradient)
            if self.clip is not None:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_noise_is_not_measured_where_a_module_clips_by_hand(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1, batch_size=8)
    with pytest.warns(UserWarning, match="at 0 of 11 steps.*Under manual optimization noise is not measured"):
        fit(tmp_path / "clipped", monitor, module=ClipsByHand(clip=1.0), data=loader(8, samples=192))
    fit(tmp_path / "not clipped", monitor, module=ClipsByHand(clip=1e6))
    assert monitor.noise_records[0].estimate("simple").value == pytest.approx(4, rel=0.1)


def test_two_steps_on_one_batch_are_no_pair(tmp_path) -> None:
    monitor = GradientHistogramMonitor(every_n_steps=1, batch_size=8)
    fit(tmp_path, monitor, module=ClipsByHand(steps=3), data=loader(8, samples=192))
    record = monitor.noise_records[0]
    assert [sample["step"] for sample in record.samples] == [6 * pair for pair in range(11)]
    assert record.estimate("simple").value == pytest.approx(4, rel=0.1)
