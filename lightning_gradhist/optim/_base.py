"""What AdamE and ALTO share: validation, state, and the gathering of parameters for a step."""

from __future__ import annotations

import functools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lightning_gradhist.explore import AUTO, check_explore, explore_choice, resolve_explore
from lightning_gradhist.optim._backends import Backend, Compiled, Kernels, backend_of, refuse_fused
from lightning_gradhist.optim._lists import Piece, StepLists, StepScalars
from lightning_gradhist.optim._parameters import refuse_complex, refuse_sparse, state_dtype
from lightning_gradhist.optim._sharding import DTensor, local

__all__ = ["Batch", "ExploringOptimizer", "ParamsT"]

BUFFERS = ("exp_avg_grad", "exp_avg", "exp_avg_sq")
_STATE = {"step", *BUFFERS}
_ONE = torch.ones(())


@dataclass
class Batch:
    """Parameters of one group, device and dtype, which are stepped together."""

    lists: StepLists
    scalars: StepScalars
    group: dict[str, Any]
    owners: list[Tensor]
    """The parameters that the entries of ``lists`` are, or under FSDP2 are this rank's parts of."""
    backend: Backend

    def pieces(self, written: Sequence[str]) -> Iterator[Piece]:
        """The parts that are stepped one after another by a function that writes to some of the lists."""
        return self.backend.pieces(self.lists, self.scalars, written)


