"""Parameters of which a strategy leaves each rank a flat piece, and what FSDP1, ``FullyShardedDataParallel``, says of them.

The one place that reads FSDP1's private attributes: there is no public way to a parameter's whole shape but to gather it, nor
to the ranks that hold other pieces of it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass(frozen=True)
class FlatPiece:
    """How a parameter lies on the ranks."""

    shape: torch.Size  # of the whole parameter, which a rank has a flat piece of
    values: int | None  # of the piece, where it has been padded; else None
    group: Any  # process group of the ranks that hold the same piece; None where no other does
    others: Any = None  # process group of the ranks that hold one whole between them, where FSDP1 has cut it up
    device: torch.device | None = None  # that they communicate on, there


def is_of_fsdp(parameter: Tensor) -> bool:
    """Whether FSDP1 has a parameter in its care, and averages its gradient."""
    return hasattr(parameter, "_fsdp_flattened")


def is_flat(parameter: Tensor) -> bool:
    """Whether a parameter is several layers' in one: FSDP1's with ``use_orig_params=False``, or unknown, or ZeRO's."""
    if hasattr(parameter, "ds_id"):  # DeepSpeed's mark, which has no public test
        return True
    return is_of_fsdp(parameter) and (getattr(parameter, "_is_flat_param", False) or not _is_found(parameter))


def fsdp_piece(parameter: Tensor) -> FlatPiece | None:
    """How FSDP1 has cut up a parameter; None of one that it has left whole, or does not have."""
    if not is_of_fsdp(parameter):
        return None
    if not _is_found(parameter):
        raise RuntimeError(
            "the FSDP module that has cut up a parameter was not found, as after gc.freeze(), so that the norm of its layer is"
            " not known; make the optimizer after wrapping and before gc.freeze(), or set layerwise=False"
        )
    return _FOUND[parameter]


def fsdp_pieces(modules: Iterable[Any]) -> list[tuple[Tensor, FlatPiece | None]]:
    """The parameters of FSDP1's modules, and how they are cut up; None of one that is not (NO_SHARD)."""
    found: list[tuple[Tensor, FlatPiece | None]] = []
    for handle, group in ((vars(part).get("_handle"), vars(part).get("_inter_node_pg")) for part in modules):
        if handle is None:
            continue
        flat, others = handle.flat_param, (handle.process_group, handle.device)
        if flat._params is None:  # use_orig_params=False: the optimizer has the flat parameter itself
            values = flat.shape[0] - getattr(flat, "_shard_numel_padded", 0)
            shape = torch.Size([sum(shape.numel() for shape in flat._shapes)])
            pieces = [(flat, FlatPiece(shape, values, group, *others))]
        else:
            shapes = zip(flat._params, flat._shapes, strict=True)
            pieces = [(parameter, FlatPiece(shape, None, group, *others)) for parameter, shape in shapes]
        found += [(parameter, piece if handle.uses_sharded_strategy else None) for parameter, piece in pieces]
    return found


def end_forward(modules: Iterable[Any]) -> None:
    """Ends a forward pass of FSDP1's modules that no backward pass follows; no collective, and there is no public way."""
    from torch.distributed.fsdp._runtime_utils import _post_backward_final_callback

    for root in (part for part in modules if part.check_is_root()):
        _post_backward_final_callback(root, root)


_FOUND = WeakTensorKeyDictionary()  # what was found of parameters


def _is_found(parameter: Tensor) -> bool:
    """Looks for the module that has cut up a parameter, to which FSDP1 keeps no way, among all objects; once."""
    if parameter not in _FOUND:
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

        _FOUND.update(fsdp_pieces(thing for thing in gc.get_objects() if issubclass(type(thing), FSDP)))
    return parameter in _FOUND
