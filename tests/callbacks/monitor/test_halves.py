"""The two halves of a batch, from one backward pass."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from support import fit, loader
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_gradhist import GradientHistogramMonitor
from lightning_gradhist.callbacks.monitor import halves
from lightning_gradhist.callbacks.monitor.halves import HalfBatches

BATCH = 24


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.utils.counters.clear()  # by other tests


class Tied(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.words(words).tanh())


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(self.layer(inputs).tanh())


def words(*shape: int) -> Tensor:
    return torch.randint(30, shape)


MODELS = [
    pytest.param(lambda: nn.Linear(8, 5), lambda: torch.randn(BATCH, 8), id="linear"),
    pytest.param(lambda: nn.Linear(8, 5), lambda: torch.randn(BATCH, 7, 3, 8), id="linear of four dimensions"),
    pytest.param(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(BATCH, 4, 9), id="conv1d"),
    pytest.param(lambda: nn.Conv2d(4, 6, 3, dilation=2), lambda: torch.randn(BATCH, 4, 9, 8), id="conv2d"),
    pytest.param(lambda: nn.Conv3d(2, 3, 2), lambda: torch.randn(BATCH, 2, 4, 4, 4), id="conv3d"),
    pytest.param(lambda: nn.Embedding(30, 8, padding_idx=3), lambda: words(BATCH, 7), id="embedding"),
    pytest.param(lambda: nn.LayerNorm((5, 6)), lambda: torch.randn(BATCH, 3, 5, 6), id="layer norm"),
    pytest.param(Tied, lambda: words(BATCH, 7), id="tied"),
    pytest.param(Twice, lambda: torch.randn(BATCH, 8), id="called twice"),
]


@pytest.mark.parametrize("most", [10**9, 20])
@pytest.mark.parametrize(("make", "draw"), MODELS)
def test_halves_are_those_of_two_backward_passes(
    make: Any, draw: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all values, and where few are looked at of these."""
    monkeypatch.setattr(halves, "_MOST", most)
    monkeypatch.setattr("lightning_gradhist.noise.sample._SMALL", 0 if most == 20 else 10**9)
    torch.manual_seed(0)
    model, inputs = make(), draw()
    parameters = dict(model.named_parameters())

    def loss(part: slice) -> Tensor:
        out = model(inputs[part])
        return out.square().flatten(1).sum(1).mean()

    first = dict(zip(parameters, torch.autograd.grad(loss(slice(BATCH // 2)), [*parameters.values()]), strict=True))
    looked = HalfBatches(model, parameters, step=7)
    model.zero_grad()
    (3 * loss(slice(None))).backward()  # a loss scale
    looked.close()
    gradients = {name: p.grad / 3 for name, p in parameters.items() if p.grad is not None}
    picked: list[dict[str, Tensor]] = []

    def metric(pick: Any) -> dict[str, Tensor]:
        picked.extend([pick(first), pick(gradients)])
        return {name: torch.ones_like(values) for name, values in picked[0].items()}

    found = looked.measure(gradients, BATCH, 3.0, 1e-4, metric)
    assert found is not None and picked[0].keys() == parameters.keys()
    if most == 20:
        assert sum(values.numel() for values in picked[0].values()) < sum(p.numel() for p in parameters.values())
    distance = product = 0.0
    for name, half in picked[0].items():
        times = parameters[name].numel() / half.numel()
        distance += times * float((half - picked[1][name]).double().square().sum())
        product += times * float(picked[1][name].double().square().sum())
    assert found.tolist() == pytest.approx([distance, product] * 2, rel=1e-4)


def measured(model: nn.Module, inputs: Tensor, run: Any = None, size: int = BATCH) -> Tensor | None:
    parameters = dict(model.named_parameters())
    looked = HalfBatches(model, parameters, step=3)
    (model(inputs) if run is None else run(model, inputs)).square().mean().backward()
    looked.close()
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    return looked.measure(gradients, size, 1.0, 1e-3, lambda pick: None)


def functional_use(model: nn.Module, inputs: Tensor) -> Tensor:
    return functional.linear(model(inputs), model.weight.T)  # type: ignore[operator,arg-type]


def test_what_the_halves_do_not_add_up_to_is_left_out() -> None:
    inputs = torch.randn(BATCH, 8)
    assert measured(nn.Linear(8, 5), inputs).isfinite().any()  # type: ignore[union-attr]
    alone = measured(nn.Linear(8, 5, bias=False), inputs, functional_use)
    assert alone is not None and alone.isnan().all()


@pytest.mark.parametrize(
    ("model", "inputs", "size"),
    [
        pytest.param(nn.Linear(8, 5), torch.randn(BATCH, BATCH, 8), BATCH, id="another dimension as long"),
        pytest.param(nn.Linear(8, 5), torch.randn(2 * BATCH, 8), BATCH, id="not the samples"),
        pytest.param(nn.Linear(8, 5), torch.randn(8, 8), 8, id="few samples"),
        pytest.param(nn.Conv2d(4, 4, 3, groups=2), torch.randn(BATCH, 4, 5, 5), BATCH, id="groups"),
        pytest.param(nn.Embedding(30, 8, max_norm=1.0), words(BATCH, 5), BATCH, id="renormed"),
    ],
)
def test_what_is_not_known_is_not_measured(model: nn.Module, inputs: Tensor, size: int) -> None:
    assert measured(model, inputs, size=size) is None


def test_a_checkpointed_layer_is_left_alone() -> None:
    run = partial(checkpoint, use_reentrant=False)
    assert measured(nn.Linear(8, 5), torch.randn(BATCH, 8), run) is None


def test_of_many_layers_some_are_looked_at_and_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_MOST_LAYERS", 2)
    torch.manual_seed(0)
    model, inputs = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))), torch.randn(BATCH, 8)
    some = measured(model, inputs)
    gradients = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    assert some is not None
    assert 0.2 < float(some[1]) / float(sum(gradients)) < 5


class Steep(L.LightningModule):
    """A regression at a rate at which steps overshoot, so that two gradients in a row point apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs = torch.randn(64, 20)
        targets = inputs.sum(1, keepdim=True) + torch.randn(64, 1)
        return (self.layer(inputs) - targets).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.42)


def test_the_noise_scale_is_right_where_steps_overshoot(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(least: int) -> list[float]:
        monkeypatch.setattr(halves, "_LEAST_SAMPLES", least)
        torch.manual_seed(0)
        monitor = GradientHistogramMonitor(every_n_steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tmp_path / str(least), monitor, module=Steep, data=loader(64, samples=64 * 300), max_steps=300)
        samples = monitor.noise_records[0].samples[20:]  # where the weights wander about the optimum
        return [sum(sample[f"{kind}_simple"] for sample in samples) for kind in ("noise", "signal")]

    (noise_in, signal_in), (noise_after, signal_after) = noise(16), noise(10**9)
    assert signal_in > 0 and noise_in > 0
    assert signal_after < 0.2 * signal_in  # the gradients of successive steps say that there is none
    assert noise_after > 1.2 * noise_in  # and that it was noise


def test_the_monitor_takes_its_hooks_off_and_changes_no_bit(tmp_path) -> None:
    class Model(Steep):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    ends = []
    for callbacks in ([], [GradientHistogramMonitor(every_n_steps=1)]):
        torch.manual_seed(1)
        made = fit(tmp_path / str(len(callbacks)), *callbacks, module=Model, data=loader(64, samples=640))
        ends.append(made.lightning_module.layer.weight.detach().clone())
        assert not made.lightning_module.layer._forward_hooks
    assert torch.equal(*ends)


def test_a_compiled_model_gets_no_hooks() -> None:
    """Nor one of which a function of the user's is compiled."""
    model = nn.Sequential(nn.Linear(8, 8))
    HalfBatches(model, dict(model.named_parameters()), 1)
    assert model[0]._forward_hooks
    compiled = nn.Sequential(nn.Linear(8, 8))
    compiled[0].compile(backend="eager")
    HalfBatches(compiled, dict(compiled.named_parameters()), 1)
    assert not compiled[0]._forward_hooks
    torch.compile(lambda x: model(x), backend="eager")(torch.zeros(1, 8))
    other = nn.Sequential(nn.Linear(8, 8))
    HalfBatches(other, dict(other.named_parameters()), 1)
    assert not other[0]._forward_hooks


def test_an_error_within_a_hook_leaves_the_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        halves, "_rule_of", lambda layer: lambda *_: math.log(-1) if isinstance(layer, nn.Linear) else None
    )
    assert measured(nn.Linear(8, 5), torch.randn(BATCH, 8)) is None
