"""EAdaptor: adaptor E around any torch optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from lightning_gradhist._dtensor import from_shard, local, placed_as
from lightning_gradhist.explore import AUTO, check_explore, resolve_explore
from lightning_gradhist.optim._base import ExploringOptimizer
from lightning_gradhist.optim._checks import refuse_complex
from lightning_gradhist.optim._formulas import explored_gradients, move_averages
from lightning_gradhist.tensors import wide

BUFFER = "exp_avg_grad"


def _of_inner(name: str, doc: str) -> Any:
    return property(lambda self: getattr(self.inner, name), lambda self, new: setattr(self.inner, name, new), doc=doc)


class EAdaptor(ExploringOptimizer):
    """Adaptor E: lets a torch optimizer see ``g + alpha * a`` in place of the gradient ``g``.

    ``a`` is the moving average of the gradient's change, ``a_k = explore_beta * a_{k-1} + (1 - explore_beta) * (g_k -
    g_{k-1})``; it equals ``(1 - explore_beta) * (g_k - e_{k-1})``, so that one buffer does for the paper's two. At each
    step, with ``c = alpha * (1 - explore_beta)`` and ``e`` zero at first::

        g'    = g + c * (g - e)                            # = g + alpha * a
        theta = one step of the inner optimizer with g'
        e     = explore_beta * e + (1 - explore_beta) * g

    ``EAdaptor(SGD(...))`` is the paper's ESGD; ``EAdaptor(AdamW(...))`` is :class:`AdamE`, which needs less memory and time.

    Its ``param_groups``, ``defaults`` and ``state`` are those of the inner one, so that schedulers and callbacks may be given
    either. ``alpha`` and ``explore_beta`` are keys of the param groups and are read at each step; where the inner
    optimizer has an ``alpha`` of its own (RMSprop, ASGD), the key is ``explore_alpha``. The state of a parameter is the
    inner optimizer's and ``exp_avg_grad`` (e), shaped as the parameter and in fp32 (float64 for float64).

    During the step of the inner optimizer ``.grad`` is a tensor with ``g'``, rounded to the gradient's dtype; afterwards it
    is the user's tensor again, unchanged. The inner optimizer's own step hooks see ``g'``, those of this one ``g``. A
    ``GradScaler`` unscales the gradients and skips steps by itself, also where the inner optimizer could do that
    (``fused=True``), so that clipping works.

    Args:
        optimizer: The inner optimizer: SGD, AdamW, RMSprop, Muon or any other whose ``step`` needs no closure. From now on
            step this object.
        alpha: Weight of the gradient's change, ``|alpha| < 1 / (1 - explore_beta)``: negative explores along valleys
            (large batches), positive exploits. ``"auto"`` is 0.5 with ``explore_beta`` 0.01, the paper's choice below
            1,000 samples a batch, until a callback or :meth:`set_batch_size` writes numbers in its place; from 1,000
            on, the paper takes -5 and 0.99.
        explore_beta: Decay of the average in E, in [0, 1); ``"auto"`` if and only if ``alpha`` is.

    Raises:
        TypeError: If ``optimizer`` is no torch optimizer or needs a closure (LBFGS), or a parameter is complex.
        ValueError: If ``optimizer`` contains adaptor E already or is ``differentiable``, or if ``alpha`` or
            ``explore_beta`` is out of range.

    Source: Zhao et al., "Exploring Landscapes for Better Minima along Valleys", NeurIPS 2025 (arXiv 2510.27153).

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
    """The inner optimizer."""

    def __init__(self, optimizer: Optimizer, alpha: float | str = AUTO, explore_beta: float | str = AUTO) -> None:
        _check_inner(optimizer)
        check_explore(alpha, explore_beta)
        for group in optimizer.param_groups:
            refuse_complex(group, type(self).__name__)
        alpha_name = "explore_alpha" if "alpha" in optimizer.defaults else "alpha"
        # the inner optimizer's own add_param_group completes groups from its defaults
        optimizer.defaults.update({alpha_name: alpha, "explore_beta": explore_beta})
        self.__setstate__({"inner": optimizer})  # not super().__init__: that would make groups of its own
        self._complete_groups()

    param_groups = _of_inner("param_groups", "The param groups of the inner optimizer.")
    state = _of_inner("state", "The state of the inner optimizer, with ``exp_avg_grad`` of what was stepped.")
    defaults = _of_inner("defaults", "The defaults of the inner optimizer, with those of adaptor E.")

    def _explore_names(self) -> tuple[str, str]:
        return ("explore_alpha" if "explore_alpha" in self.defaults else "alpha"), "explore_beta"

    def _make_step(self) -> None:
        for group in self.param_groups:
            refuse_complex(group, type(self).__name__)  # the inner optimizer may have been given one
        kept = [(param, param.grad) for group in self.param_groups for param in group["params"]]
        averages = {param: self._exp_avg_grad(param) for param, grad in kept if grad is not None}
        hidden = self._hide_averages()
        try:
            for params, alpha, explore_beta in self._alike(averages):
                grads, es = _grads_of(params), [local(averages[param]) for param in params]
                explored = explored_gradients(_in_dtype_of(grads, es), es, alpha * (1.0 - explore_beta))
                for param, grad in zip(params, _in_dtype_of(explored, grads), strict=True):
                    param.grad = from_shard(grad, param)
            self.inner.step()
        finally:
            for param, grad in kept:
                param.grad = grad
            for param, e in {**hidden, **averages}.items():
                self.state[param][BUFFER] = e
        for params, _, explore_beta in self._alike(averages):
            es = [local(averages[param]) for param in params]
            move_averages(es, _in_dtype_of(_grads_of(params), es), explore_beta)

    def _hide_averages(self) -> dict[Tensor, Tensor]:
        """Take all ``e`` out of the state, so that the inner optimizer finds what it has put there, and no more."""
        ours = [(param, state) for param, state in self.state.items() if isinstance(param, Tensor) and BUFFER in state]
        hidden = {param: state.pop(BUFFER) for param, state in ours}
        for param in hidden:
            if not self.state[param]:
                del self.state[param]
        return hidden

    def _alike(self, stepped: Collection[Tensor]) -> Iterator[tuple[list[Tensor], float, float]]:
        """The parameters of each group that are stepped, and the group's two numbers."""
        for group in self.param_groups:
            params = [param for param in group["params"] if param in stepped]
            if params:
                yield params, *resolve_explore(*(group[name] for name in self._explore_names()))

    def _exp_avg_grad(self, param: Tensor) -> Tensor:
        dtype = wide(param)
        if param in self.state and BUFFER in self.state[param]:
            e: Tensor = self.state[param][BUFFER].to(device=param.device, dtype=dtype)
            return e
        return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)

    def _add(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)

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

        With the latter, ``exp_avg_grad`` starts at zero, and ``alpha`` and ``explore_beta`` keep their present values.
        ``exp_avg_grad`` stays in fp32 for fp16 and bf16 parameters, and is a copy.

        Raises:
            ValueError: If the groups do not fit, the two numbers are out of range, or ``exp_avg_grad`` is no tensor; nothing has
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
                dtype = wide(param)
                self.state[param][BUFFER] = averages[key].to(device=param.device, dtype=dtype, copy=True)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _split(self, state_dict: StateDict) -> tuple[StateDict, dict[Any, Tensor]]:
        """Complete and check the groups, and take out ``exp_avg_grad``, which torch would cast."""
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # else the inner optimizer refuses it
            self._complete_groups()
            groups = [
                {**saved, **{name: present[name] for name in self._explore_names() if name not in saved}}
                for present, saved in zip(self.param_groups, groups, strict=True)
            ]
            for group in groups:
                self._check_group(group)
        ids = set(chain.from_iterable(group["params"] for group in groups))
        averages = {key: state[BUFFER] for key, state in state_dict["state"].items() if key in ids and BUFFER in state}
        for key, average in averages.items():
            if not isinstance(average, Tensor):
                raise ValueError(
                    f"{BUFFER} of parameter {key} in the state dict must be a tensor, got {average!r}; leave it out, and it"
                    " starts at zero."
                )
        state = {
            key: {name: value for name, value in state.items() if name != BUFFER} if key in averages else state
            for key, state in state_dict["state"].items()
        }
        return {**state_dict, "state": state, "param_groups": groups}, averages

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner}  # all that is copied or pickled

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self._with_explore_in_force(repr(self.inner))}"


def _grads_of(params: list[Tensor]) -> list[Tensor]:
    """This rank's shards of the gradients, laid out as the parameters'."""
    return [local(placed_as(param.grad, param)) for param in params if param.grad is not None]


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
    if not _saves_its_state(optimizer):
        raise TypeError(
            f"optimizer={name} does not save torch's own 'state' in its state_dict, or more beside it, and adaptor E would be "
            "lost from a checkpoint: it keeps its average there. Put EAdaptor around the optimizer that it wraps, and it "
            "around EAdaptor."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer={name} has differentiable=True, but adaptor E is no part of the autograd graph. "
            "Make the optimizer with differentiable=False."
        )


def _saves_its_state(optimizer: Optimizer) -> bool:
    """Whether what is put into its state is saved, and nothing elsewhere; found out by trying it."""
    param: Any = next((param for group in optimizer.param_groups for param in group["params"]), None)
    was_there = param in optimizer.state
    state = optimizer.state.setdefault(param, {})
    state[BUFFER] = None
    try:
        saved = optimizer.state_dict()
        return sorted(saved) == ["param_groups", "state"] and any(BUFFER in one for one in saved["state"].values())
    finally:
        del state[BUFFER]
        if not was_there:
            del optimizer.state[param]
