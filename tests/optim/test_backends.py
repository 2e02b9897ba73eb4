"""Who makes a step (``fused``), what the state is held in (``state_dtype``), and what "auto" becomes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._inductor import config as inductor
from torch.nn import Parameter

from lightning_gradhist.kernels import available
from lightning_gradhist.optim import ALTO, AdamE, EAdaptor, _backends, _moments
from lightning_gradhist.optim._formulas import rounded_stochastically

OPTIMIZERS = pytest.mark.parametrize("optimizer_class", [AdamE, ALTO])
# small ones go together, the large one alone, those with gaps or in other orders of memory as copies or views
SHAPES = [(30, 20), (3,), (), (0,), (2, 3, 5, 7), (130, 129), (1,)]


@pytest.fixture(autouse=True)
def _fresh_answers() -> Any:
    yield
    _moments._FAULTS.clear()


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
    state = [optimizer.state[param][name] for param in params for name in (*_moments.BUFFERS, "step")]
    return [param.detach() for param in params] + state


@pytest.mark.slow
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
        steps = 3 if dtype == torch.float32 else 1
        results.append(trained(params, optimizer_class(params, **copy.deepcopy(options), **flags), steps))
    if dtype == torch.float32:
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    else:  # where the last bit of fp32 differs, another neighbour in bf16 may be chosen
        got, expected = (torch.cat([tensor.float().flatten() for tensor in result]) for result in results)
        assert (got == expected).float().mean() > 0.85  # to the nearest, it would be 0.75
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


def lie_side_by_side(optimizer: Any, params: list[Parameter]) -> bool:
    columns = ([optimizer.state[param][name] for param in params] for name in _moments.BUFFERS)
    return all(_backends.side_by_side(column, [param.numel() for param in params]) is not None for column in columns)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@OPTIMIZERS
def test_the_state_of_small_parameters_lies_side_by_side_and_steps_are_the_same(
    optimizer_class: Any, tmp_path: Any
) -> None:
    """As it is made, loaded and copied; where some have no gradient or another state, a step copies it."""
    shapes = [(30, 20), (3,), (), (2, 3, 5, 7), (1,)]
    results, pairs = [], []
    for fused in (True, False):
        params = parameters(shapes=shapes)
        optimizer = optimizer_class(params, weight_decay=0.1, fused=fused)
        trained(params, optimizer)
        places = [lie_side_by_side(optimizer, params)]
        params[1].grad = None  # the others step without it
        optimizer.step()
        optimizer.state[params[3]]["exp_avg"] = optimizer.state[params[3]]["exp_avg"].clone()
        places.append(lie_side_by_side(optimizer, params))
        trained(params, optimizer)
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        params, optimizer = copy.deepcopy((params, optimizer))
        places.append(lie_side_by_side(optimizer, params))
        results.append(trained(params, optimizer))
        pairs.append(places)
    assert pairs[0] == [True, False, True] and not any(pairs[1])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    numbers = 3 * sum(param.numel() for param in params)
    assert (tmp_path / "state.pt").stat().st_size < 4 * numbers + 20_000


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@OPTIMIZERS
def test_fused_without_a_compiler(optimizer_class: Any) -> None:
    params = parameters()
    optimizer = optimizer_class(params, fused=True)
    torch._dynamo.reset()
    without = inductor.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True})
    with (
        without,
        pytest.raises(RuntimeError, match=r"(?s)fused=True is not to be had: on cpu a trial.*clang.*fused=False"),
    ):
        trained(params, optimizer)
    torch._dynamo.reset()
    assert all(state["step"] == 0 for state in optimizer.state.values())
    assert all(map(torch.equal, params, parameters()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@OPTIMIZERS
def test_a_trial_that_failed_is_made_again(optimizer_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(step: Any) -> Any:
        raise OSError(28, "No space left on device")

    params = parameters()
    optimizer = optimizer_class(params, fused=True)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="No space left"):
        patched.setattr(_backends, "_compiled", full_disk)
        trained(params, optimizer)
    trained(params, optimizer)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@OPTIMIZERS
def test_fused_leaves_no_mark_on_the_parameters(optimizer_class: Any) -> None:
    """They can be swapped, as Module.to does on request, which torch refuses for what anybody else refers to."""
    params = parameters(shapes=[(4, 4), (4,)])
    trained(params, optimizer_class(params, fused=True))
    for param in params:
        param.grad = None
        torch.utils.swap_tensors(param, Parameter(torch.zeros_like(param)))
        assert not param.any()


@OPTIMIZERS
def test_fused_error_on_params_on_meta(optimizer_class: Any) -> None:
    param = Parameter(torch.zeros(3, device="meta"))
    param.grad = torch.zeros_like(param)
    with pytest.raises(RuntimeError, match="parameters are on meta"):
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
def test_kernels_that_fail_their_trial_are_left_out(optimizer_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they do fail: without TRITON_INTERPRET they do not run on the CPU. The interpreter's tests have the other case."""
    monkeypatch.setattr(_backends.kernels, "run_on", lambda device: True)
    monkeypatch.setattr(_moments, "_FAULTS", {})
    plain, params = parameters(), parameters()
    trained(plain, optimizer_class(plain, fused=False))
    with pytest.warns(
        UserWarning, match="makes its steps on cpu without the Triton kernels: a trial step failed"
    ) as told:
        trained(params, optimizer_class(params))
    assert len(told) == 1 and all(map(torch.equal, params, plain))
    trained(params, optimizer_class(params, foreach=False))
    with pytest.raises(RuntimeError, match="fused=True is not to be had: on cpu a trial step failed"):
        trained(params, optimizer_class(params, fused=True))

    class Theirs(optimizer_class):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, needed: int) -> None:
            super().__init__(params)

    fault = Theirs(params, 1)._fault(_backends.Kernels(), torch.device("cpu"), True)
    assert fault == optimizer_class(params)._fault(_backends.Kernels(), torch.device("cpu"), True) is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.skipif(torch.__version__ < (2, 12), reason="older torch cannot compile a step into one graph")
