"""Optimizers with adaptor E: :class:`AdamE` and the layer-wise :class:`ALTO`."""

from __future__ import annotations

from lightning_gradhist.optim.adam_e import AdamE
from lightning_gradhist.optim.alto import ALTO

__all__ = ["ALTO", "AdamE"]