class ExploringOptimizer(Optimizer):
    """Base of the optimizers with adaptor E; a subclass gives the step of one parameter."""

    _added_defaults: ClassVar[dict[str, Any]] = {
        "alpha": AUTO,
        "explore_beta": AUTO,
        "maximize": False,
        "foreach": None,
        "fused": None,
        "capturable": False,
        "state_dtype": None,
    }
    """What a param group of a torch optimizer, or of an older pickle, may lack."""

    @abstractmethod
    def _update(self, batches: list[Batch]) -> None:
        """Update parameters and state of all batches in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step with all parameters that have a gradient.

        Args:
            closure: Clears the gradients, computes the loss and its gradients, and returns the loss. It runs
                first, with gradients enabled; the gradients are read after it.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            RuntimeError: If a gradient is sparse, or ``fused=True`` cannot be had (on the CPU without a C++ compiler,
                on CUDA without Triton, elsewhere); nothing has been changed then.
            ValueError: If ``alpha`` and ``explore_beta`` were changed to an illegal pair.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them, so that an error leaves nothing half done
            check_explore(group["alpha"], group["explore_beta"])
            refuse_sparse(group, type(self).__name__)
            if group["fused"]:
                refuse_fused(group, type(self).__name__)
        self._update([batch for group in self.param_groups for batch in self._batches(group)])
        return loss

    def _batches(self, group: dict[str, Any], backend: Backend | None = None) -> list[Batch]:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return []
        states = [self._initialised_state(param, group) for param in params]
        steps = [state["step"] for state in states]
        # A compiler has no use for a number that changes with each step, and would compile again for each.
        on_device = group["capturable"] or torch.compiler.is_compiling()
        if on_device:
            torch._foreach_add_(steps, 1)
        else:
            torch._foreach_add_(steps, _ONE, alpha=1)  # which is not made a tensor for each of them
        numbers = [None] * len(steps) if on_device else torch.stack(steps).tolist()
        buckets: dict[Any, tuple[list[Tensor], list[dict[str, Tensor]]]] = {}
        for param, state, number in zip(params, states, numbers, strict=True):
            bucket = buckets.setdefault((param.device, param.dtype, number), ([], []))
            bucket[0].append(param)
            bucket[1].append(state)
        return [self._batch(group, *bucket, key[2], backend) for key, bucket in buckets.items()]

    def _batch(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        states: list[dict[str, Tensor]],
        step: float | None,
        backend: Backend | None,
    ) -> Batch:
        grads = [param.grad for param in params if param.grad is not None]
        columns = [params, grads, *([state[name] for state in states] for name in BUFFERS)]
        if any(isinstance(param, DTensor) for param in params):
            columns = [[local(tensor) for tensor in column] for column in columns]
        lists = StepLists(*columns)
        steps = [state["step"] for state in states]
        scalars = self._scalars(group, steps if step is None else step, params[0].device)
        return Batch(
            lists, scalars, group, params, backend or backend_of(group, lists, self._compiled, self._kernel_fault)
        )

    @functools.cached_property
    def _compiled(self) -> Compiled:
        return Compiled()

    def _kernel_fault(self, device: torch.device) -> str | None:
        return _kernel_fault(type(self), device)  # type: ignore[arg-type]  # mypy: a class has no hash

    def _scalars(self, group: dict[str, Any], step: float | list[Tensor], device: torch.device) -> StepScalars:
        alpha, explore_beta = resolve_explore(group["alpha"], group["explore_beta"])
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        corrected = group.get("bias_correction", True)
        return StepScalars(
            # 0-d, so that it neither broadcasts nor promotes; never read on the host
            lr=lr.reshape(()).to(device) if isinstance(lr, Tensor) else lr,
            mix=alpha * (1.0 - explore_beta),
            explore_beta=explore_beta,
            beta1=beta1,
            beta2=beta2,
            step=step,
            bias_correction1=_bias_correction(beta1, step) if corrected else 1.0,
            bias_correction2=_bias_correction(beta2, step) if corrected else 1.0,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )

    def _initialised_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[param]
        if _STATE <= state.keys():
            return state
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(param, group))
        for name in BUFFERS:
            if name not in state:  # one by one: a checkpoint of torch's Adam has no exp_avg_grad
                dtype = group["state_dtype"] or state_dtype(param)
                state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        return state

    def set_batch_size(self, batch_size: float) -> None:
        """Put the paper's choice for a batch size in the place of ``"auto"``, for adaptor E.

        Groups whose ``alpha`` and ``explore_beta`` are numbers are left alone. ``OptimizerCalibration`` does the same.

        Args:
            batch_size: Samples per optimizer step over all devices and accumulated micro-batches, > 0.

        Raises:
            ValueError: If ``batch_size`` is not a positive number.
        """
        set_batch_size(self.param_groups, ("alpha", "explore_beta"), batch_size)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, whose hyper-parameters are checked first.

        Args:
            param_group: The parameters under ``"params"``, and what is to differ from the defaults.

        Raises:
            ValueError: If a hyper-parameter is out of range.
            TypeError: If a parameter is complex.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            self._check_group({**self._added_defaults, **self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            refuse_complex(self.param_groups[-1], type(self).__name__)
            _refuse_narrow_state(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(
                f"lr={lr!r} has {lr.numel()} elements: it must be a number or a tensor of one element. "
                "For several rates, use several param groups."
            )
        for name in ("lr", "eps", "weight_decay"):
            if not 0.0 <= float(group[name]) < math.inf:
                raise ValueError(f"{name}={group[name]!r} is out of range: it must be finite and satisfy {name} >= 0.")
        betas = group["betas"]
        if len(betas) != 2:
            raise ValueError(
                f"betas={betas!r} has {len(betas)} elements: it must have two, the decays of the first and "
                "the second moment. The decay of adaptor E is explore_beta."
            )
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{index}]={beta!r} is out of range: it must satisfy 0 <= beta < 1.")
        check_explore(group["alpha"], group["explore_beta"])
        if group["fused"] and group["foreach"]:
            raise ValueError("fused=True and foreach=True exclude each other: leave one of them at None.")
        if group["state_dtype"] not in (None, torch.bfloat16):
            raise ValueError(
                f"state_dtype={group['state_dtype']!r} is not offered: it must be None, for fp32 (float64 for float64 "
                "parameters), or torch.bfloat16."
            )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class, or of torch's Adam or AdamW.

        With torch's, ``exp_avg_grad`` starts at zero. The state stays in fp32 for fp16 and bf16 parameters,
        and is copied: later steps do not write to ``state_dict``. Hyper-parameters that ``state_dict`` does
        not have keep their present values.

        Args:
            state_dict: What :meth:`state_dict` returned; it is not changed.

        Raises:
            ValueError: If the groups do not fit or a hyper-parameter is out of range; nothing has been
                changed then.
        """
        hook = self.register_load_state_dict_pre_hook(_shield_state)  # last, hence after the user's own hooks
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickled or loaded state, and complete what an older one lacks."""
        super().__setstate__(state)
        for name, value in self._added_defaults.items():
            default = self.defaults.setdefault(name, value)
            for group in self.param_groups:
                group.setdefault(name, default)
        groups = {param: group for group in self.param_groups for param in group["params"]}
        for param, param_state in self.state.items():
            for name, value in param_state.items():
                if isinstance(value, _Shielded):
                    param_state[name] = value.placed(param, name, groups[param])

    def __repr__(self) -> str:
        """Show the groups as torch does, with the numbers that are in force for ``"auto"``."""
        in_force = dict(zip(("alpha", "explore_beta"), resolve_explore(AUTO, AUTO), strict=True))
        lines = [f"{type(self).__name__} ("]
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            for key in sorted(group.keys() - {"params"}):
                note = f" ({in_force[key]} in force)" if key in in_force and group[key] == AUTO else ""
                lines.append(f"    {key}: {group[key]}{note}")
        return "\n".join([*lines, ")"])


@dataclass(frozen=True)
class _Shielded:
    """A loaded value, wrapped so that torch does not cast it to the dtype of the parameter."""

    value: Any

    def placed(self, param: Tensor, name: str, group: dict[str, Any]) -> Any:
        if name == "step":
            return torch.tensor(float(self.value), dtype=torch.float32, device=_step_device(param, group))
        if not isinstance(self.value, Tensor):
            return self.value
        dtype = group["state_dtype"] or state_dtype(param)
        return self.value.to(device=param.device, dtype=dtype, copy=True)


def _shield_state(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Complete and check the groups of ``state_dict`` and shield its state, in a new dict."""
    assert isinstance(optimizer, ExploringOptimizer)
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        return state_dict  # torch refuses it
    groups = [
        {**{name: group[name] for name in optimizer.defaults if name in group}, **saved_group}
        for group, saved_group in zip(optimizer.param_groups, saved, strict=True)
    ]
    for group in groups:
        optimizer._check_group(group)
    ids = set(chain.from_iterable(group["params"] for group in groups))
    state = {
        key: {name: _Shielded(value) for name, value in values.items()} if key in ids else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state, "param_groups": groups}


