"""What users of any torch optimizer take for granted, for AdamE and ALTO alike."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn import Parameter

from lightning_gradhist.optim import ALTO, AdamE

BUFFERS = ("exp_avg_grad", "exp_avg", "exp_avg_sq")
LOW_PRECISION = [torch.bfloat16, torch.float16]


@pytest.fixture(params=[pytest.param(AdamE, id="AdamE"), pytest.param(ALTO, id="ALTO")])
def optimizer_class(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return request.param


def with_grad(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    param = Parameter(torch.randn(shape, dtype=dtype))
    param.grad = torch.randn_like(param)
    return param


def run(optimizer: torch.optim.Optimizer, steps: int, seed: int = 1) -> list[torch.Tensor]:
    """Step with seeded random gradients and return copies of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    return [param.detach().clone() for param in params]


def saved_and_loaded(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def assert_same(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


# construction


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"lr": -1.0}, "lr=-1.0 is out of range: .* lr >= 0", id="lr-negative"),
        pytest.param({"lr": math.nan}, "lr=nan .*finite", id="lr-nan"),
        pytest.param({"lr": torch.tensor(-1.0)}, r"lr=tensor\(-1.\) is out of range", id="lr-tensor-negative"),
        pytest.param({"lr": torch.ones(2)}, "lr=.* has 2 elements: .*one element", id="lr-two-elements"),
        pytest.param({"eps": -1e-8}, "eps=-1e-08 is out of range: .* eps >= 0", id="eps-negative"),
        pytest.param({"eps": math.inf}, "eps=inf .*finite", id="eps-inf"),
        pytest.param({"weight_decay": -0.1}, "weight_decay=-0.1 .* weight_decay >= 0", id="decay-negative"),
        pytest.param({"betas": (1.0, 0.9)}, r"betas\[0\]=1.0 .* 0 <= beta < 1", id="beta1-one"),
        pytest.param({"betas": (0.9, -0.1)}, r"betas\[1\]=-0.1 .* 0 <= beta < 1", id="beta2-negative"),
        pytest.param({"betas": (0.9, math.nan)}, r"betas\[1\]=nan", id="beta2-nan"),
        pytest.param({"betas": (0.99, 0.9, 0.99)}, "3 elements: .*explore_beta", id="three-betas"),
        pytest.param(
            {"alpha": -5.0, "explore_beta": 0.1},
            r"alpha=-5.0 .*\|alpha\| < 1/\(1 - explore_beta\) = 1.11111",
            id="alpha-range",
        ),
        pytest.param({"alpha": 0.5, "explore_beta": 1.0}, "explore_beta=1.0 .* < 1", id="explore-beta-one"),
        pytest.param({"alpha": 0.5}, "alpha=0.5 and explore_beta='auto' do not go together", id="half-auto"),
    ],
)
def test_ranges(optimizer_class: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer_class([with_grad(2)], **arguments)
    optimizer = optimizer_class([with_grad(2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [with_grad(2)], **arguments})
    assert len(optimizer.param_groups) == 1, "a refused group must not stay behind"
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0].update(arguments)
    other = optimizer_class([with_grad(2)], lr=0.5)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state_dict)
    assert other.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"lr": 0.0, "eps": 0.0, "weight_decay": 0.0, "betas": (0.0, 0.0)}, id="all-zero"),
        pytest.param({"lr": torch.tensor([0.1])}, id="one-element-tensor-lr"),
        pytest.param({"betas": [0.9, 0.999]}, id="list-of-betas"),
        pytest.param({"alpha": -99.9, "explore_beta": 0.99}, id="alpha-at-its-limit"),
    ],
)
def test_legal_edges(optimizer_class: Any, arguments: dict[str, Any]) -> None:
    param = with_grad(2)
    optimizer_class([param], **arguments).step()
    assert param.isfinite().all()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: torch.zeros(2), TypeError, "iterable of Tensors or dicts", id="bare-tensor"),
        pytest.param(lambda: [], ValueError, "empty parameter list", id="empty"),
        pytest.param(lambda: [1.0], TypeError, "can only optimize Tensors", id="not-a-tensor"),
        pytest.param(lambda: [with_grad(2) * 2], ValueError, "non-leaf", id="non-leaf"),
        pytest.param(
            lambda: [{"params": [p := with_grad(2)]}, {"params": [p]}],
            ValueError,
            "more than one parameter group",
            id="overlap",
        ),
        pytest.param(
            lambda: [("rotor", Parameter(torch.zeros(3, dtype=torch.complex64)))],
            TypeError,
            r"rotor with shape \(3,\) has dtype torch.complex64\. .*view_as_complex",
            id="complex",
        ),
    ],
)
def test_what_params_may_be(
    optimizer_class: Any, make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        optimizer_class(make())


def test_a_complex_group_does_not_stay_behind(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(2)])
    with pytest.raises(TypeError, match="parameter 0 of its group .*complex64"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3, dtype=torch.complex64))]})
    assert len(optimizer.param_groups) == 1


