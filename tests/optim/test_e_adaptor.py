"""EAdaptor: the equations of E around any inner optimizer, and what users take for granted."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

from lightning_gradhist.optim import AdamE
from lightning_gradhist.optim.e_adaptor import EAdaptor

STEPS = 20
SHAPES = [(3, 4), (5,), ()]
EXPLORE = [
    pytest.param(-5.0, 0.99, id="large-batch"),
    pytest.param(0.5, 0.01, id="small-batch"),
    pytest.param(-2.0, 0.9, id="medium"),
    pytest.param(0.9, 0.0, id="no-memory"),
    pytest.param(0.0, 0.5, id="idle"),
]
INNER = [
    pytest.param(lambda p: torch.optim.SGD(p, lr=0.05), id="SGD"),
    pytest.param(
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1), id="SGD-nesterov"
    ),
    pytest.param(lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True), id="SGD-fused"),
    pytest.param(lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=0.1, amsgrad=True), id="Adam"),
    pytest.param(lambda p: torch.optim.AdamW(p, lr=0.02, maximize=True), id="AdamW-maximize"),
    pytest.param(lambda p: torch.optim.AdamW(p, lr=0.02, foreach=True), id="AdamW-foreach"),
    pytest.param(lambda p: torch.optim.AdamW(p, lr=0.02, fused=True), id="AdamW-fused"),
    pytest.param(lambda p: torch.optim.RMSprop(p, lr=0.02, momentum=0.5, centered=True), id="RMSprop"),
    pytest.param(lambda p: torch.optim.ASGD(p, lr=0.02), id="ASGD"),
    pytest.param(lambda p: torch.optim.Adagrad(p, lr=0.02), id="Adagrad"),
    pytest.param(lambda p: torch.optim.Adadelta(p, lr=0.5), id="Adadelta"),
    pytest.param(lambda p: torch.optim.Adamax(p, lr=0.02), id="Adamax"),
    pytest.param(lambda p: torch.optim.NAdam(p, lr=0.02), id="NAdam"),
    pytest.param(lambda p: torch.optim.RAdam(p, lr=0.02), id="RAdam"),
    pytest.param(lambda p: torch.optim.Rprop(p, lr=0.02), id="Rprop"),
    pytest.param(lambda p: torch.optim.Adafactor(p, lr=0.02), id="Adafactor"),
]
if hasattr(torch.optim, "Muon"):  # from torch 2.9 on
    INNER.append(pytest.param(lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.02), id="Muon"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def parameters(dtype: torch.dtype = torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def gradients(k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(k + 1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def set_gradients(params: list[Parameter], k: int) -> None:
    for param, noise in zip(params, gradients(k), strict=True):
        param.grad = (param.detach().double() + 0.3 * noise).to(param.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> list[Tensor]:
    for k in steps:
        set_gradients(params, k)
        optimizer.step()
    return [param.detach().clone() for param in params]


def by_hand(
    inner: torch.optim.Optimizer, params: list[Parameter], steps: range, alpha: float, b1: float
) -> list[Tensor]:
    """The paper's two buffers, in float64, and the inner optimizer given ``g + alpha * a``."""
    a = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    previous = [torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]
    for k in steps:
        set_gradients(params, k)
        for i, param in enumerate(params):
            assert param.grad is not None
            g = param.grad.double()
            a[i] = b1 * a[i] + (1 - b1) * (g - previous[i])
            previous[i] = g
            param.grad = (g + alpha * a[i]).to(param.dtype)
        inner.step()
    return [param.detach().clone() for param in params]


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def with_grad(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    param = Parameter(torch.randn(shape, dtype=dtype))
    param.grad = torch.randn_like(param)
    return param


# the equations


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE[:2])
@pytest.mark.parametrize("make", INNER)
def test_the_inner_optimizer_sees_the_papers_gradient(make: Any, alpha: float, explore_beta: float) -> None:
    params = parameters()
    got = run(EAdaptor(make(params), alpha, explore_beta), params, range(STEPS))
    params = parameters()
    want = by_hand(make(params), params, range(STEPS), alpha, explore_beta)
    # a Newton-Schulz iteration in bf16 (Muon) and signs (Rprop) blow rounding up
    assert_close(got, want, 1e-2 if type(make(params)).__name__ in ("Muon", "Rprop") else 1e-10)


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
def test_over_sgd_it_is_the_closed_form_of_esgd(alpha: float, explore_beta: float) -> None:
    """For a constant gradient ``a_k = (1 - b) * b^(k-1) * g``, hence a closed form of ``theta``."""
    param = Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    g = torch.tensor([0.5, 0.25], dtype=torch.float64)
    optimizer = EAdaptor(torch.optim.SGD([param], lr=0.1), alpha, explore_beta)
    for _ in range(STEPS):
        param.grad = g.clone()
        optimizer.step()
    total = STEPS + alpha * (1 - explore_beta**STEPS)
    assert_close([param.detach()], [torch.tensor([1.0, -2.0], dtype=torch.float64) - 0.1 * total * g])


