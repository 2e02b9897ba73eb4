"""Short runs with several epsilons, within real runs."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import pytest
import torch
from support import Net, dataset, events, final_state, fit, loader, logged_scalars, trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradhist import AdamE, EAdaptor, OptimizerCalibration
from lightning_gradhist.callbacks.epsilon_search import EpsilonSearchProbe
from lightning_gradhist.epsilon_search import CONTROLS, TRAJECTORIES, Candidate


def search(**options: Any) -> OptimizerCalibration:
    return OptimizerCalibration(**{"epsilon": "search", "learning_rate": "keep", "probe_batches": 8, **options})


def with_eps(eps: float, **options: Any) -> Any:
    return lambda parameters: torch.optim.Adam(parameters, **{"lr": 3e-2, "eps": eps, **options})


class Scaled(Net):
    """The loss times a factor; no dropout."""

    def __init__(self, scale: float, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.scale, self.body = scale, nn.Sequential(nn.Linear(8, 16), nn.ReLU())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.scale


ENOUGH, FEW = 8 * 20 * TRAJECTORIES, 8 * 8 * TRAJECTORIES


def test_an_epsilon_that_damps_all_is_found_out(tmp_path) -> None:
    calibration = search()
    made = fit(tmp_path, calibration, module=Scaled(1e-8, with_eps(1e-8)), data=loader(samples=ENOUGH), max_steps=1)
    result, group = calibration.result, made.optimizers[0].param_groups[0]
    found = result.epsilon_search
    assert found.chosen is not None and not found.chosen.candidate.equal_rms and found.chosen.factor == 1
    assert group["eps"] == result.epsilon == found.chosen.candidate.eps < 1e-10
    assert group["lr"] == 3e-2 and found.chosen.to_present.upper < 0 > found.chosen.to_control.upper
    text = result.to_text()
    assert "at 1 times the learning rate replaces eps 1e-08" in text and f"took {found.gradients} gradients" in text
    arms = 1 + len(CONTROLS) + len(found.trials)
    assert found.gradients == 16 * TRAJECTORIES * arms and found.forwards == 4 * TRAJECTORIES * arms
    scalars = logged_scalars(tmp_path, f"calibration/epsilon_search/{result.epsilon:g}_same_rate/loss_difference_upper")
    assert scalars == {0: pytest.approx(found.chosen.to_present.upper)}
    assert "calibration/epsilon_search" in events(tmp_path).Tags()["images"]


def test_an_idle_epsilon_stays(tmp_path) -> None:
    calibration = search()
    module = Scaled(1e4, with_eps(1e-8, lr=1e-3))
    made = fit(tmp_path, calibration, module=module, data=loader(samples=ENOUGH), max_steps=1, logger=False)
    found = calibration.result.epsilon_search
    assert calibration.result.changes == () and made.optimizers[0].param_groups[0]["eps"] == 1e-8
    assert found.chosen is None and all(trial.candidate.equal_rms for trial in found.trials)
    # At a small rate the largest epsilon is ahead in a short run, and a higher rate is so by more.
    assert found.trials[-1].to_present.upper < 0 < found.trials[-1].to_control.lower and found.control >= 4
    assert f"but not than eps 1e-08 at {found.control:.3g} times the learning rate" in calibration.result.to_text()


def one_cycle() -> Net:
    return Net(scheduler=lambda optimizer: OneCycleLR(optimizer, 1e-2, total_steps=99))


def test_nothing_is_left_behind(tmp_path) -> None:
    states = []
    calibration = search(apply=False, learning_rate="surge", reference_batch_size=8)
    for callbacks in ([calibration], []):
        options = {
            "module": one_cycle,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.1,
            "max_steps": 3,
            "logger": False,
        }
        states.append(final_state(fit(tmp_path, *callbacks, data=loader(samples=8 * 72), **options)))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert calibration.result.epsilon_search.steps == 4


def test_the_batches_of_all_runs_of_a_trajectory_are_the_same_and_those_of_others_are_others(tmp_path) -> None:
    class Spy(Scaled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((float(batch[0].sum()), float(torch.rand(()))))
            batch[0].mul_(0.5)  # which the next run must not see
            return super().training_step(batch, batch_idx)

    seen: list[tuple[float, float]] = []
    calibration = search()
    module = Spy(1.0, with_eps(1e-8))
    fit(tmp_path, calibration, module=module, data=loader(samples=ENOUGH), max_steps=1, logger=False)
    arms = 1 + len(CONTROLS) + len(calibration.result.epsilon_search.trials)
    runs = [seen[8:-1][i : i + 20] for i in range(0, 20 * arms * TRAJECTORIES, 20)]
    trajectories = [runs[i : i + arms] for i in range(0, len(runs), arms)]
    assert len(seen) == 8 + 20 * arms * TRAJECTORIES + 1 and len(trajectories) == TRAJECTORIES
    assert all(run == alike[0] for alike in trajectories for run in alike)
    values = {value for alike in trajectories for pair in alike[0] for value in pair}
    assert len(values) == (20 + 17) * TRAJECTORIES  # the held-out batches have the random numbers of one


class Fixed(nn.Module):
    """The gradient is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4))


