"""The critical rate of the first step: the search, Adam's own first step, and runs that it keeps from leaping."""

from __future__ import annotations

import copy
import math
import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from support import fit
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhist import ALTO, OptimizerCalibration
from lightning_gradhist.callbacks.calibration.evidence import _Measurement
from lightning_gradhist.callbacks.known_optimizers import starts_with_signs
from lightning_gradhist.callbacks.probe.first_step import first_step, largest_factor
from lightning_gradhist.callbacks.probe.probe import Probe


@pytest.mark.parametrize(
    ("largest", "found"), [(1.0, math.inf), (1.9, math.inf), (4.0, 2.0), (2.1, 2.1 / math.sqrt(2))]
)
def test_the_largest_factor_is_where_a_parabola_is_back_at_its_start(largest: float, found: float) -> None:
    assert largest_factor(lambda f: (1 - f) ** 2 - 1e-12 * (f > 0), largest) == pytest.approx(found)


def test_no_factor_where_the_loss_is_not_known_or_only_rises() -> None:
    assert largest_factor(lambda f: math.nan, 1.0) is None
    assert largest_factor(lambda f: f, 1.0) == 0
    assert largest_factor(lambda f: math.inf if f > 1 else -f, 2.0) == pytest.approx(1.0)
    assert largest_factor(lambda f: math.nan if f > 1 else -f, 2.0) is None


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_the_first_step_is_adams(eps: float, betas: tuple[float, float]) -> None:
    weight = nn.Parameter(torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    before, weight.grad = weight.detach().clone(), torch.linspace(-0.1, 0.1, 64, dtype=torch.float64)
    torch.optim.Adam([weight], lr=0.02, eps=eps, betas=betas).step()
    torch.testing.assert_close(before - weight.detach(), first_step(weight.grad, 0.02, eps), rtol=1e-9, atol=1e-15)
    assert not first_step(torch.zeros(3), 1.0, 0.0).any()


def test_only_optimizers_that_begin_as_adam_does_are_tried() -> None:
    weights = [nn.Parameter(torch.zeros(2))]
    begins = [torch.optim.Adam(weights), torch.optim.AdamW(weights), ALTO(weights, layerwise=False)]
    others = [torch.optim.RMSprop(weights), torch.optim.RAdam(weights), torch.optim.SGD(weights), ALTO(weights)]
    assert all(map(starts_with_signs, begins)) and not any(map(starts_with_signs, others))


class Valley(L.LightningModule):
    """A deep network, whose first steps are easily too large."""

    def __init__(self, warm_up: float | None = None, fails_on: int | None = None, lr: float = 0.03) -> None:
        super().__init__()
        layers: list[nn.Module] = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.ReLU())]
        self.net, self.warm_up, self.fails_on, self.lr = nn.Sequential(*layers, nn.Linear(16, 1)), warm_up, fails_on, lr
        self.start = [p.detach().clone() for p in self.parameters()]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        moved = not all(map(torch.equal, self.start, (p.detach() for p in self.parameters())))
        if moved and self.trainer.global_step == 0 and self.global_rank == self.fails_on:
            raise RuntimeError("no such weights")
        return (self.net(inputs).squeeze(-1) - targets).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        schedule = LinearLR(optimizer, self.warm_up, total_iters=4) if self.warm_up else None
        scheduled = {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
        return scheduled if schedule else optimizer


def data(samples: int = 512) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 16, generator=generator)
    return DataLoader(TensorDataset(inputs, 0.25 + 0.5 * torch.randn(samples, generator=generator)), 16)


def calibrated(folder: Any, module: Any, how: Any = None, **options: Any) -> OptimizerCalibration:
    calibration = OptimizerCalibration(reference_batch_size=1, probe_batches=16, **(how or {"fallback": "sqrt"}))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OptimizerCalibration: surge law refused")  # so that it is sqrt's 4
        fit(folder, calibration, module=module, data=data(), **options)
    return calibration


