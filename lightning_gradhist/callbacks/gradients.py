"""The gradient that the optimizer will use, on this rank. Which of it the monitor counts: ``monitor/magnitudes.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gradhist._dtensor import is_dtensor, local, placed_as
from lightning_gradhist.callbacks._deepspeed import is_deepspeed, zero_gradients, zero_loss_scale
from lightning_gradhist.callbacks._lightning import Trainer, is_overridden
from lightning_gradhist.histogram import flat_values
from lightning_gradhist.tensors import as_real, wide, widened, with_float64

_KNOWN = ("", "lightning", "pytorch_lightning", __name__.partition(".")[0])  # packages whose hooks change no gradient
_MANY = 100  # tensors, which take several times as long one by one as side by side


def has_gradient_hook(parameter: nn.Parameter) -> bool:
    """Whether it has a hook, not ours, that is called when its gradient is accumulated; there is no public way to ask."""
    hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    functions = [getattr(hook, "func", hook) for hook in hooks.values()]
    return any(getattr(function, "__func__", None) is not LocalGradients._copy for function in functions)


def ready_gradients(
    trainer: Trainer, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The gradients from ``on_before_optimizer_step`` on: accumulated, averaged over ranks, unscaled.

    They are dense, real and in this rank's memory, whatever the layer made: of a DTensor this rank's shard.
    """
    if is_deepspeed(trainer):
        scaled = zero_gradients(trainer, parameters)
        scale = zero_loss_scale(trainer)
        return scaled if scale is None else _divided({name: g.float() for name, g in scaled.items()}, scale)
    laid = {name: _as_laid_out(p) for name, p in parameters.items() if p.grad is not None}  # collectives come first
    gradients = {name: dense(gradient) for name, gradient in laid.items()}
    # Lightning leaves the unscaling to a fused optimizer's step, and tells by this private attribute of torch.
    is_scaled = getattr(optimizer, "_step_supports_amp_scaling", False)
    return _divided(gradients, loss_scale(trainer)) if is_scaled else gradients


