"""Optimizers with adaptor E: :class:`AdamE`, the layer-wise :class:`ALTO`, and :class:`EAdaptor` for any other."""

from lightning_gradhist.optim.adam_e import AdamE
from lightning_gradhist.optim.alto import ALTO
from lightning_gradhist.optim.e_adaptor import EAdaptor
from lightning_gradhist.optim.no_decay import no_decay_groups

__all__ = ["ALTO", "AdamE", "EAdaptor", "no_decay_groups"]
