from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_gradhist.callbacks.monitor.rows import Rows, distinct_rows
from lightning_gradhist.callbacks.parameters import optimizer_parameters, plain_name


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(2), nn.Linear(2, 2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(2))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)


def rows(
    group_by: Any = None, include: str | None = None, exclude: str | None = None, model: Any = None
) -> dict[str, str]:
    model = model or Model()
    made = pickle.loads(pickle.dumps(Rows(group_by, include, exclude)))  # as strategies that spawn send it to the ranks
    found = made.of(model, [plain_name(name) for name, _ in model.named_parameters()])
    assert made.check(model) == len(set(found.values()))
    return found


def layer_number(name: str) -> str | None:
    return name.split(".")[1] if name.startswith("blocks") else None


def depth(name: str) -> int:
    return name.count(".")


def is_block(name: str) -> bool:
    return name.startswith("blocks")


BLOCK = ["norm.weight", "norm.bias", "mix.weight", "mix.bias"]
NAMES = ["token", *(f"blocks.{i}.{name}" for i in (0, 1) for name in BLOCK), "head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("group_by", "expected"),
    [
        pytest.param(None, NAMES, id="by parameter"),
        pytest.param(1, ["token"] + 8 * ["blocks"] + 2 * ["head"], id="children"),
        pytest.param(2, ["token"] + 4 * ["blocks.0"] + 4 * ["blocks.1"] + 2 * ["head"], id="depth"),
        pytest.param(9, [name.rpartition(".")[0] or name for name in NAMES], id="layers"),
        pytest.param(
            r"(\w+)\.weight",
            ["token", "norm", NAMES[2], "mix", NAMES[4], "norm", NAMES[6], "mix", NAMES[8], "head", "head.bias"],
            id="first group",
        ),  # fmt: skip
        pytest.param(
            "norm|mix", ["token", *2 * ["norm", "norm", "mix", "mix"], "head.weight", "head.bias"], id="match"
        ),
        pytest.param(layer_number, ["token", *4 * ["0"], *4 * ["1"], "head.weight", "head.bias"], id="function"),
        pytest.param(depth, ["0", *8 * ["3"], *2 * ["1"]], id="function that counts"),
        pytest.param(is_block, ["token", *8 * ["True"], "head.weight", "head.bias"], id="function that asks"),
    ],
)
def test_rows_are_groups(group_by: Any, expected: list[str]) -> None:
    assert rows(group_by) == dict(zip(NAMES, expected, strict=True))


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        pytest.param("LayerNorm", None, [n for n in NAMES if "norm" in n], id="class"),
        pytest.param("Linear", None, [n for n in NAMES if "mix" in n or "head" in n], id="class and its heirs"),
        pytest.param(None, ".*Norm|bias", [n for n in NAMES if "norm" not in n and "bias" not in n], id="exclude"),
        pytest.param(r"blocks\.1", "Linear", NAMES[5:7], id="both"),
        pytest.param("Line", "token", None, id="a class name counts in whole"),
    ],
)
def test_filters_choose_by_name_or_class(include: str | None, exclude: str | None, expected: list[str] | None) -> None:
    if expected is None:
        with pytest.raises(MisconfigurationException, match="include='Line' matches no .*norm.weight.*LayerNorm"):
            rows(None, include, exclude)
    else:
        assert list(rows(None, include, exclude)) == expected


def test_the_weights_of_parametrized_layers_are_found_by_the_class_of_the_layer() -> None:
    model = Model()
    nn.utils.parametrizations.weight_norm(model.blocks[0].mix)
    nn.utils.parametrizations.spectral_norm(model.head)
    found = rows(None, "Linear", "blocks.1", model=model)
    assert [name.rpartition("mix.")[2] for name in found] == [
        "bias",
        "parametrizations.weight.original0",
        "parametrizations.weight.original1",
        "head.bias",
        "head.parametrizations.weight.original",
    ]
    assert set(rows(None, None, ".*Norm|token", model=model)) >= set(found)


def test_no_name_of_a_user_is_changed_into_another() -> None:
    model = nn.ModuleDict({"my_orig_mod": nn.Linear(2, 2), "myweight": nn.Linear(2, 2)})
    model["_orig_mod"] = nn.ParameterDict({"bias": torch.zeros(1)})
    model.bias = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    model.parameter_6 = nn.Parameter(torch.zeros(1))  # the name of the optimizer's last, which is of no module
    optimizer.add_param_group({"params": [model.parameter_6]})
    names = [name for name, _ in model.named_parameters()]
    assert set(optimizer_parameters(model, optimizer)) == {*names, "_parameter_6"} and "_orig_mod.bias" in names


def test_a_parameter_without_a_group_is_in_no_group() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2)})
    model.weight = nn.Parameter(torch.zeros(3))
    model.parameter_weight = nn.Parameter(torch.zeros(3))
    found = rows(r"\.(weight|bias)$", model=model)
    assert found["head.weight"] == "weight" and found["weight"] == "parameter_parameter_weight"
    assert len(set(found.values())) == 4


def test_filters_that_leave_nothing_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="include and exclude together leave no parameter"):
        rows(None, "norm", "blocks")


def test_a_compiled_layer_keeps_its_name_and_class() -> None:
    model = Model()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.head = torch.compile(model.head, backend="eager")
    assert list(rows(2, "Linear", model=model).values()) == 2 * ["blocks.0"] + 2 * ["blocks.1"] + 2 * ["head"]


def test_a_filter_may_name_what_is_frozen_at_the_start() -> None:
    model = Model()
    model.blocks.requires_grad_(False)
    assert Rows(None, "blocks", None).check(model) == 0
    assert Rows(None, None, "blocks").check(model) == 3


def test_no_row_has_the_name_of_what_is_over_all_rows() -> None:
    for group in ("all", "all_1"):
        with pytest.raises(MisconfigurationException, match=f"the group '{group}', which is the name of"):
            Rows(lambda name, group=group: group, None, None).check(Model())
    model = Model()
    model.all = nn.Parameter(torch.zeros(1))
    assert rows(model=model)["all"] == "parameter_all"


def test_a_row_distinct_rows_is_no_other_row() -> None:
    rows = [{"a": "conv", "b": "conv_0"}, {"c": "conv"}]
    assert [distinct_rows(rows, index) for index in (0, 1)] == [{"a": "conv_0_0", "b": "conv_0"}, {"c": "conv_1"}]