def test_over_sgd_on_a_quadratic_it_is_a_linear_recurrence() -> None:
    """``(theta, e) -> A (theta, e)`` with the curvature h: eigenvalues of a 2x2 matrix, from numpy."""
    lr, h, alpha, b = 0.1, 2.0, -3.0, 0.8
    c = alpha * (1 - b)
    matrix = np.array([[1 - lr * h * (1 + c), lr * c], [h * (1 - b), b]])
    want = np.linalg.matrix_power(matrix, STEPS) @ np.array([1.5, 0.0])
    param = Parameter(torch.tensor(1.5, dtype=torch.float64))
    optimizer = EAdaptor(torch.optim.SGD([param], lr=lr), alpha, b)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (0.5 * h * param.square()).backward()
        optimizer.step()
    assert param.item() == pytest.approx(want[0], rel=1e-10)
    assert optimizer.state[param]["exp_avg_grad"].item() == pytest.approx(want[1], rel=1e-10)


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
@pytest.mark.parametrize(
    ("base", "decoupled"),
    [pytest.param(torch.optim.AdamW, True, id="AdamW"), pytest.param(torch.optim.Adam, False, id="Adam-coupled")],
)
def test_over_adam_it_is_adam_e(base: Any, decoupled: bool, alpha: float, explore_beta: float) -> None:
    common: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    params = parameters()
    got = run(EAdaptor(base(params, **common), alpha, explore_beta), params, range(200))
    params = parameters()
    adam_e = AdamE(params, **common, alpha=alpha, explore_beta=explore_beta, decoupled_weight_decay=decoupled)
    assert_close(got, run(adam_e, params, range(200)))


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
@pytest.mark.parametrize("make", [INNER[1], INNER[3]])
def test_against_the_authors_adaptor(make: Any, alpha: float, explore_beta: float) -> None:
    authors = pytest.importorskip("E")
    params = parameters()
    got = run(EAdaptor(make(params), alpha, explore_beta), params, range(STEPS))
    params = parameters()
    theirs = authors.E(make(params), alpha=alpha, beta=explore_beta)
    assert_close(got, run(theirs, params, range(STEPS)), 1e-10)


# step


def test_closure_runs_first_with_gradients_enabled() -> None:
    param = Parameter(torch.tensor([1.0, -2.0]))
    optimizer = EAdaptor(torch.optim.SGD([param], lr=0.1), -2.0, 0.9)
    seen = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append((torch.is_grad_enabled(), param.detach().clone()))
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 5.0
    ((enabled, at_closure),) = seen
    assert enabled
    assert_same([at_closure], [torch.tensor([1.0, -2.0])])
    other = Parameter(at_closure.clone())
    other.grad = 2 * at_closure
    assert EAdaptor(torch.optim.SGD([other], lr=0.1), -2.0, 0.9).step() is None
    assert_same([param.detach()], [other.detach()])
    torch.testing.assert_close(param.detach(), at_closure * (1 - 0.2 * 0.8))  # 1 + c = 0.8: not plain SGD