def has_gradients(trainer: Trainer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any parameter has one; ZeRO has put them elsewhere."""
    return is_deepspeed(trainer) or any(parameter.grad is not None for parameter in parameters)


def hooks_not_called(trainer: Trainer) -> list[tuple[str, str]]:
    """Hooks of the user's that may change gradients, and that a probe does not call, with whose they are."""
    module = trainer.lightning_module
    between = ("on_after_backward", "on_before_optimizer_step")
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    owners: list[Any] = [(one, type(one).__name__, ("on_train_batch_start", *between)) for one in callbacks]
    owners.insert(0, (module, "the module", ("backward", "configure_gradient_clipping", "optimizer_step", *between)))
    found = [
        (hook, name)
        for owner, name, hooks in owners
        for hook in hooks
        if _package(getattr(owner, hook, None)) not in _KNOWN
    ]
    if not is_deepspeed(trainer):  # which has hooks of its own there
        hooked = [name for name, parameter in module.named_parameters() if has_gradient_hook(parameter)]
        found += [("the post-accumulate-grad hook", f"parameter {name!r}") for name in hooked[:1]]
    return found


def _package(function: Any) -> str:
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def local_gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, dense and real: of a DTensor this rank's shard, laid out as the parameter's."""
    return dense(_as_laid_out(parameter))


def lies_otherwise(parameter: nn.Parameter) -> bool:
    """Whether its gradient lies otherwise on the ranks than the parameter does, so that to have it is a collective."""
    if not is_dtensor(parameter):
        return False
    gradient = parameter.grad
    return gradient is not None and is_dtensor(gradient) and gradient.placements != parameter.placements


def _as_laid_out(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    return placed_as(gradient.detach() if gradient.requires_grad else gradient, parameter)


def dense(gradient: Tensor) -> Tensor:
    """A gradient in this rank's memory, with all its values, as real numbers."""
    gradient = local(gradient)
    return as_real(gradient.to_dense() if gradient.layout != torch.strided else gradient)


def squared_norm(gradients: Iterable[Tensor]) -> Tensor:
    """The sum of the squares of all values, on the device of the first gradient; 0 where there is none."""
    values = [as_real(gradient) for gradient in gradients] or [torch.zeros(1, device="cpu")]
    kinds = {(value.layout, value.dtype, value.device) for value in values}
    if len(values) > _MANY and len(kinds) == 1 and values[0].layout == torch.strided:
        values = [widened(torch._utils._flatten_dense_tensors(values))]
    norms = torch._foreach_norm([flat_values(value)[0] for value in values])
    widest = max(map(wide, norms), key=lambda dtype: dtype.itemsize)
    stacked = torch.stack([norm.to(norms[0].device, widest) for norm in norms])
    return with_float64(stacked).double().square().sum()  # float32 does not hold the squares of all that it holds


class LocalGradients:
    """Copies of what backward leaves on this rank, before DDP averages it, until :meth:`take` or :meth:`close`.

    A backward replaces the copies of the one before it, so that with accumulation the last holds the whole step's. Of
    parameters that are trained what ``select`` picks is copied, all by default.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        select: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = lambda gradients: gradients,
    ) -> None:
        self._select = select
        self._copies: dict[str, Tensor] = {}
        self._error: Exception | None = None
        self._handles: dict[str, RemovableHandle] = {}
        self._is_open = True
        self.extend(parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # hooks stay with the parameters of this process: a copy is None

    def extend(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copies those that are trained by now, too."""
        for name, parameter in parameters.items() if self._is_open else ():
            if parameter.requires_grad and name not in self._handles:
                self._handles[name] = parameter.register_post_accumulate_grad_hook(partial(self._copy, name))

    @property
    def names(self) -> Iterable[str]:
        """Of the parameters that it has looked at, whether they had a gradient or not."""
        return self._handles.keys()

    def take(self, trainer: Trainer, times: int = 1) -> dict[str, Tensor]:
        """The gradients, unscaled, divided by a number; nothing is copied any more. Raises what a copy has raised."""
        self.close()
        if self._error is not None:
            raise self._error
        return _divided(self._copies, loss_scale(trainer) / times)

    def close(self) -> None:
        """Copies nothing any more."""
        self._is_open = False
        for handle in self._handles.values():
            handle.remove()

    def _copy(self, name: str, parameter: Tensor) -> None:
        try:
            selected = self._select({name: local_gradient(parameter)})  # type: ignore[arg-type]
            self._copies |= {name: gradient.clone() for name, gradient in selected.items()}
        except Exception as error:  # within the user's backward, which goes on
            self._error = error


def before_update(optimizer: Optimizer, then: Callable[[], None]) -> RemovableHandle:
    """Calls a function whenever an optimizer is about to change the weights, and nothing more is done to gradients.

    Lightning hands backward and clipping to the optimizer's step as its closure, but under a GradScaler, where both come
    before the step. A step that the scaler skips does not come here, unless the optimizer is fused.
    """

    def hook(optimizer: Optimizer, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        closure = kwargs.get("closure")
        if closure is None:
            then()
            return None

        def closure_and_then() -> Any:
            loss = closure()
            then()
            return loss

        return args, {**kwargs, "closure": closure_and_then}

    return optimizer.register_step_pre_hook(hook)


def found_inf(optimizer: Optimizer) -> Tensor | None:
    """Within the step of a fused optimizer under a GradScaler, whether it skips the step: 1 or 0, on the device."""
    return getattr(optimizer, "found_inf", None)


def loss_scale(trainer: Trainer) -> float:
    """The factor of the loss under 16-mixed, else 1."""
    scaler = loss_scaler(trainer)
    return float(scaler.get_scale()) if scaler is not None else 1.0


def may_skip_steps(trainer: Trainer) -> bool:
    """Whether a loss scale that overflows makes the optimizer leave out steps."""
    return loss_scaler(trainer) is not None or zero_loss_scale(trainer) is not None


def loss_scaler(trainer: Trainer) -> Any:
    """The GradScaler of 16-mixed, which may skip steps, or None."""
    return getattr(trainer.precision_plugin, "scaler", None)


def rounding_unit(trainer: Trainer) -> float:
    """The relative precision of the arithmetic that gradients come from, by the Trainer's ``precision``."""
    kinds = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    precision = str(trainer.precision)
    return torch.finfo(next((dtype for key, dtype in kinds.items() if key in precision), torch.float32)).eps


def clip_limits(trainer: Trainer) -> tuple[float | None, float | None]:
    """What the Trainer clips the norm to, and what each value; None where it does not, and where the module clips itself."""
    limit, by_norm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm in (None, "norm")
    if not limit or is_overridden("configure_gradient_clipping", trainer.lightning_module):
        return None, None
    return (float(limit), None) if by_norm else (None, float(limit))


def _divided(gradients: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    return gradients if scale == 1.0 else {name: gradient / scale for name, gradient in gradients.items()}
