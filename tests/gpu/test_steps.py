"""The optimizers on a GPU: the fused step against the eager one and against double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_gradhist import ALTO, AdamE
from lightning_gradhist.optim.adam_e import adam_e_reference
from lightning_gradhist.optim.alto import alto_reference

OPTIMIZERS = [pytest.param(ALTO, id="ALTO"), pytest.param(AdamE, id="AdamE")]
REFERENCES: dict[type, Any] = {ALTO: alto_reference, AdamE: adam_e_reference}
OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.01}
EXPLORE: dict[str, Any] = {"alpha": -5.0, "explore_beta": 0.99}
SHAPES = [(), (1,), (0,), (31,), (129, 65), (3, 5, 7, 9), (70_001,)]
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
STEPS = 5
STATES = [pytest.param(None, id="wide state"), pytest.param(torch.bfloat16, id="bfloat16 state")]
FRACTION = {None: 1e-5, torch.bfloat16: 4e-2}  # some roundings of the state
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself


def parameters(dtype: torch.dtype, device: torch.device, shapes: list[Any] = SHAPES) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in shapes]


def set_gradients(params: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for param in params:
        param.grad = (0.3 * torch.randn(param.shape, generator=generator)).to(param.device, param.dtype)


def trained(optimizer: type, params: list[torch.nn.Parameter], steps: int = STEPS, **options: Any) -> list[Tensor]:
    made = optimizer(params, **{**OPTIONS, **EXPLORE, **options})
    for step in range(steps):
        set_gradients(params, step)
        made.step()
    return [param.detach().cpu().double() for param in params]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("maximize", [False, True], ids=["minimize", "maximize"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_is_eager_is_the_reference_in_double_precision(
    optimizer: type, dtype: torch.dtype, maximize: bool, device: torch.device
) -> None:
    start = parameters(dtype, torch.device("cpu"))
    group = optimizer(start, **OPTIONS, **EXPLORE, maximize=maximize).param_groups[0]
    truth = [(param.detach().double(), *[torch.zeros(param.shape, dtype=torch.float64)] * 3) for param in start]
    for step in range(STEPS):
        set_gradients(start, step)  # rounded to the dtype
        pairs = zip(truth, start, strict=True)
        truth = [REFERENCES[optimizer](now[0], param.grad.double(), *now[1:], step + 1, group) for now, param in pairs]
    expected = [theta for theta, *_ in truth]
    fused = trained(optimizer, parameters(dtype, device), fused=True, maximize=maximize)
    eager = trained(optimizer, parameters(dtype, device), fused=False, maximize=maximize)
    close(fused, eager, TOLERANCES[dtype])
    close(fused, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_is_eager_with_a_narrow_state(optimizer: type, dtype: torch.dtype, device: torch.device) -> None:
    fused, eager = (
        trained(optimizer, parameters(dtype, device), fused=is_fused, state_dtype=torch.bfloat16)
        for is_fused in (True, False)
    )
    close(fused, eager, FRACTION[torch.bfloat16])


@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_same_bits_twice(optimizer: type, state_dtype: torch.dtype | None, device: torch.device) -> None:
    options = {"fused": True, "state_dtype": state_dtype}
    once, twice = (trained(optimizer, parameters(torch.float32, device), **options) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tensor_as_learning_rate(optimizer: type, device: torch.device) -> None:
    rate = torch.tensor(0.02, device=device)
    found = trained(optimizer, parameters(torch.float32, device), fused=True, lr=rate)
    close(found, trained(optimizer, parameters(torch.float32, device), fused=False), 1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_many_small_and_one_large_tensor(optimizer: type, device: torch.device) -> None:
    many, large = (10_000, 2**25) if device.type == "cuda" else (300, 2**18)
    shapes = [(1 + index % 97,) for index in range(many)] + [(large,)]
    found = trained(optimizer, parameters(torch.float32, device, shapes), steps=2, fused=True)
    close(found, trained(optimizer, parameters(torch.float32, device, shapes), steps=2, fused=False), 1e-5)


@pytest.mark.cuda_only
@pytest.mark.parametrize("state_dtype", STATES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_reads_the_learning_rate_live(
    optimizer: type, state_dtype: torch.dtype | None, device: torch.device
) -> None:
    shapes = [(129, 65), (31,)]
    captured, plain = parameters(torch.float32, device, shapes), parameters(torch.float32, device, shapes)
    rate = torch.tensor(0.02, device=device)
    made = optimizer(
        captured, **{**OPTIONS, **EXPLORE, "lr": rate}, fused=True, capturable=True, state_dtype=state_dtype
    )
    other = optimizer(plain, **{**OPTIONS, **EXPLORE}, fused=False, state_dtype=state_dtype)
    for param in captured:
        param.grad = torch.zeros_like(param)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(3):
            _copy_gradients(captured, plain, step)
            made.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made.step()
    for step in range(3):
        set_gradients(plain, step)
        other.step()
    for step, new_rate in ((3, 0.02), (4, 0.005), (5, 0.05)):
        rate.fill_(new_rate)
        other.param_groups[0]["lr"] = new_rate
        _copy_gradients(captured, plain, step)
        graph.replay()
        other.step()
    tolerance = FRACTION[state_dtype]
    close([p.detach().cpu().double() for p in captured], [p.detach().cpu().double() for p in plain], tolerance)


def _copy_gradients(captured: list[torch.nn.Parameter], plain: list[torch.nn.Parameter], step: int) -> None:
    set_gradients(plain, step)
    for mine, theirs in zip(captured, plain, strict=True):
        mine.grad.copy_(theirs.grad)


@pytest.mark.cuda_only
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_waits_for_no_device(optimizer: type, device: torch.device) -> None:
    params = parameters(torch.float32, device)
    made = optimizer(params, **OPTIONS, **EXPLORE, fused=True)
    for step in range(2):
        set_gradients(params, step)
        made.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda_only
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_a_side_stream(optimizer: type, device: torch.device) -> None:
    expected = trained(optimizer, parameters(torch.float32, device), fused=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = trained(optimizer, parameters(torch.float32, device), fused=True)
    torch.cuda.current_stream().wait_stream(stream)
    close(found, expected, 1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(optimizer: type, device: torch.device) -> None:
    params = parameters(torch.float32, device, [(17,), (5, 3)])
    made = optimizer(params, **OPTIONS, **EXPLORE, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    before = [param.detach().clone() for param in params]
    for bad in (True, False):
        scaler.scale(torch.ones((), device=device))  # the scale is made at the first use
        set_gradients(params, 0)
        for param in params:
            param.grad *= scaler.get_scale()
        params[0].grad[0] = torch.inf if bad else params[0].grad[0]
        scaler.step(made)
        scaler.update()
        changed = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
        assert changed == [not bad] * 2