@pytest.mark.parametrize("make", INNER)
def test_the_gradient_is_the_same_tensor_with_the_same_values(make: Any) -> None:
    params = parameters(torch.float32)
    optimizer = EAdaptor(make(params), -5.0, 0.9)
    for k in range(3):
        set_gradients(params, k)
        before = [(param.grad, param.grad.clone()) for param in params if param.grad is not None]
        optimizer.step()
        for param, (grad, values) in zip(params, before, strict=True):
            assert param.grad is grad
            assert_same([grad], [values])


def test_an_error_of_the_inner_optimizer_leaves_gradient_and_average_alone() -> None:
    param = with_grad(3)
    inner = torch.optim.SGD([param], lr=0.1)
    optimizer = EAdaptor(inner, -5.0, 0.9)
    optimizer.step()
    grad, e = param.grad, optimizer.state[param]["exp_avg_grad"].clone()

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = inner.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        optimizer.step()
    handle.remove()
    assert param.grad is grad
    assert_same([optimizer.state[param]["exp_avg_grad"]], [e])
    optimizer.step()


def test_parameters_without_gradient_are_skipped() -> None:
    params = [with_grad(2), with_grad(2)]
    optimizer = EAdaptor(torch.optim.AdamW(params, lr=0.1), -5.0, 0.9)
    params[0].grad = None
    before = params[0].detach().clone()
    optimizer.step()
    optimizer.step()
    assert_same([params[0].detach()], [before])
    assert params[0] not in optimizer.state
    params[0].grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [1.0, 3.0]
    params[0].grad = None
    kept = optimizer.state[params[0]]["exp_avg_grad"].clone()
    optimizer.step()
    assert_same([optimizer.state[params[0]]["exp_avg_grad"]], [kept])


class Strict(torch.optim.Optimizer):
    """Starts at its second step, initialises where there is no state, and knows every key it has put there."""

    def __init__(self, params: Any, by_length: bool) -> None:
        self.by_length = by_length
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.state["calls"] = self.state.get("calls", 0) + 1  # not every key of the state is a parameter
        if self.state["calls"] == 1:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if len(self.state[param]) == 0 if self.by_length else param not in self.state:
                    self.state[param] = {"total": torch.zeros_like(param)}
                assert set(self.state[param]) == {"total"}
                self.state[param]["total"].add_(param.grad)
                param.data.sub_(self.state[param]["total"], alpha=group["lr"])


@pytest.mark.parametrize("by_length", [True, False])
def test_the_inner_optimizer_finds_its_own_state_only(by_length: bool) -> None:
    param = with_grad(3)
    optimizer = EAdaptor(Strict([param], by_length), -5.0, 0.9)
    for _ in range(3):
        optimizer.step()
    assert set(optimizer.state[param]) == {"total", "exp_avg_grad"}
    assert optimizer.state["calls"] == 3
    other = EAdaptor(Strict([param], by_length))
    seen = []
    other.inner.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(set(loaded["state"][0])))
    other.load_state_dict(optimizer.state_dict())
    assert seen == [{"total"}]
    other.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_the_average_in_fp32(dtype: torch.dtype) -> None:
    param = Parameter(torch.zeros(4, dtype=dtype))
    optimizer = EAdaptor(torch.optim.SGD([param], lr=1.0), -50.0, 0.99)
    e = torch.zeros(4)
    seen: list[Tensor] = []
    optimizer.inner.register_step_pre_hook(lambda *_: seen.append(param.grad.clone()))  # type: ignore[union-attr]
    for k in range(20):
        g = torch.randn(4, generator=torch.Generator().manual_seed(k)).to(dtype)
        param.grad = g
        optimizer.step()
        torch.testing.assert_close(seen[-1], (g.float() - 0.5 * (g.float() - e)).to(dtype), rtol=1e-2, atol=1e-6)
        e = torch.lerp(e, g.float(), 0.01)
    assert seen[-1].dtype is dtype
    buffer = optimizer.state[param]["exp_avg_grad"]
    assert buffer.dtype is torch.float32
    torch.testing.assert_close(buffer, e)


