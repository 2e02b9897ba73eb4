"""The numbers of steps of a group lie in one tensor, of which those in the state are views; nobody must notice."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_gradhist import ALTO, AdamE

OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [ALTO, AdamE])


def made(optimizer_class: Any) -> Any:
    torch.manual_seed(0)
    return optimizer_class([Parameter(torch.randn(3)) for _ in range(4)], lr=0.01)


def step(optimizer: Any, without: int | None = None) -> None:
    for index, param in enumerate(optimizer.param_groups[0]["params"]):
        param.grad = None if index == without else torch.ones_like(param)
    optimizer.step()


def numbers(optimizer: Any) -> list[float]:
    return [optimizer.state[param]["step"].item() for param in optimizer.param_groups[0]["params"]]


@OPTIMIZERS
def test_parameters_without_a_gradient_are_left_behind(optimizer_class: Any) -> None:
    optimizer = made(optimizer_class)
    for without in (None, 1, None, 3, 3, None):
        step(optimizer, without)
    assert numbers(optimizer) == [6, 5, 6, 4]


@OPTIMIZERS
def test_a_number_that_is_set_in_place_is_that_of_its_parameter_alone(optimizer_class: Any) -> None:
    optimizer = made(optimizer_class)
    step(optimizer)
    optimizer.state[optimizer.param_groups[0]["params"][2]]["step"].zero_()
    step(optimizer)
    assert numbers(optimizer) == [2, 2, 1, 2]


@OPTIMIZERS
@pytest.mark.parametrize("parameters", [1, 3])
def test_numbers_stay_in_their_place(optimizer_class: Any, parameters: int) -> None:
    optimizer = optimizer_class([Parameter(torch.ones(2)) for _ in range(parameters)], lr=0.01)
    step(optimizer)
    held = [state["step"] for state in optimizer.state.values()]
    step(optimizer)
    assert [number.item() for number in held] == [2] * parameters


def by_state_dict(optimizer: Any) -> Any:
    other = made(type(optimizer))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    return other


@OPTIMIZERS
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), by_state_dict],
    ids=["copy", "pickle", "state"],
)
def test_another_optimizer_counts_for_itself(optimizer_class: Any, again: Callable[[Any], Any]) -> None:
    optimizer = made(optimizer_class)
    step(optimizer)
    other = again(optimizer)
    for _ in range(2):
        step(other)
    assert numbers(optimizer) == [1] * 4 and numbers(other) == [3] * 4


@OPTIMIZERS
def test_a_checkpoint_of_one_parameter_is_small(optimizer_class: Any) -> None:
    """Tools that save tensors one by one copy views of a larger memory; torch.save of all writes that memory once."""
    torch.manual_seed(0)
    optimizer = optimizer_class([Parameter(torch.randn(1)) for _ in range(500)], lr=0.01)
    step(optimizer)
    buffer = io.BytesIO()
    torch.save({index: state["step"] for index, state in optimizer.state_dict()["state"].items()}, buffer)
    assert buffer.tell() < 500 * 200
