"""What code refers to by itself: cells, defaults and attributes of functions, global names, attributes of classes."""

from __future__ import annotations

import copyreg
import sys
import types
from contextlib import ExitStack, suppress
from typing import Any

import torch

from lightning_gradhist.callbacks.probe.copies import ALL_SMALL, Copier, is_cached
from lightning_gradhist.callbacks.probe.silence import PACKAGES, SilentRun, is_own_code, writes

_PARTS = ("__func__", "fget", "fset", "fdel", "func", "dispatcher")  # of classmethods, properties, ...


def put_copies_in_place(copier: Copier, undo: ExitStack) -> None:
    """Has copies where the code of what was copied refers to something itself, and the originals again afterwards.

    Of global names and classes, this looks into the user's own code, and not into installed packages.
    """
    hooks = vars(torch.nn.modules.module)  # private: those of all modules
    of_all = {name for name, value in hooks.items() if name.startswith("_global_") and isinstance(value, dict)}
    _in_names(hooks, of_all, copier, undo, set())
    for package in filter(None, map(sys.modules.get, PACKAGES)):  # whoever calls them, as hooks of wandb.watch do
        for name, value in [(name, value) for name, value in vars(package).items() if writes(name, value)]:
            undo.callback(setattr, package, name, value)
            setattr(package, name, SilentRun())
    seen: set[int] = set()
    while copier.code:  # more comes with what is copied
        one, limit = copier.code.pop()
        copier.limit = min(limit, ALL_SMALL)
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, types.FunctionType):
            _in_function(one, copier, undo)
        elif isinstance(one, types.ModuleType):
            _in_all_names(one, copier, undo, set())
        elif isinstance(one, type):
            if _is_users_class(one):
                _in_class(one, copier, undo)
        elif _is_users_class(type(one)):
            _in_object(one, copier, undo)


def _in_function(function: types.FunctionType, copier: Copier, undo: ExitStack) -> None:
    name = function.__qualname__
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not yet filled
            content = cell.cell_contents
            undo.callback(setattr, cell, "cell_contents", content)
            cell.cell_contents = copier.copy(content, f"{name}.{variable}")
    for attribute in ("__defaults__", "__kwdefaults__"):
        defaults = getattr(function, attribute)
        copied = copier.copy(defaults, f"{name}.{attribute}")
        if copied is not defaults:
            undo.callback(setattr, function, attribute, defaults)
            setattr(function, attribute, copied)
    if _is_users(function.__globals__):
        own, function.__dict__ = function.__dict__, {}
        undo.callback(setattr, function, "__dict__", own)
        copier.fill(function, own)
        _in_names(function.__globals__, _names(function.__code__), copier, undo, set())


def _in_names(space: dict[str, Any], names: set[str], copier: Copier, undo: ExitStack, seen: set[int]) -> None:
    seen.add(id(space))  # modules may import one another
    before = {name: space[name] for name in names & space.keys()}

    def put_back() -> None:
        for name in (names & space.keys()) - before.keys():
            if not isinstance(space[name], types.ModuleType):  # one that was imported meanwhile stays so
                del space[name]
        space.update(before)

    undo.callback(put_back)
    for name, value in before.items():
        if not isinstance(value, types.ModuleType):
            space[name] = copier.copy(value, f"{space.get('__name__')}.{name}")
    for module in (*before.values(), *_imported(space, names)):
        if isinstance(module, types.ModuleType):
            if "getattr" in names:  # by which a function reaches what it does not name
                _in_all_names(module, copier, undo, seen)
            else:
                _in_module(module, names, copier, undo, seen)


def _in_module(module: types.ModuleType, names: set[str], copier: Copier, undo: ExitStack, seen: set[int]) -> None:
    if _is_users(vars(module)) and id(vars(module)) not in seen:
        _in_names(vars(module), names, copier, undo, seen)