def channels_last() -> Tensor:
    return torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "make_grad"),
    [
        pytest.param(lambda: torch.randn(()), torch.randn_like, id="0-d"),
        pytest.param(lambda: torch.randn(3, 0, 2), torch.randn_like, id="empty"),
        pytest.param(lambda: torch.randn(4, 3).t(), torch.randn_like, id="transposed"),
        pytest.param(lambda: torch.randn(6, 4)[::2, 1:], torch.randn_like, id="strided"),
        pytest.param(channels_last, torch.randn_like, id="channels-last"),
        pytest.param(lambda: torch.randn(3, 4), lambda p: torch.randn(4).expand_as(p), id="expanded-grad"),
    ],
)
def test_layouts(make: Callable[[], Tensor], make_grad: Callable[[Tensor], Tensor]) -> None:
    param = Parameter(make())
    param.grad = make_grad(param.detach())
    plain = Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    plain.grad = param.grad.clone(memory_format=torch.contiguous_format)
    optimizers = [EAdaptor(torch.optim.AdamW([one], lr=0.1), -5.0, 0.9) for one in (param, plain)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(param.detach(), plain.detach())
    assert optimizers[0].state[param]["exp_avg_grad"].stride() == torch.zeros_like(param).stride()


# construction and refusals


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: [with_grad(2)], TypeError, r"type list: it must be a torch.optim.Optimizer", id="a-list"),
        pytest.param(
            lambda: torch.optim.LBFGS([with_grad(2)]), TypeError, "LBFGS calls its closure itself", id="LBFGS"
        ),
        pytest.param(lambda: AdamE([with_grad(2)]), ValueError, "AdamE contains adaptor E already", id="AdamE"),
        pytest.param(
            lambda: EAdaptor(torch.optim.SGD([with_grad(2)])), ValueError, "EAdaptor contains adaptor E", id="twice"
        ),
        pytest.param(
            lambda: torch.optim.SGD([with_grad(2)], differentiable=True), ValueError, "differentiable=False", id="diff"
        ),
        pytest.param(
            lambda: torch.optim.SGD([("rotor", Parameter(torch.zeros(3, dtype=torch.complex64)))]),
            TypeError,
            r"rotor with shape \(3,\) has dtype torch.complex64",
            id="complex",
        ),
    ],
)
def test_what_it_refuses_to_adapt(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        EAdaptor(make())


@pytest.mark.parametrize(
    ("alpha", "explore_beta", "message"),
    [
        pytest.param(-5.0, 0.1, r"alpha=-5.0 .*\|alpha\| < 1/\(1 - explore_beta\) = 1.11111", id="alpha-range"),
        pytest.param(0.5, 1.0, "explore_beta=1.0 .* < 1", id="explore-beta-one"),
        pytest.param(0.5, "auto", "do not go together", id="half-auto"),
    ],
)
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_ranges(base: Any, alpha: Any, explore_beta: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EAdaptor(base([with_grad(2)]), alpha, explore_beta)
    params = [with_grad(2), with_grad(2)]
    before = [param.detach().clone() for param in params]
    optimizer = EAdaptor(base([{"params": [param]} for param in params]))
    alpha_name = "explore_alpha" if base is torch.optim.RMSprop else "alpha"
    bad = {alpha_name: alpha, "explore_beta": explore_beta}
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [with_grad(2)], **bad})
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][1].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    optimizer.param_groups[1].update(bad)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert len(optimizer.param_groups) == 2
    assert_same([param.detach() for param in params], before)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    dense, sparse = with_grad(3, 2), Parameter(torch.zeros(3, 2))
    sparse.grad = torch.eye(3, 2).to_sparse()
    before = dense.detach().clone()
    optimizer = EAdaptor(torch.optim.SGD([dense, sparse], lr=0.1))
    with pytest.raises(RuntimeError, match=r"EAdaptor .*parameter 1 of its group.*\(3, 2\).*sparse=False.*SparseAdam"):
        optimizer.step()
    assert_same([dense.detach()], [before])
    assert not optimizer.state


