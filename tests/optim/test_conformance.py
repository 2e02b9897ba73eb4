"""AdamE, ALTO and EAdaptor under the conformance suite of torch's own optimizers.

torch's wheel has the suite's data, ``torch.testing._internal.common_optimizers``, and not its tests
(``test/test_optim.py``). The tests here bear the names of those, are written anew for pytest, and are fed by
an ``OptimizerInfo`` of each class. What does not apply is skipped by name, with the reason.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_flatten

from lightning_gradhist.optim import ALTO, AdamE
from lightning_gradhist.optim.e_adaptor import EAdaptor

pytest.importorskip("expecttest")  # torch's suite imports it
from torch.testing._internal import common_optimizers as suite  # noqa: E402

pytestmark = pytest.mark.slow

# that import freezes torch.backends' flags, which Lightning's Trainer sets
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True


# what the suite is fed


class AdaptedAdamW(EAdaptor):
    """EAdaptor under a signature of its own, as the suite constructs optimizers."""

    def __init__(
        self, params: Any, lr: Any = 1e-3, *, alpha: Any = "auto", explore_beta: Any = "auto", **options: Any
    ) -> None:
        super().__init__(torch.optim.AdamW(params, lr, **options), alpha, explore_beta)


class AdaptedSGD(EAdaptor):
    def __init__(
        self, params: Any, lr: Any = 1e-3, *, alpha: Any = "auto", explore_beta: Any = "auto", **options: Any
    ) -> None:
        super().__init__(torch.optim.SGD(params, lr, **options), alpha, explore_beta)


Inputs = Callable[..., list[Any]]


def inputs(*more: tuple[str, dict[str, Any]]) -> Inputs:
    """Every configuration without the flags that the tests set, as torch's own functions of this kind."""
    configurations: list[tuple[str, dict[str, Any]]] = [
        ("default", {}),
        ("non-default lr", {"lr": 0.01}),
        ("tensor lr", {"lr": torch.tensor(0.001)}),
        ("nonzero weight_decay", {"weight_decay": 0.1}),
        ("maximize", {"weight_decay": 0.1, "maximize": True}),
        ("explore", {"alpha": -5.0, "explore_beta": 0.99}),
        ("explore, weight_decay", {"alpha": -0.5, "explore_beta": 0.0, "weight_decay": 0.9}),
        *more,
    ]

    def make(device: Any = None, dtype: Any = None) -> list[Any]:
        return [
            suite.OptimizerInput(params=None, kwargs=copy.deepcopy(kwargs), desc=desc)
            for desc, kwargs in configurations
        ]

    return make


def error_inputs(*ours: tuple[str, dict[str, Any], str]) -> Inputs:
    """torch's error inputs for all optimizers, with our message for a tensor lr, and our own."""

    def make(device: str, dtype: torch.dtype) -> list[Any]:
        common = suite.get_error_inputs_for_all_optims(device, dtype)
        kept = [error for error in common if "Tensor lr" not in error.optimizer_error_input.desc]
        return kept + [
            suite.ErrorOptimizerInput(
                suite.OptimizerInput(params=None, kwargs=kwargs, desc=desc), error_type=ValueError, error_regex=regex
            )
            for desc, kwargs, regex in ours
        ]

    return make


EXPLORE_ERRORS = [
    ("alpha out of range", {"alpha": 2.0, "explore_beta": 0.1}, r"\|alpha\| < 1/\(1 - explore_beta\)"),
    ("explore_beta out of range", {"alpha": 0.5, "explore_beta": 1.0}, "0 <= explore_beta < 1"),
]
ADAM_ERRORS = [
    ("tensor lr of two elements", {"lr": torch.tensor([0.001, 0.001])}, "a number or a tensor of one element"),
    ("beta1", {"betas": (1.0, 0.0)}, r"betas\[0\]=1.0 is out of range"),
    ("weight_decay", {"weight_decay": -1}, "weight_decay=-1 is out of range"),
    *EXPLORE_ERRORS,
]
CAPTURABLE = ("capturable, tensor lr", {"capturable": True, "lr": torch.tensor(0.001)})


