"""The histogram as a metric of torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric

from lightning_gradhist.histogram import MagnitudeHistogram


class MagnitudeHistogramMetric(Metric):
    """Counts of magnitudes as a :class:`torchmetrics.Metric`; counts of ranks and updates are added.

    Args:
        names: the names of the rows; they must differ, else ``ValueError``.
        **kwargs: as for :class:`torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = MagnitudeHistogramMetric(["weight"])
        >>> metric.update({"weight": torch.tensor([1.0, 0.0])})
        >>> histogram = metric.compute()
        >>> histogram.total().tolist(), histogram.zeros.tolist()
        ([2], [1])
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    table: Tensor

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        histogram = MagnitudeHistogram(names)
        self.names = histogram.names
        self.add_state("table", histogram.table, dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor], rows: Mapping[str, str] | None = None) -> None:
        """Counts, as :meth:`lightning_gradhist.MagnitudeHistogram.update`."""
        MagnitudeHistogram.from_table(self.names, self.table).update(values, rows)

    def compute(self) -> MagnitudeHistogram:
        """The histogram so far; later updates do not change it."""
        return MagnitudeHistogram.from_table(self.names, self.table.clone())
