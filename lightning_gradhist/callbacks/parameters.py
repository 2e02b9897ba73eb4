"""Parameters by their names in the module."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # what torch.compile and activation checkpointing put in


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of its module add, so that it is the same with and without them."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def model_shapes(module: nn.Module) -> dict[str, list[int]]:
    """Names and shapes of the parameters that are trained, by which a record knows its model."""
    return {
        plain_name(name): list(p.shape)  # the same model, compiled or not
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def optimizer_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by their names in the module, in the order of its groups."""
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {names.get(id(parameter), f"parameter_{i}"): parameter for i, parameter in enumerate(parameters)}