GRADIENT = torch.tensor([1e-4, 1e-3, 1e-2, 1e-1])


class Linear(Net):
    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__(optimizer, scheduler)
        self.body, self.head = nn.Identity(), Fixed()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.head.weight @ GRADIENT


def rms(eps: float, gradient: Tensor) -> float:
    return float((gradient / (gradient + eps)).double().norm())


@pytest.mark.parametrize(
    ("optimizer", "options", "gradient"),
    [
        pytest.param(with_eps(1e-8), {}, GRADIENT, id="adam"),
        pytest.param(lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=10.0), {}, GRADIENT, id="adamw"),
        pytest.param(lambda p: AdamE(p, lr=1e-2, eps=1e-8, alpha=0.0, explore_beta=0.5), {}, GRADIENT, id="adame"),
        pytest.param(lambda p: EAdaptor(torch.optim.Adam(p), 0.0, 0.5), {}, GRADIENT, id="adaptor"),
        pytest.param(with_eps(1e-8, fused=True), {}, GRADIENT, id="fused"),
        pytest.param(with_eps(1e-8, lr=torch.tensor(1e-2)), {}, GRADIENT, id="lr of a tensor"),
        pytest.param(
            with_eps(1e-8), {"gradient_clip_val": 1e-2}, GRADIENT * (1e-2 / GRADIENT.norm()), id="norm clipped"
        ),
        pytest.param(
            with_eps(1e-8), {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
            GRADIENT.clamp(max=1e-3), id="value clipped",
        ),
    ],
)  # fmt: skip
def test_the_factor_makes_updates_as_large(tmp_path, optimizer: Any, options: Any, gradient: Tensor) -> None:
    calibration = search()
    module = Linear(optimizer)
    fit(tmp_path, calibration, module=module, data=loader(samples=FEW), max_steps=1, logger=False, **options)
    trials = calibration.result.epsilon_search.trials
    assert len(trials) >= 2
    for trial in trials:
        expected = rms(1e-8, gradient) / rms(trial.candidate.eps, gradient)
        assert trial.factor == pytest.approx(expected, rel=1e-3), trial


