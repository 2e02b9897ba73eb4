"""What an optimizer makes of the gradients: how far it moves the weights, and which of them its epsilon damps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradhist.callbacks._lightning import LightningModule, rank_zero_warn
from lightning_gradhist.callbacks.guard import Guard
from lightning_gradhist.callbacks.optimizers import damping_epsilons, second_moment
from lightning_gradhist.callbacks.parameters import optimizer_parameters
from lightning_gradhist.callbacks.strategies import Replicas, local, own_parts
from lightning_gradhist.epsilon import IDLE_SHARE
from lightning_gradhist.histogram import COLUMNS, MagnitudeHistogram
from lightning_gradhist.logging.charts import distributions
from lightning_gradhist.logging.sinks import Sink
from lightning_gradhist.logging.writer import HostTensor, Once, send_heatmap
from lightning_gradhist.tensors import as_real, batches, copies, elementwise, joined

_ALARM = 0.1
_SUMS = 4  # squares of the update, squares of the weights, damped, all that could be
_MOMENT = "optimizer_second_moment"
Send = Callable[[Callable[[Sink], None]], None]


class StateReport:
    """What a logged step did to the weights, by row and over all ranks.

    Args:
        table: float64 ``[len(names), 4 + columns of a histogram]``: sums of squares of the update and of the weights before
            it, numbers of weights that epsilon damps and of those that have a second moment other than zero, and the counts
            of its root as in :attr:`MagnitudeHistogram.table`. NaN where a rank could not count.
        names: of the rows.
        eps: the epsilon in force by row, the largest of a row; none where there is none.
        step: the trainer's ``global_step``.
        suffix: of the names of what is over all rows.
    """

    def __init__(self, table: Tensor, names: list[str], eps: Mapping[str, float], step: int, suffix: str) -> None:
        self.names, self.eps, self.step, self.suffix = names, eps, step, suffix
        self.histogram = Once(self._histogram)
        """Makes the histogram of the roots of the second moment."""
        self._on_host = HostTensor(table)

    def scalars(self) -> dict[str, float]:
        """``optimizer_update_ratio/<row>`` and ``optimizer_damped_share/<row>``, where a row has them."""
        sums = self._table()[:, :_SUMS]
        found = {}
        pooled = torch.cat([sums, sums.sum(0, keepdim=True)]).tolist()
        for name, (update, weights, damped, counted) in zip([*self.names, f"all{self.suffix}"], pooled, strict=True):
            if weights > 0:
                found[f"optimizer_update_ratio/{name}"] = math.sqrt(update / weights)
            if counted > 0:
                found[f"optimizer_damped_share/{name}"] = damped / counted
        return found

    def alarm(self) -> str | None:
        """A sentence about the row where epsilon damps most weights, and the way out; None if 10% or less of each row."""
        if self._on_host()[:, -1].isnan().any():  # of which send() has spoken
            return None
        damped, counted = self._table()[:, 2:_SUMS].unbind(1)
        shares = (damped / counted).nan_to_num(0.0)  # a row without a second moment
        alarming = shares > _ALARM
        if not alarming.any():
            return None
        worst = int((damped * alarming).argmax())
        least = float(self.histogram().quantile(IDLE_SHARE)[worst])
        idle = 10.0 ** math.floor(math.log10(least)) if least > 0 else 0.0  # NaN where all are below float32's range
        return (
            f"GradientHistogramMonitor: eps={self.eps[self.names[worst]]:g} damps {float(shares[worst]):.1%} of the weights"
            f" of {self.names[worst]!r} at step {self.step}: the root of their second moment is below it, and their step"
            f" less than half of what it would be without. More than {_ALARM:.0%} are damped in {int(alarming.sum())} of"
            f" {len(self.names)} rows, and most weights in this one. Lower eps (eps={idle:g} damps {IDLE_SHARE:.0%} of it at"
            " most), or have OptimizerCalibration choose it. Parameters whose gradient is only rounding noise, as that of a"
            " bias before a normalization, are rightly damped; leave them out with exclude=."
        )

    def send(self, send: Send) -> None:
        """Has loggers write the scalars and histograms."""
        send(lambda sink: sink.scalars(self.scalars(), self.step))
        send(lambda sink: sink.histograms(distributions(self.histogram(), _MOMENT, f"all{self.suffix}"), self.step))

    def draw(self, send: Send) -> None:
        """Has loggers show the second moment by layer, with epsilon drawn in."""
        title, tag = f"root of the second moment by layer, step {self.step}", f"{_MOMENT}_by_layer{self.suffix}"
        send_heatmap(send, tag, self.step, title, self.histogram, self.eps)

    def _table(self) -> Tensor:
        table = self._on_host()
        if table[:, -1].isnan().any():
            raise RuntimeError(
                "a rank could not look at its part of the optimizer's step, so that the step is left out"
            )
        return table

    def _histogram(self) -> MagnitudeHistogram:
        return MagnitudeHistogram.from_table(self.names, self._table()[:, _SUMS:].long())


class StateWatch:
    """Looks at the optimizers' steps that are logged, from before each until it is done.

    Args:
        replicas: how tensors lie on the ranks.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self.begun = False
        """Whether a step is under way; the same on all ranks."""
        self._rows: Mapping[str, str] = {}
        self._before: dict[str, Tensor] | None = None
        self._last: dict[str, tuple[StateReport, bool]] = {}
        self._has_warned = False

    def begin(self, module: LightningModule, optimizer: Optimizer, rows: Mapping[str, str]) -> None:
        """Copies this rank's part of the weights that the step is going to change.

        Args:
            module: that has the parameters.
            optimizer: about to step.
            rows: which of its parameters are looked at, and in which row.
        """
        self.begun, self._rows, self._before = True, rows, None
        parameters = optimizer_parameters(module, optimizer)
        stepped = [name for name in rows if parameters[name].grad is not None]
        self._before = copies(self._weights(parameters, stepped))

    def end(
        self, module: LightningModule, optimizer: Optimizer, step: int, suffix: str, guard: Guard
    ) -> StateReport | None:
        """Compares with what is there after the step; to be called on every rank. None where this one could not."""
        self.begun = False
        parameters, rows = optimizer_parameters(module, optimizer), self._rows
        names = list(dict.fromkeys(rows.values()))
        eps: dict[str, float] = {}
        table = torch.full((len(names), _SUMS + COLUMNS), math.nan, dtype=torch.float64, device=module.device)
        guard.done(lambda: eps.update(damping_epsilons(optimizer, parameters)))
        filled = not names or (
            self._before is not None and guard.done(partial(self._fill, table, names, optimizer, parameters, rows, eps))
        )
        self._before = None
        if self._replicas.ranks > 1:
            torch.distributed.all_reduce(table)  # counts are exact in float64 up to 2**53
        if not filled:
            return None
        by_row: dict[str, float] = {}
        for name in eps.keys() & rows.keys():
            by_row[rows[name]] = max(eps[name], by_row.get(rows[name], 0.0))
        return StateReport(table, names, by_row, step, suffix)

    def log(self, report: StateReport, send: Send, draws: bool) -> None:
        """Has a report written; to be called where loggers write.

        Args:
            report: of a step that was taken.
            send: gives each logger's sink to a job.
            draws: whether its figure is drawn now, and not only if it is the last.
        """
        last = self._last.get(report.suffix)
        if last is not None:
            self._warn(last[0])  # not of the present one, for which the host would wait
        report.send(send)
        if draws:
            report.draw(send)
        self._last[report.suffix] = (report, draws)

    def close(self, send: Send) -> None:
        """Says and draws what there is to say and draw of the last reports."""
        for report, drawn in self._last.values():
            self._warn(report)
            if not drawn:
                report.draw(send)
        self._last = {}

    def _warn(self, report: StateReport) -> None:
        alarm = None if self._has_warned else report.alarm()
        if alarm is not None:
            self._has_warned = True
            rank_zero_warn(alarm)

    def _weights(self, parameters: Mapping[str, nn.Parameter], names: list[str]) -> dict[str, Tensor]:
        weights = {name: as_real(local(parameters[name].detach())) for name in names}
        return own_parts(weights, parameters, self._replicas)

    def _fill(
        self,
        table: Tensor,
        names: list[str],
        optimizer: Optimizer,
        parameters: Mapping[str, nn.Parameter],
        rows: Mapping[str, str],
        eps: Mapping[str, float],
    ) -> None:
        """Writes this rank's part into a table as that of :class:`StateReport`."""
        before = self._before
        assert before is not None
        histogram = MagnitudeHistogram(names, table.device)
        after = self._weights(parameters, list(before))
        moments = second_moment(optimizer, {name: parameters[name] for name in before if name in eps})
        roots = elementwise(lambda part: _wide(part).sqrt(), own_parts(moments, parameters, self._replicas))
        histogram.update({name: root for name, root in roots.items() if root.numel()}, rows)
        row_of = {row: index for index, row in enumerate(histogram.names)}
        sums = table.new_zeros(len(table), _SUMS)
        for batch in batches(before):
            index = torch.tensor([row_of[rows[name]] for name in batch])
            found = _sums(batch, joined(batch, after), joined(batch, roots), [eps.get(name, 0.0) for name in batch])
            sums.index_add_(0, index.to(table.device), found.to(table.device))
        table.copy_(torch.cat([sums, histogram.table.double()], 1))


def _sums(before: Mapping[str, Tensor], after: Tensor, roots: Tensor, eps: list[float]) -> Tensor:
    """Of the parts of a batch, the first columns of :class:`StateReport`'s table, float64 ``[len(before), 4]``."""
    weights = joined(before)
    update = _wide(after) - weights
    touched = roots > 0  # others have not had a gradient yet, and make no step to be damped
    if len(before) == 1:
        squares = [torch.linalg.vector_norm(values, dtype=torch.float64).square() for values in (update, weights)]
        counts = [(touched & (roots < eps[0])).sum(), touched.sum()]
        return torch.stack([*squares, *(count.double() for count in counts)])[None]
    sizes = torch.tensor([part.numel() for part in before.values()])
    owners = torch.arange(len(sizes)).repeat_interleave(sizes).to(weights.device)
    limits = torch.tensor(eps, dtype=roots.dtype).to(weights.device)[owners]
    values = [update.double().square(), weights.double().square(), touched & (roots < limits), touched]
    terms = torch.stack([value.double() for value in values], 1)
    return terms.new_zeros(len(before), _SUMS).index_add_(0, owners, terms)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