@pytest.mark.parametrize("fused", [True, None])
def test_a_compiled_step_of_a_large_tensor_is_not_cut_into_chunks(fused: bool | None) -> None:
    params = parameters(shapes=[(8000, 1000)])
    optimizer = AdamE(params, fused=fused)
    counter = CompileCounter()
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for _ in range(2):
        params[0].grad = torch.ones_like(params[0])
        step()
    assert counter.op_count < 150  # of two graphs; each of sixteen chunks would have some twenty


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
def test_norms_of_large_tensors_are_exact(fused: bool | None, gaps: bool) -> None:
    """A million equal numbers, of which a sum one by one in fp32 is off by 0.1%."""
    memory = torch.full((1000, 2000), 0.1)
    param = Parameter(memory[:, ::2] if gaps else memory[:, :1000].contiguous())
    param.grad = torch.ones_like(param)
    optimizer = ALTO([param], fused=fused, lr=0.01, weight_decay=0.0)
    optimizer.step()
    torch.testing.assert_close(param.detach().double().mean().item(), 0.1 - 0.01 * 0.1, rtol=1e-6, atol=0.0)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@OPTIMIZERS
def test_fused_with_a_gradient_in_another_order_of_memory(optimizer_class: Any) -> None:
    results = []
    for fused in (True, False):
        param = Parameter(torch.ones(6, 5))
        param.grad = torch.arange(30.0).view(5, 6).t()
        optimizer_class([param], fused=fused).step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@OPTIMIZERS
def test_numbers_of_any_kind_are_taken(optimizer_class: Any) -> None:
    """As schedulers and sweeps write them into param groups; none of them reaches a backend as it is."""
    params = parameters(shapes=[(3, 2)])
    optimizer = optimizer_class(params)
    numbers = {"lr": np.float32(0.5), "betas": (np.float32(0.5), 0), "eps": 1, "weight_decay": np.float64(0.5)}
    optimizer.param_groups[0].update(numbers, maximize=np.bool_(True))
    params[0].grad = torch.ones_like(params[0])
    (subgroup,) = optimizer._subgroups(optimizer.param_groups[0])
    assert {type(number) for number in subgroup.scalars} == {float, bool}
    optimizer.step()


def test_an_error_in_one_group_leaves_all_as_it_was() -> None:
    params = parameters(shapes=[(3,), (4,)])
    optimizer = AdamE([{"params": params[:1]}, {"params": params[1:]}])
    optimizer.param_groups[1]["betas"] = (0.9, "0.99x")
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError):
        optimizer.step()
    assert all(map(torch.equal, params, parameters(shapes=[(3,), (4,)])))
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_a_checkpoint_is_laid_out_as_the_parameter_is() -> None:
    saved = AdamE([Parameter(torch.randn(2, 3, 4, 5))])
    saved.param_groups[0]["params"][0].grad = torch.ones(2, 3, 4, 5)
    saved.step()
    param = Parameter(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    optimizer = AdamE([param])
    optimizer.load_state_dict(saved.state_dict())
    assert {optimizer.state[param][name].stride() for name in _moments.BUFFERS} == {param.stride()}


# state_dtype


@OPTIMIZERS
def test_bf16_state_takes_half_the_memory_and_is_saved(optimizer_class: Any) -> None:
    params = parameters(torch.bfloat16)
    optimizer = optimizer_class(params, state_dtype=torch.bfloat16)
    trained(params, optimizer)
    assert all(optimizer.state[p][name].dtype == torch.bfloat16 for p in params for name in _moments.BUFFERS)
    other = [Parameter(param.detach().clone()) for param in params]
    resumed = optimizer_class(other, state_dtype=torch.bfloat16)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(map(torch.equal, trained(params, optimizer), trained(other, resumed)))


def test_a_checkpoint_of_amsgrad_is_refused() -> None:
    theirs = torch.optim.AdamW(parameters(), amsgrad=True)
    trained_by_torch = copy.deepcopy(theirs.state_dict())
    for optimizer_class in (AdamE, ALTO):
        optimizer = optimizer_class(parameters())
        with pytest.raises(ValueError, match="amsgrad=True, and .* keeps no maximum"):
            optimizer.load_state_dict(trained_by_torch)
        assert "amsgrad" not in optimizer.param_groups[0]


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
    assert {optimizer.state[params[0]][name].dtype for name in _moments.BUFFERS} == {torch.bfloat16}


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.parametrize("fused", [None, True], ids=["eager", "compiled"])
@OPTIMIZERS
def test_bf16_training_does_not_stall(optimizer_class: Any, fused: bool | None) -> None:
    """100 steps, each a tenth of what bf16 can tell from nothing, end near the float64 truth; rounded to nearest, nowhere."""
    ends = {}
    for dtype, state_dtype in ((torch.float64, None), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, None)):
        param = Parameter(torch.full((512,), 1.0, dtype=dtype))
        optimizer = optimizer_class([param], lr=4e-4, state_dtype=state_dtype, weight_decay=0.0, fused=fused)
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
