"""EAdaptor: adaptor E around any torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from lightning_gradhist.adaptor import AUTO, check_explore, explore_choice, resolve_explore
from lightning_gradhist.optim._base import fill_in_explore
from lightning_gradhist.optim._checks import refuse_complex, refuse_sparse
from lightning_gradhist.optim._formulas import explored_gradients, move_averages, wide_dtype
from lightning_gradhist.optim._sharding import mesh_of

BUFFER = "exp_avg_grad"


class EAdaptor(Optimizer):
    """Adaptor E: lets a torch optimizer see ``g + alpha * a`` in place of the gradient ``g``.

    ``a`` is the moving average of the gradient's change, ``a_k = explore_beta * a_{k-1} + (1 - explore_beta) *
    (g_k - g_{k-1})``. It equals ``(1 - explore_beta) * (g_k - e_{k-1})``, so that one buffer does for its two.
    At each step, with ``c = alpha * (1 - explore_beta)`` and ``e`` zero at first::

        g'    = g + c * (g - e)                            # = g + alpha * a
        theta = one step of the inner optimizer with g'
        e     = explore_beta * e + (1 - explore_beta) * g

    ``EAdaptor(SGD(...))`` is the paper's ESGD; ``EAdaptor(AdamW(...))`` is :class:`AdamE`, which needs less
    memory and time.

    It is an optimizer over the very ``param_groups``, ``defaults`` and ``state`` of the inner one: schedulers,
    callbacks and ``add_param_group`` may be given either of the two. ``alpha`` and ``explore_beta`` are keys of
    the param groups and are read at each step; where the inner optimizer has an ``alpha`` of its own (RMSprop,
    ASGD), the key is ``explore_alpha``. The state of a parameter is the inner optimizer's and ``exp_avg_grad``
    (e), shaped as the parameter and in fp32 (float64 for float64); ``state_dict`` holds both.

    During the step of the inner optimizer ``.grad`` is a tensor with ``g'``, rounded to the gradient's dtype,
    which takes as much memory as the gradients; afterwards it is the user's tensor again, unchanged. The inner
    optimizer's own step hooks see ``g'``, those of this one ``g``. A ``GradScaler`` unscales the gradients and
    skips steps by itself, also where the inner optimizer could do that (``fused=True``), so that clipping works.

    Args:
        optimizer: The inner optimizer: SGD, AdamW, RMSprop, Muon or any other whose ``step`` needs no closure.
            Step this object from now on, not the inner one.
        alpha: Weight of the gradient's change, ``|alpha| < 1 / (1 - explore_beta)``: negative explores along
            valleys (large batches), positive exploits. ``"auto"`` stays in the param group until a callback
            or :meth:`set_batch_size` writes a number there; until then the small-batch choice, 0.5 with ``explore_beta``
            0.01, is in force. From 1,000 samples a batch the paper takes -5 and 0.99.
        explore_beta: Decay of the average in E, in [0, 1); ``"auto"`` if and only if ``alpha`` is.

    Attributes:
        inner: The inner optimizer.

    Raises:
        TypeError: If ``optimizer`` is no torch optimizer or needs a closure (LBFGS), or a parameter is complex.
        ValueError: If ``optimizer`` contains adaptor E already or is ``differentiable``, or if ``alpha`` or
            ``explore_beta`` is out of range.

    Source: Zhao et al., "Exploring Landscapes for Better Minima along Valleys", NeurIPS 2025 (arXiv
    2510.27153), adaptor E.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = EAdaptor(torch.optim.SGD([x], lr=0.1, momentum=0.5), alpha=-5.0, explore_beta=0.9)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     x.square().sum().backward()
        ...     optimizer.step()
        >>> bool(x.abs().max() < 0.01)
        True
        >>> sorted(optimizer.state_dict()["state"][0])
        ['exp_avg_grad', 'momentum_buffer']
    """

    inner: Optimizer

    def __init__(self, optimizer: Optimizer, alpha: float | str = AUTO, explore_beta: float | str = AUTO) -> None:
        """Check ``optimizer`` and the two numbers, and write them into its defaults and param groups."""
        _check_inner(optimizer)
        check_explore(alpha, explore_beta)
        for group in optimizer.param_groups:
            refuse_complex(group, "EAdaptor")
        alpha_name = "explore_alpha" if "alpha" in optimizer.defaults else "alpha"
        # the inner optimizer's own add_param_group completes groups from its defaults
        optimizer.defaults.update({alpha_name: alpha, "explore_beta": explore_beta})
        self.__setstate__({"inner": optimizer})  # not super().__init__: that would make groups of its own
        self._complete_groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of the inner optimizer."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = param_groups

    @property
    def state(self) -> Any:
        """The state of the inner optimizer, with ``exp_avg_grad`` for each parameter that was stepped."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the inner optimizer, with those of adaptor E."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.inner.defaults = defaults

    def _names(self) -> tuple[str, str]:
        return ("explore_alpha" if "explore_alpha" in self.defaults else "alpha"), "explore_beta"

    def _complete_groups(self) -> None:
        """Give both numbers to groups that lack them, as those of a checkpoint loaded by the inner optimizer."""
        for group in self.param_groups:
            for name in self._names():
                group.setdefault(name, self.defaults[name])

    def _check_group(self, group: dict[str, Any]) -> None:
        alpha, explore_beta = self._names()
        check_explore(group[alpha], group[explore_beta])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step of the inner optimizer with the gradients that adaptor E gives it.

        Args:
            closure: Clears the gradients, computes the loss and its gradients, and returns the loss. It runs
                first, with gradients enabled; the gradients are read after it.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            RuntimeError: If a gradient is sparse; nothing has been changed then.
            TypeError: If a parameter is complex; nothing has been changed then.
            ValueError: If ``alpha`` and ``explore_beta`` were changed to an illegal pair.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._complete_groups()
        for group in self.param_groups:  # all of them, so that an error leaves nothing half done
            self._check_group(group)
            refuse_complex(group, "EAdaptor")
            refuse_sparse(group, "EAdaptor")
        self._step_with_explored_gradients()
        return loss

    def _step_with_explored_gradients(self) -> None:
        kept = [(param, param.grad) for group in self.param_groups for param in group["params"]]
        averages = {param: self._exp_avg_grad(param) for param, grad in kept if grad is not None}
        hidden = self._hide_averages()
        try:
            for params, grads, es, alpha, explore_beta in self._by_group(averages):
                mix = alpha * (1.0 - explore_beta)
                mixed = explored_gradients(_in_dtype_of(grads, es), es, mix)
                for param, explored in zip(params, _in_dtype_of(mixed, grads), strict=True):
                    param.grad = explored
            self.inner.step()
        finally:
            for param, grad in kept:
                param.grad = grad
            for param, e in {**hidden, **averages}.items():
                self.state[param][BUFFER] = e
        for _, grads, es, _, explore_beta in self._by_group(averages):
            move_averages(es, _in_dtype_of(grads, es), explore_beta)

    def _hide_averages(self) -> dict[Tensor, Tensor]:
        """Take all ``e`` out of the state, so that the inner optimizer finds what it has put there, and no more."""
        hidden = {
            param: state.pop(BUFFER)
            for param, state in self.state.items()
            if isinstance(param, Tensor) and BUFFER in state
        }
        for param in hidden:
            if not self.state[param]:
                del self.state[param]
        return hidden

    def _by_group(
        self, averages: dict[Tensor, Tensor]
    ) -> list[tuple[list[Tensor], list[Tensor], list[Tensor], float, float]]:
        """Parameters, gradients and ``e`` of each group, those of each device mesh apart, and the group's two numbers."""
        lists = []
        for group in self.param_groups:
            numbers = resolve_explore(*(group[name] for name in self._names()))
            by_mesh: dict[Any, list[Tensor]] = {}
            for param in group["params"]:
                if param in averages:
                    by_mesh.setdefault(mesh_of(param), []).append(param)
            for params in by_mesh.values():
                grads = [param.grad for param in params if param.grad is not None]
                lists.append((params, grads, [averages[param] for param in params], *numbers))
        return lists

    def _exp_avg_grad(self, param: Tensor) -> Tensor:
        dtype = wide_dtype(param)
        if param in self.state and BUFFER in self.state[param]:
            e: Tensor = self.state[param][BUFFER].to(device=param.device, dtype=dtype)
            return e
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group to the inner optimizer.

        Args:
            param_group: The parameters under ``"params"``, and what is to differ from the defaults.

        Raises:
            TypeError: If a parameter is complex.
            ValueError: If ``alpha`` or ``explore_beta`` is out of range.
        """
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            self._check_group({**self.defaults, **param_group})
        self.inner.add_param_group(param_group)
        try:
            refuse_complex(self.param_groups[-1], "EAdaptor")
        except TypeError:
            self.param_groups.pop()
            raise

    def set_batch_size(self, batch_size: float) -> None:
        """Put the paper's choice for a batch size in the place of ``"auto"``.

        Groups whose two numbers are numbers are left alone. ``OptimizerCalibration`` does the same.

        Args:
            batch_size: Samples per optimizer step over all devices and accumulated micro-batches, > 0.

        Raises:
            ValueError: If ``batch_size`` is not a positive number.
        """
        self._complete_groups()
        fill_in_explore(self.param_groups, self._names(), batch_size)

    def state_dict(self) -> StateDict:
        """Return the state dict of the inner optimizer, which holds adaptor E's state and numbers as well."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.inner.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this class, or one of the inner optimizer.

        With the latter, ``exp_avg_grad`` starts at zero, and ``alpha`` and ``explore_beta`` keep their present
        values. ``exp_avg_grad`` stays in fp32 for fp16 and bf16 parameters, and is copied: later steps do not
        write to ``state_dict``.

        Args:
            state_dict: What :meth:`state_dict` returned; it is not changed.

        Raises:
            ValueError: If the groups do not fit or ``alpha`` or ``explore_beta`` is out of range; nothing has
                been changed then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        inner, averages = self._split(state_dict)
        self.inner.load_state_dict(inner)
        ids = chain.from_iterable(group["params"] for group in inner["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=True):
            if key in averages:
                dtype = wide_dtype(param)
                self.state[param][BUFFER] = averages[key].to(device=param.device, dtype=dtype, copy=True)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _split(self, state_dict: StateDict) -> tuple[StateDict, dict[Any, Tensor]]:
        """Complete and check the groups, and take out ``exp_avg_grad``, which torch would cast."""
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # else the inner optimizer refuses it
            self._complete_groups()
            groups = [
                {**saved, **{name: present[name] for name in self._names() if name not in saved}}
                for present, saved in zip(self.param_groups, groups, strict=True)
            ]
            for group in groups:
                self._check_group(group)
        ids = set(chain.from_iterable(group["params"] for group in groups))
        averages = {key: state[BUFFER] for key, state in state_dict["state"].items() if key in ids and BUFFER in state}
        state = {
            key: {name: value for name, value in state.items() if name != BUFFER} if key in averages else state
            for key, state in state_dict["state"].items()
        }
        return {**state_dict, "state": state, "param_groups": groups}, averages

    def __getstate__(self) -> dict[str, Any]:
        """The inner optimizer is all that is copied or pickled."""
        return {"inner": self.inner}

    def __repr__(self) -> str:
        """Show the inner optimizer, with the numbers that are in force for ``"auto"``."""
        text = repr(self.inner)
        for name, value in zip(self._names(), explore_choice(None), strict=True):
            text = text.replace(f"    {name}: {AUTO}\n", f"    {name}: {AUTO} ({value} in force)\n")
        return f"{type(self).__name__} of {text}"


def _in_dtype_of(tensors: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    """Tensors in the dtypes of others: themselves where these agree, else copies."""
    return [tensor.to(other.dtype) for tensor, other in zip(tensors, like, strict=True)]


def _check_inner(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer={optimizer!r} is of type {type(optimizer).__name__}: it must be a torch.optim.Optimizer, "
            "made from the parameters, as in EAdaptor(torch.optim.SGD(model.parameters(), lr=0.1))."
        )
    name = type(optimizer).__name__
    if "explore_beta" in optimizer.defaults:
        raise ValueError(
            f"optimizer={name} contains adaptor E already: explore_beta is one of its hyper-parameters. "
            "Use it as it is, or adapt an optimizer without E, such as SGD or AdamW."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"optimizer={name} calls its closure itself, as often as it likes, and adaptor E needs one gradient a "
            "step. Adapt an optimizer whose step() can do without a closure, such as SGD or AdamW."
        )
    saved = sorted(optimizer.state_dict())
    if saved != ["param_groups", "state"]:
        raise TypeError(
            f"optimizer={name} saves {saved} in its state_dict, and adaptor E would be lost from a checkpoint: it keeps its "
            "average in torch's own 'state'. Put EAdaptor around the optimizer that it wraps, and it around EAdaptor."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer={name} has differentiable=True, but adaptor E is no part of the autograd graph. "
            "Make the optimizer with differentiable=False."
        )
