"""Who makes a step (``fused``), what the state is held in (``state_dtype``), and what "auto" becomes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch.nn import Parameter

from lightning_gradhist.kernels import available
from lightning_gradhist.optim import ALTO, AdamE, EAdaptor, _backends, _base
from lightning_gradhist.optim._formulas import rounded_stochastically

OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [AdamE, ALTO])
# small ones go together, the large one alone, those with gaps or in other orders of memory as copies or views
SHAPES = [(30, 20), (3,), (), (0,), (2, 3, 5, 7), (130, 129), (1,)]


@pytest.fixture(autouse=True)
def _fresh_answers() -> Any:
    yield
    _backends._missing_compiler.cache_clear()
    _base._kernel_fault.cache_clear()


def parameters(dtype: torch.dtype = torch.float32, shapes: Any = SHAPES) -> list[Parameter]:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    if shapes is SHAPES:
        tensors.append(torch.randn(20, 30, generator=generator)[:, ::2])
        tensors.append(torch.randn(20, 30, 50, generator=generator).permute(2, 0, 1))
    return [Parameter(tensor.to(dtype)) for tensor in tensors]


def trained(params: list[Parameter], optimizer: Any, steps: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    for k in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if not isinstance(optimizer.param_groups[0]["lr"], Tensor):
            optimizer.param_groups[0]["lr"] = 0.01 * (k + 1)
        optimizer.step()
    state = [optimizer.state[param][name] for param in params for name in (*_base.BUFFERS, "step")]
    return [param.detach() for param in params] + state


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own, in its compiler
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        pytest.param(torch.float32, {"weight_decay": 0.1}, id="fp32"),
        pytest.param(
            torch.float32, {"weight_decay": 0.1, "capturable": True, "lr": torch.tensor(0.02)}, id="capturable"
        ),
        pytest.param(torch.bfloat16, {"weight_decay": 0.1, "state_dtype": torch.bfloat16}, id="bf16"),
    ],
)
@OPTIMIZERS
def test_fused_matches_forloop(optimizer_class: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """On the CPU: the eager step compiled. (torch's test of this name.)"""
    results = []
    for flags in ({"fused": True}, {"foreach": False}):
        params = parameters(dtype)
        results.append(trained(params, optimizer_class(params, **copy.deepcopy(options), **flags)))
    if dtype == torch.float32:
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    else:  # where the last bit of fp32 differs, another neighbour in bf16 may be chosen, and that goes on
        got, expected = (torch.cat([tensor.float().flatten() for tensor in result]) for result in results)
        assert torch.isclose(got, expected, rtol=0.02, atol=1e-3).float().mean() > 0.99


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_a_changed_number_does_not_compile_again() -> None:
    params = parameters()
    optimizer = AdamE(params, weight_decay=0.1, fused=True)
    trained(params, optimizer, 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for name, value in {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.5, "lr": 1.0}.items():
            optimizer.param_groups[0][name] = value
            trained(params, optimizer, 1)
        optimizer.param_groups[0].update(alpha=-5.0, explore_beta=0.99)
        trained(params, optimizer, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_fused_finds_memory_that_has_moved() -> None:
    """Views of small tensors are kept from step to step, and made anew where parameters or state are elsewhere."""
    results = []
    for fused in (True, False):
        params = parameters()
        optimizer = AdamE(params, weight_decay=0.1, fused=fused)
        trained(params, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for param in params:
            param.data = param.data.clone()
        trained(params, optimizer)
        other = copy.deepcopy((params, optimizer))  # with state of its own
        results += [trained(*other), trained(params, optimizer)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


@OPTIMIZERS
def test_fused_without_a_compiler(optimizer_class: Any) -> None:
    params = parameters()
    optimizer = optimizer_class(params, fused=True)
    without = inductor.patch({"cpp.cxx": ("no-such-compiler",)})
    with without, pytest.raises(RuntimeError, match=r"\(fused=True\).*no C\+\+ compiler was found.*fused=False"):
        trained(params, optimizer)
    assert not optimizer.state and all(map(torch.equal, params, parameters()))


@OPTIMIZERS
def test_fused_error_on_params_on_meta(optimizer_class: Any) -> None:
    param = Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="they are on meta"):
        optimizer_class([param], fused=True).step()


@OPTIMIZERS
def test_contradictions_raise(optimizer_class: Any) -> None:
    with pytest.raises(ValueError, match="fused=True and foreach=True exclude each other"):
        optimizer_class(parameters(), fused=True, foreach=True)
    with pytest.raises(ValueError, match="state_dtype=torch.float16 is not offered"):
        optimizer_class(parameters(), state_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"parameter 0 of its group is float64\..*state_dtype=None"):
        optimizer_class(parameters(torch.float64), state_dtype=torch.bfloat16)


@pytest.mark.skipif(not available(), reason="Triton is not installed")
@OPTIMIZERS
def test_kernels_that_fail_their_trial_are_not_used(optimizer_class: Any) -> None:
    """Here they do fail: without TRITON_INTERPRET they do not run on the CPU. The interpreter's tests have the other case."""
    cpu = torch.device("cpu")
    with pytest.warns(UserWarning, match="makes its steps without Triton on cpu: the kernels failed their trial"):
        fault = optimizer_class(parameters())._kernel_fault(cpu)
    assert fault == optimizer_class(parameters())._kernel_fault(cpu)  # and no second warning
    lists = _backends.StepLists(*([torch.zeros(3)] for _ in range(5)))
    with pytest.raises(RuntimeError, match="cannot be had|not to be had"):
        _backends._refuse_fault(torch.device("cuda"), lambda _: fault)
    auto = {"fused": None, "foreach": None}
    assert isinstance(_backends.backend_of(auto, lists, _backends.Compiled(), lambda _: fault), _backends.Eager)


# state_dtype


@OPTIMIZERS
def test_bf16_state_takes_half_the_memory_and_is_saved(optimizer_class: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = optimizer_class(params, state_dtype=torch.bfloat16)
    trained(params, optimizer)
    assert all(optimizer.state[p][name].dtype == torch.bfloat16 for p in params for name in _base.BUFFERS)
    other = [Parameter(param.detach().clone()) for param in params]
    resumed = optimizer_class(other, state_dtype=torch.bfloat16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, trained(params, optimizer), trained(other, resumed)))


def test_a_checkpoint_of_fp32_state_is_loaded_into_bf16_state() -> None:
    params = parameters(torch.bfloat16, [(5, 3)])
    adamw = torch.optim.AdamW(params)
    params[0].grad = torch.ones_like(params[0])
    adamw.step()
    optimizer = AdamE(params, state_dtype=torch.bfloat16)
    saved = adamw.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["state_dtype"] == torch.bfloat16
    optimizer.step()
    assert {optimizer.state[params[0]][name].dtype for name in _base.BUFFERS} == {torch.bfloat16}


@OPTIMIZERS
def test_all_ways_to_step_choose_the_same_neighbours(optimizer_class: Any) -> None:
    """But where the last bit of fp32 differs, as the norms of ALTO may."""
    results = []
    for foreach in (None, True, False):
        params = parameters(torch.bfloat16)
        options = {"layerwise": False} if optimizer_class is ALTO else {}
        optimizer = optimizer_class(params, state_dtype=torch.bfloat16, foreach=foreach, **options)
        results.append(trained(params, optimizer))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@OPTIMIZERS
def test_bf16_training_does_not_stall(optimizer_class: Any) -> None:
    """100 steps, each a tenth of what bf16 can tell from nothing, end near the float64 truth; rounded to nearest, nowhere."""
    ends = {}
    for dtype, state_dtype in ((torch.float64, None), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, None)):
        param = Parameter(torch.full((512,), 1.0, dtype=dtype))
        optimizer = optimizer_class([param], lr=4e-4, weight_decay=0.0, state_dtype=state_dtype)
        generator = torch.Generator().manual_seed(3)
        for _ in range(100):
            param.grad = (1.0 + 0.1 * torch.randn(512, generator=generator)).to(dtype)
            optimizer.step()
        ends[dtype, state_dtype] = float(param.detach().double().mean())
    truth = ends[torch.float64, None]
    assert truth < 0.97
    assert abs(ends[torch.bfloat16, torch.bfloat16] - truth) < 0.05 * (1 - truth)
    assert ends[torch.bfloat16, None] == 1.0


def test_rounding_is_right_in_the_mean_and_leaves_alone_what_fits() -> None:
    values = torch.logspace(-30, 30, 101)
    mean = torch.stack([rounded_stochastically(values, float(k)).double() for k in range(1, 4001)]).mean(0)
    # a step of bf16 is at most 2^-7 of a value; the mean of 4,000 choices is within five standard errors
    assert ((mean - values.double()).abs() <= values.double() * 2**-7 * 0.5 / 4000**0.5 * 5).all()
    fits = torch.cat([values.bfloat16().float(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])])
    for step in (1.0, torch.tensor(2.0)):
        rounded = rounded_stochastically(fits, step)
        assert torch.equal(rounded.view(torch.int32), fits.view(torch.int32))
    one_and_a_bit = torch.full((1,), 1.0 + 2**-9)
    assert {float(rounded_stochastically(one_and_a_bit, float(k))) for k in range(50)} == {1.0, 1.0 + 2**-7}


# "auto"


@pytest.mark.parametrize("make", [AdamE, ALTO, lambda params: EAdaptor(torch.optim.SGD(params, lr=0.1))])
def test_set_batch_size(make: Any) -> None:
    params = parameters()
    optimizer = make(params[:2])
    optimizer.add_param_group({"params": params[2:], "alpha": -0.5, "explore_beta": 0.5})
    optimizer.set_batch_size(4096)
    numbers = [(group["alpha"], group["explore_beta"]) for group in optimizer.param_groups]
    assert numbers == [(-5.0, 0.99), (-0.5, 0.5)]
    optimizer.set_batch_size(1)  # they are numbers now
    assert optimizer.param_groups[0]["alpha"] == -5.0
    with pytest.raises(ValueError, match="batch_size=0 is out of range"):
        optimizer.set_batch_size(0)
