"""What is used of Lightning, from whichever of its two packages is installed.

``lightning`` brings ``pytorch_lightning`` along, and a project may be written for either. So :class:`Callback` is a
callback of both, for their Trainers and their command lines alike. To import the second beside the first takes 0.2 s.
"""
# ruff: noqa: F401 - most of what is imported here is for the other modules

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.profilers import PassThroughProfiler
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
    from lightning.pytorch.utilities.seed import isolate_rng as _isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "lightning":
        raise
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    from pytorch_lightning.loggers.logger import DummyLogger  # type: ignore[assignment]
    from pytorch_lightning.profilers import PassThroughProfiler  # type: ignore[assignment]
    from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn  # type: ignore[assignment]
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException  # type: ignore[assignment]
    from pytorch_lightning.utilities.seed import isolate_rng as _isolate_rng
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

if not TYPE_CHECKING:
    try:
        from pytorch_lightning import Callback as _Callback
        from pytorch_lightning.utilities.exceptions import MisconfigurationException as _MisconfigurationException
        from pytorch_lightning.utilities.exceptions import SIGTERMException as _SIGTERMException
    except ImportError:  # lightning alone, or beside one that cannot be imported
        pass
    else:
        _ours = (Callback, MisconfigurationException, SIGTERMException)
        _others = (_Callback, _MisconfigurationException, _SIGTERMException)
        Callback, MisconfigurationException, SIGTERMException = (
            type(one.__name__, tuple(dict.fromkeys((one, other))), {})
            for one, other in zip(_ours, _others, strict=True)
        )


@contextmanager
def isolate_rng() -> Generator[None, None, None]:
    """Lightning's, which alone would put nothing back after an exception, nor on devices other than CUDA's."""
    other = torch.accelerator.current_accelerator(check_available=True)
    with ExitStack() as stack:
        if other is not None and other.type != "cuda":
            devices = range(torch.accelerator.device_count())
            stack.enter_context(torch.random.fork_rng(devices, device_type=other.type))
        generators = _isolate_rng()
        generators.__enter__()
        stack.callback(generators.__exit__, None, None, None)
        yield


def is_a(thing: object, *names: str) -> bool:
    """Whether a class of one of these names is among a thing's own; by name, as Lightning's classes are there twice."""
    return not {cls.__name__ for cls in type(thing).__mro__}.isdisjoint(names)


def is_overridden(method_name: str, instance: Any) -> bool:
    """Whether the class of a module or a data module, of either package, has a hook of its own."""
    roots = {cls.__module__.partition(".")[0] for cls in type(instance).__mro__}
    package = "lightning.pytorch" if "lightning" in roots else "pytorch_lightning"
    return bool(import_module(f"{package}.utilities.model_helpers").is_overridden(method_name, instance))
