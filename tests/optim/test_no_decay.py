"""no_decay_groups: which parameters decay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_gradhist.optim import ALTO, AdamE
from lightning_gradhist.optim.e_adaptor import EAdaptor
from lightning_gradhist.optim.no_decay import no_decay_groups


def names(groups: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Names with decay, and without."""
    found: tuple[list[str], list[str]] = ([], [])
    for group in groups:
        found[group["weight_decay"] == 0.0].extend(name for name, _ in group["params"])
    return found


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.zeros(5, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm(4)
        self.debias = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 7, bias=False)


EXPECTED_DECAY = [
    "position",
    "tokens.weight",
    "attention.in_proj_weight",
    "attention.out_proj.weight",
    "debias.weight",
    "head.weight",
]


def test_two_groups_for_any_torch_optimizer() -> None:
    module = Block()
    groups = no_decay_groups(module, 0.1)
    decay, no_decay = names(groups)
    assert decay == EXPECTED_DECAY
    assert no_decay == [name for name, _ in module.named_parameters() if name not in EXPECTED_DECAY]
    assert "attention.bias_k" in no_decay  # 3-d
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    for make in (torch.optim.AdamW, torch.optim.SGD, AdamE, ALTO, lambda p: EAdaptor(torch.optim.SGD(p))):
        optimizer = make(no_decay_groups(module, 0.1))
        assert [group["param_names"] for group in optimizer.param_groups] == [decay, no_decay]
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.LayerNorm((3, 4)), id="LayerNorm"),
        pytest.param(lambda: nn.RMSNorm((3, 4)), id="RMSNorm"),
        pytest.param(lambda: nn.GroupNorm(2, 4), id="GroupNorm"),
        pytest.param(lambda: nn.BatchNorm1d(4), id="BatchNorm1d"),
        pytest.param(lambda: nn.BatchNorm2d(4), id="BatchNorm2d"),
        pytest.param(lambda: nn.BatchNorm3d(4), id="BatchNorm3d"),
        pytest.param(lambda: nn.SyncBatchNorm(4), id="SyncBatchNorm"),
        pytest.param(lambda: nn.InstanceNorm1d(4, affine=True), id="InstanceNorm1d"),
        pytest.param(lambda: nn.InstanceNorm2d(4, affine=True), id="InstanceNorm2d"),
        pytest.param(lambda: nn.InstanceNorm3d(4, affine=True), id="InstanceNorm3d"),
        pytest.param(lambda: type("Own", (nn.LayerNorm,), {})((3, 4)), id="subclass"),
    ],
)
def test_norm_layers_do_not_decay(make: Callable[[], nn.Module]) -> None:
    layer = make()
    layer.register_parameter("table", nn.Parameter(torch.ones(2, 2)))  # whatever the shape
    decay, no_decay = names(no_decay_groups(nn.Sequential(nn.Linear(2, 2, bias=False), layer), 0.1))
    assert decay == ["0.weight"]
    assert no_decay == [f"1.{name}" for name, _ in layer.named_parameters()]
    assert len(no_decay) >= 2


def test_layers_without_parameters_are_no_obstacle() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LocalResponseNorm(2), nn.LayerNorm(2, elementwise_affine=False))
    assert names(no_decay_groups(module, 0.1)) == (["0.weight"], ["0.bias"])


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_on_request(make: Any) -> None:
    module = nn.Sequential(make(3, 2), nn.Linear(2, 2))
    assert names(no_decay_groups(module, 0.1)) == (["0.weight", "1.weight"], ["1.bias"])
    assert names(no_decay_groups(module, 0.1, embeddings=True)) == (["1.weight"], ["0.weight", "1.bias"])


@pytest.mark.parametrize("patterns", [r"^position$", [r"^position$", r"norm"]])
def test_patterns(patterns: Any) -> None:
    decay, no_decay = names(no_decay_groups(Block(), 0.1, patterns=patterns))
    assert decay == EXPECTED_DECAY[1:] and "position" in no_decay


def test_the_word_bias_is_looked_for_in_the_last_part_only() -> None:
    module = nn.ModuleDict({"bias": nn.Linear(2, 2), "unbiased": nn.Linear(2, 2)})
    module.register_parameter("relative_bias_table", nn.Parameter(torch.zeros(3, 3)))
    module.register_parameter("biased", nn.Parameter(torch.zeros(3, 3)))
    decay, no_decay = names(no_decay_groups(module, 0.1))
    assert decay == ["biased", "bias.weight", "unbiased.weight"]
    assert no_decay == ["relative_bias_table", "bias.bias", "unbiased.bias"]


@pytest.mark.parametrize("embedding_first", [True, False])
def test_tied_parameters_appear_once_and_any_use_decides(embedding_first: bool) -> None:
    module = nn.ModuleDict()
    layers = {"tokens": nn.Embedding(7, 4), "head": nn.Linear(4, 7, bias=False)}
    layers["head"].weight = layers["tokens"].weight
    for name in layers if embedding_first else reversed(layers):
        module[name] = layers[name]
    first = "tokens.weight" if embedding_first else "head.weight"
    assert names(no_decay_groups(module, 0.1)) == ([first], [])
    assert names(no_decay_groups(module, 0.1, embeddings=True)) == ([], [first])
    assert names(no_decay_groups(module, 0.1, patterns=r"head\.weight")) == ([], [first])
    AdamE(no_decay_groups(module, 0.1))  # torch warns of duplicates, and warnings are errors here


