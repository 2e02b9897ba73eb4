"""The implementations that ``optim_step.py`` compares, and the gate that ours pass before anything is timed."""

import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_gradhist.optim import ALTO, AdamE, EAdaptor
from lightning_gradhist.optim.adam_e import adam_e_reference
from lightning_gradhist.optim.alto import alto_reference

BETAS = (0.9, 0.99)
ALPHA, EXPLORE_BETA = -5.0, 0.99  # the paper's for large batches
# with decay, without which the authors' ALTO is not layer-wise
COMMON: dict[str, Any] = {"betas": BETAS, "eps": 1e-6, "weight_decay": 0.01}
EXPLORE: dict[str, Any] = {"alpha": ALPHA, "explore_beta": EXPLORE_BETA}
_STEPS, _LR, _SPREAD = 10, 0.05, 0.1
_SHAPES = [(3, 5), (), (1,), (17,), (129, 65), (70_001,)]
_TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-2, 2e-2)}
"""Relative and absolute; ten steps at this rate move a parameter by some 0.3."""
# How often a step must at least read or write memory for each parameter: the parameter, its gradient and what state has
# their dtype; state in fp32. 28, 36, 40 and 48 bytes in fp32. The layer-wise ones read parameter, m and v again for the update.
ADAMW = (3 + 4, 0)
ADAM_E, EADAPTOR, AUTHORS_E = (3, 6), (3 + 4, 2), (3 + 6, 0)
LAMB = (4 + 6, 0)
LAYERWISE_E, AUTHORS_ALTO = (4, 8), (4 + 8, 0)

T = TypeVar("T", bound=Any)
Make = Callable[[list[Parameter], float], Any]
"""Builds an optimizer from parameters and learning rate; raises :class:`LeftOut` where it cannot be built."""


class LeftOut(Exception):
    """Something cannot be built here; the message says why."""


def built(wanted: Sequence[T], build: Callable[[T], object]) -> tuple[list[T], dict[str, str]]:
    """Those that can be built, and by name of the others a note with the reason, which is also printed."""
    good, notes = [], {}
    for one in wanted:
        try:
            build(one)
        except LeftOut as reason:
            notes[one.name] = f"left out: {reason}"
            print(f"left out: {one.name} ({reason})")
        else:
            good.append(one)
    return good, notes


