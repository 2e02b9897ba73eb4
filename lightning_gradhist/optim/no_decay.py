"""Param groups: which parameters decay, and which do not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

NORM_LAYERS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.SyncBatchNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
)  # fmt: skip
"""Layers whose parameters do not decay, whatever their shape; subclasses included."""
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def no_decay_groups(
    module: nn.Module,
    weight_decay: float,
    *,
    embeddings: bool = False,
    patterns: str | Iterable[str] = (),
    **no_decay_options: Any,
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a module into a param group with weight decay and one without.

    A parameter does not decay if in any of its uses in ``module``

    - it has at most one dimension, or
    - the last part of its name has the word "bias" in it (``bias``, ``bias_k``, ``in_proj_bias``), or
    - it belongs to a norm layer (LayerNorm, RMSNorm, GroupNorm, Batch-, SyncBatch-, InstanceNorm and subclasses), or
    - it belongs to an ``Embedding`` or ``EmbeddingBag`` and ``embeddings`` is true, or
    - a pattern is found in its full name.

    Every trainable parameter is in one group, once, under its first name and in the order of ``named_parameters()``; frozen
    ones are in none. So a tied weight is decided by all layers that use it.

    Args:
        module: The module, not lazy, and not yet wrapped in FSDP1, which flattens parameters (``fully_shard`` is fine).
        weight_decay: Of the first group, >= 0; that of the second is 0.
        embeddings: Do not decay embeddings either.
        patterns: Regular expression or expressions; ``re.search`` looks for them in full names such as
            ``"encoder.0.weight"``.
        **no_decay_options: Of the group without decay, such as ``layerwise=False`` for :class:`ALTO`, or its own ``lr``.

    Returns:
        The group with decay and the one without, as any torch optimizer takes them; one that would be empty is left out.
        ``"params"`` are pairs of name and parameter, so that error messages and state dicts have the names; a group
        added later must have names too.

    Raises:
        ValueError: If ``weight_decay`` is out of range, a pattern is in no name, or there are lazy or FSDP1 parameters.
        TypeError: If ``no_decay_options`` contains ``params``.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.GroupNorm(1, 3))
        >>> decay, no_decay = no_decay_groups(net, 0.1, layerwise=False)
        >>> [name for name, _ in decay["params"]], decay["weight_decay"]
        (['0.weight'], 0.1)
        >>> [name for name, _ in no_decay["params"]], no_decay["weight_decay"], no_decay["layerwise"]
        (['0.bias', '1.weight', '1.bias'], 0.0, False)
    """
    if not 0.0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay!r} is out of range: it must be finite and satisfy >= 0.")
    if "params" in no_decay_options:
        raise TypeError("params is no option of the group without decay: the parameters are those of module.")
    _refuse_unreal_shapes(module)
    no_decay_layers = NORM_LAYERS + (EMBEDDINGS if embeddings else ())
    exempt = _matching(module, [patterns] if isinstance(patterns, str) else list(patterns))
    for layer in module.modules():
        for name, param in layer.named_parameters(recurse=False, remove_duplicate=False):  # tied ones repeatedly
            if param.ndim <= 1 or "bias" in name.split("_") or isinstance(layer, no_decay_layers):
                exempt.add(param)
    trainable = [(name, param) for name, param in module.named_parameters() if param.requires_grad]
    decay = {"params": [pair for pair in trainable if pair[1] not in exempt], "weight_decay": weight_decay}
    others = [pair for pair in trainable if pair[1] in exempt]
    no_decay = {**no_decay_options, "params": others, "weight_decay": 0.0}
    return [group for group in (decay, no_decay) if group["params"]]


def _matching(module: nn.Module, patterns: list[str]) -> set[nn.Parameter]:
    named = list(module.named_parameters(remove_duplicate=False))
    found: set[nn.Parameter] = set()
    for pattern in patterns:
        matched = {param for name, param in named if re.search(pattern, name)}
        if not matched:
            raise ValueError(
                f"patterns: {pattern!r} is found in no parameter name of {type(module).__name__}. Names look like "
                f"{', '.join(repr(name) for name, _ in named[:3])}; correct the pattern or leave it out."
            )
        found |= matched
    return found


def _refuse_unreal_shapes(module: nn.Module) -> None:
    for name, layer in module.named_modules():
        if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(layer).__mro__):
            raise ValueError(
                f"module has FSDP1-wrapped layers ({name or type(layer).__name__}), whose parameters are flattened, so "
                "that their dimensions tell nothing. Use FSDP2 (fully_shard), or call no_decay_groups before wrapping."
            )
    for name, param in module.named_parameters():
        if is_lazy(param):
            raise ValueError(
                f"parameter {name} is lazy and has no shape yet. Run one batch through the module before no_decay_groups."
            )
