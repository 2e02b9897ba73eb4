"""The absolute rate: the loss along the optimizer's own steps, against closed forms."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support import Net, dataset, final_state, fit, loader
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import ConcatDataset, DataLoader

from lightning_gradhist import ALTO, EAdaptor, OptimizerCalibration


class Regression(L.LightningModule):
    """Least squares: the loss is a parabola along every step."""

    def __init__(self, optimizer: Any, scheduler: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.9, 8))
        self.make, self.make_scheduler = optimizer, scheduler

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (batch[0] @ self.weight - batch[1]).square().mean() / 2

    def configure_optimizers(self) -> Any:
        optimizer = self.make([self.weight])
        return ([optimizer], [self.make_scheduler(optimizer)]) if self.make_scheduler else optimizer


def greedy(**options: Any) -> OptimizerCalibration:
    return OptimizerCalibration(**{"learning_rate": "greedy", "epsilon": "keep", **options})


def same_batches(number: int = 32) -> DataLoader:
    return DataLoader(ConcatDataset([dataset(64)] * number), 64)


def moments(samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of the start, the gradient and the Hessian of least squares."""
    inputs, labels = (tensor.double() for tensor in dataset(samples).tensors)
    weight = torch.linspace(-0.5, 0.9, 8, dtype=torch.float64)
    return weight, inputs.T @ (inputs @ weight - labels) / samples, inputs.T @ inputs / samples


def best(step: Tensor, gradient: Tensor, hessian: Tensor) -> float:
    return float(gradient @ step / (step @ hessian @ step))


def alto_step(weight: Tensor, gradient: Tensor) -> Tensor:
    direction = gradient.sign() + 0.01 * weight
    return direction * weight.norm() / direction.norm()


@pytest.mark.parametrize(
    ("optimizer", "step"),
    [
        pytest.param(lambda p: torch.optim.SGD(p, 1e-9), lambda w, g: g, id="sgd, tiny rate"),
        pytest.param(lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.5), lambda w, g: g + 0.5 * w, id="coupled decay"),
        pytest.param(lambda p: torch.optim.Adam(p, 1e-3), lambda w, g: g.sign(), id="adam"),
        pytest.param(lambda p: torch.optim.Adam(p, 1e-3, fused=True), lambda w, g: g.sign(), id="adam, fused"),
        pytest.param(lambda p: torch.optim.AdamW(p, weight_decay=0.3), lambda w, g: g.sign() + 0.3 * w, id="adamw"),
        pytest.param(lambda p: torch.optim.Adagrad(p), lambda w, g: g.sign(), id="adagrad, state from the start"),
        pytest.param(lambda p: ALTO(p, weight_decay=0.01, alpha=0.0, explore_beta=0.5), alto_step, id="alto"),
        pytest.param(lambda p: EAdaptor(torch.optim.Adam(p), 0.0, 0.5), lambda w, g: g.sign(), id="adaptor"),
    ],
)
def test_the_rate_is_that_of_the_optimizers_own_step(tmp_path, optimizer: Any, step: Any) -> None:
    calibration, module = greedy(), Regression(optimizer)
    made = fit(tmp_path, calibration, module=module, data=same_batches(), logger=False, max_steps=1)
    weight, gradient, hessian = moments(64)
    expected = best(step(weight, gradient), gradient, hessian)
    result = calibration.result
    assert result.law == "greedy" and result.problems == ()
    assert result.greedy.value == pytest.approx(expected, rel=1e-3)
    assert made.optimizers[0].param_groups[0]["lr"] == pytest.approx(result.greedy.value) == result.learning_rate
    assert "best rate of a single step" in result.to_text() and "the best for one step" in result.to_text()


@pytest.mark.parametrize("accumulate", [1, 4])
def test_noise_of_the_batch_makes_the_step_shorter(tmp_path, accumulate: int) -> None:
    calibration = greedy(probe_batches=768)
    module = Regression(lambda p: torch.optim.SGD(p, 0.1))
    fit(
        tmp_path, calibration, module=module, data=loader(8, samples=8192), accumulate_grad_batches=accumulate,
        logger=False, max_steps=1,
    )  # fmt: skip
    _, gradient, hessian = moments(8192)
    inputs, labels = (tensor.double() for tensor in dataset(8192).tensors)
    per_sample = (inputs @ torch.linspace(-0.5, 0.9, 8, dtype=torch.float64) - labels)[:, None] * inputs
    noise = torch.trace(hessian @ per_sample.T.cov()) / (8 * accumulate)
    expected = float(gradient @ gradient / (gradient @ hessian @ gradient + noise))
    found = calibration.result.greedy
    assert expected == pytest.approx(found.value, rel=0.1) and found.upper < 1.6 * found.lower
    assert expected < 0.9 * best(gradient, gradient, hessian)