def _step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    # on the CPU reading it does not wait for the device; a captured graph needs it on the device
    return param.device if group["capturable"] else torch.device("cpu")


def _bias_correction(beta: float, step: float | list[Tensor]) -> float | list[Tensor]:
    return [1.0 - beta**tensor for tensor in step] if isinstance(step, list) else 1.0 - beta**step


def set_batch_size(groups: Sequence[dict[str, Any]], names: tuple[str, str], batch_size: float) -> None:
    """Put the choice for a batch size in the place of ``"auto"`` under two keys of param groups."""
    choice = dict(zip(names, explore_choice(batch_size), strict=True))
    for group in groups:
        group.update({name: value for name, value in choice.items() if group[name] == AUTO})


def _refuse_narrow_state(group: dict[str, Any]) -> None:
    wide = [index for index, param in enumerate(group["params"]) if param.dtype == torch.float64]
    if group["state_dtype"] is not None and wide:
        raise ValueError(
            f"state_dtype={group['state_dtype']} is for parameters of fp32, bf16 and fp16, but parameter {wide[0]} of its "
            "group is float64. Put those into a group with state_dtype=None."
        )


@functools.cache
def _kernel_fault(cls: type[ExploringOptimizer], device: torch.device) -> str | None:
    """Try the kernels of an optimizer once on a device: two steps against the eager ones.

    Returns:
        What is wrong, of which there is one warning; None if nothing is.
    """
    if (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):  # a graph that would hold the trial; who captures has warmed up before
        return None
    try:
        torch.testing.assert_close(_trial(cls, Kernels(), device), _trial(cls, None, device), rtol=1e-4, atol=1e-6)
    except Exception as error:  # whatever a compiler, a driver or the comparison may raise
        fault = f"the kernels failed their trial there ({type(error).__name__}: {error})"
        warnings.warn(f"{cls.__name__} makes its steps without Triton on {device}: {fault}", stacklevel=2)
        return fault
    return None


def _trial(cls: type[ExploringOptimizer], backend: Backend | None, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(device).requires_grad_() for size in (1, 4096, 10_000)]
    optimizer = cls(params, fused=False, weight_decay=0.1)  # type: ignore[call-arg]
    for _ in range(2):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        with torch.no_grad():
            optimizer._update(optimizer._batches(optimizer.param_groups[0], backend))
    return [param.detach() for param in params] + [s[name] for s in optimizer.state.values() for name in BUFFERS]