def test_the_defaults_are_those_of_the_paper() -> None:
    shared = {"betas": (0.9, 0.99), "eps": 1e-6, "alpha": "auto", "explore_beta": "auto"}
    shared |= {"maximize": False, "foreach": None, "fused": None, "capturable": False, "state_dtype": None}
    adam_e = AdamE([with_grad(2)]).param_groups[0]
    alto = ALTO([with_grad(2)]).param_groups[0]
    del adam_e["params"], alto["params"]
    assert adam_e == {**shared, "lr": 1e-3, "weight_decay": 0.0, "decoupled_weight_decay": True}
    assert alto == {**shared, "lr": 1e-2, "weight_decay": 1e-4, "layerwise": True, "bias_correction": True}


# step


def test_closure_runs_first_with_gradients_enabled(optimizer_class: Any) -> None:
    param = Parameter(torch.tensor([1.0, -2.0]))
    optimizer = optimizer_class([param])
    seen = []

    def closure() -> torch.Tensor:
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
    optimizer_class([other]).step()
    assert_same([param.detach()], [other.detach()])
    assert not torch.equal(param, at_closure)


def test_without_closure_returns_none(optimizer_class: Any) -> None:
    assert optimizer_class([with_grad(2)]).step() is None


def test_parameters_without_gradient_are_skipped(optimizer_class: Any) -> None:
    frozen, trained = with_grad(2), with_grad(2)
    optimizer = optimizer_class([frozen, trained])
    frozen.grad = None
    before = frozen.detach().clone()
    for _ in range(3):
        optimizer.step()
    assert_same([frozen.detach()], [before])
    assert frozen not in optimizer.state
    frozen.grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (frozen, trained)] == [1.0, 4.0]
    fresh = Parameter(before.clone())
    fresh.grad = torch.ones(2)
    optimizer_class([fresh]).step()
    assert_same([frozen.detach()], [fresh.detach()])  # its own bias correction, that of a first step


def test_sparse_gradients_are_refused_before_anything_changes(optimizer_class: Any) -> None:
    dense, sparse = with_grad(3, 2), Parameter(torch.zeros(3, 2))
    sparse.grad = torch.eye(3, 2).to_sparse()
    before = dense.detach().clone()
    optimizer = optimizer_class([dense, sparse])
    message = rf"{optimizer_class.__name__} .*parameter 1 of its group.*\(3, 2\).*sparse=False.*SparseAdam"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert_same([dense.detach()], [before])
    assert not optimizer.state


def test_gradients_are_neither_changed_nor_clipped(optimizer_class: Any) -> None:
    param = with_grad(5)
    param.grad = grad = 1e6 * torch.randn(5)
    kept = grad.clone()
    optimizer = optimizer_class([param], weight_decay=0.1, maximize=True)
    optimizer.step()
    optimizer.step()
    assert param.grad is grad
    assert_same([grad], [kept])
    torch.testing.assert_close(optimizer.state[param]["exp_avg_grad"], -kept * (1 - 0.01**2))


def test_coupled_decay_leaves_the_gradient_alone() -> None:
    param = with_grad(5)
    assert param.grad is not None
    kept = param.grad.clone()
    AdamE([param], weight_decay=0.1, decoupled_weight_decay=False).step()
    assert_same([param.grad], [kept])


