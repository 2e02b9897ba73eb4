"""What is known of optimizers, against what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradhist import ALTO, AdamE, EAdaptor
from lightning_gradhist.callbacks.known_optimizers import (
    UNKNOWN,
    centered,
    class_name,
    coupled_decay,
    innermost,
    own_clip_norm,
    rule_of,
)
from lightning_gradhist.callbacks.optimizer_state import metric_weights, second_moment

SMALL, LARGE = 1e-3, 3e-2


def from_package(name: str, optimizer: str, **options: Any) -> Any:
    def make(parameters: Any, eps: float) -> Any:
        return getattr(pytest.importorskip(name), optimizer)(parameters, lr=1e-3, eps=eps, **options)

    return pytest.param(make, id=f"{name}.{optimizer}")


def stepped(make: Any, eps: float, steps: int = 12) -> tuple[Tensor, Any, nn.Parameter]:
    """The last update after gradients that do not depend on the weights."""
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.zeros(64, dtype=torch.float64))
    optimizer = make([parameter], eps)
    scale = torch.logspace(-3, -1, 64, dtype=torch.float64)
    for _ in range(steps):
        parameter.grad = scale * (1 + 0.5 * torch.randn(64, generator=generator, dtype=torch.float64))
        before = parameter.detach().clone()
        optimizer.step()
    return parameter.detach() - before, optimizer, parameter


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p, eps: torch.optim.Adam(p, eps=eps), id="Adam"),
        pytest.param(lambda p, eps: torch.optim.Adam(p, eps=eps, amsgrad=True, betas=(0.9, 0.5)), id="AMSGrad"),
        pytest.param(lambda p, eps: torch.optim.NAdam(p, eps=eps), id="NAdam"),
        pytest.param(lambda p, eps: torch.optim.RAdam(p, eps=eps), id="RAdam"),
        pytest.param(lambda p, eps: torch.optim.RMSprop(p, eps=eps), id="RMSprop"),
        pytest.param(lambda p, eps: torch.optim.RMSprop(p, eps=eps, centered=True), id="RMSprop, centered"),
        pytest.param(lambda p, eps: AdamE(p, eps=eps), id="AdamE"),
        pytest.param(lambda p, eps: ALTO(p, eps=eps, layerwise=False, weight_decay=0.0), id="ALTO"),
        pytest.param(
            lambda p, eps: ALTO(p, eps=eps, layerwise=False, weight_decay=0.0, bias_correction=False), id="ALTO Vanilla"
        ),
        pytest.param(lambda p, eps: EAdaptor(torch.optim.RMSprop(p, eps=eps)), id="EAdaptor"),
        from_package("pytorch_optimizer", "Lamb", adam=True),
        from_package("pytorch_optimizer", "AdamP", delta=0.0),
        from_package("pytorch_optimizer", "RAdam"),
        from_package("torch_optimizer", "Lamb", adam=True),
    ],
)
def test_epsilon_is_added_to_what_is_said_to_be_under_the_root(make: Any) -> None:
    """At two epsilons the updates are as ``1 / (r + eps)``, which tells ``r``."""
    (small, optimizer, parameter), (large, _, _) = stepped(make, SMALL), stepped(make, LARGE)
    moment = second_moment(optimizer, {"weight": parameter})["weight"]
    root = moment.sqrt()
    torch.testing.assert_close(small / large, (root + LARGE) / (root + SMALL), rtol=1e-6, atol=0)
    weights = metric_weights(optimizer, {"weight": parameter})
    assert weights is not None
    # the metric is 1 / (r + eps), up to one factor, with one more gradient of the mean square in r
    group, state = innermost(optimizer).param_groups[0], innermost(optimizer).state[parameter]
    decay = group["betas"][1] if "betas" in group else group["alpha"]
    number = min(float(state.get("step", group.get("step"))), 1 / (1 - decay))
    ratio = weights["weight"].double() * ((moment + moment.mean() / number).sqrt() + SMALL)
    torch.testing.assert_close(ratio, ratio.mean().expand(64), rtol=1e-5, atol=0)


class Adam(torch.optim.SGD):
    """Of the name of another."""


class OwnStep(torch.optim.Adam):
    """Of another's base, and with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Named(torch.optim.Adam):
    """With the step of its base."""


@pytest.mark.parametrize(
    ("kind", "adaptive"), [(torch.optim.Adam, True), (Named, True), (Adam, False), (OwnStep, False)]
)
def test_a_class_is_known_by_its_package_and_its_step(kind: Any, adaptive: bool) -> None:
    optimizer = kind([nn.Parameter(torch.zeros(2))], lr=1e-2)
    assert rule_of(optimizer).adaptive is adaptive
    assert (rule_of(optimizer) is UNKNOWN) is (kind is OwnStep)


def test_a_second_moment_that_is_packed_is_not_read() -> None:
    made = type("AdamW8bit", (torch.optim.Optimizer,), {"__module__": "bitsandbytes.optim", "step": lambda self: None})
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = made([parameter], {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8})
    for dtype in (torch.uint8, torch.float32):
        optimizer.state[parameter] = {"step": 1, "state2": torch.ones(8, dtype=dtype)}
        assert bool(second_moment(optimizer, {"weight": parameter})) is (dtype == torch.float32)


def test_where_the_whole_optimizer_couples_its_decay_or_clips() -> None:
    members = {"__module__": "apex.optimizers", "step": lambda self: None, "adam_w_mode": 0}
    made = type("FusedLAMB", (torch.optim.Optimizer,), members)
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = made([parameter], {"lr": 1e-3, "weight_decay": 0.1, "max_grad_norm": 0.5})
    assert coupled_decay(optimizer) == {id(parameter): 0.1} and own_clip_norm(optimizer) == 0.5
    assert own_clip_norm(torch.optim.Adam([parameter])) is None


def test_centered_are_those_of_a_centered_group() -> None:
    named = {name: nn.Parameter(torch.zeros(2)) for name in "ab"}
    groups = [{"params": [named["a"]], "centered": True}, {"params": [named["b"]]}]
    assert centered(torch.optim.RMSprop(groups), named) == {"a"}


def test_an_optimizer_is_called_by_what_it_wraps() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    assert class_name(torch.optim.SGD(parameters, lr=0.1)) == "SGD"
    assert class_name(EAdaptor(torch.optim.SGD(parameters, lr=0.1))) == "EAdaptor(SGD)"
