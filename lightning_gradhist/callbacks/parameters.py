"""Parameters by their names in the module."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_gradhist.callbacks._deepspeed import grouped_parameters
from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.strategies import flat_pieces

# What torch.compile, activation checkpointing and FSDP1 put in.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def plain_name(name: str) -> str:
    """The name of a parameter without what wrappers of its module add, so that it is the same with and without them."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module by their plain names; one whose plain name another one has keeps its whole name."""
    whole, plain = dict(module.named_parameters()), {}
    for name, parameter in whole.items():
        short = plain_name(name)
        plain[name if short in whole or short in plain else short] = parameter
    return plain


def model_shapes(trainer: Trainer) -> dict[str, list[int] | None]:
    """Names and whole shapes of all parameters, by which a record knows its model; None where there is no shape yet."""
    pieces, named = flat_pieces(trainer), named_parameters(trainer.lightning_module)
    shapes = {name: pieces[id(p)].shape if id(p) in pieces else p.shape for name, p in named.items() if not is_lazy(p)}
    return {name: list(shapes[name]) if name in shapes else None for name in named}


def optimizer_parameters(module: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """The parameters of an optimizer by their names in the module, in the order of its groups.

    One of another module is called by its place, ``parameter_<i>``; one without a shape yet is left out.
    """
    named = named_parameters(module)
    names = {id(parameter): name for name, parameter in named.items()}
    found: dict[str, nn.Parameter] = {}
    for i, parameter in enumerate(parameter for group in grouped_parameters(optimizer) for parameter in group):
        name = names.get(id(parameter), f"parameter_{i}")
        while id(parameter) not in names and name in named:
            name = f"_{name}"
        if not is_lazy(parameter):
            found[name] = parameter
    return found