@pytest.mark.parametrize(("algorithm", "limit"), [("norm", 0.01), ("value", 0.01)])
def test_the_step_is_clipped_as_training_clips(tmp_path, algorithm: str, limit: float) -> None:
    calibration, module = greedy(), Regression(lambda p: torch.optim.SGD(p, 0.1))
    fit(
        tmp_path, calibration, module=module, data=same_batches(), logger=False, max_steps=1,
        gradient_clip_val=limit, gradient_clip_algorithm=algorithm,
    )  # fmt: skip
    _, gradient, hessian = moments(64)
    step = gradient * limit / gradient.norm() if algorithm == "norm" else gradient.clamp(-limit, limit)
    assert calibration.result.greedy.value == pytest.approx(best(step, gradient, hessian), rel=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        pytest.param(lambda o: LambdaLR(o, lambda step: step / 10), "initial_lr", id="a warm-up from zero"),
        pytest.param(lambda o: OneCycleLR(o, 0.02, total_steps=10), "max_lr", id="one cycle"),
    ],
)
def test_a_schedule_gets_its_highest_rate(tmp_path, scheduler: Any, key: str) -> None:
    calibration, module = greedy(), Regression(torch.optim.Adam, scheduler)
    made = fit(tmp_path, calibration, module=module, data=same_batches(), logger=False, max_steps=1)
    _, gradient, hessian = moments(64)
    expected = best(gradient.sign(), gradient, hessian)
    assert made.optimizers[0].param_groups[0][key] == pytest.approx(expected, rel=1e-3)


def test_groups_keep_their_ratio_and_epsilon_comes_first(tmp_path) -> None:
    class Groups(Regression):
        def __init__(self) -> None:
            super().__init__(None)
            self.weight = nn.Parameter(self.weight.detach()[:4])
            self.other = nn.Parameter(torch.linspace(0.1, 0.9, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return (batch[0] @ torch.cat([self.weight, self.other]) - batch[1]).square().mean() / 2

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([{"params": [self.weight]}, {"params": [self.other], "lr": 1e-4}], 1e-3, eps=10.0)

    calibration = greedy(epsilon=1e-30)
    made = fit(tmp_path, calibration, module=Groups(), data=same_batches(), logger=False, max_steps=1)
    weight = torch.cat([torch.linspace(-0.5, 0.9, 8)[:4], torch.linspace(0.1, 0.9, 4)]).double()
    inputs, labels = (tensor.double() for tensor in dataset(64).tensors)
    gradient, hessian = inputs.T @ (inputs @ weight - labels) / 64, inputs.T @ inputs / 64
    step = gradient.sign() * torch.tensor([1.0] * 4 + [0.1] * 4)
    first, second = made.optimizers[0].param_groups
    assert first["lr"] == pytest.approx(best(step, gradient, hessian), rel=1e-3)
    assert second["lr"] == pytest.approx(first["lr"] / 10)


def test_nothing_is_left_behind(tmp_path) -> None:
    states = []
    calibration = greedy(apply=False, epsilon="auto", probe_batches=60)
    for callbacks in ([calibration], []):
        made = fit(tmp_path, *callbacks, data=loader(32, samples=2048), logger=False)
        states.append(final_state(made))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert calibration.result.law == "greedy" and calibration.result.changes


def test_dropout_and_batch_norm_are_the_same_at_each_length(tmp_path) -> None:
    calibration = greedy(probe_batches=64)
    fit(tmp_path, calibration, data=loader(32, samples=32 * 64), logger=False, max_steps=1)
    found = calibration.result.greedy
    assert 1e-3 < found.lower < found.value < found.upper < 1


class Flat(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * 0


class Falls(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return sum(p.sum() for p in self.parameters())


class Fails(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not torch.is_grad_enabled():
            raise RuntimeError("needs a graph")
        return super().training_step(batch, batch_idx)


def no_rate(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.0)


class NeedsAttribute(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, 0.1)
        self.mine = 1.0

    def step(self, closure: Any = None) -> Any:
        assert self.mine
        return super().step(closure)


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        pytest.param(lambda: Flat(torch.optim.Adam), {}, "the optimizer's step has length 0", id="no step"),
        pytest.param(Flat, {}, "the loss falls at no length", id="nothing but decay"),
        pytest.param(Falls, {}, "falls along the whole range", id="falls for ever"),
        pytest.param(Fails, {}, "needs a graph", id="fails without a graph"),
        pytest.param(Net, {"probe_batches": 16}, "at least 17 batches; pass probe_batches=17", id="too few asked for"),
        pytest.param(
            Net, {"data": loader(8, samples=64)}, "needs 17 full batches, and the loader has 8", id="too short"
        ),
        pytest.param(lambda: Net(no_rate), {}, "every learning rate of the optimizer is zero", id="rate of zero"),
        pytest.param(lambda: Net(NeedsAttribute), {}, "the optimizer's step raised AttributeError", id="not copied"),
    ],
)
def test_what_cannot_be_found_is_said_and_the_rate_kept(tmp_path, module: Any, options: Any, message: str) -> None:
    data = options.pop("data", loader(4, samples=256))
    calibration = greedy(**options)
    with pytest.warns(UserWarning, match=message):
        made = fit(tmp_path, calibration, module=module, data=data, logger=False, max_steps=2)
    assert calibration.result.changes == () and calibration.result.law == "keep"
    assert calibration.result.greedy is None and made.global_step == 2


@pytest.mark.parametrize("options", [{"reference": "x"}, {"reference_batch_size": 8}, {"fallback": "sqrt"}])
def test_a_reference_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="learning_rate='greedy' is for those who have no reference"):
        greedy(**options)