def info(optim_cls: Any, optim_inputs: Inputs, optim_errors: Inputs, **options: Any) -> Any:
    return suite.OptimizerInfo(
        optim_cls,
        optim_inputs_func=optim_inputs,
        optim_error_inputs_func=optim_errors,
        scheduler_inputs=(
            [lambda opt: lr_scheduler.StepLR(opt, gamma=0.9, step_size=10)],
            [
                lambda opt: lr_scheduler.LinearLR(opt, start_factor=0.4, total_iters=4),
                lambda opt: lr_scheduler.ReduceLROnPlateau(opt),
            ],
        ),
        supported_impls=("foreach",),  # fused compiles for each kind of input: test_backends.py has some of them
        not_og_supported_flags=("foreach", "fused", "maximize", "capturable"),
        supports_complex=False,
        has_capturable_arg=optim_cls is not AdaptedSGD,
        **options,
    )


optim_db = [
    info(
        AdamE,
        inputs(CAPTURABLE, ("coupled decay", {"weight_decay": 0.1, "decoupled_weight_decay": False})),
        error_inputs(*ADAM_ERRORS),
    ),
    info(
        ALTO,
        inputs(
            CAPTURABLE,
            ("not layerwise", {"layerwise": False}),
            ("vanilla", {"bias_correction": False}),
            ("no decay", {"weight_decay": 0.0}),
        ),
        error_inputs(*ADAM_ERRORS),
    ),
    info(AdaptedAdamW, inputs(("amsgrad", {"amsgrad": True})), error_inputs(*EXPLORE_ERRORS)),
    info(AdaptedSGD, inputs(("momentum", {"momentum": 0.9})), error_inputs(*EXPLORE_ERRORS)),
]
OURS = optim_db[:2]  # EAdaptor leaves much to its inner optimizer


def by_name(infos: list[Any]) -> Any:
    return pytest.mark.parametrize("optim_info", [pytest.param(one, id=one.name) for one in infos])


