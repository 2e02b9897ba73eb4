"""Trajectories of AdamE and ALTO against independent oracles.

The first oracle is written from the paper's equations, in float64 and with the paper's two buffers; it
imports nothing of the package. The second is the authors' package, the third torch's own Adam and AdamW.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gradhist.optim import ALTO, AdamE, alto

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
