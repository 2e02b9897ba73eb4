"""Which parameters are counted, and in which row of the histogram."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial
from typing import Any

from torch import nn

from lightning_gradhist.callbacks._lightning import MisconfigurationException, Trainer, rank_zero_info, rank_zero_warn
from lightning_gradhist.callbacks.parameters import model_shapes, named_parameters, plain_name
from lightning_gradhist.callbacks.strategies import least_over_ranks

_NAMED = 12
_MANY = 200  # rows beyond which a page of histograms is no longer read
_POOLED = re.compile(r"all(_\d+)?")  # names of what is over all rows


class Rows:
    """Gives each parameter the name of its row, or leaves it out: by the arguments of ``GradientHistogramMonitor``.

    Raises:
        MisconfigurationException: for an argument that is none of these, or no regular expression.
    """

    def __init__(
        self, group_by: int | str | Callable[[str], str | None] | None, include: str | None, exclude: str | None
    ) -> None:
        filters = {"include": include, "exclude": exclude}
        self._filters = {name: None if x is None else _compiled(name, x) for name, x in filters.items()}
        self._group_by = group_by
        self._group_of = _grouping(group_by)
        self._groups: dict[str, str | None] = {}
        self._has_warned = False

    def of(self, module: nn.Module, names: Iterable[str]) -> dict[str, str]:
        """The rows of those parameters that are counted, by name; one for which there is no group has its own."""
        layers = _layers(module) if any(self._filters.values()) else {}
        groups = {name: self._group(name) for name in names if self._is_counted(name, layers)}
        taken = {group for group in self._groups.values() if group is not None}
        return {name: self._own_row(name, taken) if group is None else group for name, group in groups.items()}

    def check(self, module: nn.Module) -> int:
        """Refuses filters that match no parameter of the module, or leave none; else counts the rows that are trained.

        A parameter that is frozen now counts for a match, as it may be trained later.

        Raises:
            MisconfigurationException: naming what there is.
        """
        layers = _layers(module)
        trained = {name: p.requires_grad for name, p in named_parameters(module).items()}
        names = list(trained)
        classes = sorted({_classes(name, layers)[0] for name in names if _classes(name, layers)})
        there = f"The parameters are {_listed(names)}; the layers {_listed(classes)}."
        for argument, pattern in self._filters.items():
            if pattern is not None and not any(_matches(pattern, name, layers) for name in names):
                raise MisconfigurationException(
                    f"{argument}={pattern.pattern!r} matches no parameter's name and no layer's class. {there}"
                )
        rows = self.of(module, names)
        if names and not rows:
            raise MisconfigurationException(f"include and exclude together leave no parameter. {there}")
        taken = sorted(row for row in set(rows.values()) if _POOLED.fullmatch(row))
        if taken:
            raise MisconfigurationException(
                f"group_by gives the group {taken[0]!r}, which is the name of what is over all groups; give it another one"
            )
        return len({row for name, row in rows.items() if trained[name]})

    def check_start(self, trainer: Trainer, module: nn.Module) -> None:
        """Checks filters and groups at the start of training, on every rank, and points out that there are many rows.

        Raises:
            MisconfigurationException: as :meth:`check`, and for a function that groups otherwise on another rank, whose
                counts would be added to other rows.
        """
        rows = self.check(module)
        if trainer.world_size > 1 and callable(self._group_by):
            mine = list(self.of(module, model_shapes(trainer)).items())
            if not least_over_ranks(float(mine == trainer.strategy.broadcast(mine)), trainer):
                raise MisconfigurationException(
                    "group_by gives other groups on other ranks; it must depend on nothing but the parameter's name, not"
                    " on the rank nor on hash(), which differs from process to process"
                )
        if self._group_by is None and rows > _MANY:
            rank_zero_info(
                f"GradientHistogramMonitor logs {rows} histograms, one a parameter; group_by=1, 2, ... gives one a module"
                " at that depth, and include= and exclude= choose among the parameters."
            )

    def _group(self, name: str) -> str | None:
        """The group of a parameter, asked for once, so that it stays the same; none where the user's function raises."""
        if name not in self._groups:
            try:
                group: Any = self._group_of and self._group_of(name)  # whatever the user's function returns
                self._groups[name] = None if group in (None, "") or group is False else str(group)
            except Exception as error:
                self._groups[name] = None
                if not self._has_warned:
                    rank_zero_warn(f"group_by raises for {name!r}, which has a row of its own now: {error!r}")
                self._has_warned = True
        return self._groups[name]

    def _own_row(self, name: str, taken: Set[str]) -> str:
        """The name of a parameter, or another one where a group has that, or what is over all rows."""
        row = name
        while _POOLED.fullmatch(row) or row in taken or (row != name and row in self._groups):
            row = f"parameter_{row}"
        return row

    def _is_counted(self, name: str, layers: Mapping[str, list[str]]) -> bool:
        include, exclude = self._filters.values()
        if include is not None and not _matches(include, name, layers):
            return False
        return exclude is None or not _matches(exclude, name, layers)


def distinct_rows(rows: Sequence[Mapping[str, str]], index: int) -> dict[str, str]:
    """The rows of one of several optimizers: one that another optimizer has as well ends in the optimizer's index."""
    others = {row for i, other in enumerate(rows) if i != index for row in other.values()}
    taken = others.union(rows[index].values())

    def own(row: str) -> str:
        row = f"{row}_{index}"
        return own(row) if row in taken else row

    return {name: own(row) if row in others else row for name, row in rows[index].items()}


def _grouping(group_by: Any) -> Callable[[str], str | None] | None:
    """The function, if any, from the name of a parameter to that of its group, or to nothing; one that can be pickled."""
    if isinstance(group_by, int) and not isinstance(group_by, bool) and group_by >= 1:
        return partial(_module_path, depth=group_by)
    if isinstance(group_by, str):
        return partial(_first_group, pattern=_compiled("group_by", group_by))
    if group_by is None or callable(group_by):
        return group_by
    raise MisconfigurationException(
        "group_by must be None, a depth of the module path from 1 up, a regular expression, or a function of a"
        f" parameter's name, got {group_by!r}"
    )


def _module_path(name: str, depth: int) -> str:
    return ".".join(name.split(".")[:-1][:depth])


def _first_group(name: str, pattern: re.Pattern[str]) -> str | None:
    match = pattern.search(name)
    return match[1 if pattern.groups else 0] if match else None


def _compiled(argument: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise MisconfigurationException(f"{argument} must be a regular expression, got {pattern!r}: {error}") from None


def _layers(module: nn.Module) -> dict[str, list[str]]:
    """By name, the names of a layer's class and its bases below ``nn.Module``."""
    return {
        plain_name(name): [cls.__name__ for cls in type(layer).__mro__ if issubclass(cls, nn.Module)][:-1]
        for name, layer in module.named_modules()
    }


def _classes(name: str, layers: Mapping[str, list[str]]) -> list[str]:
    """The class names of a parameter's layer; of a parametrized one also of the layer whose weight it makes."""
    owner, parametrized, _ = name.partition("parametrizations.")
    owners = layers.get(owner.rstrip("."), []) if parametrized else []
    return owners + layers.get(name.rpartition(".")[0], [])


def _matches(pattern: re.Pattern[str], name: str, layers: Mapping[str, list[str]]) -> bool:
    return bool(pattern.search(name)) or any(map(pattern.fullmatch, _classes(name, layers)))


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
