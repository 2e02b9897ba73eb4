"""The second moments against the papers' recursions, written out in numpy, and the ranges that come of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradhist.epsilon import FAMILIES, SecondMoment, epsilon_range
from lightning_gradhist.explore import variance_factor
from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.noise import GradientMoments

SHAPES = {"conv": (8, 3, 3, 3), "norm": (8,), "linear": (40, 50), "bias": (2,)}
STEPS = 300


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}


@lru_cache
def gradients(steps: int = STEPS, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Every coordinate has a mean and a deviation of its own; the first rows of a layer are never used."""
    generator = torch.Generator().manual_seed(0)

    def spread(shape: tuple[int, ...], depth: int) -> Tensor:
        return torch.exp(1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) - 4 - 2 * depth)

    mean = {name: 0.3 * spread(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    deviation = {name: spread(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    mean["linear"][:5], deviation["linear"][:5] = 0.0, 0.0
    made = []
    for _ in range(steps):
        noise = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
        made.append({name: (mean[name] + deviation[name] * noise[name]).to(dtype) for name in SHAPES})
    return made


def transcribed(family: str, b1: float, b2: float, decay: float, alpha: float, b: float) -> dict[str, np.ndarray]:
    """The recursions as the papers have them: a_k of adaptor E from the change of the gradient, with two buffers."""
    found = {}
    for name, theta in parameters().items():
        v = m = a = g_before = np.zeros(theta.shape)
        for step in gradients():
            g = step[name].numpy() + decay * theta.numpy()
            a = b * a + (1 - b) * (g - g_before)
            g_before = g
            m = b1 * m + (1 - b1) * g
            x = {"adabelief": g - m, "adamomentum": m, "adame": g + alpha * a, "alto": g + alpha * a}.get(family, g)
            v = b2 * v + (1 - b2) * x**2
        found[name] = np.sqrt(v / (1 - b2**STEPS))
    return found


def authors_range(r: dict[str, np.ndarray]) -> tuple[float, float]:
    lower, upper = [], []
    for values in r.values():
        ascending = np.sort(values[values != 0])
        n = len(ascending)
        lower.append(ascending[int((1 - 0.98) * n)])
        upper.append(ascending[int(0.98 * n)])
    return 10.0 ** round(math.log10(min(lower))), 10.0 ** round(math.log10(max(upper)))


def followed(moment: SecondMoment, dtype: torch.dtype = torch.float64) -> SecondMoment:
    for step in gradients(dtype=dtype):
        moment.update(step, parameters(dtype))
    return moment


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_the_authors_rule_to_the_last_digits(family: str, decay: float) -> None:
    alpha, explore_beta = -5.0, 0.9
    moment = followed(SecondMoment(family, 0.8, 0.99, decay, alpha, explore_beta))
    expected = transcribed(family, 0.8, 0.99, decay, alpha, explore_beta)
    for name, r in moment.rms().items():
        np.testing.assert_allclose(r.numpy(), expected[name], rtol=1e-9, atol=1e-300)
    found = epsilon_range(moment.rms())
    assert (found.lower, found.upper) == pytest.approx(authors_range(expected), rel=1e-12)


def test_families_differ() -> None:
    lowest = {family: epsilon_range(followed(SecondMoment(family)).rms()).lower_unrounded for family in FAMILIES}
    assert lowest["adam"] == lowest["rmsprop"] and lowest["adame"] == lowest["alto"]
    assert max(lowest["adamomentum"], lowest["adabelief"]) < lowest["adam"] < lowest["alto"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ranges_from_bins_agree_to_one_bin(family: str) -> None:
    r = followed(SecondMoment(family, beta2=0.99)).rms()
    histogram = MagnitudeHistogram(list(r))
    histogram.update(r)
    everything = {"all": torch.cat([values.flatten() for values in r.values()])}
    for binned, exact in ((histogram, r), (histogram.pooled(), everything)):
        found, expected = epsilon_range(binned), epsilon_range(exact)
        assert found.per_name.keys() == expected.per_name.keys()
        for name, pair in expected.per_name.items():
            assert found.per_name[name] == pytest.approx(pair, rel=1 / 8)


@pytest.mark.parametrize(
    ("family", "alpha", "explore_beta"),
    [pytest.param("adam", "auto", "auto", id="adam"), pytest.param("adame", 0.5, 0.01, id="adame"),
     pytest.param("alto", -5.0, 0.9, id="alto")],
)  # fmt: skip
def test_the_probes_form_agrees_within_its_error(family: str, alpha: Any, explore_beta: Any) -> None:
    # The probe has E[g^2] from a few gradients in place of an average over an epoch. Of 32 Gaussian gradients the
    # relative error of a root mean square is 1 / sqrt(2 * 32), that of the average over 300 far less; the quantile of
    # many coordinates is known better still.
    moment, probe = SecondMoment(family, alpha=alpha, explore_beta=explore_beta), GradientMoments(parameters())
    for step in gradients():
        moment.update(step)
    for step in gradients(STEPS + 32)[STEPS:]:
        probe.update(step)
    q = 1.0 if family == "adam" else variance_factor(alpha, explore_beta)
    measured = {name: v.sqrt() for name, v in probe.second_moment(1 / q).items()}
    exact = moment.rms()
    ratio = (measured["linear"][5:] / exact["linear"][5:]).log()
    assert abs(float(ratio.mean())) < 0.03 and float(ratio.std()) < 1.3 / math.sqrt(2 * 32)
    expected, found = epsilon_range(exact), epsilon_range(measured)
    for name in ("conv", "linear"):
        assert found.per_name[name] == pytest.approx(expected.per_name[name], rel=0.2)


def test_half_precision_gradients_are_kept_in_single() -> None:
    moment = followed(SecondMoment(), torch.float16)
    exact = followed(SecondMoment()).rms()
    assert all(r.dtype == torch.float32 for r in moment.rms().values())
    torch.testing.assert_close(moment.rms()["conv"].double(), exact["conv"], rtol=1e-2, atol=0)


def test_a_parameter_without_gradient_is_skipped() -> None:
    moment, alone = SecondMoment("adabelief"), SecondMoment("adabelief")
    for i, step in enumerate(gradients(9)):
        moment.update({**step, "norm": step["norm"] if i % 3 == 0 else None})
        if i % 3 == 0:
            alone.update({"norm": step["norm"]})
    torch.testing.assert_close(moment.rms()["norm"], alone.rms()["norm"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(lambda: SecondMoment("sgd"), r"family must be one of \('adam', .* got 'sgd'", id="family"),
        pytest.param(lambda: SecondMoment(beta1=1.0), "beta1 must satisfy 0 <= beta1 < 1, got 1.0", id="beta1"),
        pytest.param(lambda: SecondMoment(beta2=-0.1), "beta2 must satisfy .* got -0.1", id="beta2"),
        pytest.param(lambda: SecondMoment(beta2=False), "beta2 must satisfy 0 <= beta2 < 1, got False", id="flag"),
        pytest.param(lambda: SecondMoment(weight_decay=-1.0), "weight_decay must be from 0 up", id="decay"),
        pytest.param(
            lambda: SecondMoment("alto", alpha=9.0, explore_beta=0.5), "alpha=9.0 is out of range", id="alpha"
        ),
        pytest.param(
            lambda: SecondMoment(weight_decay=0.1).update({"w": torch.ones(2)}), "pass them", id="no-parameters"
        ),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