def peer(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of setuptools, about pkg_resources
            return importlib.import_module(name)
    except ImportError as error:
        raise LeftOut(f"{name}: {error}; 'make peers' installs the peers") from None


def timm_lamb() -> Any:
    # timm's optimizers are loaded as a package of their own: "import timm" would want torchvision
    found = importlib.util.find_spec("timm")
    package = types.ModuleType("timm_optim")
    package.__path__ = [str(Path(folder) / "optim") for folder in (found and found.submodule_search_locations) or ()]
    sys.modules.setdefault("timm_optim", package)
    return peer("timm_optim.lamb").Lamb


@dataclass(frozen=True)
class Implementation:
    name: str
    distribution: str  # where it comes from, as pip names it
    accesses: tuple[int, int]
    make: Make
    layerwise: bool | None = None  # which reference ours must agree with; None for the others'
    checked_in: torch.dtype | None = None  # None for the dtype of the run
    fixed_bytes: int = 0  # for any dtype: those of a copy

    def bytes_per_parameter(self, dtype: torch.dtype) -> int:
        """Bytes that a step moves at least, for a parameter of ``dtype``."""
        return self.accesses[0] * dtype.itemsize + self.accesses[1] * torch.float32.itemsize + self.fixed_bytes


def implementations() -> list[Implementation]:
    """List all that are compared, whether they can be built here or not."""
    ours, authors, name = "lightning-gradhist", "e-optimizer-adaptor", "pytorch_optimizer"
    adam_e, alto = (partial(cls, **COMMON, **EXPLORE) for cls in (AdamE, ALTO))
    as_authors = {**COMMON, "betas": (EXPLORE_BETA, *BETAS), "alp": ALPHA}
    authors_e = lambda p, lr: peer("E").E(adamw(p, lr), alpha=ALPHA, beta=EXPLORE_BETA)  # noqa: E731
    e_adaptor = lambda p, lr: EAdaptor(adamw(p, lr), **EXPLORE)  # noqa: E731
    return [
        Implementation("AdamW", "torch", ADAMW, adamw),
        Implementation("AdamW foreach", "torch", ADAMW, partial(adamw, foreach=True)),
        Implementation("AdamW fused", "torch", ADAMW, partial(adamw, fused=True)),
        Implementation("timm Lamb", "timm", LAMB, lambda p, lr: timm_lamb()(p, lr, **COMMON)),
        Implementation(f"{name} Lamb", name, LAMB, lambda p, lr: peer(name).Lamb(p, lr, **COMMON)),
        Implementation("authors' ALTO", authors, AUTHORS_ALTO, lambda p, lr: peer("ALTO").ALTO(p, lr, **as_authors)),
        Implementation("authors' E(AdamW)", authors, AUTHORS_E, authors_e),
        # the AdamW within has 16-bit state for 16-bit parameters, which drifts away from the reference
        Implementation("EAdaptor(AdamW)", ours, EADAPTOR, e_adaptor, layerwise=False, checked_in=torch.float32),
        Implementation("AdamE", ours, ADAM_E, partial(adam_e, fused=False), layerwise=False),
        Implementation("AdamE fused", ours, ADAM_E, partial(adam_e, fused=True), layerwise=False),
        Implementation("ALTO", ours, LAYERWISE_E, partial(alto, fused=False), layerwise=True),
        Implementation("ALTO fused", ours, LAYERWISE_E, partial(alto, fused=True), layerwise=True),
    ]


def adamw(params: list[Parameter], lr: float, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, **COMMON, **options)


def reference(theta: Tensor, grads: list[Tensor], lr: float, dtype: torch.dtype, *, layerwise: bool) -> Tensor:
    """The steps of AdamE, or of the layer-wise ALTO, by their specification in float64, rounded to ``dtype`` after each."""
    group = {**COMMON, **EXPLORE, "lr": lr, "maximize": False}
    group |= {"layerwise": True, "bias_correction": True} if layerwise else {"decoupled_weight_decay": True}
    step = alto_reference if layerwise else adam_e_reference
    e = m = v = torch.zeros_like(theta)
    for k, g in enumerate(grads, start=1):
        theta, e, m, v = step(theta, g, e, m, v, k, group)
        theta = theta.to(dtype).double()
    return theta


def check(implementation: Implementation, device: torch.device, dtype: torch.dtype) -> None:
    """Let an implementation make some steps on small tensors of odd shapes; :class:`LeftOut` where it cannot be built.

    Ours must agree with :func:`reference`, and AdamE at ``alpha=0`` with torch's AdamW. The others must only leave finite
    parameters that have moved.
    """
    name, layerwise, dtype = implementation.name, implementation.layerwise, implementation.checked_in or dtype
    starts, grads = _problem(dtype)
    got = _run(implementation.make, device, dtype)
    if layerwise is None:
        moved = all(bool(g.isfinite().all()) and not torch.equal(g, s) for g, s in zip(got, starts, strict=True))
        assert moved, f"{name} leaves parameters that are not finite, or have not moved"
        return
    by_tensor = zip(starts, map(list, zip(*grads, strict=True)), strict=True)
    want = [reference(start, of_tensor, _LR, dtype, layerwise=layerwise) for start, of_tensor in by_tensor]
    _assert_close(name, "the float64 reference", got, want, dtype)
    if not layerwise:
        got, want = _run(implementation.make, device, torch.float32, alpha=0.0), _run(adamw, device, torch.float32)
        _assert_close(f"{name} at alpha=0", "torch's AdamW", got, want, torch.float32)


def _problem(dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters and, for each step, gradients: float64 values that ``dtype`` can hold."""
    generator = torch.Generator().manual_seed(0)
    starts, *grads = (
        [torch.randn(shape, generator=generator).to(dtype).double() for shape in _SHAPES] for _ in range(1 + _STEPS)
    )
    return starts, [[_SPREAD * grad for grad in of_step] for of_step in grads]


def _run(make: Make, device: torch.device, dtype: torch.dtype, **settings: float) -> list[Tensor]:
    starts, grads = _problem(dtype)
    params = [Parameter(start.to(device, dtype)) for start in starts]
    optimizer = make(params, _LR)
    for group in optimizer.param_groups:
        group.update(settings)
    for of_step in grads:
        for param, grad in zip(params, of_step, strict=True):
            param.grad = grad.to(device, dtype)
        optimizer.step()
    return [param.detach().cpu().double() for param in params]


def _assert_close(name: str, other: str, got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for mine, theirs in zip(got, want, strict=True):
        message = f"{name} differs from {other} by up to {(mine - theirs).abs().max():.1e}, shape {tuple(mine.shape)}"
        assert torch.allclose(mine, theirs, *_TOLERANCES[dtype]), message
