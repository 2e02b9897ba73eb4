"""What the monitor tells of optimizers, against their own state and the weights before and after their steps."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from support import (
    Net,
    StateSpy,
    TwoOptimizers,
    assert_state_is_logged,
    events,
    expected_counts,
    final_state,
    fit,
    logged_counts,
    logged_scalars,
)
from torch import nn

from lightning_gradhist import ALTO, AdamE, EAdaptor, GradientHistogramMonitor
from lightning_gradhist.callbacks.optimizer_state import metric_weights, second_moment
from lightning_gradhist.logging import figures

SMALL = 1e-20  # damps nothing, not even what a bias before BatchNorm has for a gradient


@pytest.fixture(autouse=True)
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take more time than all else here; the test that looks at them undoes this."""
    monkeypatch.setattr(figures, "available", lambda: False)


def monitor(every_n_steps: int = 5, **options: Any) -> GradientHistogramMonitor:
    return GradientHistogramMonitor(every_n_steps, noise_scale=False, optimizer_state=True, **options)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=SMALL), {}, id="AdamW"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=SMALL, amsgrad=True), {}, id="AMSGrad"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=SMALL), {"precision": "bf16-true"}, id="bf16-true"),
        pytest.param(lambda p: AdamE(p, lr=1e-2, eps=SMALL), {}, id="AdamE"),
        pytest.param(lambda p: ALTO(p, lr=1e-2, eps=SMALL), {"accumulate_grad_batches": 2}, id="ALTO, accumulation"),
        pytest.param(lambda p: EAdaptor(torch.optim.Adam(p, lr=1e-2, eps=SMALL)), {}, id="EAdaptor"),
    ],
)
def test_it_is_that_of_the_optimizer(tmp_path, optimizer: Any, options: dict[str, Any]) -> None:
    spy = StateSpy()
    fit(tmp_path, monitor(), spy, module=Net(optimizer), max_steps=7, **options)  # without the alarm, an error here
    assert len(spy.seen.roots[-1]) == 6
    assert_state_is_logged(tmp_path, spy.seen, [0, 5], SMALL)


def test_rows_with_several_epsilons_count_each_with_its_own(tmp_path) -> None:
    class Groups(Net):
        def configure_optimizers(self) -> Any:
            groups = [
                {"params": [self.body[0].weight], "eps": 2e-2},
                {"params": [self.body[1].weight], "eps": torch.tensor(1e-1), "betas": (0.9, 0.9)},
                {"params": [self.head.weight], "eps": SMALL},
            ]
            return torch.optim.AdamW(groups, lr=1e-2)

    spy = StateSpy()
    with pytest.warns(UserWarning, match="finds that eps"):
        fit(tmp_path, monitor(group_by=1, exclude="bias"), spy, module=Groups, max_steps=6)
    for step in (0, 5):
        roots = {name: root[root > 0] for name, root in spy.seen.roots[step + 1].items()}
        body = torch.cat([roots["body.0.weight"].flatten(), roots["body.1.weight"]])
        damped = int((roots["body.0.weight"] < 2e-2).sum() + (roots["body.1.weight"] < 1e-1).sum())
        assert 0 < damped < body.numel()
        assert logged_scalars(tmp_path, "optimizer_damped_share/body")[step] == pytest.approx(damped / body.numel())
        assert logged_scalars(tmp_path, "optimizer_damped_share/head")[step] == 0
        pooled = logged_scalars(tmp_path, "optimizer_damped_share/all")[step]
        assert pooled == pytest.approx(damped / (body.numel() + roots["head.weight"].numel()))
        assert logged_counts(tmp_path, "optimizer_second_moment/body", step) == expected_counts(body)
        ratio = logged_scalars(tmp_path, "optimizer_update_ratio/body")[step]
        assert ratio == pytest.approx(spy.seen.ratio(step, "body.0.weight", "body.1.weight"), rel=1e-5)
    tags = events(tmp_path).Tags()["scalars"]
    assert {tag.partition("/")[2] for tag in tags if tag.startswith("optimizer_")} == {"body", "head", "all"}