def test_zero_gradient_without_decay_changes_nothing(optimizer_class: Any) -> None:
    param = with_grad(4)
    param.grad = torch.zeros(4)
    before = param.detach().clone()
    optimizer = optimizer_class([param], lr=1.0, weight_decay=0.0)
    optimizer.step()
    optimizer.step()
    assert_same([param.detach()], [before])


def test_alto_moves_a_layer_by_lr_times_its_length() -> None:
    params = [with_grad(30, 20), with_grad(7)]
    before = [param.detach().clone() for param in params]
    ALTO(params, lr=0.01).step()
    for param, start in zip(params, before, strict=True):
        torch.testing.assert_close((param.detach() - start).norm(), 0.01 * start.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-4])
def test_a_zero_initialised_layer_learns_under_alto(weight_decay: float) -> None:
    layer = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    x = torch.randn(64, 3)
    y = x @ torch.randn(3, 2) + 1.0
    optimizer = ALTO(layer.parameters(), lr=0.02, weight_decay=weight_decay)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * losses[0]


def test_layerwise_is_switched_by_group() -> None:
    start = torch.tensor([30.0, 40.0])
    params = [Parameter(start.clone()), Parameter(start.clone())]
    for param in params:
        param.grad = torch.ones(2)
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "layerwise": False}]
    ALTO(groups, lr=0.1, weight_decay=0.0).step()
    lengths = [(param.detach() - start).norm().item() for param in params]
    assert lengths == pytest.approx([0.1 * 50.0, 0.1 * math.sqrt(2.0)], rel=1e-4)


def test_maximize_flips_the_sign(optimizer_class: Any) -> None:
    up, down = with_grad(4), with_grad(4)
    down.data.copy_(up.data)
    assert up.grad is not None
    down.grad = -up.grad
    ups = optimizer_class([up], weight_decay=0.1, maximize=True)
    downs = optimizer_class([down], weight_decay=0.1)
    for _ in range(3):
        ups.step()
        downs.step()
    assert_same([up.detach()], [down.detach()])


def test_no_host_synchronisation(optimizer_class: Any) -> None:
    param = Parameter(torch.empty(3, device="meta"))
    param.grad = torch.empty(3, device="meta")
    optimizer = optimizer_class([param], weight_decay=0.1)
    optimizer.param_groups[0]["lr"] = torch.empty(1, device="meta")
    optimizer.step()  # a meta tensor has no data: reading one on the host raises
    optimizer.step()
    state = optimizer.state[param]
    assert state["step"].device.type == "cpu" and state["step"].dtype is torch.float32
    assert state["step"].ndim == 0 and state["step"] == 2


# hyper-parameters are live


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
def test_tensor_lr(optimizer_class: Any, shape: tuple[int, ...], lr_dtype: torch.dtype) -> None:
    lr = torch.full(shape, 0.25, dtype=lr_dtype)
    params, others = [[with_grad(4), with_grad()] for _ in range(2)]
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param.data)
    tensor = optimizer_class(params, lr=lr, weight_decay=0.5)
    number = optimizer_class(others, lr=0.25, weight_decay=0.5)
    torch.testing.assert_close(run(tensor, 3), run(number, 3))
    assert tensor.param_groups[0]["lr"] is lr and lr.eq(0.25).all()
    lr.fill_(0.125)
    number.param_groups[0]["lr"] = 0.125
    torch.testing.assert_close(run(tensor, 3), run(number, 3))