def all_inputs(infos: list[Any], flags: bool = True) -> Any:
    """Every class with every configuration, and with every flag (foreach) where ``flags``."""
    params = []
    for one in infos:
        found = (
            suite._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, one)
            if flags and one.name != "AdaptedAdamW"  # torch's AdamW refuses a tensor lr with foreach
            else one.optim_inputs_func("cpu")
        )
        params += [pytest.param(one, each.kwargs, id=f"{one.name}-{each.desc}") for each in found]
    return pytest.mark.parametrize(("optim_info", "kwargs"), params)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Problem:
    """A small regression without a minimum at hand: weight and bias, contiguous or not."""

    def __init__(self, contiguous: bool = True, dtype: torch.dtype = torch.float32) -> None:
        weight, bias = torch.randn(10, 5, 2), torch.randn(10, 2)
        self.weight = Parameter((weight[..., 0].clone() if contiguous else weight[..., 0]).to(dtype))
        self.bias = Parameter((bias[..., 0].clone() if contiguous else bias[..., 0]).to(dtype))
        self.input = torch.randn(5).to(dtype)

    @property
    def params(self) -> list[Parameter]:
        return [self.weight, self.bias]

    def named(self) -> list[tuple[str, Parameter]]:
        return [("weight", self.weight), ("bias", self.bias)]

    def loss(self) -> Tensor:
        return (self.weight.mv(self.input) + self.bias).square().sum()

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def run() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return run

    def copy(self) -> Problem:
        other = copy.copy(self)
        other.weight = Parameter(self.weight.detach().clone())
        other.bias = Parameter(self.bias.detach().clone())
        return other

    def train(self, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
        for _ in range(steps):
            optimizer.step(self.closure(optimizer))
        return [param.detach().clone() for param in self.params]


def fresh(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Hyper-parameters whose tensors are not shared between optimizers."""
    return copy.deepcopy(kwargs)


def assert_same(one: Any, other: Any) -> None:
    """The same structure, the same bits in its tensors, and equal other values."""
    leaves, structure = tree_flatten(one)
    other_leaves, other_structure = tree_flatten(other)
    assert structure == other_structure
    for leaf, other_leaf in zip(leaves, other_leaves, strict=True):
        if isinstance(leaf, Tensor):
            torch.testing.assert_close(leaf, other_leaf, rtol=0, atol=0)
        else:
            assert leaf == other_leaf


def test_the_suite_leaves_no_trace() -> None:
    assert not torch.backends.flags_frozen()
    assert torch.get_default_dtype() is torch.float32


# by the names of test_optim.py


@by_name(optim_db)
def test_optim_infos_do_not_specify_global_cliquey_kwargs(optim_info: Any) -> None:
    for one in optim_info.optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & one.kwargs.keys()


ERRORS = [
    pytest.param(one, error, id=f"{one.name}-{error.optimizer_error_input.desc}")
    for one in optim_db
    for error in one.optim_error_inputs_func("cpu", torch.float32)
]


@pytest.mark.parametrize(("optim_info", "error"), ERRORS)
def test_errors(optim_info: Any, error: Any) -> None:
    given_input = error.optimizer_error_input
    params = [Parameter(torch.randn(2, 2))] if given_input.params is None else given_input.params
    raises = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
    with raises(error.error_type, match=error.error_regex):
        optim_info.optim_cls(params, **given_input.kwargs)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@pytest.mark.parametrize("with_lrsched", [False, True], ids=["constant", "scheduled"])
@all_inputs(optim_db, flags=False)
def test_forloop_goes_right_direction(
    optim_info: Any, kwargs: dict[str, Any], contiguous: bool, with_lrsched: bool
) -> None:
    for make_schedulers in optim_info.scheduler_inputs if with_lrsched else [[]]:
        problem = Problem(contiguous)
        optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
        schedulers = [make(optimizer) for make in make_schedulers]
        closure = problem.closure(optimizer)
        before = closure().item()
        for _ in range(8):
            loss = optimizer.step(closure)
            assert isinstance(loss, Tensor)
            for scheduler in schedulers:
                if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(loss.detach())
                else:
                    scheduler.step()
        after = closure().item()
        assert after > before if kwargs.get("maximize") else after < before


@by_name(optim_db)
def test_param_group_with_lrscheduler_goes_right_direction(optim_info: Any) -> None:
    for make_schedulers in optim_info.scheduler_inputs:
        problem = Problem()
        groups: list[dict[str, Any]] = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01}]
        optimizer = optim_info.optim_cls(groups, lr=0.001)
        schedulers = [make(optimizer) for make in make_schedulers]
        closure = problem.closure(optimizer)
        before = closure().item()
        for _ in range(20):
            loss = optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step(*[loss.detach()] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))
        assert closure().item() < before


@pytest.mark.parametrize("num_dim", [0, 1, 2])
@by_name(optim_db)
def test_tensor_lr(optim_info: Any, num_dim: int) -> None:
    for one in optim_info.optim_inputs_func("cpu"):
        problem = Problem()
        other = problem.copy()
        kwargs = {**fresh(one.kwargs), "lr": torch.full((1,) * num_dim, 0.01)}
        tensor = optim_info.optim_cls(problem.params, **kwargs)
        number = optim_info.optim_cls(other.params, **{**kwargs, "lr": 0.01})
        torch.testing.assert_close(problem.train(tensor, 5), other.train(number, 5))
        assert tensor.param_groups[0]["lr"] is kwargs["lr"] and kwargs["lr"].item() == pytest.approx(0.01)


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
@all_inputs(optim_db, flags=False)
def test_foreach_matches_forloop(optim_info: Any, kwargs: dict[str, Any], contiguous: bool) -> None:
    start = Problem(contiguous)
    trained = []
    for foreach in (False, True, None):
        if foreach and optim_info.name == "AdaptedAdamW" and isinstance(kwargs.get("lr"), Tensor):
            continue  # torch's AdamW refuses it
        problem = start.copy()
        optimizer = optim_info.optim_cls(problem.params, **{**fresh(kwargs), "foreach": foreach})
        trained.append((problem.train(optimizer, 7), optimizer.state_dict()["state"]))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0])


@pytest.mark.parametrize("foreach", [False, True, None])
@by_name(optim_db)
def test_mixed_device_dtype(optim_info: Any, foreach: bool | None) -> None:
    """Of devices there is one here; dtypes in one group may be mixed."""
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
    values, grads = torch.randn(6, 4), torch.randn(6, 4)
    for one in optim_info.optim_inputs_func("cpu"):
        if foreach and optim_info.name == "AdaptedAdamW" and isinstance(one.kwargs.get("lr"), Tensor):
            continue
        mixed = [Parameter(values.to(dtype)) for dtype in dtypes]
        alone = [Parameter(values.to(dtype)) for dtype in dtypes]
        for param in (*mixed, *alone):
            param.grad = grads.to(param.dtype)
        kwargs = {**fresh(one.kwargs), "foreach": foreach, "eps": 1e-3}
        if optim_info.name == "AdaptedSGD":
            del kwargs["eps"]
        together = optim_info.optim_cls(mixed, **fresh(kwargs))
        single = [optim_info.optim_cls([param], **fresh(kwargs)) for param in alone]
        for _ in range(3):
            for optimizer in (together, *single):
                optimizer.step()
        torch.testing.assert_close([p.detach() for p in mixed], [p.detach() for p in alone])


@by_name(optim_db)
def test_set_default_dtype_works_with_foreach(optim_info: Any) -> None:
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.float16):
            torch.set_default_dtype(dtype)
            param = Parameter(torch.randn(3, 2, dtype=torch.float32))
            param.grad = torch.ones_like(param)
            optimizer = optim_info.optim_cls([param], foreach=True)
            optimizer.step()
            state = optimizer.state[param]
            assert param.isfinite().all()
            assert state["exp_avg_grad"].dtype is torch.float32
            assert optim_info not in OURS or state["step"].dtype is torch.float32
    finally:
        torch.set_default_dtype(default)


@by_name(optim_db)
def test_param_groups_weight_decay(optim_info: Any) -> None:
    problem = Problem()
    groups: list[dict[str, Any]] = [{"params": [problem.weight], "weight_decay": 0.5}, {"params": [problem.bias]}]
    optimizer = optim_info.optim_cls(groups, weight_decay=0.0, lr=0.01)
    before = problem.loss().item()
    with torch.no_grad():
        assert optimizer.step(problem.closure(optimizer)).item() == pytest.approx(before)
    problem.train(optimizer, 20)
    assert problem.loss() < before
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@by_name(optim_db)
def test_param_groups_lr(optim_info: Any) -> None:
    param, frozen, late = Parameter(torch.ones(3)), Parameter(torch.ones(3)), Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [{"params": [param]}, {"params": [frozen], "lr": 0.0}]
    optimizer = optim_info.optim_cls(groups, lr=0.01)
    optimizer.add_param_group({"params": late, "lr": 0.1})
    for one in (param, frozen, late):
        one.grad = torch.ones(3)
    optimizer.step()
    moved = [(1 - one.detach()).abs().max().item() for one in (param, frozen, late)]
    assert moved[1] == 0.0 and moved[2] == pytest.approx(10 * moved[0], rel=1e-4) and moved[0] > 0


@all_inputs(optim_db)
def test_step_is_noop_when_params_have_no_grad(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    before = [param.detach().clone() for param in problem.params]
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    optimizer.step()
    assert optimizer.step(lambda: 1.0) == 1.0
    assert_same([param.detach() for param in problem.params], before)
    assert not any(optimizer.state.values())


@all_inputs(optim_db)
def test_step_is_noop_for_empty_grads(optim_info: Any, kwargs: dict[str, Any]) -> None:
    param = Parameter(torch.randn(5, 0, 2))
    param.grad = torch.randn_like(param)
    optimizer = optim_info.optim_cls([param], **fresh(kwargs))
    optimizer.step()
    assert param.shape == (5, 0, 2)


@all_inputs(optim_db)
def test_step_is_noop_for_zero_grads(optim_info: Any, kwargs: dict[str, Any]) -> None:
    param = Parameter(torch.randn(5, 1))
    before = param.detach().clone()
    kwargs = {**fresh(kwargs), "weight_decay": 0.0}
    optimizer = optim_info.optim_cls([param], **kwargs)
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert_same(param.detach(), before)


@all_inputs(optim_db)
def test_optimizer_can_be_printed(optim_info: Any, kwargs: dict[str, Any]) -> None:
    groups: list[dict[str, Any]] = [{"params": [param]} for param in Problem().params]
    text = repr(optim_info.optim_cls(groups, **fresh(kwargs)))
    assert "Parameter Group 1" in text and f"alpha: {kwargs.get('alpha', 'auto')}" in text


@pytest.mark.parametrize("names", [(False, False), (True, False), (False, True)], ids=str)
@all_inputs(optim_db, flags=False)
def test_state_dict_deterministic(optim_info: Any, kwargs: dict[str, Any], names: tuple[bool, bool]) -> None:
    """Named or not, on either side (in test_optim.py also test_can_load_from_to_named_state_dict)."""
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.named() if names[0] else problem.params, **fresh(kwargs))
    problem.train(optimizer, 5)
    other_problem = problem.copy()
    other = optim_info.optim_cls(other_problem.named() if names[1] else other_problem.params, **fresh(kwargs))
    state_dict = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    assert_same(state_dict["state"], kept["state"])
    if isinstance(kwargs.get("lr"), Tensor):
        assert other.param_groups[0]["lr"] is not state_dict["param_groups"][0]["lr"]
    for _ in range(5):
        assert_same(problem.train(optimizer, 1), other_problem.train(other, 1))
    one, two = optimizer.state_dict(), other.state_dict()
    for group in (*one["param_groups"], *two["param_groups"]):
        group.pop("param_names", None)
    assert_same(one, two)
    # the same parameter twice is packed the same
    other.param_groups.extend(other.param_groups)
    assert_same(other.state_dict()["param_groups"][0]["params"], other.state_dict()["param_groups"][-1]["params"])


@all_inputs(optim_db)
def test_can_load_older_state_dict(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    problem.train(optimizer, 2)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for group in state_dict["param_groups"]:
        for flag in optim_info.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(state_dict)
    problem.train(optimizer, 2)
    assert set(optim_info.not_og_supported_flags) & set(inspect.signature(optimizer.__init__).parameters) <= set(
        optimizer.param_groups[0]
    )


@all_inputs(optim_db)
def test_save_load_equality_with_weights_only(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    problem.train(optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=True), optimizer.state_dict())


@all_inputs(optim_db, flags=False)
def test_load_nontensor_step(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    problem.train(optimizer, 3)
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        if "step" in state:
            state["step"] = int(state["step"].item())
    other_problem = problem.copy()
    other = optim_info.optim_cls(other_problem.params, **fresh(kwargs))
    other.load_state_dict(state_dict)
    assert_same(other_problem.train(other, 3), problem.train(optimizer, 3))
    assert all(isinstance(state["step"], Tensor) for state in other.state.values() if "step" in state)


@by_name(optim_db)
def test_step_pre_hook(optim_info: Any) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params)
    seen: list[Any] = []
    handle = optimizer.register_step_pre_hook(lambda *arguments: seen.append(arguments))
    closure = problem.closure(optimizer)
    optimizer.step(closure)
    ((hooked, arguments, keywords),) = seen
    assert hooked is optimizer and arguments[-1] is closure and keywords == {}
    handle.remove()
    optimizer.step(closure)
    assert len(seen) == 1


@by_name(optim_db)
def test_step_pre_hook_may_replace_the_closure(optim_info: Any) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params)
    optimizer.register_step_pre_hook(lambda hooked, *_: ((hooked, lambda: "replaced"), {}))
    assert optimizer.step() == "replaced"


@by_name(optim_db)
def test_step_post_hook(optim_info: Any) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params)
    before = problem.weight.detach().clone()
    seen: list[bool] = []
    handle = optimizer.register_step_post_hook(lambda *_: seen.append(torch.equal(problem.weight, before)))
    problem.train(optimizer, 1)
    handle.remove()
    problem.train(optimizer, 1)
    assert seen == [False]


@by_name(optim_db)
def test_step_all_hooks(optim_info: Any) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params)
    seen: list[str] = []

    def note(word: str) -> Any:
        return lambda hooked, *_: seen.append(word) if hooked is optimizer else None

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    problem.train(optimizer, 1)
    for handle in handles:
        handle.remove()
    problem.train(optimizer, 1)
    assert seen == ["global pre", "pre", "post", "global post"]


@by_name(optim_db)
def test_state_dict_pre_post_hook(optim_info: Any) -> None:
    optimizer = optim_info.optim_cls(Problem().params)
    optimizer.register_state_dict_pre_hook(lambda hooked: hooked.param_groups[0].update(mark=1))
    optimizer.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "extra": 2})
    optimizer.register_state_dict_post_hook(lambda _, state_dict: state_dict.update(first="prepended"), prepend=True)
    state_dict = optimizer.state_dict()
    assert (state_dict["param_groups"][0]["mark"], state_dict["extra"], state_dict["first"]) == (1, 2, "prepended")


@by_name(optim_db)
def test_load_state_dict_pre_hook_and_prepend(optim_info: Any) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, lr=0.25)
    state_dict = optimizer.state_dict()

    def set_lr(value: float) -> Any:
        def hook(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
            return {**loaded, "param_groups": [{**group, "lr": value} for group in loaded["param_groups"]]}

        return hook

    handle = optimizer.register_load_state_dict_pre_hook(set_lr(0.5))
    optimizer.register_load_state_dict_pre_hook(set_lr(0.75), prepend=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.5
    handle.remove()
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.75
    assert state_dict["param_groups"][0]["lr"] == 0.25


@by_name(optim_db)
def test_load_state_dict_post_hook(optim_info: Any) -> None:
    optimizer = optim_info.optim_cls(Problem().params)
    optimizer.register_load_state_dict_post_hook(lambda hooked: hooked.param_groups[0].update(lr=0.125))
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.125


@all_inputs(optim_db)
def test_deepcopy_copies_all_public_attrs(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    problem.train(optimizer, 2)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):

        def public(one: Any) -> set[str]:
            return {name for name in vars(one) if not name.startswith("_")}

        assert public(other) == public(optimizer)
        assert_same(other.state_dict(), optimizer.state_dict())


@all_inputs(optim_db)
def test_non_empty_state(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    problem.train(optimizer, 1)
    for param in problem.params:
        assert optimizer.state[param]["exp_avg_grad"].shape == param.shape


@all_inputs(optim_db)
def test_grads_are_never_inplaced_into(optim_info: Any, kwargs: dict[str, Any]) -> None:
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params, **fresh(kwargs))
    for _ in range(3):
        problem.closure(optimizer)()
        grads = [param.grad for param in problem.params]
        versions = [grad._version for grad in grads if grad is not None]
        optimizer.step()
        for param, grad, version in zip(problem.params, grads, versions, strict=True):
            assert param.grad is grad is not None and grad._version == version


@by_name(optim_db)
def test_defaults_changed_to_foreach(optim_info: Any) -> None:
    """What None means is the class's choice; the key is there to be changed later."""
    problem = Problem()
    optimizer = optim_info.optim_cls(problem.params)
    assert optimizer.param_groups[0]["foreach"] is None
    problem.train(optimizer, 1)
    optimizer.param_groups[0]["foreach"] = False
    problem.train(optimizer, 1)


@all_inputs(OURS, flags=False)
def test_second_order_optims_return_consistent_types(optim_info: Any, kwargs: dict[str, Any]) -> None:
    """torch's is about LBFGS; of ours, what a closure returns is returned as it is."""
    optimizer = optim_info.optim_cls(Problem().params, **fresh(kwargs))
    for value in (1.5, torch.tensor(1.5), None, {"loss": 1.5}):
        assert optimizer.step(lambda value=value: value) is value


@pytest.mark.parametrize("device_of_scale", ["cpu"])
@by_name(optim_db)
def test_grad_scaling_autocast(optim_info: Any, device_of_scale: str) -> None:
    """From test_cuda.py's _grad_scaling_autocast_test, with the scaler that torch has for CPU."""
    problem = Problem()
    plain_problem = problem.copy()
    optimizer = optim_info.optim_cls(problem.params, lr=0.01)
    plain = optim_info.optim_cls(plain_problem.params, lr=0.01)
    scaler = torch.amp.GradScaler(device_of_scale, init_scale=128.0, growth_interval=2)
    for k in range(6):
        optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        if k == 3:
            assert problem.weight.grad is not None
            problem.weight.grad.fill_(torch.inf)
        before, state = [p.detach().clone() for p in problem.params], copy.deepcopy(optimizer.state_dict())
        scaler.step(optimizer)
        scaler.update()
        if k == 3:
            assert_same([p.detach() for p in problem.params], before)
            assert_same(optimizer.state_dict(), state)
        else:
            plain_problem.train(plain, 1)
    torch.testing.assert_close(
        [p.detach() for p in problem.params], [p.detach() for p in plain_problem.params], rtol=1e-4, atol=1e-5
    )


@by_name(OURS)
def test_capturable_matches_forloop(optim_info: Any) -> None:
    """On CPU: the device step in place of the host's (test_cuda.py: test_graph_optims_with_...)."""
    for one in optim_info.optim_inputs_func("cpu"):
        start = Problem()
        trained = []
        for capturable in (False, True):
            problem = start.copy()
            optimizer = optim_info.optim_cls(problem.params, **{**fresh(one.kwargs), "capturable": capturable})
            trained.append(problem.train(optimizer, 10))
        torch.testing.assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)


NOT_APPLICABLE = {
    "test_complex": "complex parameters are refused with a TypeError (test_optimizer_contract.py)",
    "test_complex_2d": "complex parameters are refused with a TypeError (test_optimizer_contract.py)",
    "test_rosenbrock_sparse": "sparse gradients are refused with a RuntimeError (test_optimizer_contract.py)",
    "test_forloop_goes_right_direction_multigpu": "needs two GPUs",
    "test_foreach_large_tensor": "needs a GPU with more than 2^31 elements to spare",
    "test_peak_memory_foreach": "measures CUDA memory; benchmarks/optim_step.py measures ours",
    "test_fused_large_tensor": "needs a GPU with more than 2^31 elements to spare",
    "test_fused_does_not_step_if_foundinf": "no _step_supports_amp_scaling: the scaler itself skips the step",
    "test_fused_cpu_matches_cuda": "needs a GPU",
    "test_cpu_load_state_dict": "needs a GPU",
    "test_state_dict_with_cuda_params": "needs a GPU",
    "test_adamw_serialization": "about AdamW being a subclass of Adam",
    "test_differentiable": "differentiable is not offered",
    "test_duplicate_params_in_one_param_group": "among the error inputs of test_errors",
    "test_duplicate_params_across_param_groups": "among the error inputs of test_errors",
}


@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_not_applicable(name: str) -> None:
    pytest.skip(f"{name}: {NOT_APPLICABLE[name]}")


# torch.compile


@pytest.mark.parametrize("tensor_lr", [True, False], ids=["tensor-lr", "float-lr"])
@pytest.mark.parametrize("capturable", [True, False], ids=["capturable", "host-step"])
@by_name(OURS)
def test_compiled_step_is_the_step(optim_info: Any, capturable: bool, tensor_lr: bool) -> None:
    torch._dynamo.reset()
    start = Problem()
    counter = CompileCounter()  # counts graphs, and runs them as they are
    trained, optimizers = [], []
    for compiled in (True, False):
        problem = start.copy()
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        optimizer = optim_info.optim_cls(problem.params, lr=lr, weight_decay=0.1, capturable=capturable)
        step = torch.compile(optimizer.step, backend=counter, fullgraph=True) if compiled else optimizer.step
        for k in range(6):
            if k == 3 and tensor_lr:
                lr.fill_(0.01)
            problem.closure(optimizer)()
            step()
            if compiled and k == 1:
                graphs = counter.frame_count  # the first step, which makes the state, and the others
        trained.append([param.detach() for param in problem.params])
        optimizers.append(optimizer)
    assert counter.frame_count == graphs <= 2
    torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, in its compiler
def test_compiled_step_of_the_adaptor() -> None:
    torch._dynamo.reset()
    start = Problem()
    trained = []
    for compiled in (True, False):
        problem = start.copy()
        optimizer = EAdaptor(torch.optim.SGD(problem.params, lr=0.01, momentum=0.9), -5.0, 0.9)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step  # torch's SGD breaks it
        for _ in range(4):
            problem.closure(optimizer)()
            step()
        trained.append([param.detach() for param in problem.params])
    torch.testing.assert_close(trained[0], trained[1])


# properties


shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=4)
unit = st.floats(0.0, 0.999)
hyper_parameters = st.fixed_dictionaries(
    {
        "lr": st.floats(0.0, 0.1),
        "betas": st.tuples(unit, unit),
        "eps": st.floats(1e-8, 1.0),
        "weight_decay": st.floats(0.0, 1.0),
        "maximize": st.booleans(),
        "capturable": st.booleans(),
    }
)
explore = st.one_of(
    st.just({"alpha": "auto", "explore_beta": "auto"}),
    st.tuples(st.floats(-0.99, 0.99), unit).map(lambda t: {"alpha": t[0] / (1 - t[1]), "explore_beta": t[1]}),
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
extras = {
    AdamE: st.fixed_dictionaries({"decoupled_weight_decay": st.booleans()}),
    ALTO: st.fixed_dictionaries({"layerwise": st.booleans(), "bias_correction": st.booleans()}),
}


@st.composite
def cases(draw: st.DrawFn) -> tuple[Any, list[Any], list[dict[str, Any]], int]:
    """A class, its parameters with their dtypes, one group of options for each of them, and a seed."""
    optimizer_class = draw(st.sampled_from([AdamE, ALTO]))
    params = [(shape, draw(dtypes)) for shape in draw(shapes)]
    options = [
        {**draw(hyper_parameters), **draw(explore), **draw(extras[optimizer_class])}
        for _ in range(draw(st.integers(1, 2)))
    ]
    return optimizer_class, params, options, draw(st.integers(0, 2**16))


def trained(case: tuple[Any, list[Any], list[dict[str, Any]], int], foreach: bool | None) -> torch.optim.Optimizer:
    optimizer_class, made_of, options, seed = case
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape, dtype in made_of]
    groups = [
        {"params": params[i :: len(options)], **one} for i, one in enumerate(options) if params[i :: len(options)]
    ]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, foreach=foreach)
    for k in range(3):
        for i, param in enumerate(params):
            grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            param.grad = None if (i + k) % 4 == 3 else grad  # also steps without a gradient
        optimizer.step()
    return optimizer


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
}


@settings(max_examples=200, derandomize=True, deadline=None)
@given(case=cases())
def test_properties(case: tuple[Any, list[Any], list[dict[str, Any]], int]) -> None:
    optimizers = [trained(case, foreach) for foreach in (False, True, None)]
    for groups in zip(*(optimizer.param_groups for optimizer in optimizers), strict=True):
        for params in zip(*(group["params"] for group in groups), strict=True):
            param = params[0]
            assert param.isfinite().all()
            for optimizer, other in zip(optimizers, params, strict=True):
                torch.testing.assert_close(other.detach(), param.detach(), **TOLERANCE[param.dtype])
                state = optimizer.state[other]
                assert set(state) in (set(), {"step", "exp_avg_grad", "exp_avg", "exp_avg_sq"})
                for name in state.keys() - {"step"}:
                    assert state[name].shape == other.shape
                    assert state[name].dtype == torch.promote_types(other.dtype, torch.float32)
                    assert state[name].isfinite().all()
                if state:
                    assert state["step"].shape == () and state["step"].dtype is torch.float32
                    assert math.isclose(state["step"].item(), round(state["step"].item()))