def test_complex_parameters_are_refused_however_they_come() -> None:
    optimizer = EAdaptor(torch.optim.SGD([with_grad(2)], lr=0.1))
    rotor = Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(TypeError, match="complex64"):
        optimizer.add_param_group({"params": [rotor]})
    assert len(optimizer.param_groups) == 1
    optimizer.inner.add_param_group({"params": [rotor]})
    with pytest.raises(TypeError, match="complex64"):
        optimizer.step()


# param groups


def test_param_groups_are_those_of_the_inner_optimizer() -> None:
    inner = torch.optim.SGD([with_grad(2)], lr=0.1)
    optimizer = EAdaptor(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state and optimizer.defaults is inner.defaults
    optimizer.add_param_group({"params": [with_grad(3)], "lr": 0.2, "alpha": -5.0, "explore_beta": 0.9})
    inner.add_param_group({"params": [with_grad(4)], "lr": 0.3})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.3]
    assert [group["alpha"] for group in optimizer.param_groups] == ["auto", -5.0, "auto"]
    optimizer.load_state_dict(optimizer.state_dict())  # torch makes a new list
    assert optimizer.param_groups is inner.param_groups
    optimizer.step()
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"]})


@pytest.mark.parametrize("target", ["adaptor", "inner"])
def test_schedulers_drive_it_through_either(target: str) -> None:
    inner = torch.optim.SGD([with_grad(2)], lr=0.1, momentum=0.9)
    optimizer = EAdaptor(inner)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer if target == "adaptor" else inner, max_lr=0.2, total_steps=10
    )
    rates, momenta = [], []
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert max(rates) == pytest.approx(0.2, rel=0.05) and min(momenta) == pytest.approx(0.85, rel=0.02)


def test_both_numbers_are_read_at_each_step() -> None:
    params, others = parameters(), parameters()
    optimizer = EAdaptor(torch.optim.SGD(params, lr=0.05), -2.0, 0.9)
    constant = EAdaptor(torch.optim.SGD(others, lr=0.05), -2.0, 0.9)
    assert_same(run(optimizer, params, range(5)), run(constant, others, range(5)))
    optimizer.param_groups[0].update(alpha=0.5, explore_beta=0.01)
    changed, same = run(optimizer, params, range(5, 7)), run(constant, others, range(5, 7))
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(changed, same, strict=True))


def test_auto_is_the_small_batch_choice_and_repr_says_so() -> None:
    params, others = parameters(), parameters()
    auto, number = EAdaptor(torch.optim.SGD(params)), EAdaptor(torch.optim.SGD(others), 0.5, 0.01)
    assert_same(run(auto, params, range(5)), run(number, others, range(5)))
    auto.add_param_group({"params": [with_grad(2)], "alpha": -5.0, "explore_beta": 0.99})
    first, second = repr(auto).split("Parameter Group 1")
    assert first.startswith("EAdaptor of SGD (\nParameter Group 0\n")
    assert "    alpha: auto (0.5 in force)\n" in first and "    explore_beta: auto (0.01 in force)\n" in first
    assert "    alpha: -5.0\n" in second and "    explore_beta: 0.99\n" in second


@pytest.mark.parametrize("base", [torch.optim.RMSprop, torch.optim.ASGD])
def test_an_alpha_of_the_inner_optimizer_stays_its_own(base: Any) -> None:
    own = base([with_grad(2)]).defaults["alpha"]
    optimizer = EAdaptor(base([with_grad(2)]), -5.0, 0.9)
    (group,) = optimizer.param_groups
    assert (group["alpha"], group["explore_alpha"], group["explore_beta"]) == (own, -5.0, 0.9)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.param_groups[0]["explore_alpha"] == -5.0
        assert other._explore_names() == ("explore_alpha", "explore_beta")