def test_weights_shrink_alike_at_all_rates(tmp_path) -> None:
    class Spy(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            seen.update((group["lr"], round(group["lr"] * group["weight_decay"], 9)) for group in self.param_groups)
            return super().step(closure)

    seen: set[tuple[float, float]] = set()
    calibration = search(apply=False)
    module = Linear(lambda parameters: Spy(parameters, 1e-2, weight_decay=0.1))
    fit(tmp_path, calibration, module=module, data=loader(samples=FEW), max_steps=1, logger=False)
    rates = {rate for rate, shrinks in seen if shrinks}
    assert len(rates) == 1 + len(CONTROLS) + len(calibration.result.epsilon_search.trials)
    assert {shrinks for _, shrinks in seen} == {1e-3, 0.0}  # the latter of the steps that are compared


class Fails(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.calls >= 4 and not torch.is_grad_enabled():
            raise RuntimeError("needs a graph")
        return super().training_step(batch, batch_idx)


class Explodes(Net):
    """Finite at the weights of the start alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        start = self.__dict__.setdefault("start", self.head.weight.detach().clone())
        return loss if torch.equal(start, self.head.weight) else loss * float("nan")


class OwnRates:
    """A scheduler that cannot be scaled from outside."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self, *args: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def two_epsilons(parameters: Any) -> Any:
    first, *others = parameters
    return torch.optim.Adam([{"params": [first], "eps": 0.1}, {"params": others, "eps": 1e-20}])


class OwnRatesNet(Net):
    def __init__(self) -> None:
        super().__init__(with_eps(1e-1), OwnRates)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class NeedsAttribute(torch.optim.Adam):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1, eps=1e-1)
        self.mine = 1.0

    def step(self, closure: Any = None) -> Any:
        assert self.mine
        return super().step(closure)


@pytest.mark.parametrize(
    ("module", "options", "message", "as_auto"),
    [
        pytest.param(lambda: Net(torch.optim.SGD), {}, "SGD is not known to have an epsilon", False, id="sgd"),
        pytest.param(
            lambda: Net(with_eps(0.1)), {"data": loader(8, samples=80)},
            "no search for epsilon: it needs 48 full batches, and the loader has 10", True, id="few batches",
        ),
        pytest.param(
            lambda: Net(with_eps(0.1, lr=0.0)), {}, "no search.*every learning rate of the optimizer is zero", True,
            id="rate of zero",
        ),
        pytest.param(
            lambda: Net(two_epsilons), {}, r"no search for epsilon: the groups have epsilons of their own \(0.1, 1e-20\)",
            True, id="epsilons",
        ),
        pytest.param(
            lambda: Net(lambda p: torch.optim.RAdam(p, eps=0.1)), {}, "no search.*RAdam's first steps are without epsilon",
            True, id="radam",
        ),
        pytest.param(OwnRatesNet, {}, "no search for epsilon: OwnRates keeps base rates", True, id="scheduler"),
        pytest.param(lambda: Fails(with_eps(0.1)), {}, "no search.*needs a graph", True, id="fails"),
        pytest.param(
            lambda: Explodes(with_eps(0.1)), {},
            f"no search.*only 0 of {TRAJECTORIES} short runs.*finite loss", True, id="not finite",
        ),
        pytest.param(lambda: Net(NeedsAttribute), {}, "no search.*the optimizer's step raised Attr", True, id="copy"),
    ],
)  # fmt: skip
def test_what_cannot_be_tried_is_said_and_epsilon_chosen_as_auto_does(
    tmp_path, module: Any, options: Any, message: str, as_auto: bool
) -> None:
    data = options.pop("data", loader(samples=FEW))
    calibration = search()
    with pytest.warns(UserWarning, match=message):
        made = fit(tmp_path, calibration, module=module, data=data, logger=False, max_steps=1)
    result = calibration.result
    assert result.epsilon_search is None and made.global_step == 1
    assert [change.name for change in result.changes] == (["eps"] if as_auto else [])
    assert as_auto is any("lowered to" in reason for reason in result.reasons)


def test_fewer_batches_make_shorter_runs_and_odd_ones_are_left_out(tmp_path) -> None:
    calibration = search(probe_batches=4)
    fit(tmp_path, calibration, data=loader(8, samples=8 * 9 * TRAJECTORIES), max_steps=1, logger=False)
    assert calibration.result.epsilon_search.steps == 5


class Noisy(L.LightningModule):
    """One weight with a steady gradient, and many with gradients of noise, which it costs to move."""

    def __init__(self, noise: float, bend: float) -> None:
        super().__init__()
        self.noise, self.bend = noise, bend
        self.one, self.many = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1000))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.noise * (batch[0] @ self.many).mean() + self.bend * self.many.square().sum() / 2 - self.one.sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=1e-3)
        return [optimizer], [LambdaLR(optimizer, lambda step: step / 10)]