def partly_damped(share: float) -> Any:
    """An optimizer that leaves in its state second moments of which a known share lies below epsilon."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-3)
        optimizer.register_step_post_hook(damp)
        return optimizer

    def damp(optimizer: torch.optim.Optimizer, *hook: Any) -> None:
        for state in optimizer.state.values():
            moment = state["exp_avg_sq"]
            below = torch.arange(moment.numel()) < round(share * moment.numel())
            roots = torch.where(below, 3e-5, 1e-2).view_as(moment)
            moment.copy_(roots.square() * (1 - 0.999 ** float(state["step"])))

    return make


def test_the_alarm_comes_once_and_names_the_row_with_most_damped_weights(tmp_path) -> None:
    with pytest.warns(UserWarning, match="GradientHistogramMonitor") as caught:
        fit(tmp_path, monitor(1), module=Net(partly_damped(0.25)), max_steps=5)
    (message,) = [str(warning.message) for warning in caught if "GradientHistogramMonitor" in str(warning.message)]
    assert "eps=0.001 damps 25.0% of the weights of 'body.0.weight' at step 0" in message
    assert "in 6 of 6 rows" in message and "Lower eps (eps=1e-05 damps 2% of it at most)" in message
    assert logged_scalars(tmp_path, "optimizer_damped_share/body.0.weight") == dict.fromkeys(range(5), 0.25)


def test_there_is_no_alarm_up_to_a_tenth(tmp_path) -> None:
    fit(tmp_path, monitor(1, include=r"0\.weight"), module=Net(partly_damped(12 / 128)), max_steps=2)
    assert logged_scalars(tmp_path, "optimizer_damped_share/body.0.weight") == {0: 12 / 128, 1: 12 / 128}


class KeyBias(L.LightningModule):
    """The bias of an attention's keys has no gradient but rounding noise, 1e-9 beside 0.3 for that of the values."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)
        self.eps = eps

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = batch[0][:, None] * torch.linspace(0.5, 2.0, 5)[:, None]
        return nn.functional.cross_entropy(self.head(self.attention(tokens, tokens, tokens)[0].mean(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=self.eps)


def test_rounding_noise_is_no_alarm(tmp_path) -> None:
    fit(tmp_path / "noise", monitor(2), module=KeyBias(1e-7), max_steps=5)  # a warning is an error
    assert logged_scalars(tmp_path / "noise", "optimizer_damped_share/attention.in_proj_bias")[4] >= 1 / 3
    with pytest.warns(UserWarning, match="eps=0.03 damps"):  # what is small and no noise
        fit(tmp_path / "small", monitor(2), module=KeyBias(3e-2), max_steps=5)


@pytest.mark.filterwarnings("ignore:.*has no logger to write histograms to")
def test_the_alarm_needs_neither_a_second_report_nor_a_logger(tmp_path) -> None:
    with pytest.warns(UserWarning, match="'body.0.weight' at step 0.*in 1 of 1 rows") as caught:
        watch = monitor(include=r"0\.weight", exclude="head")
        fit(tmp_path, watch, module=Net(partly_damped(13 / 128)), max_steps=2, logger=False)
    assert len([warning for warning in caught if "finds that eps" in str(warning.message)]) == 1


class Embedding(Net):
    """Rows of a table that no batch asks for: their second moment stays zero."""

    def __init__(self, make_optimizer: Any) -> None:
        super().__init__(make_optimizer)
        self.table = nn.Embedding(8, 16)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.table(batch[1]).square().mean()


def test_weights_that_never_had_a_gradient_are_not_damped(tmp_path) -> None:
    spy = StateSpy()
    fit(
        tmp_path,
        monitor(include="table"),
        spy,
        module=Embedding(lambda p: torch.optim.AdamW(p, eps=1e-12)),
        max_steps=6,
    )
    assert (spy.seen.roots[-1]["table.weight"] == 0).float().mean() >= 5 / 8
    assert set(logged_scalars(tmp_path, "optimizer_damped_share/table.weight").values()) == {0.0}


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), id="SGD"),
        pytest.param(lambda p: torch.optim.Adafactor(p), id="Adafactor"),
        pytest.param(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3), id="LBFGS"),
    ],
)
def test_without_a_second_moment_there_is_the_update_alone(tmp_path, optimizer: Any) -> None:
    spy = StateSpy()
    fit(tmp_path, monitor(1), spy, module=Net(optimizer), max_steps=3)
    assert list(logged_scalars(tmp_path, "optimizer_update_ratio/head.weight")) == [0, 1, 2]
    if len(spy.seen.weights) == 4:  # LBFGS is looked at at each evaluation of a step
        ratio = logged_scalars(tmp_path, "optimizer_update_ratio/head.weight")[1]
        assert ratio == pytest.approx(spy.seen.ratio(1, "head.weight"), rel=1e-5) and ratio > 0
    tags = [tag for kind in ("scalars", "histograms", "images") for tag in events(tmp_path).Tags()[kind]]
    assert not [tag for tag in tags if tag.startswith("optimizer_") and "update_ratio" not in tag]


@pytest.mark.parametrize("fused", [pytest.param(False, id="by the scaler"), pytest.param(True, id="by the optimizer")])
def test_a_skipped_step_logs_nothing(tmp_path, fused: bool) -> None:
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3))
    module = Net(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=SMALL, fused=fused))
    spy = StateSpy()
    fit(tmp_path, monitor(1, include="head"), spy, module=module, plugins=[precision], limit_train_batches=12)
    changed = [
        any(not torch.equal(before[name], after[name]) for name in before)
        for before, after in zip(spy.seen.weights, spy.seen.weights[1:], strict=False)
    ]
    assert 2 < sum(changed) < len(changed) - 2
    assert list(logged_scalars(tmp_path, "optimizer_damped_share/all")) == [i for i, took in enumerate(changed) if took]
    for step, ratio in logged_scalars(tmp_path, "optimizer_update_ratio/head.weight").items():
        assert ratio == pytest.approx(spy.seen.ratio(step, "head.weight"), rel=1e-5)