# state


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_training_goes_on_bit_for_bit_after_a_reload(make: Any, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    optimizer = EAdaptor(make(params), -5.0, 0.9)
    run(optimizer, params, range(5))
    fresh = [Parameter(param.detach().clone()) for param in params]
    other = EAdaptor(make(fresh))
    state_dict = saved_and_loaded(optimizer.state_dict())
    kept = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    for param in other.state:
        assert other.state[param]["exp_avg_grad"].dtype == torch.promote_types(dtype, torch.float32)
    got, want = run(other, fresh, range(5, 10)), run(optimizer, params, range(5, 10))
    # NAdam's mu_product is made in fp32 and loaded in the parameter's dtype
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 if isinstance(optimizer.inner, torch.optim.NAdam) else 0)
    averages = [[state["exp_avg_grad"] for state in one["state"].values()] for one in (state_dict, kept)]
    assert_same(*averages)  # neither loading nor stepping wrote to it
    assert state_dict["param_groups"] == kept["param_groups"]


@pytest.mark.parametrize("make", INNER)
def test_a_checkpoint_of_the_inner_optimizer_loads(make: Any) -> None:
    params = parameters()
    inner = make(params)
    run(inner, params, range(5))
    fresh = [Parameter(param.detach().clone()) for param in params]
    optimizer = EAdaptor(make(fresh), -5.0, 0.9)
    run(optimizer, fresh, range(2))
    for one, other in zip(fresh, params, strict=True):
        one.data.copy_(other.data)
    optimizer.load_state_dict(saved_and_loaded(inner.state_dict()))
    alpha_name, _ = optimizer._explore_names()
    group = optimizer.param_groups[0]
    assert (group[alpha_name], group["explore_beta"]) == (-5.0, 0.9)
    assert all("exp_avg_grad" not in optimizer.state[param] for param in fresh)
    want = by_hand(inner, params, range(5, 10), -5.0, 0.9)
    assert_close(run(optimizer, fresh, range(5, 10)), want, 1e-2 if type(inner).__name__ in ("Muon", "Rprop") else 1e-9)


def test_a_checkpoint_loaded_by_the_inner_optimizer_goes_on() -> None:
    param = with_grad(3, dtype=torch.bfloat16)
    inner = torch.optim.AdamW([param], lr=0.1)
    plain = inner.state_dict()
    optimizer = EAdaptor(inner, -5.0, 0.9)
    optimizer.step()
    inner.load_state_dict(optimizer.state_dict())  # torch casts to bf16
    optimizer.step()
    assert optimizer.state[param]["exp_avg_grad"].dtype is torch.float32
    inner.load_state_dict(plain)
    assert "alpha" not in optimizer.param_groups[0]
    optimizer.step()
    assert (optimizer.param_groups[0]["alpha"], optimizer.param_groups[0]["explore_beta"]) == (-5.0, 0.9)


def test_an_inner_optimizer_in_mid_run_is_adapted_from_zero() -> None:
    params, others = parameters(), parameters()
    one, other = torch.optim.AdamW(params, lr=0.02), torch.optim.AdamW(others, lr=0.02)
    assert_same(run(one, params, range(5)), run(other, others, range(5)))
    got = run(EAdaptor(one, -5.0, 0.9), params, range(5, 15))
    assert_close(got, by_hand(other, others, range(5, 15), -5.0, 0.9), 1e-10)


def test_an_average_that_is_no_tensor_is_refused_before_anything_is_loaded() -> None:
    params = parameters()
    optimizer = EAdaptor(torch.optim.AdamW(params, lr=0.02))
    run(optimizer, params, range(3))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][1]["exp_avg_grad"] = None
    state_dict["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match="exp_avg_grad of parameter 1 .* must be a tensor, got None"):
        optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_state_dicts_that_do_not_fit_are_refused() -> None:
    one = EAdaptor(torch.optim.SGD([with_grad(2)]))
    two = EAdaptor(torch.optim.SGD([{"params": [with_grad(2)]}, {"params": [with_grad(2)]}]))
    for optimizer, state_dict in [(one, two.state_dict()), (two, one.state_dict())]:
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="doesn't match the size"):
        one.load_state_dict(EAdaptor(torch.optim.SGD([with_grad(2), with_grad(2)])).state_dict())


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle"),
    ],
)
@pytest.mark.parametrize("make", INNER)
def test_copies_keep_everything(make: Any, copied: Callable[[Any], Any]) -> None:
    params = parameters(torch.bfloat16)
    optimizer = EAdaptor(make(params), -2.0, 0.9)
    run(optimizer, params, range(3))
    other, fresh = copied((optimizer, params))
    assert repr(other) == repr(optimizer)
    assert other.param_groups is other.inner.param_groups and other.inner is not optimizer.inner
    assert_same(run(optimizer, params, range(3, 6)), run(other, fresh, range(3, 6)))