CHANGES = [
    pytest.param({"lr": 0.5}, id="lr"),
    pytest.param({"betas": (0.5, 0.99)}, id="beta1"),
    pytest.param({"betas": (0.9, 0.5)}, id="beta2"),
    pytest.param({"eps": 1.0}, id="eps"),
    pytest.param({"weight_decay": 0.5}, id="weight_decay"),
    pytest.param({"alpha": -5.0, "explore_beta": 0.99}, id="explore"),
    pytest.param({"maximize": True}, id="maximize"),
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_hyper_parameter_is_read_at_each_step(optimizer_class: Any, change: dict[str, Any]) -> None:
    start = torch.randn(6)
    optimizer = optimizer_class([Parameter(start.clone())], lr=0.1, weight_decay=0.1)
    constant = optimizer_class([Parameter(start.clone())], lr=0.1, weight_decay=0.1)
    assert_same(run(optimizer, 2), run(constant, 2))
    optimizer.param_groups[0].update(change)
    (changed,), (same) = run(optimizer, 2), run(constant, 2)
    assert not torch.allclose(changed, same[0], atol=1e-4)


@pytest.mark.parametrize("change", CHANGES)
def test_numbers_written_before_the_first_step_are_those_of_construction(
    optimizer_class: Any, change: dict[str, Any]
) -> None:
    start = torch.randn(6)
    written = optimizer_class([Parameter(start.clone())])
    written.param_groups[0].update(change)
    assert_same(run(written, 3), run(optimizer_class([Parameter(start.clone())], **change), 3))


def test_auto_is_the_small_batch_choice(optimizer_class: Any) -> None:
    start = torch.randn(6)
    auto = optimizer_class([Parameter(start.clone())])
    number = optimizer_class([Parameter(start.clone())], alpha=0.5, explore_beta=0.01)
    assert_same(run(auto, 3), run(number, 3))
    assert auto.param_groups[0]["alpha"] == auto.param_groups[0]["explore_beta"] == "auto"


def test_an_illegal_pair_written_later_is_refused_before_anything_changes(optimizer_class: Any) -> None:
    params = [with_grad(2), with_grad(2)]
    before = [param.detach().clone() for param in params]
    optimizer = optimizer_class([{"params": [param]} for param in params])
    optimizer.param_groups[1]["alpha"] = -5.0
    with pytest.raises(ValueError, match="alpha=-5.0 and explore_beta='auto'"):
        optimizer.step()
    assert_same([param.detach() for param in params], before)
    assert "alpha: -5.0" in repr(optimizer)


def test_repr_shows_what_is_in_force(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(2)], lr=0.25)
    optimizer.add_param_group({"params": [with_grad(2)], "alpha": -5.0, "explore_beta": 0.99})
    first, second = repr(optimizer).split("Parameter Group 1")
    assert first.startswith(f"{optimizer_class.__name__} (\nParameter Group 0\n")
    assert "    alpha: auto (0.5 in force)\n" in first
    assert "    explore_beta: auto (0.01 in force)\n" in first
    assert "    lr: 0.25\n" in first
    assert "    alpha: -5.0\n" in second and "    explore_beta: 0.99\n" in second


def test_add_param_group_in_mid_run(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(3)], lr=0.1)
    run(optimizer, 2)
    late = with_grad(3)
    before = late.detach().clone()
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    run(optimizer, 1)
    assert optimizer.state[late]["step"] == 1
    assert not torch.equal(late, before)
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99)


def test_one_cycle_drives_lr_and_the_first_moment_decay(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(3)], lr=0.1, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.2, total_steps=10, base_momentum=0.8, max_momentum=0.95
    )
    momenta = []
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        momenta.append(optimizer.param_groups[0]["betas"][0])
        assert optimizer.param_groups[0]["betas"][1] == 0.99
    assert min(momenta) == pytest.approx(0.8) and max(momenta) == pytest.approx(0.95)


# shapes, layouts and dtypes


