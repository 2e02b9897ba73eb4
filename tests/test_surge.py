"""The laws against closed forms and dense double sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gradhist.surge import LAWS, PowerLaw, SaturatingLaw, SurgeLaw, scaling_law, sign_descent_rate

SIZES = [(32, 32), (64, 1024), (1024, 64), (300, 7), (1, 65_536)]


@pytest.mark.parametrize(("batch", "reference"), SIZES)
@pytest.mark.parametrize("noise_scale", [0.5, 100.0, 1000.0, 1e6])
def test_ratio_and_absolute_form(batch: float, reference: float, noise_scale: float) -> None:
    def rate(b: float) -> float:
        return 0.03 / ((math.sqrt(noise_scale / b) + math.sqrt(b / noise_scale)) / 2)

    law = SurgeLaw(noise_scale, max_learning_rate=0.03)
    assert law.learning_rate(batch) == pytest.approx(rate(batch), rel=1e-12)
    assert law.ratio(batch, reference) == pytest.approx(rate(batch) / rate(reference), rel=1e-12)


def test_the_peak_is_at_the_noise_scale() -> None:
    law = SurgeLaw(700, max_learning_rate=0.1)
    assert law.learning_rate(700) == 0.1
    assert all(law.learning_rate(b) < 0.1 for b in (1, 350, 699, 701, 1400, 1e6))
    assert law.learning_rate(350) == pytest.approx(law.learning_rate(1400))  # symmetric in the logarithm


@pytest.mark.parametrize(("batch", "reference"), SIZES)
def test_limits(batch: float, reference: float) -> None:
    root = math.sqrt(batch / reference)
    assert SurgeLaw(math.inf).ratio(batch, reference) == pytest.approx(root, rel=1e-12)
    assert SurgeLaw(1e12).ratio(batch, reference) == pytest.approx(root, rel=1e-6)
    assert SurgeLaw(1e-9).ratio(batch, reference) == pytest.approx(1 / root, rel=1e-6)


def test_levels_off_beyond_its_bound() -> None:
    law = SurgeLaw(100, max_learning_rate=1.0, valid_until=400)
    assert law.learning_rate(400) == law.learning_rate(1e9) < 1.0
    assert law.ratio(5000, 400) == law.ratio(400, 5000) == 1.0
    assert law.ratio(5000, 10) == law.ratio(400, 10) == SurgeLaw(100).ratio(400, 10)
    assert SurgeLaw(math.inf, valid_until=64).ratio(1024, 16) == 2.0


@pytest.mark.parametrize(("name", "exponent"), [("sqrt", 0.5), ("fourth_root", 0.25), ("linear", 1.0), ("keep", 0.0)])
def test_power_laws(name: str, exponent: float) -> None:
    for batch, reference in SIZES:
        assert scaling_law(name).ratio(batch, reference) == (batch / reference) ** exponent
    assert scaling_law(name) == PowerLaw(exponent)


def test_every_name_has_its_law() -> None:
    assert scaling_law("surge", 50.0, 70.0) == SurgeLaw(50.0, valid_until=70.0)
    assert scaling_law("saturating", 50.0, 70.0) == SaturatingLaw(50.0)
    assert all(scaling_law(name).ratio(64, 64) == 1.0 for name in LAWS)


@pytest.mark.parametrize(("batch", "reference"), SIZES)
@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("noise_scale", [0.5, 100.0, 1e6])
def test_the_saturating_law(batch: float, reference: float, noise_scale: float, exponent: float) -> None:
    def rate(b: float) -> float:
        return 1 / (1 + noise_scale / b) ** exponent

    law = SaturatingLaw(noise_scale, exponent)
    assert law.ratio(batch, reference) == pytest.approx(rate(batch) / rate(reference), rel=1e-12)


def test_limits_of_the_saturating_law() -> None:
    for batch, reference in SIZES:
        assert SaturatingLaw(math.inf).ratio(batch, reference) == math.sqrt(batch / reference)
        assert SaturatingLaw(1e13).ratio(batch, reference) == pytest.approx(math.sqrt(batch / reference), rel=1e-6)
        assert SaturatingLaw(1e-9).ratio(batch, reference) == pytest.approx(1.0, rel=1e-6)
    assert SaturatingLaw(100).ratio(1e12, 100) == pytest.approx(math.sqrt(2))  # it levels off, and never falls


# --- Theorems 2, 3 and 4 against dense sums --------------------------------------------------------------------------


def problem(seed: int = 0, signal: float = 0.05, number: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sigma = 0.5 + torch.rand(number, generator=generator, dtype=torch.float64)
    mu = signal * torch.randn(number, generator=generator, dtype=torch.float64)
    root = torch.randn(number, number, generator=generator, dtype=torch.float64)
    hessian = root @ root.T + 20 * torch.outer(mu, mu) / mu.dot(mu)  # its sum off the diagonal is positive
    return mu, sigma, hessian


def theorem_3(mu: Tensor, sigma: Tensor, hessian: Tensor) -> tuple[float, float]:
    n = len(mu)
    m, s, h = mu.tolist(), sigma.tolist(), hessian.tolist()
    trace = sum(h[i][i] for i in range(n))
    off = sum(m[i] * m[j] / (s[i] * s[j]) * h[i][j] for i in range(n) for j in range(n) if i != j)
    noise_scale = math.pi * trace / (2 * off)
    return noise_scale, math.sqrt(noise_scale / (2 * math.pi)) * sum(m[i] ** 2 / s[i] for i in range(n)) / trace


def theorem_2(batch: float, mu: Tensor, sigma: Tensor, hessian: Tensor) -> float:
    n = len(mu)
    m, s, h = mu.tolist(), sigma.tolist(), hessian.tolist()
    e = [math.erf(math.sqrt(batch / 2) * m[i] / s[i]) for i in range(n)]
    curvature = sum((1 - e[i] ** 2) * h[i][i] for i in range(n))
    curvature += sum(e[i] * e[j] * h[i][j] for i in range(n) for j in range(n))
    return sum(e[i] * m[i] for i in range(n)) / curvature


def theorem_4(mu: Tensor, hessian: Tensor) -> float:
    m, h = mu.tolist(), hessian.tolist()
    signs = [math.copysign(1, x) for x in m]
    return sum(map(abs, m)) / sum(a * b * h[i][j] for i, a in enumerate(signs) for j, b in enumerate(signs))


def rate_of(batch: float, mu: Tensor, sigma: Tensor, hessian: Tensor) -> float:
    return sign_descent_rate(batch, mu, sigma, hessian.diag(), lambda v: hessian @ v)


@pytest.mark.parametrize("seed", range(5))
def test_from_moments_is_theorem_3(seed: int) -> None:
    mu, sigma, hessian = problem(seed)
    law = SurgeLaw.from_moments(mu, sigma, hessian.diag(), lambda v: hessian @ v)
    assert (law.noise_scale, law.max_learning_rate) == pytest.approx(theorem_3(mu, sigma, hessian), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch", [0.1, 1, 30, 1e3, 1e5])
def test_sign_descent_is_theorem_2(seed: int, batch: float) -> None:
    mu, sigma, hessian = problem(seed)
    assert rate_of(batch, mu, sigma, hessian) == pytest.approx(theorem_2(batch, mu, sigma, hessian), rel=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_small_batches_follow_the_surge_law(seed: int) -> None:
    mu, sigma, hessian = problem(seed, signal=1e-3)
    bound = float((math.pi * sigma**2 / (2 * mu**2)).min())
    law = SurgeLaw.from_moments(mu, sigma, hessian.diag(), lambda v: hessian @ v)
    for batch in (bound / 1e4, bound / 1e3):
        assert rate_of(batch, mu, sigma, hessian) == pytest.approx(law.learning_rate(batch), rel=5e-3)


@pytest.mark.parametrize("seed", range(5))
def test_large_batches_level_off(seed: int) -> None:
    mu, sigma, hessian = problem(seed)
    constant = theorem_4(mu, hessian)
    assert constant > 0
    assert rate_of(1e9, mu, sigma, hessian) == pytest.approx(constant, rel=1e-6)


def test_best_rate_minimises_the_quadratic_loss() -> None:
    # Lemma 1 by simulation: signs of Gaussian batch gradients, the loss change is quadratic in the rate.
    mu, sigma, hessian = problem(2, signal=0.3, number=4)
    batch, generator = 5.0, torch.Generator().manual_seed(0)
    noise = torch.randn(400_000, 4, generator=generator, dtype=torch.float64)
    steps = (mu + sigma / math.sqrt(batch) * noise).sign()
    slope, curvature = float((steps @ mu).mean()), float(((steps @ hessian) * steps).sum(1).mean())
    assert rate_of(batch, mu, sigma, hessian) == pytest.approx(slope / curvature, rel=0.02)


BAD = problem()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: SurgeLaw(0.0), "noise_scale must be a positive number of samples, got 0.0", id="zero"),
        pytest.param(lambda: SurgeLaw(-1.0), "noise_scale must be .* got -1.0", id="negative"),
        pytest.param(lambda: SurgeLaw(math.nan), "noise_scale must be .* got nan", id="nan"),
        pytest.param(lambda: SurgeLaw(1.0, valid_until=0), "valid_until must be", id="valid-until"),
        pytest.param(lambda: SurgeLaw(1.0, 0.0), "max_learning_rate must be positive, got 0.0", id="rate"),
        pytest.param(lambda: SurgeLaw(1.0, math.inf), "max_learning_rate must be positive, got inf", id="rate-inf"),
        pytest.param(lambda: SurgeLaw(math.inf, 0.1), "must then be finite", id="peak-at-infinity"),
        pytest.param(lambda: SurgeLaw(1.0).learning_rate(1), "max_learning_rate is needed", id="no-rate"),
        pytest.param(lambda: SurgeLaw(1.0, 1.0).learning_rate(0), "batch_size must be", id="batch"),
        pytest.param(lambda: SurgeLaw(1.0).ratio(1, 0), "reference_batch_size must be", id="reference"),
        pytest.param(lambda: SurgeLaw(1.0).ratio(math.inf, 1), "batch_size must be .* got inf", id="infinite"),
        pytest.param(lambda: PowerLaw(1.0).ratio(-4, 1), "batch_size must be .* got -4", id="power"),
        pytest.param(lambda: SaturatingLaw(0.0), "noise_scale must be .* got 0.0", id="saturating"),
        pytest.param(lambda: SaturatingLaw(1.0, 0.0), "exponent must be a positive number, got 0.0", id="exponent"),
        pytest.param(lambda: SaturatingLaw(1.0).ratio(1, 0), "reference_batch_size must be", id="saturating-reference"),
        pytest.param(lambda: scaling_law("cubic"), r"one of \('surge', .* got 'cubic'", id="name"),
        pytest.param(
            lambda: SurgeLaw.from_moments(BAD[0], BAD[1], -BAD[2].diag(), lambda v: BAD[2] @ v),
            "positive trace of the Hessian",
            id="trace",
        ),
        pytest.param(
            lambda: SurgeLaw.from_moments(BAD[0], BAD[1], BAD[2].diag(), lambda v: 0 * v), "off its diagonal", id="off"
        ),
        pytest.param(lambda: rate_of(1.0, BAD[0], BAD[1], -BAD[2]), "curvature .* must be positive", id="curvature"),
        pytest.param(lambda: rate_of(0.0, *BAD), "batch_size must be", id="sign-batch"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
