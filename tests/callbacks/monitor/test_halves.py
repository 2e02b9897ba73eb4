"""The two halves of a batch, from one backward pass."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import statistics
import warnings
import weakref
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo
from support import fit, loader
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from lightning_gradhist import GradientHistogramMonitor
from lightning_gradhist.callbacks.monitor import halves
from lightning_gradhist.callbacks.monitor.halves import HalfBatches

BATCH = 24


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


class AtTwoSizes(nn.Module):
    """A convolution that is called for two sizes of image."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs).tanh().mean((2, 3)) + self.layer(inputs[..., :4, :4]).mean((2, 3))


class _First(nn.Module):
    def forward(self, outputs: Any) -> Tensor:
        return outputs[0]


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
    pytest.param(AtTwoSizes, lambda: torch.randn(BATCH, 16, 20, 20), id="a convolution at two sizes"),
]


@pytest.mark.parametrize("most", [10**9, 20])
@pytest.mark.parametrize(("make", "draw"), MODELS)
def test_halves_are_those_of_two_backward_passes(
    make: Any, draw: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all values, and where few are looked at of these."""
    monkeypatch.setattr(halves, "_MOST", most)
    monkeypatch.setattr(halves, "_LEAST_SHARE", 0.0)  # embeddings alone would not do
    monkeypatch.setattr("lightning_gradhist.noise.sample._SMALL", 0 if most == 20 else 10**9)
    torch.manual_seed(0)
    model, inputs = make(), draw()
    parameters = dict(model.named_parameters())

    def loss(part: Any) -> Tensor:
        out = model(inputs[part])
        return out.square().flatten(1).sum(1).mean()

    looked = HalfBatches(model, parameters, step=7)
    model.zero_grad()
    (3 * loss(slice(None))).backward()  # a loss scale
    looked.close()
    gradients = {name: p.grad / 3 for name, p in parameters.items() if p.grad is not None}
    half, _ = looked._halves[BATCH]
    assert half.tolist() != sorted(half.tolist()) and len(half) == BATCH // 2
    first = dict(zip(parameters, torch.autograd.grad(loss(half), [*parameters.values()]), strict=True))
    picked: list[dict[str, Tensor]] = []

    def metric(pick: Any) -> dict[str, Tensor]:
        picked.extend([pick(first), pick(gradients)])
        return {name: torch.ones_like(values) for name, values in picked[0].items()}

    found = looked.measure(gradients, BATCH, 3.0, 1e-4, metric)
    assert found is not None and picked[0].keys() == parameters.keys()
    if most == 20:
        assert sum(values.numel() for values in picked[0].values()) < sum(p.numel() for p in parameters.values())
    distance = product = 0.0
    for name, part in picked[0].items():
        times = looked._pick(name, parameters[name])[1]
        distance += times * float((part - picked[1][name]).double().square().sum())
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
        pytest.param(
            nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)),
            torch.randn(BATCH, 8),
            BATCH,
            id="few samples and batch norm",
        ),
        pytest.param(
            nn.Sequential(nn.LSTM(8, 20), _First(), nn.Linear(20, 2)), torch.randn(BATCH, 8), BATCH, id="LSTM"
        ),
        pytest.param(spectral_norm(nn.Linear(8, 5)), torch.randn(BATCH, 8), BATCH, id="parametrized"),
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
        return [statistics.fmean(sample[f"{kind}_simple"] for sample in samples) for kind in ("noise", "signal")]

    (noise_in, signal_in), (noise_after, signal_after) = noise(16), noise(10**9)
    assert signal_in > 0 and noise_in > 0
    assert signal_after < 0.2 * signal_in  # the gradients of successive steps say that there is none
    assert noise_after > 1.2 * noise_in  # and that it was noise


def test_where_the_halves_tell_the_noise_no_pair_of_steps_is_measured(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise AssertionError("a pair was measured")

    monkeypatch.setattr("lightning_gradhist.callbacks.monitor.noise.measure_pair", fails)
    monitor = GradientHistogramMonitor(every_n_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(tmp_path, monitor, module=Steep, data=loader(64, samples=64 * 12), max_steps=12)
    samples = monitor.noise_records[0].samples  # the first step has no halves yet, and so a pair, which fails
    assert [sample["step"] for sample in samples] == [0, *range(2, 12)]
    assert [sample["noise_simple"] is not None for sample in samples] == [False] + [True] * 10


@pytest.mark.parametrize(("batches", "steps"), [(12, [0, 2, 4, 6, 8, 10]), (1, [2, 4, 6, 8, 10])])
def test_what_a_device_has_measured_is_recorded_where_no_second_step_follows(
    tmp_path, monkeypatch: pytest.MonkeyPatch, batches: int, steps: list[int]
) -> None:
    """At the end, and in epochs of one batch. A pair waits for what the halves tell, as nobody knows it at once."""
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda _: False))
    monitor = GradientHistogramMonitor(every_n_steps=1)
    data = loader(64, samples=64 * batches)
    fit(tmp_path, monitor, module=Steep, data=data, max_steps=11, max_epochs=11)
    samples = monitor.noise_records[0].samples
    assert [sample["step"] for sample in samples] == steps
    assert all(sample["noise_simple"] is not None for sample in samples)


def test_the_monitor_takes_its_hooks_off_and_changes_no_bit(tmp_path) -> None:
    class Model(Steep):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    ends = []
    for callbacks in ([], [GradientHistogramMonitor(every_n_steps=1)]):
        torch.manual_seed(1)
        made = fit(tmp_path / str(len(callbacks)), *callbacks, module=Model, data=loader(64, samples=640))
        ends.append(made.lightning_module.layer.weight.detach().clone())
        assert not made.lightning_module.layer._forward_hooks and not module._global_forward_hooks
    assert torch.equal(*ends)


class Copying(Steep):
    """Copies itself wherever it can, and has a layer that changes with each look at its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = spectral_norm(nn.Linear(20, 1))
        self.copies: list[Any] = []

    def copy(self) -> None:
        copies, self.copies = self.copies, []
        pickle.loads(pickle.dumps(self.layer))
        self.copies = [*copies[-1:], copy.deepcopy(self.layer)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.copy()
        inputs = torch.randn(64, 20)
        loss = (self.layer(inputs) + self.normed(inputs)).square().mean()
        self.copy()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.copy()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def test_a_module_can_be_copied_and_saved_at_any_time_and_nothing_in_it_changes(tmp_path) -> None:
    states = []
    for callbacks in ([], [GradientHistogramMonitor(every_n_steps=1)]):
        torch.manual_seed(1)
        made = fit(tmp_path / str(len(callbacks)), *callbacks, module=Copying, data=loader(64, samples=640))
        states.append(made.lightning_module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_batch_in_an_order_is_halved_by_chance() -> None:
    """Half of the samples have targets of 1, and the others of -1: sorted, the halves would be far apart."""
    model, inputs = nn.Linear(8, 1), torch.cat([torch.ones(128, 8), -torch.ones(128, 8)])
    inputs = inputs + torch.randn(256, 8)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    parameters = dict(model.named_parameters())
    looked = HalfBatches(model, parameters, step=3)
    (model(inputs) - torch.ones(256, 1)).square().mean().backward()
    looked.close()
    found = looked.measure({n: p.grad for n, p in parameters.items()}, 256, 1.0, 1e-3, lambda pick: None)  # type: ignore[misc]
    assert found is not None and float(found[0]) < 1  # sorted, 32


def test_what_a_layer_was_given_is_let_go_of_with_its_gradient() -> None:
    model, inputs = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(BATCH, 8)
    given: list[Any] = []
    model[2].register_forward_pre_hook(lambda _, args: given.append(weakref.ref(args[0])))
    looked = HalfBatches(model, dict(model.named_parameters()), step=3)
    loss = model(inputs).square().mean()
    loss.backward()
    gc.collect()
    assert given[0]() is None and loss is not None
    looked.close()


def test_a_compiled_model_gets_no_hooks() -> None:
    compiled = nn.Sequential(nn.Linear(8, 8))
    compiled[0].compile(backend="eager")
    for model in (compiled, torch.compile(nn.Linear(8, 8), backend="eager")):
        looked = HalfBatches(model, dict(model.named_parameters()), 1)  # type: ignore[arg-type]
        looked.close()
        assert looked._handle is None


def compiled_body(model: Any, inputs: Tensor) -> Tensor:
    return model[1](torch.compile(lambda x: model[0](x), backend="eager")(inputs))


def compiled_helper(model: nn.Module, inputs: Tensor) -> Tensor:
    return model(torch.compile(lambda x: 2 * x, backend="eager")(inputs))  # type: ignore[no-any-return]


def takes_the_weight(model: Any, inputs: Tensor) -> Tensor:
    return model[1](functional.linear(inputs, model[0].weight))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("run", "is_known"), [(compiled_body, False), (takes_the_weight, False), (compiled_helper, True)]
)
def test_halves_are_those_of_layers_that_are_called(run: Any, is_known: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 20), nn.Linear(20, 2))
    assert (measured(model, torch.randn(BATCH, 8), run) is not None) == is_known


def test_a_compiled_function_is_not_compiled_again_for_hooks() -> None:
    model, graphs = nn.Sequential(nn.Linear(8, 8)), []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    function = torch.compile(lambda x: model(x), backend=backend, fullgraph=True)
    for step in range(4):
        looked = HalfBatches(model, dict(model.named_parameters()), step) if step else None
        function(torch.zeros(BATCH, 8)).sum().backward()
        if looked is not None:
            looked.close()
            assert looked._handle is not None and not looked._found
    assert len(graphs) == 1


def test_an_error_within_a_hook_leaves_the_backward_pass_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        halves, "_rule_of", lambda layer: lambda *_: math.log(-1) if isinstance(layer, nn.Linear) else None
    )
    assert measured(nn.Linear(8, 5), torch.randn(BATCH, 8)) is None


def test_an_error_within_a_hook_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for fails in (False, True):
        if fails:
            monkeypatch.setattr(halves, "_rule_of", lambda layer: lambda *_: math.log(-1))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            made = fit(tmp_path / str(fails), GradientHistogramMonitor(every_n_steps=1), data=loader(64, samples=640))
        ends.append([parameter.detach().clone() for parameter in made.lightning_module.parameters()])
        said = [str(one.message) for one in told]
        assert sum("could not look at the two halves of a batch, training goes on: Val" in one for one in said) == fails
    assert all(map(torch.equal, *ends))


def test_nothing_is_looked_at_while_a_cuda_graph_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measured(nn.Linear(8, 5), torch.randn(BATCH, 8)) is not None
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert measured(nn.Linear(8, 5), torch.randn(BATCH, 8)) is None