def test_hooks_are_called_once_with_the_adaptor() -> None:
    param = with_grad(2)
    optimizer = EAdaptor(torch.optim.SGD([param], lr=0.1), -5.0, 0.9)
    grad, calls = param.grad, []
    optimizer.register_step_pre_hook(lambda hooked, *_: calls.append(("pre", hooked, param.grad is grad)))
    optimizer.register_step_post_hook(lambda hooked, *_: calls.append(("post", hooked, param.grad is grad)))
    optimizer.inner.register_step_pre_hook(lambda hooked, *_: calls.append(("inner", hooked, param.grad is grad)))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert calls == [("pre", optimizer, True), ("inner", optimizer.inner, False), ("post", optimizer, True)]
    assert {"Optimizer.step#EAdaptor.step", "Optimizer.step#SGD.step"} <= {e.key for e in profile.key_averages()}

    def more(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "more": state_dict.get("more", 0) + 1}

    seen: list[Any] = []
    optimizer.register_state_dict_pre_hook(seen.append)
    optimizer.register_state_dict_post_hook(more)
    state_dict = optimizer.state_dict()
    assert state_dict["more"] == 1
    optimizer.register_load_state_dict_pre_hook(lambda _, loaded: seen.append(loaded["more"]))
    optimizer.register_load_state_dict_post_hook(seen.append)
    optimizer.load_state_dict(state_dict)
    assert seen == [optimizer, 1, optimizer]


def test_distributed_checkpoint_round_trip() -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    params = list(layer.parameters())

    def go(optimizer: torch.optim.Optimizer, params: list[Parameter], seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            optimizer.step()
        return [param.detach().clone() for param in params]

    optimizer = EAdaptor(torch.optim.AdamW(params, lr=0.1), -5.0, 0.99)
    go(optimizer, params, 1)
    state_dict = copy.deepcopy(get_optimizer_state_dict(layer, optimizer))  # AdamW would go on with the same tensors
    other_layer = copy.deepcopy(layer)
    other_params = list(other_layer.parameters())
    other = EAdaptor(torch.optim.AdamW(other_params, lr=3.0))
    set_optimizer_state_dict(other_layer, other, state_dict)
    assert other.state[other_layer.weight]["exp_avg_grad"].dtype is torch.float32
    assert_same(go(optimizer, params, 2), go(other, other_params, 2))


# GradScaler


@pytest.mark.parametrize("make", INNER)
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler_unscales_and_skips(make: Any, unscale_first: bool) -> None:
    params, others = parameters(torch.float32), parameters(torch.float32)
    optimizer, plain = EAdaptor(make(params), -5.0, 0.9), EAdaptor(make(others), -5.0, 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    scaler.scale(torch.zeros(()))
    for k in range(6):
        overflows = k == 3
        set_gradients(params, k)
        set_gradients(others, k)
        for param in params:
            assert param.grad is not None
            param.grad.mul_(scaler.get_scale())
        if overflows:
            assert params[0].grad is not None
            params[0].grad[0, 0] = torch.inf
        before = copy.deepcopy(optimizer.state_dict())
        weights = [param.detach().clone() for param in params]
        if unscale_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert_same([param.detach() for param in params], weights)
            torch.testing.assert_close(optimizer.state_dict(), before, rtol=0, atol=0)
        else:
            plain.step()
    assert scaler.get_scale() == 512.0
    assert_close([param.detach() for param in params], [other.detach() for other in others], 1e-6)
