"""The numbers of adaptor E."""

from __future__ import annotations

import ast
import inspect
import math
import sys

import pytest
import torch

from lightning_gradhist import explore
from lightning_gradhist.explore import (
    AUTO,
    check_explore,
    explore_choice,
    resolve_explore,
    variance_factor,
)


@pytest.mark.parametrize(
    ("batch_size", "choice"),
    [
        pytest.param(None, (0.5, 0.01), id="unknown"),
        pytest.param(1, (0.5, 0.01), id="one"),
        pytest.param(999.5, (0.5, 0.01), id="just-below"),
        pytest.param(1_000, (-5.0, 0.99), id="limit"),
        pytest.param(16_384, (-5.0, 0.99), id="large"),
    ],
)
def test_explore_choice(batch_size: float | None, choice: tuple[float, float]) -> None:
    assert explore_choice(batch_size) == choice
    check_explore(*choice)


@pytest.mark.parametrize("batch_size", [0, -4, math.nan, math.inf])
def test_explore_choice_refuses(batch_size: float) -> None:
    with pytest.raises(ValueError, match=rf"batch_size={batch_size} is out of range.* > 0"):
        explore_choice(batch_size)


@pytest.mark.parametrize(
    ("alpha", "explore_beta"),
    [(AUTO, AUTO), (0, 0), (0.999, 0.0), (-5.0, 0.99), (99.9, 0.99), (-1.0101, 0.01)],
)
def test_check_explore_accepts(alpha: float | str, explore_beta: float | str) -> None:
    check_explore(alpha, explore_beta)


@pytest.mark.parametrize(
    ("alpha", "explore_beta", "message"),
    [
        pytest.param(AUTO, 0.99, "alpha='auto' and explore_beta=0.99 do not go together", id="half-auto"),
        pytest.param(-5.0, AUTO, "alpha=-5.0 and explore_beta='auto' do not go together", id="auto-half"),
        pytest.param("Auto", "Auto", "alpha='Auto' .*two numbers, or leave both \"auto\"", id="other-string"),
        pytest.param(None, None, "alpha=None and explore_beta=None", id="none"),
        pytest.param(0.0, 1.0, r"explore_beta=1.0 .*0 <= explore_beta < 1\. .*\"auto\"", id="beta-one"),
        pytest.param(0.0, -0.1, "explore_beta=-0.1 .*0 <= explore_beta < 1", id="beta-negative"),
        pytest.param(0.0, math.nan, "explore_beta=nan .*0 <= explore_beta < 1", id="beta-nan"),
        pytest.param(1.0, 0.0, r"alpha=1.0 .*explore_beta=0.0 .*\|alpha\| < .* = 1\. Move", id="alpha-limit"),
        pytest.param(-5, 0.1, r"alpha=-5 .*explore_beta=0.1 .* = 1.11111\. .*raise explore_beta", id="alpha-low"),
        pytest.param(math.nan, 0.5, "alpha=nan is out of range", id="alpha-nan"),
    ],
)
def test_check_explore_refuses(alpha: float | str, explore_beta: float | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_explore(alpha, explore_beta)
    with pytest.raises(ValueError, match=message):
        resolve_explore(alpha, explore_beta)


def test_resolve_explore() -> None:
    assert resolve_explore(AUTO, AUTO) == (0.5, 0.01)
    numbers = resolve_explore(-5, 0.99)
    assert numbers == (-5.0, 0.99)
    assert all(type(number) is float for number in numbers)


@pytest.mark.parametrize(
    ("alpha", "explore_beta"),
    [(-5.0, 0.99), (0.5, 0.01), (-2.0, 0.9), (0.9, 0.0), (0.0, 0.5)],
)
def test_variance_factor_is_that_of_two_buffer_noise(alpha: float, explore_beta: float) -> None:
    # g + alpha * a is linear in the gradients: the variance is the sum of the squares of their weights
    weights = torch.zeros(4_000, dtype=torch.float64)
    a = torch.zeros_like(weights)
    previous = torch.zeros_like(weights)
    for k in range(len(weights)):
        g = torch.zeros_like(weights)
        g[k] = 1.0
        a = explore_beta * a + (1 - explore_beta) * (g - previous)
        previous = g
    weights = g + alpha * a
    assert variance_factor(alpha, explore_beta) == pytest.approx(weights.square().sum().item(), rel=1e-9)


def test_variance_factor_refuses() -> None:
    with pytest.raises(ValueError, match="resolve_explore"):
        variance_factor(AUTO, AUTO)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="alpha=3.0"):
        variance_factor(3.0, 0.5)


def test_needs_the_standard_library_only() -> None:
    imports = [node for node in ast.walk(ast.parse(inspect.getsource(explore)))]
    modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= sys.stdlib_module_names
