"""What AdamE and ALTO share: validation, state, the loop over parameters, and two formulas."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from lightning_gradhist.explore import AUTO, check_explore, resolve_explore

__all__ = ["ExploringOptimizer", "ParamsT", "StepScalars", "adam_direction", "explored_gradient"]

BUFFERS = ("exp_avg_grad", "exp_avg", "exp_avg_sq")


class StepScalars(NamedTuple):
    """The scalars of one step, the same for all parameters of a group that have made equally many steps."""

    lr: float | Tensor
    mix: float
    """``c = alpha * (1 - explore_beta)``."""
    explore_beta: float
    beta1: float
    beta2: float
    bias_correction1: float
    """``1 - beta1^k`` at step k, or 1 without bias correction."""
    bias_correction2: float
    """``1 - beta2^k`` at step k, or 1 without bias correction."""
    eps: float
    weight_decay: float
    maximize: bool


def explored_gradient(grad: Tensor, exp_avg_grad: Tensor, s: StepScalars) -> Tensor:
    """Return ``g + alpha * a = g + c * (g - e)`` and advance ``e``; ``grad`` is not changed."""
    g = -grad if s.maximize else grad
    explored = torch.add(g, g - exp_avg_grad, alpha=s.mix)
    exp_avg_grad.lerp_(g, 1.0 - s.explore_beta)
    return explored


def adam_direction(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars) -> Tensor:
    """Advance ``m`` and ``v`` and return ``m_hat / (sqrt(v_hat) + eps)``."""
    exp_avg.lerp_(grad, 1.0 - s.beta1)
    exp_avg_sq.mul_(s.beta2).addcmul_(grad, grad, value=1.0 - s.beta2)
    denominator = (exp_avg_sq / s.bias_correction2).sqrt_().add_(s.eps)
    return (exp_avg / s.bias_correction1).div_(denominator)


class ExploringOptimizer(Optimizer):
    """Base of the optimizers with adaptor E; a subclass gives the step of one parameter."""

    _added_defaults: ClassVar[dict[str, Any]] = {"alpha": AUTO, "explore_beta": AUTO, "maximize": False}
    """What a param group of a torch optimizer, or of an older pickle, may lack."""

    @abstractmethod
    def _step_param(self, param: Tensor, state: dict[str, Tensor], s: StepScalars, group: dict[str, Any]) -> None:
        """Update ``param`` and the buffers of its ``state`` in place from ``param.grad``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step with all parameters that have a gradient.

        Args:
            closure: Clears the gradients, computes the loss and its gradients, and returns the loss. It runs
                first, with gradients enabled; the gradients are read after it.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            RuntimeError: If a gradient is sparse; nothing has been changed then.
            ValueError: If ``alpha`` and ``explore_beta`` were changed to an illegal pair.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # all of them, so that an error leaves nothing half done
            check_explore(group["alpha"], group["explore_beta"])
            self._refuse_sparse_gradients(group)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        scalars: dict[float, StepScalars] = {}
        for param in group["params"]:
            if param.grad is None:
                continue
            state = self._initialised_state(param)
            state["step"] += 1
            k = state["step"].item()
            if k not in scalars:
                scalars[k] = self._scalars(group, k)
            self._step_param(param, state, scalars[k], group)

    def _scalars(self, group: dict[str, Any], k: float) -> StepScalars:
        alpha, explore_beta = resolve_explore(group["alpha"], group["explore_beta"])
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        corrected = group.get("bias_correction", True)
        return StepScalars(
            # 0-d, so that it neither broadcasts nor promotes; never read on the host
            lr=lr.reshape(()) if isinstance(lr, Tensor) else lr,
            mix=alpha * (1.0 - explore_beta),
            explore_beta=explore_beta,
            beta1=beta1,
            beta2=beta2,
            bias_correction1=1.0 - beta1**k if corrected else 1.0,
            bias_correction2=1.0 - beta2**k if corrected else 1.0,
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
        )

    def _initialised_state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if "step" not in state:
            # on the CPU, where reading it does not wait for the device
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in BUFFERS:
            if name not in state:  # one by one: a checkpoint of torch's Adam has no exp_avg_grad
                state[name] = torch.zeros_like(param, dtype=_state_dtype(param), memory_format=torch.preserve_format)
        return state

    def _refuse_sparse_gradients(self, group: dict[str, Any]) -> None:
        for index, param in enumerate(group["params"]):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} takes dense gradients only, but {_describe(group, index)} has a "
                    f"gradient with layout {param.grad.layout}. Build its layer with sparse=False, make the "
                    "gradient dense before the step, or give that parameter to torch.optim.SparseAdam."
                )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, whose hyper-parameters are checked first.

        Args:
            param_group: The parameters under ``"params"``, and what is to differ from the defaults.

        Raises:
            ValueError: If a hyper-parameter is out of range.
            TypeError: If a parameter is complex.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for index, param in enumerate(self.param_groups[-1]["params"]):
            if param.is_complex():
                group = self.param_groups.pop()
                raise TypeError(
                    f"{type(self).__name__} takes real parameters only, but {_describe(group, index)} has "
                    f"dtype {param.dtype}. Hold real and imaginary parts as one real parameter and use "
                    "torch.view_as_complex on it in forward."
                )

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
        for param, param_state in self.state.items():
            for name, value in param_state.items():
                if isinstance(value, _Shielded):
                    param_state[name] = value.placed(param, name)

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

    def placed(self, param: Tensor, name: str) -> Any:
        if name == "step":
            return torch.tensor(float(self.value), dtype=torch.float32)
        if not isinstance(self.value, Tensor):
            return self.value
        return self.value.to(device=param.device, dtype=_state_dtype(param), copy=True)


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


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.promote_types(param.dtype, torch.float32)


def _describe(group: dict[str, Any], index: int) -> str:
    name = group["param_names"][index] if "param_names" in group else f"parameter {index} of its group"
    return f"{name} with shape {tuple(group['params'][index].shape)}"
