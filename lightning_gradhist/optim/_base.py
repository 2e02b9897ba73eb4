"""What all optimizers with adaptor E share: the closure, the checks, and the two numbers that may be ``"auto"``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.optim.optimizer import Optimizer

from lightning_gradhist.explore import AUTO, check_explore, explore_choice
from lightning_gradhist.optim._checks import refuse_complex, refuse_sparse


class ExploringOptimizer(Optimizer):
    """Base of the optimizers with adaptor E; a subclass gives the step."""

    _added_defaults: ClassVar[dict[str, Any]] = {}  # what a group of a torch optimizer, or of an older pickle, may lack

    def _explore_names(self) -> tuple[str, str]:  # the keys of the two numbers in the param groups
        return "alpha", "explore_beta"

    @abstractmethod
    def _make_step(self) -> None:
        """Make a step with the gradients that are there, which are neither sparse nor all None."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step with all parameters that have a gradient, after the closure, which returns the loss.

        Raises:
            RuntimeError: If a gradient is sparse, or ``fused=True`` cannot be had (on the CPU without a C++ compiler,
                on CUDA without Triton, elsewhere); no parameter has been changed then.
            ValueError: If ``alpha`` and ``explore_beta`` were changed to an illegal pair; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._complete_groups()
        for group in self.param_groups:  # all of them, so that an error leaves nothing half done
            check_explore(*(group[name] for name in self._explore_names()))
            refuse_sparse(group, type(self).__name__)
        self._make_step()
        return loss

    def _complete_groups(self) -> None:
        """Give both numbers to groups that lack them, as those of a checkpoint loaded by the inner optimizer."""
        for group in self.param_groups:
            for name in self._explore_names():
                if name not in group:
                    group[name] = self.defaults[name]

    def set_batch_size(self, batch_size: float) -> None:
        """Put the paper's choice for a batch size in the place of ``"auto"``, for adaptor E.

        Groups whose two numbers are numbers are left alone. ``OptimizerCalibration`` does the same.

        Args:
            batch_size: Samples per optimizer step over all devices and accumulated micro-batches, > 0.

        Raises:
            ValueError: If ``batch_size`` is not a positive number.
        """
        self._complete_groups()
        for name, value in zip(self._explore_names(), explore_choice(batch_size), strict=True):
            for group in self.param_groups:
                group[name] = value if group[name] == AUTO else group[name]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group as torch does, or refuse it as the constructor does, and leave all as it was."""
        if isinstance(param_group, dict):  # torch says what is wrong with anything else
            self._check_group({**self._added_defaults, **self.defaults, **param_group})
        self._add(param_group)
        try:
            self._check_params(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _add(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_explore(*(group[name] for name in self._explore_names()))

    def _check_params(self, group: dict[str, Any]) -> None:
        refuse_complex(group, type(self).__name__)

    def __repr__(self) -> str:
        return self._with_explore_in_force(super().__repr__())

    def _with_explore_in_force(self, text: str) -> str:
        """What torch shows, with the numbers that are in force for ``"auto"``."""
        for name, value in zip(self._explore_names(), explore_choice(None), strict=True):
            text = text.replace(f"    {name}: {AUTO}\n", f"    {name}: {AUTO} ({value} in force)\n")
        return text