def of_noise(tmp_path: Any, calibration: OptimizerCalibration, noise: float, bend: float) -> Any:
    signs = torch.randn(ENOUGH, 1000, generator=torch.Generator().manual_seed(0)).sign()
    return fit(tmp_path, calibration, module=Noisy(noise, bend), data=DataLoader(TensorDataset(signs), 8), max_steps=1,
               logger=False)  # fmt: skip


def test_an_epsilon_that_damps_noise_is_handed_off_with_its_factor(tmp_path) -> None:
    calibration = search(learning_rate="linear", reference_batch_size=4)
    made = of_noise(tmp_path, calibration, noise=0.03, bend=0.03)
    result, group = calibration.result, made.optimizers[0].param_groups[0]
    chosen = result.epsilon_search.chosen
    assert chosen.candidate.equal_rms and group["eps"] == result.epsilon == chosen.candidate.eps > 1e-4
    assert chosen.factor > 2 and result.ratio == 2
    assert group["initial_lr"] == pytest.approx(1e-2 * 2 * chosen.factor) == result.learning_rate
    assert group["weight_decay"] == pytest.approx(1e-3 / chosen.factor)  # so that weights shrink as before


def test_a_weight_decay_that_is_scaled_takes_the_factor_too(tmp_path) -> None:
    calibration = search(learning_rate="linear", reference_batch_size=4, scale_with_batch=["weight_decay"])
    made = of_noise(tmp_path, calibration, noise=0.03, bend=0.03)
    group, chosen = made.optimizers[0].param_groups[0], calibration.result.epsilon_search.chosen
    assert group["weight_decay"] == pytest.approx(1e-3 * 2 / (2 * chosen.factor))


def test_a_descent_that_a_higher_rate_has_too_is_not_epsilons_merit(tmp_path) -> None:
    calibration = search()
    of_noise(tmp_path, calibration, noise=1e-3, bend=0.0)
    found = calibration.result.epsilon_search
    assert found.chosen is None and found.trials[-1].to_present.upper < 0
    assert found.control > 4 and calibration.result.changes == ()


def test_float16_is_compared_from_its_floor_up(tmp_path) -> None:
    calibration = search()
    module = Scaled(1.0, with_eps(1e-8, lr=1e-3))
    data = loader(samples=FEW)
    made = fit(tmp_path, calibration, module=module, data=data, max_steps=1, logger=False, precision="16-true")
    found = calibration.result.epsilon_search
    assert found.present == 1e-7 and all(trial.candidate.eps >= 1e-7 for trial in found.trials)
    assert made.optimizers[0].param_groups[0]["eps"] >= 1e-7


def test_a_resumed_run_keeps_what_was_found(tmp_path) -> None:
    calibration = search()
    made = fit(tmp_path, calibration, module=Scaled(1e-8, with_eps(1e-8)), data=loader(samples=ENOUGH), max_steps=2,
               logger=False)  # fmt: skip
    eps = made.optimizers[0].param_groups[0]["eps"]
    made.save_checkpoint(tmp_path / "last.ckpt")
    again = search()
    resumed = trainer(tmp_path, again, logger=False, max_steps=4)
    resumed.fit(Scaled(1e-8, with_eps(1e-8)), loader(samples=ENOUGH), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.optimizers[0].param_groups[0]["eps"] == eps < 1e-10 and again.result is None
    assert again.state_dict() == calibration.state_dict()
    assert re.search("epsilon search +loss after 16 steps", again.state_dict()["report"])


def test_gradients_of_training_are_not_touched(tmp_path) -> None:
    """The probe between two accumulated batches: what is in .grad stays there."""

    class Late(Net):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                before = [(p, p.grad, p.grad.clone()) for p in self.parameters()]
                probe = EpsilonSearchProbe(self.trainer, self, ())
                probe.run(1e-8, (Candidate(1e-4),), 0.95)
                assert probe.why_none is None
                assert all(p.grad is grad and torch.equal(grad, copy) for p, grad, copy in before)
                self.looked = True

    module = Late()
    fit(tmp_path, module=module, data=loader(4, samples=len(dataset(1024))), accumulate_grad_batches=2, logger=False,
        max_steps=1)  # fmt: skip
    assert module.looked