def test_two_optimizers_are_told_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.undo()
    fit(tmp_path, monitor(4), module=TwoOptimizers)
    tags = events(tmp_path).Tags()
    assert len(logged_scalars(tmp_path, "optimizer_update_ratio/all_0")) == 4  # 16 steps
    assert len(logged_scalars(tmp_path, "optimizer_update_ratio/all_1")) == 2  # 8 steps
    assert "optimizer_damped_share/all_0" in tags["scalars"] and "optimizer_damped_share/all_1" not in tags["scalars"]
    assert [tag for tag in tags["images"] if "second_moment" in tag] == ["optimizer_second_moment_by_layer_0"]
    images = {tag: [image.step for image in events(tmp_path).Images(tag)] for tag in tags["images"]}
    assert images["optimizer_second_moment_by_layer_0"] == images["gradient_magnitude_by_layer_0"]


class Late(Net):
    """A head whose bias is all zeros at first, and a layer that is frozen after one epoch."""

    def __init__(self) -> None:
        super().__init__(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=SMALL))
        nn.init.zeros_(self.head.bias)

    def on_train_epoch_start(self) -> None:
        self.body[0].requires_grad_(self.current_epoch == 0)


def test_what_has_no_weights_yet_or_makes_no_step_is_left_out(tmp_path) -> None:
    fit(tmp_path, monitor(3), module=Late, max_epochs=2, limit_train_batches=6)
    assert list(logged_scalars(tmp_path, "optimizer_update_ratio/head.bias")) == [3, 6, 9]
    assert list(logged_scalars(tmp_path, "optimizer_damped_share/head.bias")) == [0, 3, 6, 9]
    for tag in ("optimizer_update_ratio", "optimizer_damped_share"):
        assert list(logged_scalars(tmp_path, f"{tag}/body.0.weight")) == [0, 3]


def test_training_is_the_same_with_and_without(tmp_path) -> None:
    module = lambda: Net(lambda p: torch.optim.AdamW(p, lr=1e-2, eps=SMALL))  # noqa: E731
    without = final_state(fit(tmp_path / "a", module=module, max_steps=4))
    made = fit(tmp_path / "b", monitor(1), module=module, max_steps=4)
    torch.testing.assert_close(without["weights"], final_state(made)["weights"], rtol=0, atol=0)
    assert not made.optimizers[0]._optimizer_step_post_hooks


def test_a_monitor_is_copied_in_mid_run(tmp_path) -> None:
    class Copying(L.Callback):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            self.copied = copy.deepcopy(trainer.callbacks[0])

    copying = Copying()
    module = Net(lambda p: torch.optim.AdamW(p, eps=SMALL))
    fit(tmp_path, monitor(1), copying, module=module, max_steps=2)
    assert copying.copied.optimizer_state and copying.copied.state_dict()["optimizers"][0]["steps"] == 2


def test_a_rank_that_cannot_copy_its_weights_logs_nothing_and_says_so(tmp_path, monkeypatch) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no room for a copy")

    monkeypatch.setattr("lightning_gradhist.callbacks.monitor.updates.own_parts", full)
    with pytest.warns(UserWarning, match="could not copy the weights, training goes on.*no room for a copy"):
        made = fit(tmp_path, monitor(1), max_steps=3)
    assert made.global_step == 3
    assert not [tag for tag in events(tmp_path).Tags()["scalars"] if tag.startswith("optimizer_")]
    assert len(logged_scalars(tmp_path, "gradient_median/all")) == 3


def test_the_alarm_says_what_to_do_of_moments_below_the_range_of_float32(tmp_path) -> None:
    class Tiny(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self.head(batch[0]), batch[1]) * 1e-60

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    with pytest.warns(UserWarning, match="damps 100.0% of the weights.*Lower eps .eps=0 damps") as caught:
        fit(tmp_path, GradientHistogramMonitor(every_n_steps=4, optimizer_state=True), module=Tiny, precision="64-true")
    assert not any("could not log" in str(one.message) for one in caught)


def test_the_metric_has_the_epsilon_of_each_group() -> None:
    layer = nn.Linear(4, 4)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "eps": 1}]
    optimizer = torch.optim.AdamW(groups, eps=1e-8)
    layer(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    parameters = dict(layer.named_parameters())
    optimizer.param_groups[0]["eps"] = torch.tensor(0.5)
    moments = second_moment(optimizer, parameters)
    weights = metric_weights(optimizer, parameters)
    assert weights is not None
    for name, eps in (("weight", 0.5), ("bias", 1.0)):
        torch.testing.assert_close(weights[name], 1 / ((moments[name] + moments[name].mean()).sqrt() + eps))