def test_a_rate_whose_first_step_would_raise_the_loss_is_lowered(tmp_path) -> None:
    result = calibrated(tmp_path, Valley).result
    (told,) = [reason for reason in result.reasons if "the first step: times 4 it raises" in reason]
    assert (
        1 < result.ratio < 4
        and f"taken times {result.ratio:.3g}. A longer warm-up" in told
        and "times 2.83 it does not" in told
    )
    assert result.ratio_interval[0] <= result.ratio == result.ratio_interval[1]
    assert result.learning_rate == pytest.approx(0.03 * result.ratio)
    # by hand: the mean gradient of the first half of the probe, and the last four batches of the second
    L.seed_everything(7, verbose=False)
    net, batches = Valley().net, list(data())[:16]

    def loss(of: nn.Module, some: Any) -> Any:
        return sum((of(inputs).squeeze(-1) - targets).square().mean() for inputs, targets in some) / len(some)

    gradients = torch.autograd.grad(loss(net, batches[:8]), list(net.parameters()))

    def after(factor: float) -> float:
        moved = copy.deepcopy(net)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), gradients, strict=True):
                p -= factor * 0.03 * g.sign()
        return float(loss(moved, batches[-4:]).detach())

    assert after(result.ratio) < after(0.0) < after(result.ratio * math.sqrt(2))


def test_a_warm_up_lifts_the_bound_by_as_much_as_its_first_step_is_shorter(tmp_path) -> None:
    free, half = (calibrated(tmp_path / str(share), partial(Valley, share)).result.ratio for share in (0.1, 0.5))
    assert (free, half) == (4.0, pytest.approx(4.0))
    assert calibrated(tmp_path / "rate", partial(Valley, 0.5, lr=0.2)).result.ratio == pytest.approx(1.0)


def test_a_law_that_was_asked_for_is_warned_of(tmp_path) -> None:
    with pytest.warns(UserWarning, match="the linear law gives times 16, but .* times 2.83 it does not; make"):
        assert calibrated(tmp_path, Valley, {"learning_rate": "linear"}).result.ratio == 16


def _on_two_ranks(folder: Any) -> Any:
    from rank_jobs import ddp

    found = []
    for name, fails_on, knows in (("both", None, 2), ("fails", 1, 2), ("knows not", None, 1)):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() >= knows:
            _Measurement._largest_ratio = lambda _: 0.0  # type: ignore[method-assign]
        calibration = calibrated(folder / name, partial(Valley, None, fails_on), **ddp(2))
        found.append((calibration.result.ratio, " ".join(calibration.result.reasons)))
    return found


def test_ranks_agree_on_the_first_step_and_on_one_that_fails_or_knows_no_batch_size(tmp_path) -> None:
    one, other = run_ranks(_on_two_ranks, 2, tmp_path)
    assert one == other
    (lowered, told), *others = one
    assert "it raises the loss" in told
    for free, nothing in others:
        assert lowered < free and "it raises" not in nothing


class Momentum(Valley):
    """State that moves with the weights: an encoder that follows them, a running mean, a batch that is written into."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.net)
        self.running = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        batch[0].mul_(1.5)
        with torch.no_grad():
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.data.lerp_(fast, 0.5)
        loss = super().training_step(batch, batch_idx) + (self.net(batch[0]) - self.slow(batch[0])).square().mean()
        self.running = 0.9 * self.running + 0.1 * float(loss.detach())
        return loss / self.running

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=0.3)


def test_the_noise_scale_is_measured_before_the_first_step_is_tried(tmp_path, monkeypatch) -> None:
    with_it = calibrated(tmp_path / "with", Momentum).result
    monkeypatch.setattr(Probe, "critical_factor", lambda *_: None)
    without = calibrated(tmp_path / "without", Momentum).result
    assert with_it.noise_scale == without.noise_scale and with_it.ratio < without.ratio


def test_groups_begin_with_their_own_rates_and_epsilons(tmp_path, monkeypatch) -> None:
    class Groups(Valley):
        def configure_optimizers(self) -> Any:
            first, *others = self.parameters()
            groups = [{"params": [first], "lr": 0.1, "eps": 1.0}, {"params": others}]
            optimizer = torch.optim.Adam(groups, lr=0.01)
            factors = [lambda step: 0.5, lambda step: 0.03]
            return [optimizer], [LambdaLR(optimizer, factors)]

    made: list[Any] = []
    monkeypatch.setattr(Probe, "critical_factor", lambda _, step, largest: made.append(step()))
    calibrated(tmp_path, Groups, {"epsilon": "keep"})
    first, second, *_ = made[0].values()
    assert first.abs().max() < 0.05 * 0.9 and second.abs().max() == pytest.approx(3e-4, rel=1e-4)


def test_a_batch_without_a_finite_loss_is_left_out_of_the_try(tmp_path) -> None:
    class Broken(Valley):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return loss * math.nan if batch_idx == 14 else loss

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "OptimizerCalibration: .* not finite")
        result = calibrated(tmp_path, Broken).result
    assert 1 < result.ratio < 4