def _in_all_names(module: types.ModuleType, copier: Copier, undo: ExitStack, seen: set[int]) -> None:
    """Of which most are not used: what cannot be copied ends the probe only where it is."""
    limit, copier.limit = copier.limit, ALL_SMALL
    _in_module(module, {name for name in vars(module) if not name.startswith("__")}, copier, undo, seen)
    copier.limit = limit


def _imported(space: dict[str, Any], names: set[str]) -> list[types.ModuleType]:
    """The modules that a function may import where it is called, from anywhere or from a package that it is in."""
    places, package = [""], space.get("__package__") or ""
    while package:
        places.append(f"{package}.")
        package = package.rpartition(".")[0]
    return [sys.modules[place + name] for place in places for name in names if place + name in sys.modules]


def _in_class(kind: type, copier: Copier, undo: ExitStack) -> None:
    before = {name: value for name, value in vars(kind).items() if not name.startswith(("__", "_abc_"))}

    def put_back() -> None:
        for name in [name for name in vars(kind) if not name.startswith(("__", "_abc_")) and name not in before]:
            type.__delattr__(kind, name)
        for name, value in before.items():
            if name not in vars(kind) or vars(kind)[name] is not value:
                _set_in(kind, name, value)

    undo.callback(put_back)
    for name, value in vars(kind).copy().items():
        inner = [getattr(value, part, None) for part in _PARTS] if hasattr(type(value), "__get__") else []
        for part in (value, *inner):
            if isinstance(part, (types.FunctionType, type)):
                copier.keep(part)
        function = getattr(value, "__func__", getattr(value, "fget", value))  # of a classmethod, a property
        if is_cached(function):
            cached = copier.copy(function, f"{kind.__qualname__}.{name}")
            if isinstance(value, property):
                cached = value.getter(cached)
            elif function is not value:
                cached = type(value)(cached)
            undo.callback(_set_in, kind, name, value)
            _set_in(kind, name, cached)
        elif name in before and (not hasattr(type(value), "__get__") or _is_users_class(type(value))):
            copied = copier.copy(value, f"{kind.__qualname__}.{name}")
            if copied is not value:
                _set_in(kind, name, copied)
    for other in (type(kind), *kind.__bases__):
        copier.keep(other)


def _set_in(kind: type, name: str, value: Any) -> None:
    """Sets an attribute of a class past what its metaclass does, where that can be passed by."""
    try:
        type.__setattr__(kind, name, value)
    except TypeError:  # of a metaclass that is written in C, as pybind11's
        setattr(kind, name, value)


def _in_object(one: Any, copier: Copier, undo: ExitStack) -> None:
    """In one that there is only once, as a registry that pickle knows by its name, or a member of an enumeration."""
    name = type(one).__qualname__
    for space in (getattr(one, "__dict__", None), one):
        if isinstance(space, dict):
            undo.callback(dict.update, space, dict(space))
            undo.callback(dict.clear, space)
            dict.update(space, {key: copier.copy(value, f"{name}.{key}") for key, value in space.items()})
    for slot in copyreg._slotnames(type(one)):  # type: ignore[attr-defined]
        if hasattr(one, slot):
            undo.callback(object.__setattr__, one, slot, getattr(one, slot))
            object.__setattr__(one, slot, copier.copy(getattr(one, slot), f"{name}.{slot}"))


def _names(code: types.CodeType) -> set[str]:
    """Also what is in quotes, by which ``globals`` and ``setattr`` find a variable."""
    within = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return {*code.co_names, *(constant for constant in code.co_consts if isinstance(constant, str))}.union(*within)


def _is_users_class(kind: type) -> bool:
    return _is_users(vars(sys.modules.get(kind.__module__, types)))


def _is_users(space: dict[str, Any]) -> bool:
    """Whether these are the names of a module that is no installed package."""
    package = (space.get("__name__") or "").partition(".")[0]
    # That of a part may be made up, as torch.ops has it.
    return is_own_code(package, getattr(sys.modules.get(package), "__file__", None) or space.get("__file__"))
