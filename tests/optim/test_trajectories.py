"""Trajectories of AdamE and ALTO against independent oracles.

The first oracle is written from the paper's equations, in float64 and with the paper's two buffers; it
imports nothing of the package. The second is the authors' package, the third torch's own Adam and AdamW, the
last the package's own specification of a step.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gradhist.optim import ALTO, AdamE, alto
from lightning_gradhist.optim.adam_e import adam_e_reference
from lightning_gradhist.optim.alto import alto_reference

STEPS = 200
LR, EPS, BETAS = 0.02, 1e-6, (0.9, 0.99)
SHAPES = [(3, 4), (5,), ()]

EXPLORE = [
    pytest.param(-5.0, 0.99, id="large-batch"),
    pytest.param(0.5, 0.01, id="small-batch"),
    pytest.param(-2.0, 0.9, id="medium"),
    pytest.param(-60.0, 0.99, id="near-limit"),
    pytest.param(0.9, 0.0, id="no-memory"),
    pytest.param(0.0, 0.5, id="idle"),
]


class Problem:
    """Tensor ``i`` has the gradient ``h_i * (theta - target_i) + noise_ik`` at step ``k``."""

    def __init__(self, scale: float = 1.0) -> None:
        rng = np.random.default_rng(0)
        self.scale = scale
        self.start = [rng.normal(size=shape) for shape in SHAPES]
        self.target = [rng.normal(size=shape) for shape in SHAPES]
        self.curvature = [rng.uniform(0.2, 2.0, size=shape) for shape in SHAPES]
        self.noise = [0.3 * rng.normal(size=(STEPS, *shape)) for shape in SHAPES]

    def grad(self, i: int, k: int, theta: Any) -> Any:
        return self.scale * (self.curvature[i] * (theta - self.target[i]) + self.noise[i][k])

    def parameters(self, dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(torch.tensor(start, dtype=dtype)) for start in self.start]

    def set_grads(self, params: list[torch.nn.Parameter], k: int) -> None:
        for i, param in enumerate(params):
            param.grad = torch.as_tensor(self.grad(i, k, param.detach().double().numpy()), dtype=param.dtype)

    def run(self, optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> list[np.ndarray]:
        for k in steps:
            self.set_grads(params, k)
            optimizer.step()
        return [param.detach().numpy().copy() for param in params]


def oracle(
    problem: Problem,
    i: int,
    alpha: float,
    b1: float,
    *,
    weight_decay: float = 0.0,
    coupled: bool = False,
    lamb: bool = False,
    corrected: bool = True,
) -> np.ndarray:
    b2, b3 = BETAS
    theta = problem.start[i]
    a = previous = m = v = np.zeros_like(theta)
    for k in range(1, STEPS + 1):
        g = problem.grad(i, k - 1, theta)
        a = b1 * a + (1 - b1) * (g - previous)
        previous = g
        x = g + alpha * a + (weight_decay * theta if coupled else 0.0)
        m = b2 * m + (1 - b2) * x
        v = b3 * v + (1 - b3) * x**2
        m_hat, v_hat = (m / (1 - b2**k), v / (1 - b3**k)) if corrected else (m, v)
        r = m_hat / (np.sqrt(v_hat) + EPS) + (0.0 if coupled else weight_decay * theta)
        phi = np.sqrt((theta**2).sum()) + 1e-10
        theta = theta - LR * r * (phi / (np.sqrt((r**2).sum()) + 1e-6 * phi) if lamb else 1.0)
    return theta


def assert_close(got: list[np.ndarray], want: list[np.ndarray], tolerance: float = 1e-12) -> None:
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


def reloaded(
    optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]
) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in params]
    other = type(optimizer)(fresh, lr=77.0)  # type: ignore[call-arg]
    other.load_state_dict(torch.load(file, weights_only=True))
    return other, fresh


def run_with_reload(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> list[np.ndarray]:
    problem = Problem()
    params = problem.parameters()
    optimizer = make(params)
    problem.run(optimizer, params, range(STEPS // 2))
    optimizer, params = reloaded(optimizer, params)
    return problem.run(optimizer, params, range(STEPS // 2, STEPS))


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
@pytest.mark.parametrize(
    ("weight_decay", "decoupled"),
    [
        pytest.param(0.0, True, id="no-decay"),
        pytest.param(0.1, True, id="decoupled"),
        pytest.param(0.1, False, id="coupled"),
    ],
)
def test_adam_e_against_the_equations(alpha: float, explore_beta: float, weight_decay: float, decoupled: bool) -> None:
    got = run_with_reload(
        lambda params: AdamE(
            params,
            LR,
            BETAS,
            EPS,
            weight_decay,
            alpha=alpha,
            explore_beta=explore_beta,
            decoupled_weight_decay=decoupled,
        )
    )
    want = [
        oracle(Problem(), i, alpha, explore_beta, weight_decay=weight_decay, coupled=not decoupled)
        for i in range(len(SHAPES))
    ]
    assert_close(got, want)


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
@pytest.mark.parametrize("weight_decay", [0.0, 1e-4, 0.1])
@pytest.mark.parametrize("layerwise", [pytest.param(True, id="layerwise"), pytest.param(False, id="plain")])
@pytest.mark.parametrize("corrected", [pytest.param(True, id="corrected"), pytest.param(False, id="vanilla")])
def test_alto_against_the_equations(
    alpha: float, explore_beta: float, weight_decay: float, layerwise: bool, corrected: bool
) -> None:
    got = run_with_reload(
        lambda params: ALTO(
            params,
            LR,
            BETAS,
            EPS,
            weight_decay,
            alpha=alpha,
            explore_beta=explore_beta,
            layerwise=layerwise,
            bias_correction=corrected,
        )
    )
    want = [
        oracle(
            Problem(),
            i,
            alpha,
            explore_beta,
            weight_decay=weight_decay,
            lamb=layerwise,
            corrected=corrected,
        )
        for i in range(len(SHAPES))
    ]
    assert_close(got, want)


def test_the_oracle_tells_the_variants_apart() -> None:
    variants = [
        oracle(Problem(), 0, -2.0, 0.9),
        oracle(Problem(), 0, -2.0, 0.5),
        oracle(Problem(), 0, 0.5, 0.9),
        oracle(Problem(), 0, -2.0, 0.9, weight_decay=0.1),
        oracle(Problem(), 0, -2.0, 0.9, weight_decay=0.1, coupled=True),
        oracle(Problem(), 0, -2.0, 0.9, lamb=True),
        oracle(Problem(), 0, -2.0, 0.9, corrected=False),
    ]
    for i, one in enumerate(variants):
        for other in variants[:i]:
            assert np.abs(one - other).max() > 1e-4


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(("alpha", "explore_beta"), [(-5.0, 0.99), (0.5, 0.01)])
@pytest.mark.parametrize(
    ("optimizer_class", "reference", "options"),
    [
        pytest.param(AdamE, adam_e_reference, {}, id="AdamE"),
        pytest.param(AdamE, adam_e_reference, {"decoupled_weight_decay": False}, id="AdamE-coupled"),
        pytest.param(AdamE, adam_e_reference, {"maximize": True}, id="AdamE-maximize"),
        pytest.param(ALTO, alto_reference, {}, id="ALTO"),
        pytest.param(ALTO, alto_reference, {"layerwise": False, "bias_correction": False}, id="ALTO-plain"),
        pytest.param(ALTO, alto_reference, {"maximize": True}, id="ALTO-maximize"),
    ],
)
def test_each_step_is_the_specified_one(
    optimizer_class: Any,
    reference: Any,
    options: dict[str, Any],
    alpha: float,
    explore_beta: float,
    foreach: bool | None,
) -> None:
    problem = Problem(scale=-1.0 if "maximize" in options else 1.0)
    params = [*problem.parameters(), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    common: dict[str, Any] = {"alpha": alpha, "explore_beta": explore_beta, "foreach": foreach}
    optimizer = optimizer_class(params, LR, BETAS, EPS, 0.1, **common, **options)
    zeros = [torch.zeros_like(param, requires_grad=False) for param in params]
    want = [(param.detach().clone(), zero, zero, zero) for param, zero in zip(params, zeros, strict=True)]
    for k in range(50):
        problem.set_grads(params[:-1], k)
        params[-1].grad = zeros[-1] if k < 2 else zeros[-1] + 1.0
        want = [
            reference(theta, param.grad, *rest, k + 1, optimizer.param_groups[0])
            for (theta, *rest), param in zip(want, params, strict=True)
        ]
        optimizer.step()
    names = ("exp_avg_grad", "exp_avg", "exp_avg_sq")
    got = [(param.detach(), *(optimizer.state[param][name] for name in names)) for param in params]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_specification_of_adam_e_is_one_of_plain_numbers() -> None:
    group = AdamE(Problem().parameters(), LR, BETAS, EPS, 0.1, alpha=-2.0, explore_beta=0.9).param_groups[0]
    numbers, tensors = (1.0, 0.5, 0.25, 0.125, 0.0625), torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0625]).double()
    got, want = adam_e_reference(*numbers, 3, group), adam_e_reference(*tensors, 3, group)
    np.testing.assert_allclose(got, torch.stack(want), rtol=1e-15)


@pytest.mark.parametrize("maximizer", [AdamE, ALTO])
def test_maximize_is_descent_on_the_negative(maximizer: Any) -> None:
    up, down = Problem(scale=-1.0), Problem()
    params = up.parameters()
    got = up.run(maximizer(params, LR, maximize=True), params, range(STEPS))
    params = down.parameters()
    assert_close(got, down.run(maximizer(params, LR), params, range(STEPS)))


@pytest.mark.parametrize("explore_beta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("reference", "decoupled"),
    [pytest.param(torch.optim.Adam, False, id="Adam"), pytest.param(torch.optim.AdamW, True, id="AdamW")],
)
@pytest.mark.parametrize("maximize", [False, True])
def test_alpha_zero_is_torch(
    explore_beta: float, dtype: torch.dtype, reference: Any, decoupled: bool, maximize: bool
) -> None:
    problem = Problem(scale=-1.0 if maximize else 1.0)
    common: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.1, "maximize": maximize}
    params = problem.parameters(dtype)
    optimizer = AdamE(params, **common, alpha=0.0, explore_beta=explore_beta, decoupled_weight_decay=decoupled)
    got = problem.run(optimizer, params, range(STEPS))
    params = problem.parameters(dtype)
    want = problem.run(reference(params, **common), params, range(STEPS))
    assert_close(got, want, 1e-12 if dtype is torch.float64 else 1e-5)


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
def test_alto_against_the_authors(alpha: float, explore_beta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    authors = pytest.importorskip("ALTO")
    monkeypatch.setattr(alto, "EPS2", 0.0)  # theirs has neither of the two
    monkeypatch.setattr(alto, "EPS3", 0.0)
    problem = Problem(scale=0.03)
    params = problem.parameters()
    problem.set_grads(params, 0)
    grads = [param.grad for param in params if param.grad is not None]
    assert torch.nn.utils.get_total_norm(grads) < 1, "their hidden clip must be idle"
    common: dict[str, Any] = {
        "lr": LR,
        "eps": EPS,
        "weight_decay": 0.1,
    }  # theirs has no trust ratio without decay
    optimizer = ALTO(params, betas=BETAS, alpha=alpha, explore_beta=explore_beta, **common)
    got = problem.run(optimizer, params, range(STEPS))
    params = problem.parameters()
    theirs = authors.ALTO(params, betas=(explore_beta, *BETAS), alp=alpha, **common)
    assert_close(got, problem.run(theirs, params, range(STEPS)))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_checkpoint_of_the_authors_alto_goes_on(weight_decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    authors = pytest.importorskip("ALTO")
    monkeypatch.setattr(alto, "EPS2", 0.0)
    monkeypatch.setattr(alto, "EPS3", 0.0)
    problem = Problem(scale=0.03)
    params = problem.parameters()
    theirs = authors.ALTO(params, lr=LR, betas=(0.9, *BETAS), alp=-2.0, eps=EPS, weight_decay=weight_decay)
    problem.run(theirs, params, range(STEPS // 2))
    ours = [torch.nn.Parameter(param.detach().clone()) for param in params]
    optimizer = ALTO(ours)
    optimizer.load_state_dict(theirs.state_dict())
    assert set(optimizer.state[ours[0]]) == {"step", "exp_avg_grad", "exp_avg", "exp_avg_sq"}
    rest = range(STEPS // 2, STEPS)
    assert_close(problem.run(optimizer, ours, rest), problem.run(theirs, params, rest))


@pytest.mark.parametrize(("alpha", "explore_beta"), EXPLORE)
@pytest.mark.parametrize(
    ("base", "decoupled"),
    [pytest.param(torch.optim.Adam, False, id="Adam"), pytest.param(torch.optim.AdamW, True, id="AdamW")],
)
def test_adam_e_against_the_authors_adaptor(alpha: float, explore_beta: float, base: Any, decoupled: bool) -> None:
    authors = pytest.importorskip("E")
    problem = Problem()
    common: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.1}
    params = problem.parameters()
    optimizer = AdamE(params, alpha=alpha, explore_beta=explore_beta, decoupled_weight_decay=decoupled, **common)
    got = problem.run(optimizer, params, range(STEPS))
    params = problem.parameters()
    theirs = authors.E(base(params, **common), alpha=alpha, beta=explore_beta)
    assert_close(got, problem.run(theirs, params, range(STEPS)))


def run_with_closure(make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]) -> list[np.ndarray]:
    problem = Problem()
    params = problem.parameters()
    optimizer = make(params)
    for k in range(20):

        def closure(k: int = k) -> float:
            optimizer.zero_grad()
            problem.set_grads(params, k)
            return 0.0

        optimizer.step(closure)
    return [param.detach().numpy().copy() for param in params]


def test_under_a_closure_the_authors_adaptor_is_idle_and_ours_is_not() -> None:
    authors = pytest.importorskip("E")
    plain = run_with_closure(lambda params: torch.optim.Adam(params, LR, BETAS, EPS))
    theirs = run_with_closure(lambda params: authors.E(torch.optim.Adam(params, LR, BETAS, EPS), alpha=-2.0, beta=0.9))
    ours = run_with_closure(lambda params: AdamE(params, LR, BETAS, EPS, alpha=-2.0, explore_beta=0.9))
    problem = Problem()
    params = problem.parameters()
    without = problem.run(AdamE(params, LR, BETAS, EPS, alpha=-2.0, explore_beta=0.9), params, range(20))
    for i in range(len(SHAPES)):
        np.testing.assert_array_equal(theirs[i], plain[i])
        np.testing.assert_array_equal(ours[i], without[i])
        assert np.abs(ours[i] - plain[i]).max() > 1e-4