def test_a_parameter_with_two_names_in_one_layer() -> None:
    module = nn.Module()
    module.table = nn.Parameter(torch.zeros(3, 3))
    module.position_bias = module.table
    assert names(no_decay_groups(module, 0.1)) == ([], ["table"])


def test_a_shared_layer_is_taken_once() -> None:
    shared = nn.Linear(2, 2)
    module = nn.Sequential(shared, nn.ReLU(), shared)
    assert names(no_decay_groups(module, 0.1)) == (["0.weight"], ["0.bias"])
    assert names(no_decay_groups(module, 0.1, patterns=r"^2\.")) == ([], ["0.weight", "0.bias"])


def test_frozen_parameters_are_left_out() -> None:
    module = Block()
    module.head.requires_grad_(False)
    module.norm.requires_grad_(False)
    groups = no_decay_groups(module, 0.1, patterns="head")
    found = {name for part in names(groups) for name in part}
    assert found == {name for name, param in module.named_parameters() if param.requires_grad}
    assert no_decay_groups(nn.Linear(2, 2).requires_grad_(False), 0.1) == []


@pytest.mark.parametrize(
    ("module", "weight_decays"),
    [
        pytest.param(nn.LayerNorm(3), [0.0], id="no-decay-only"),
        pytest.param(nn.Linear(3, 2, bias=False), [0.1], id="decay-only"),
    ],
)
def test_an_empty_group_is_left_out(module: nn.Module, weight_decays: list[float]) -> None:
    optimizer = torch.optim.AdamW(no_decay_groups(module, 0.1))
    assert [group["weight_decay"] for group in optimizer.param_groups] == weight_decays


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        Block(),
        nn.LSTM(4, 3, 2),
        nn.TransformerEncoderLayer(4, 2, 8),
        nn.PReLU(),
        nn.Conv2d(2, 3, 3),
        parametrizations.weight_norm(nn.Linear(3, 2)),
    )
    groups = no_decay_groups(module, 0.1, embeddings=True)
    params = [id(param) for group in groups for _, param in group["params"]]
    assert sorted(params) == sorted(id(param) for param in module.parameters())
    assert {name: param for group in groups for name, param in group["params"]}.keys() == dict(
        module.named_parameters()
    ).keys()
    assert [names(no_decay_groups(module, 0.1)) for _ in range(3)] == [names(no_decay_groups(module, 0.1))] * 3


def test_options_of_the_group_without_decay_reach_it_alone() -> None:
    module = nn.Linear(30, 20)
    optimizer = ALTO(no_decay_groups(module, 0.1, layerwise=False, lr=0.5), lr=0.01)
    assert [group["layerwise"] for group in optimizer.param_groups] == [True, False]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]
    before = module.weight.detach().clone()
    module(torch.randn(8, 30)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close((module.weight.detach() - before).norm(), 0.01 * before.norm(), rtol=1e-4, atol=0)


def test_checkpoints_go_by_name_and_without() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer = AdamE(no_decay_groups(module, 0.1))
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert [group["param_names"] for group in state_dict["param_groups"]] == [
        ["0.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]
    unnamed = [{"params": [param for _, param in g["params"]]} for g in no_decay_groups(module, 0.1)]
    AdamE(unnamed).load_state_dict(state_dict)


class FullyShardedDataParallel(nn.Module):
    """By the name of torch's class."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.zeros(6))


@pytest.mark.parametrize(
    ("module", "arguments", "error", "message"),
    [
        pytest.param(nn.Linear(2, 2), {"weight_decay": -0.1}, ValueError, "weight_decay=-0.1 is out of", id="negative"),
        pytest.param(nn.Linear(2, 2), {"weight_decay": float("nan")}, ValueError, "weight_decay=nan", id="nan"),
        pytest.param(
            nn.Linear(2, 2),
            {"weight_decay": 0.1, "patterns": ["weight", "norm"]},
            ValueError,
            "'norm' is found in no parameter name of Linear.*'weight', 'bias'",
            id="idle-pattern",
        ),
        pytest.param(
            nn.Linear(2, 2), {"weight_decay": 0.1, "params": []}, TypeError, "params is no option", id="params"
        ),
        pytest.param(
            nn.Sequential(FullyShardedDataParallel()),
            {"weight_decay": 0.1},
            ValueError,
            r"FSDP1-wrapped layers \(0\).*fully_shard",
            id="fsdp1",
        ),
    ],
)
def test_refusals(module: nn.Module, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        no_decay_groups(module, **arguments)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_parameters_are_refused() -> None:
    module = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="parameter 0.weight is lazy"):
        no_decay_groups(module, 0.1)
    module(torch.randn(1, 3))
    assert names(no_decay_groups(module, 0.1)) == (["0.weight"], ["0.bias"])
