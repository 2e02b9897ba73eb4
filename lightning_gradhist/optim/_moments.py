"""What AdamE and ALTO share: state, the step's scalars, and which parameters are stepped together."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from lightning_gradhist._dtensor import is_dtensor, local, placed_as
from lightning_gradhist.explore import resolve_explore
from lightning_gradhist.kernels import StepScalars, StepTensors
from lightning_gradhist.optim._backends import Backend, Bucket, backend_of, is_small, side_by_side
from lightning_gradhist.optim._base import ExploringOptimizer
from lightning_gradhist.optim._checks import check_hyper_parameters, refuse_amsgrad, refuse_capture, refuse_narrow_state
from lightning_gradhist.tensors import wide

BUFFERS = ("exp_avg_grad", "exp_avg", "exp_avg_sq")
_STATE = {"step", *BUFFERS}
State = dict[str, Tensor]
Alike = tuple[list[Tensor], list[Tensor], list[State]]  # parameters, gradients and states


@dataclass
class Subgroup:
    """Parameters of one param group, on one device, of one dtype and with one number of steps: what a backend is given."""

    tensors: StepTensors
    scalars: StepScalars
    group: dict[str, Any]
    params: list[Tensor]  # what the entries of tensors are, or under FSDP2 are this rank's shards of
    steps: list[Tensor]  # how many they have made, of each or of all; scalars is one ahead
    backend: Backend

    def for_each_bucket(self, do: Callable[[Subgroup, Bucket], None], written: Sequence[str]) -> None:
        """Do something that writes to some of the lists with one bucket after another."""
        self.backend.for_each_bucket(partial(do, self), self.tensors, self.scalars, written)


class MomentOptimizer(ExploringOptimizer):
    """Base of AdamE and ALTO, whose state is ``e``, ``m`` and ``v``."""

    @abstractmethod
    def _update(self, subgroups: list[Subgroup]) -> None:
        """Update parameters and state in place."""

    def _make_step(self) -> None:
        refuse_capture(self)
        self._take([subgroup for group in self.param_groups for subgroup in self._subgroups(group)])

    def _take(self, subgroups: list[Subgroup]) -> None:
        for subgroup in subgroups:
            torch._foreach_add_(subgroup.steps, 1)
        self._update(subgroups)

    def _subgroups(self, group: dict[str, Any], backend: Backend | None = None) -> list[Subgroup]:
        """What is to be stepped, with the scalars of the coming step; nothing has been changed yet."""
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return []
        states = self._initialised_states(params, group)
        # A compiler has no use for a number that changes with each step, and would compile again for each.
        on_device = group["capturable"] or torch.compiler.is_compiling()
        whole = None if on_device else _together(states)
        numbers = [None] * len(states) if whole is None else whole.tolist()
        grads = [param.grad for param in params if param.grad is not None]
        by_kind: dict[Any, Alike] = {}  # lists, as Python's garbage collector would go through triples
        for param, grad, state, number in zip(params, grads, states, numbers, strict=True):
            kind = param.device, param.dtype, grad.dtype, state["exp_avg"].dtype, number
            if kind not in by_kind:
                by_kind[kind] = [], [], []
            its_params, its_grads, its_states = by_kind[kind]
            its_params.append(param)
            its_grads.append(grad)
            its_states.append(state)
        subgroups = [self._subgroup(group, number, backend, alike) for (*_, number), alike in by_kind.items()]
        if whole is not None and len(subgroups) == 1:
            subgroups[0].steps = [whole]
        return subgroups

    def _subgroup(self, group: dict[str, Any], number: float | None, backend: Backend | None, alike: Alike) -> Subgroup:
        params, grads, states = alike
        steps, *buffers = ([state[name] for state in states] for name in ("step", *BUFFERS))
        if wide(grads[0]) != wide(params[0]):  # one of the two is float64
            grads = [grad.to(wide(param)) for grad, param in zip(grads, params, strict=True)]
        columns = [params, grads, *buffers]
        if any(map(is_dtensor, {type(param): param for param in params}.values())):  # one of each kind, for speed
            columns[1] = [placed_as(grad, param) for grad, param in zip(grads, params, strict=True)]
            columns = [[local(tensor) for tensor in column] for column in columns]
        tensors = StepTensors(*columns)
        coming = list(torch._foreach_add(steps, 1)) if number is None else number + 1.0
        scalars = self._scalars(group, coming, params[0].device)
        return Subgroup(tensors, scalars, group, params, steps, backend or backend_of(group, tensors, self._fault))

    def _fault(self, backend: Backend, device: torch.device, again: bool) -> str | None:
        """What is wrong with a backend on a device, None if nothing is; what failed before is tried again, if told to."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # the graph would hold the trial; who captures has warmed up before
        ours = next(cls for cls in type(self).__mro__ if cls.__module__.startswith(__name__.rpartition(".")[0]))
        tried = ours, type(backend), device
        if tried not in _FAULTS or (again and _FAULTS[tried] is not None):
            _FAULTS[tried] = _fault_of(*tried)
            if _FAULTS[tried] is not None and not again:
                warnings.warn(
                    f"{type(self).__name__} makes its steps on {device} without the Triton kernels: {_FAULTS[tried]}",
                    stacklevel=2,
                )
        return _FAULTS[tried]

    def _scalars(self, group: dict[str, Any], step: float | list[Tensor], device: torch.device) -> StepScalars:
        alpha, explore_beta = resolve_explore(group["alpha"], group["explore_beta"])
        beta1, beta2 = map(float, group["betas"])  # of NumPy's numbers, and ints, only some backends know what to do
        lr = group["lr"]
        corrected = group.get("bias_correction", True)
        return StepScalars(
            # 0-d, so that it neither broadcasts nor promotes; never read on the host
            lr=lr.reshape(()).to(device, non_blocking=True) if isinstance(lr, Tensor) else float(lr),
            mix=alpha * (1.0 - explore_beta),
            explore_beta=explore_beta,
            beta1=beta1,
            beta2=beta2,
            step=step,
            bias_correction1=_bias_correction(beta1, step) if corrected else 1.0,
            bias_correction2=_bias_correction(beta2, step) if corrected else 1.0,
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group["maximize"]),
        )

    def _initialised_states(self, params: list[Tensor], group: dict[str, Any]) -> list[State]:
        states = [self.state[param] for param in params]
        fresh = [(param, state) for param, state in zip(params, states, strict=True) if not state.keys() >= _STATE]
        for param, state in fresh:
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=_step_device(param, group))
            for name in BUFFERS:
                if name not in state:  # one by one: a checkpoint of torch's Adam has no exp_avg_grad
                    dtype = _state_dtype(param, group)
                    state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
        if group["fused"] and not torch.compiler.is_compiling():
            lay_side_by_side([state for _, state in fresh])
        return states

    def _check_group(self, group: dict[str, Any]) -> None:
        check_hyper_parameters(group)

    def _check_params(self, group: dict[str, Any]) -> None:
        super()._check_params(group)
        refuse_narrow_state(group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class, or of torch's Adam or AdamW; with theirs, ``exp_avg_grad`` starts at zero.

        The state stays in fp32 for fp16 and bf16 parameters, and is copied: later steps do not write to ``state_dict``.
        Hyper-parameters that ``state_dict`` does not have keep their present values.

        Raises:
            ValueError: If groups do not fit, a number is out of range, or ``amsgrad`` was on; nothing has been changed then.
        """
        with self.register_load_state_dict_pre_hook(_shield_state):  # last, hence after the user's own hooks
            super().load_state_dict(state_dict)

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
        for group in self.param_groups:
            if group["fused"]:
                lay_side_by_side([self.state[param] for param in group["params"] if param in self.state])


@dataclass(frozen=True)
class _Shielded:
    """A loaded value, wrapped so that torch does not cast it to the dtype of the parameter."""

    value: Any

    def placed(self, param: Tensor, name: str, group: dict[str, Any]) -> Any:
        if name == "step":
            return torch.tensor(float(self.value), dtype=torch.float32, device=_step_device(param, group))
        if not isinstance(self.value, Tensor):
            return self.value
        dtype = _state_dtype(param, group)
        if is_dtensor(param) or self.value.shape != param.shape:
            return self.value.to(device=param.device, dtype=dtype, copy=True)
        # in the order of the parameter's memory, whatever that of the checkpoint was
        return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(self.value)


def _shield_state(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """Complete and check the groups of ``state_dict`` and shield its state, in a new dict."""
    assert isinstance(optimizer, MomentOptimizer)
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        return state_dict  # torch refuses it
    groups = [
        {**{name: group[name] for name in optimizer.defaults if name in group}, **saved_group}
        for group, saved_group in zip(optimizer.param_groups, saved, strict=True)
    ]
    for group, present in zip(groups, optimizer.param_groups, strict=True):
        refuse_amsgrad(group, type(optimizer).__name__)
        check_hyper_parameters(group)
        refuse_narrow_state({**group, "params": present["params"]})
    ids = set(chain.from_iterable(group["params"] for group in groups))
    state = {
        key: {name: _Shielded(value) for name, value in values.items()} if key in ids else values
        for key, values in state_dict["state"].items()
    }
    return {**state_dict, "state": state, "param_groups": groups}


def _together(states: list[State]) -> Tensor:
    """The numbers of steps as one tensor ``[n]``, of which those in the states are views: one addition does for all."""
    steps = [state["step"] for state in states]
    laid = side_by_side(steps, [1] * len(steps)) if steps[0].is_cpu else None
    if laid is not None:
        return laid
    whole = torch.stack(steps).to("cpu", torch.float32)  # Lightning may have moved them to a device, to be waited for
    for state, step in zip(states, whole.unbind(), strict=True):
        state["step"] = step
    return whole


def lay_side_by_side(states: Sequence[State]) -> None:
    """Puts what is kept of small parameters on the CPU into one memory, in their order, so that no step has to copy it."""
    alike: dict[Any, list[State]] = {}
    for state in states:
        for name in BUFFERS:
            value = state.get(name)
            if value is not None and not is_dtensor(value) and is_small(value):
                alike.setdefault((name, value.dtype), []).append(state)
    for (name, _), some in alike.items():
        values = [state[name] for state in some]
        flat = torch._utils._flatten_dense_tensors(values)
        for state, value in zip(some, torch._utils._unflatten_dense_tensors(flat, values), strict=True):
            state[name] = value


def _state_dtype(param: Tensor, group: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype | None = group["state_dtype"]
    return dtype or wide(param)


def _step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    # on the CPU reading it does not wait for the device; a captured graph needs it on the device
    return param.device if group["capturable"] else torch.device("cpu")


def _bias_correction(beta: float, step: float | list[Tensor]) -> float | list[Tensor]:
    if not isinstance(step, list):
        return 1.0 - beta**step
    corrections = list(torch._foreach_neg(torch._foreach_pow(beta, step)))
    torch._foreach_add_(corrections, 1.0)
    return corrections


_FAULTS: dict[tuple[type[MomentOptimizer], type[Backend], torch.device], str | None] = {}  # what trials have found


def _fault_of(cls: type[MomentOptimizer], kind: type[Backend], device: torch.device) -> str | None:
    """Try a backend on a device: two steps of one of our optimizers against the eager ones."""
    try:
        torch.testing.assert_close(_trial(cls, kind(), device), _trial(cls, None, device), rtol=1e-4, atol=1e-6)
    except Exception as error:  # whatever a compiler, a driver or the comparison may raise
        return f"a trial step failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


@torch.no_grad()
def _trial(cls: type[MomentOptimizer], backend: Backend | None, device: torch.device) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)

    def draw(size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu").to(device)

    params = [draw(size).requires_grad_() for size in (3, 4096, 10_000)]
    optimizer = cls(params, fused=False, weight_decay=0.1)  # type: ignore[call-arg]
    for _ in range(2):
        for param in params:
            param.grad = draw(param.numel())
        optimizer._take(optimizer._subgroups(optimizer.param_groups[0], backend))
    return [param.detach() for param in params] + [s[name] for s in optimizer.state.values() for name in BUFFERS]
