"""What is used of Lightning, from whichever of its two packages is installed."""

from __future__ import annotations

from lightning_utilities.core.apply_func import apply_to_collection

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.profilers import PassThroughProfiler
    from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
    from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.seed import isolate_rng
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "lightning":
        raise
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
    from pytorch_lightning.loggers.logger import DummyLogger  # type: ignore[assignment]
    from pytorch_lightning.profilers import PassThroughProfiler  # type: ignore[assignment]
    from pytorch_lightning.utilities import CombinedLoader, rank_zero_info, rank_zero_warn  # type: ignore[assignment]
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException  # type: ignore[assignment]
    from pytorch_lightning.utilities.model_helpers import is_overridden
    from pytorch_lightning.utilities.seed import isolate_rng
    from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature

__all__ = [
    "Callback",
    "CombinedLoader",
    "DummyLogger",
    "LightningModule",
    "MisconfigurationException",
    "PassThroughProfiler",
    "SIGTERMException",
    "Trainer",
    "apply_to_collection",
    "is_overridden",
    "is_param_in_hook_signature",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_warn",
]