def channels_last() -> torch.Tensor:
    return torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("make", "make_grad"),
    [
        pytest.param(lambda: torch.randn(()), torch.randn_like, id="0-d"),
        pytest.param(lambda: torch.randn(0), torch.randn_like, id="empty"),
        pytest.param(lambda: torch.randn(3, 0, 2), torch.randn_like, id="empty-3-d"),
        pytest.param(lambda: torch.randn(4, 3).t(), torch.randn_like, id="transposed"),
        pytest.param(lambda: torch.randn(6, 4)[::2, 1:], torch.randn_like, id="strided"),
        pytest.param(lambda: torch.randn(7)[1:], torch.randn_like, id="unaligned"),
        pytest.param(channels_last, torch.randn_like, id="channels-last"),
        pytest.param(
            channels_last,
            lambda p: torch.randn_like(p, memory_format=torch.contiguous_format),
            id="channels-last-contiguous-grad",
        ),
        pytest.param(lambda: torch.randn(3, 4), lambda p: torch.randn(4).expand_as(p), id="expanded-grad"),
    ],
)
def test_layouts(
    optimizer_class: Any,
    make: Callable[[], torch.Tensor],
    make_grad: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    param = Parameter(make())
    param.grad = make_grad(param.detach())
    plain = Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    plain.grad = param.grad.clone(memory_format=torch.contiguous_format)
    stride = param.stride()
    optimizer = optimizer_class([param], weight_decay=0.1)
    other = optimizer_class([plain], weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
        other.step()
    torch.testing.assert_close(param.detach(), plain.detach())
    assert param.stride() == stride
    like = torch.zeros_like(param)
    for name in BUFFERS:
        buffer = optimizer.state[param][name]
        assert (buffer.shape, buffer.stride()) == (like.shape, like.stride())


def test_dtypes_may_be_mixed_in_a_group(optimizer_class: Any) -> None:
    dtypes = [torch.float32, torch.float64, *LOW_PRECISION]
    params = [with_grad(3, dtype=dtype) for dtype in dtypes]
    before = [param.detach().clone() for param in params]
    optimizer = optimizer_class(params, lr=0.1)
    optimizer.step()
    assert [param.dtype for param in params] == dtypes
    assert [optimizer.state[param]["exp_avg"].dtype for param in params] == [
        torch.float32,
        torch.float64,
        torch.float32,
        torch.float32,
    ]
    for param, start in zip(params, before, strict=True):
        assert not torch.equal(param, start)


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_is_the_fp32_step_rounded(optimizer_class: Any, dtype: torch.dtype) -> None:
    low = with_grad(50, dtype=dtype)
    full = Parameter(low.detach().float())
    one, other = optimizer_class([low], lr=0.05), optimizer_class([full], lr=0.05)
    for k in range(5):
        low.grad = (1e-3 * torch.randn(50, generator=torch.Generator().manual_seed(k))).to(dtype)
        full.grad = low.grad.float()
        one.step()
        other.step()
        assert_same([low.detach()], [full.detach().to(dtype)])
        full.data.copy_(low.data)


def test_eps_does_not_underflow_in_fp16(optimizer_class: Any) -> None:
    param = Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.zeros(3, dtype=torch.float16)
    optimizer_class([param], eps=1e-12, weight_decay=0.0).step()
    assert_same([param.detach()], [torch.ones(3, dtype=torch.float16)])


# state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION])
def test_training_goes_on_bit_for_bit_after_a_reload(optimizer_class: Any, dtype: torch.dtype) -> None:
    params = [with_grad(5, 3, dtype=dtype), with_grad(dtype=dtype)]
    optimizer = optimizer_class(params, lr=0.1, alpha=-5.0, explore_beta=0.99, weight_decay=0.1)
    run(optimizer, 5)
    fresh = [Parameter(param.detach().clone()) for param in params]
    other = optimizer_class(fresh, lr=3.0)
    state_dict = saved_and_loaded(optimizer.state_dict())
    kept = copy.deepcopy(state_dict)
    other.load_state_dict(state_dict)
    for param in fresh:
        for name in BUFFERS:
            assert other.state[param][name].dtype == torch.promote_types(dtype, torch.float32)
    assert_same(run(optimizer, 5, seed=2), run(other, 5, seed=2))
    torch.testing.assert_close(state_dict, kept, rtol=0, atol=0)  # neither loading nor stepping wrote to it


def test_load_state_dict_respects_the_users_hooks(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(3, dtype=torch.bfloat16)], lr=0.5)
    run(optimizer, 2)
    param = with_grad(3, dtype=torch.bfloat16)
    other = optimizer_class([param])
    seen = []

    def double_step(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {key: {**value, "step": 2 * value["step"]} for key, value in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(double_step)
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(copy.deepcopy(loaded.state[param])))
    for _ in range(2):
        other.load_state_dict(optimizer.state_dict())
    assert [state["step"].item() for state in seen] == [4.0, 4.0]
    assert all(state["exp_avg"].dtype is torch.float32 for state in seen)


@pytest.mark.parametrize(
    "copied",
    [
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_keep_everything(optimizer_class: Any, copied: Callable[[Any], Any], dtype: torch.dtype) -> None:
    optimizer = optimizer_class([with_grad(4, dtype=dtype)], lr=0.1, alpha=-2.0, explore_beta=0.9)
    run(optimizer, 3)
    other = copied(optimizer)
    assert repr(other) == repr(optimizer)
    assert other.defaults == optimizer.defaults | {"differentiable": False}
    assert_same(run(optimizer, 3, seed=2), run(other, 3, seed=2))


def test_an_older_pickle_is_completed(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(4)])
    whole = optimizer.param_groups[0].copy()
    for name in optimizer_class._added_defaults:
        del optimizer.defaults[name], optimizer.param_groups[0][name]
    (group,) = pickle.loads(pickle.dumps(optimizer)).param_groups
    del whole["params"], group["params"]
    assert group == whole


@pytest.mark.parametrize("reference", [torch.optim.Adam, torch.optim.AdamW])
def test_a_torch_checkpoint_is_loaded(optimizer_class: Any, reference: Any) -> None:
    param = with_grad(4)
    theirs = reference([param], lr=0.3, betas=(0.8, 0.9))
    run(theirs, 3)
    optimizer = optimizer_class([param], alpha=-5.0, explore_beta=0.99)
    optimizer.load_state_dict(saved_and_loaded(theirs.state_dict()))
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.3, (0.8, 0.9))
    assert (group["alpha"], group["explore_beta"]) == (-5.0, 0.99)
    state = optimizer.state[param]
    assert_same([state["exp_avg"]], [theirs.state[param]["exp_avg"]])
    param.grad = torch.ones(4)
    optimizer.step()
    assert state["step"] == 4
    torch.testing.assert_close(state["exp_avg_grad"], torch.full((4,), 0.01))  # from zero


def test_a_torch_checkpoint_goes_on_as_in_torch_at_alpha_zero() -> None:
    params = [with_grad(4), with_grad(4)]
    params[1].data.copy_(params[0].data)
    theirs = torch.optim.AdamW(params[:1], lr=0.1)
    run(theirs, 3)
    params[1].data.copy_(params[0].data)
    ours = AdamE(params[1:], alpha=0.0, explore_beta=0.5)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(run(ours, 5, seed=2), run(theirs, 5, seed=2))


def test_state_dicts_that_do_not_fit_are_refused(optimizer_class: Any) -> None:
    one = optimizer_class([with_grad(2)])
    two = optimizer_class([{"params": [with_grad(2)]}, {"params": [with_grad(2)]}])
    for optimizer, state_dict in [(one, two.state_dict()), (two, one.state_dict())]:
        with pytest.raises(ValueError, match="different number of parameter groups"):
            optimizer.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="doesn't match the size"):
        one.load_state_dict(optimizer_class([with_grad(2), with_grad(2)]).state_dict())


def test_named_parameters(optimizer_class: Any) -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = optimizer_class(layer.named_parameters())
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    run(optimizer, 2)
    unnamed = optimizer_class(copy.deepcopy(layer).parameters())
    unnamed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert_same(run(optimizer, 2, seed=2), run(unnamed, 2, seed=2))
    layer.weight.grad = torch.eye(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match=r"weight with shape \(2, 3\)"):
        optimizer.step()


def test_distributed_checkpoint_round_trip(optimizer_class: Any) -> None:
    layer = torch.nn.Linear(3, 2, dtype=torch.bfloat16)
    optimizer = optimizer_class(layer.parameters(), alpha=-5.0, explore_beta=0.99)
    run(optimizer, 3)
    state_dict = get_optimizer_state_dict(layer, optimizer)
    other_layer = copy.deepcopy(layer)
    other = optimizer_class(other_layer.parameters(), lr=3.0)
    set_optimizer_state_dict(other_layer, other, state_dict)
    assert other.state[other_layer.weight]["exp_avg_grad"].dtype is torch.float32
    assert_same(run(optimizer, 3, seed=2), run(other, 3, seed=2))


def test_step_hooks_and_profiler_name(optimizer_class: Any) -> None:
    optimizer = optimizer_class([with_grad(2)])
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert calls == ["pre", "post"]
    name = f"Optimizer.step#{optimizer_class.__name__}.step"
    assert name in {event.key for event in profile.key_averages()}
