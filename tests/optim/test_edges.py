"""Gradients of another dtype, norms at the ends of float32, version counters, hyper-parameters that are no numbers."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import Lookahead
from torch import Tensor

from lightning_gradhist import ALTO, AdamE, EAdaptor
from lightning_gradhist.optim.adam_e import adam_e_reference
from lightning_gradhist.optim.alto import alto_reference

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's compiler, about itself
STEPS = [
    pytest.param({}, id="eager"),
    pytest.param({"foreach": True}, id="foreach"),
    pytest.param({"fused": True}, id="fused"),
]
DTYPES = [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def stepped(cls: Any, param: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    parameter = torch.nn.Parameter(param.clone())
    parameter.grad_dtype = None
    optimizer = cls([parameter], lr=0.01, alpha=0.5, explore_beta=0.01, **options)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach().double()


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch ties a gradient to its parameter's dtype")
@pytest.mark.parametrize("options", STEPS)
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize(("cls", "reference"), [(ALTO, alto_reference), (AdamE, adam_e_reference)])
def test_gradients_of_another_dtype(cls: Any, reference: Any, dtype: Any, grad_dtype: Any, options: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(30, 7, generator=generator).to(dtype)
    grads = [torch.randn(30, 7, generator=generator).to(grad_dtype) for _ in range(4)]
    group = cls([torch.nn.Parameter(param)], lr=0.01, alpha=0.5, explore_beta=0.01).param_groups[0]
    state = param.double(), *(torch.zeros(30, 7, dtype=torch.float64) for _ in range(3))
    for k, grad in enumerate(grads, 1):
        state = reference(state[0], grad.double(), *state[1:], k, group)
    found = stepped(cls, param, grads, **options)
    torch.testing.assert_close(found, state[0], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("options", [*STEPS, pytest.param({"foreach": False}, id="one by one")])
@pytest.mark.parametrize("number", [5, 100_000])
@pytest.mark.parametrize("scale", [1e-30, 1e-23, 1e-12, 1e12, 1e19, 1e35])
def test_norms_at_the_ends_of_float32(scale: float, number: int, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(number, generator=generator) * scale
    grad = torch.randn(number, generator=generator)
    group = {"betas": (0.9, 0.99), "explore_beta": 0.01, "alpha": 0.5, "bias_correction": True, "maximize": False}
    group |= {"eps": 1e-6, "weight_decay": 0.0, "lr": 0.01, "layerwise": True}
    zero = torch.zeros(number, dtype=torch.float64)
    expected = alto_reference(param.double(), grad.double(), zero, zero, zero, 1, group)[0]
    found = stepped(ALTO, param, [grad], weight_decay=0.0, **options)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.slow
def test_a_step_by_kernels_tells_autograd_that_the_weights_have_changed() -> None:
    code = """if True:
        import torch
        from lightning_gradhist import ALTO, AdamE
        for cls in (AdamE, ALTO):
            weight = torch.nn.Parameter(torch.ones(64))
            optimizer = cls([weight], lr=0.1, fused=True)
            weight.grad = torch.ones(64)
            loss = (weight * weight).sum()
            optimizer.step()
            try:
                loss.backward()
            except RuntimeError as error:
                print("modified by an inplace operation" in str(error))
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr


@pytest.mark.parametrize("options", STEPS)
@pytest.mark.parametrize("cls", [ALTO, AdamE])
def test_a_step_tells_autograd_that_the_weights_have_changed(cls: Any, options: dict[str, Any]) -> None:
    weight = torch.nn.Parameter(torch.ones(64))
    optimizer = cls([weight], lr=0.1, **options)
    weight.grad = torch.ones(64)
    loss = (weight * weight).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        pytest.param({"lr": "1e-3"}, "lr='1e-3'", id="lr"),
        pytest.param({"eps": "1e-8"}, "eps='1e-8'", id="eps"),
        pytest.param({"weight_decay": None}, "weight_decay=None", id="weight_decay"),
        pytest.param({"betas": (0.9, "0.99")}, "betas=", id="betas"),
        pytest.param({"lr": True}, "lr=True", id="lr-bool"),
        pytest.param({"eps": False}, "eps=False", id="eps-bool"),
        pytest.param({"weight_decay": True}, "weight_decay=True", id="weight_decay-bool"),
        pytest.param({"betas": (True, 0.99)}, "betas=", id="betas-bool"),
    ],
)
@pytest.mark.parametrize("cls", [ALTO, AdamE])
def test_hyper_parameters_that_are_no_numbers_are_refused(cls: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=f"{named}.*must be a number"):
        cls([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"eps": torch.tensor([1e-8, 1e-8])}, "eps=.* has 2 elements: it must be a number", id="eps"),
        pytest.param({"betas": (torch.ones(2), 0.9)}, "betas=.* has 2 elements: it must be a number", id="one-beta"),
        pytest.param({"betas": torch.tensor(0.9)}, "betas=.* has 1 elements: it must have two", id="betas-tensor"),
        pytest.param({"betas": 0.9}, "betas=.*0.9.* has 1 elements: it must have two", id="betas-number"),
        pytest.param({"alpha": True, "explore_beta": 0.5}, "alpha=True and explore_beta=0.5 do not", id="alpha"),
        pytest.param({"alpha": 0.5, "explore_beta": False}, "alpha=0.5 and explore_beta=False do not", id="beta"),
    ],
)
@pytest.mark.parametrize("cls", [ALTO, AdamE])
def test_hyper_parameters_of_another_kind_are_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        cls([weight], **options)
    with pytest.raises(ValueError, match=message):
        cls([{"params": [weight], **options}])
    if "alpha" in options:
        with pytest.raises(ValueError, match=message):
            EAdaptor(torch.optim.SGD([weight], lr=0.1), **options)


def test_tensors_of_one_element_are_numbers() -> None:
    found = []
    for number in (float, torch.tensor):
        weight = torch.nn.Parameter(torch.ones(2))
        betas = torch.tensor([0.9, 0.99]) if number is torch.tensor else (float(torch.tensor(0.9)), 0.99)
        optimizer = AdamE([weight], lr=number(0.1), betas=betas, eps=number(1e-6), weight_decay=number(0.1))
        weight.grad = torch.ones(2)
        optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)


class Slow(torch.optim.SGD):
    """As Lookahead does, keeps what it steps with in an attribute of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"slow": [], "fast": super().state_dict(), "param_groups": self.param_groups}


@pytest.mark.parametrize("wrapped", [lambda p: Slow(p, lr=0.1), lambda p: Lookahead(torch.optim.SGD(p, lr=0.1))])
def test_an_optimizer_that_saves_another_state_is_refused(wrapped: Any) -> None:
    inner = wrapped([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match=r"optimizer=(Slow|Lookahead) does not save torch's own 'state'.*EAdaptor"):
        EAdaptor(inner)
    assert not inner.state


def test_around_the_adaptor_it_goes_on_after_a_reload() -> None:
    def steps(optimizer: Any, weight: Any, numbers: Any) -> None:
        for number in numbers:
            weight.grad = torch.sin(number + weight.detach())
            optimizer.step()

    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    one, other = (Lookahead(EAdaptor(torch.optim.Adam([weight], lr=0.1), -5.0, 0.9), k=2) for weight in (first, second))
    steps(one, first, range(5))
    second.data.copy_(first.data)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, weight in ((one, first), (other, second)):
        steps(optimizer, weight, range(5, 10))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
