"""What an optimizer makes of the gradients: how far it moves the weights, and which of them its epsilon damps.

These are the charts of ``optimizer_state=True``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_gradhist.callbacks.gradients import has_gradients, rounding_unit
from lightning_gradhist.callbacks.monitor.observer import Step, StepObserver, WatchedOptimizer
from lightning_gradhist.callbacks.optimizer_state import damping_epsilons, optimizer_weights, second_moment
from lightning_gradhist.callbacks.strategies import own_parts
from lightning_gradhist.epsilon import IDLE_SHARE, without_rounding_noise
from lightning_gradhist.histogram import COLUMNS, MagnitudeHistogram
from lightning_gradhist.logging.magnitude_report import distributions
from lightning_gradhist.logging.writer import Lazy, Send, send_heatmap
from lightning_gradhist.tensors import HostTensor, batches, copies, elementwise, joined, sent, widened, with_float64

_ALARM = 0.1
_SUMS = 4  # squares of the update, squares of the weights, damped, all that could be
_MOMENT = "optimizer_second_moment"


class UpdateReport:
    """What a logged step did to the weights, by row and over all ranks.

    The table is float64 ``[len(names), 4 + columns of a histogram]``: sums of squares of the update and of the weights before
    it, numbers of weights that epsilon damps and of those that have a second moment other than zero, and the counts of its
    root as in :attr:`MagnitudeHistogram.table`; NaN where a rank could not count. ``eps`` has the largest epsilon in force in
    each row that has one. The names of what is over all rows have the suffix.
    """

    def __init__(self, table: Tensor, names: list[str], eps: Mapping[str, float], step: int, suffix: str) -> None:
        self.names, self.eps, self.step, self.suffix = names, eps, step, suffix
        self.histogram = Lazy(lambda: MagnitudeHistogram.from_table(names, self._table()[:, _SUMS:].long()))
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

    def alarm(self, unit: float) -> str | None:
        """A sentence about the row where epsilon damps most weights, and the way out.

        What is rounding noise to :func:`without_rounding_noise`, as the calibration sees it, is left out.

        Args:
            unit: the relative precision of the arithmetic.

        Returns:
            None if 10% or less of each row is damped, or 2% or less of all, which ``OptimizerCalibration`` leaves as it is.
        """
        if self._on_host()[:, -1].isnan().any():  # of which send() has spoken
            return None
        damped, counted = self._table()[:, 2:_SUMS].unbind(1)
        known = without_rounding_noise(self.histogram(), unit)
        noise = self.histogram().counts - known.counts
        eps = torch.tensor([[self.eps.get(name, 0.0)] for name in self.names], dtype=torch.float64, device="cpu")
        damped_noise = (noise * (known.edges[1:] <= eps)).sum(1)
        damped, counted = (damped - damped_noise).clamp(min=0), counted - noise.sum(1)
        shares = (damped / counted).nan_to_num(0.0)  # a row without a second moment
        alarming = shares > _ALARM
        if not alarming.any() or damped.sum() <= IDLE_SHARE * counted.sum():
            return None
        worst = int((damped * alarming).argmax())
        least = float(known.quantile(IDLE_SHARE)[worst])
        idle = 10.0 ** math.floor(math.log10(least)) if least > 0 else 0.0  # NaN where all are below float32's range
        return (
            f"finds that eps={self.eps[self.names[worst]]:g} damps {float(shares[worst]):.1%} of the weights"
            f" of {self.names[worst]!r} at step {self.step}: the root of their second moment is below it, and their step"
            f" less than half of what it would be without. More than {_ALARM:.0%} are damped in {int(alarming.sum())} of"
            f" {len(self.names)} rows, and most weights in this one. Lower eps (eps={idle:g} damps {IDLE_SHARE:.0%} of it at"
            " most), or have OptimizerCalibration choose it."
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


class UpdateMonitor(StepObserver):
    """Looks at the weights before and after the steps that are due, and at the second moment after them."""

    def __init__(self, watched: WatchedOptimizer) -> None:
        self._watched, self._fit = watched, watched.fit
        self._rows: Mapping[str, str] = {}
        self._before: dict[str, Tensor] | None = None
        self._last: UpdateReport | None = None
        self._last_is_drawn = False

    def at_update(self, step: Step) -> None:
        """Copies this rank's part of the weights that the step is going to change."""
        self._rows, self._before = self._watched.find_rows(), None
        with self._fit.guard.attempt("copy the weights"):
            parameters = self._watched.parameters
            changed = [name for name in self._rows if has_gradients(self._fit.trainer, [parameters[name]])]
            self._before = copies(self._weights(parameters, changed))

    def after_update(self, step: Step) -> None:
        """Compares with what is there after the step, and logs it."""
        names = list(dict.fromkeys(self._rows.values()))
        before, table, self._before = self._before, None, None
        if before is not None:
            with self._fit.guard.attempt("look at the optimizer's step"):
                eps = damping_epsilons(self._watched.optimizer, self._watched.parameters)
                table = self._table(names, before, eps)
        self._fit.sums.add_up(table, len(names) * (_SUMS + COLUMNS), math.nan)  # counts are exact up to 2**53
        if table is None or step.skipped or not self._fit.trainer.is_global_zero:
            return
        with self._fit.guard.attempt("log"):
            self._warn_of_damping()  # in the report before, for which the host need not wait
            self._last = UpdateReport(table, names, _largest(eps, self._rows), step.number, self._watched.suffix)
            self._last_is_drawn = step.drawn
            self._last.send(self._fit.send)
            if step.drawn:
                self._last.draw(self._fit.send)

    def finish(self) -> None:
        """Says and draws what there is to say and draw of the last report."""
        with self._fit.guard.attempt("log"):
            self._warn_of_damping()
            if self._last is not None and not self._last_is_drawn:
                self._last.draw(self._fit.send)

    def close(self) -> None:
        """Lets go of the weights."""
        self._before = None

    def _warn_of_damping(self) -> None:
        if self._last is None or "damping" in self._fit.warned:
            return
        alarm = self._last.alarm(rounding_unit(self._fit.trainer))
        if alarm is not None:
            self._fit.warn_once("damping", alarm)

    def _weights(self, parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> dict[str, Tensor]:
        weights = optimizer_weights(self._watched.optimizer, {name: parameters[name] for name in names})
        return own_parts(weights, parameters, self._fit.replicas)

    def _table(self, names: list[str], before: Mapping[str, Tensor], eps: Mapping[str, float]) -> Tensor:
        """This rank's part of the table of :class:`UpdateReport`."""
        rows, parameters = self._rows, self._watched.parameters
        histogram = MagnitudeHistogram(names, self._fit.module.device)
        after = self._weights(parameters, before)
        moments = second_moment(self._watched.optimizer, {name: parameters[name] for name in before if name in eps})
        roots = elementwise(lambda part: widened(part).sqrt(), own_parts(moments, parameters, self._fit.replicas))
        histogram.update({name: root for name, root in roots.items() if root.numel()}, rows)
        row_of = {row: index for index, row in enumerate(histogram.names)}
        counts = with_float64(histogram.table).double()
        sums = counts.new_zeros(len(row_of), _SUMS)
        for batch in batches(before):
            index = torch.tensor([row_of[rows[name]] for name in batch], device="cpu")
            found = _sums(batch, joined(batch, after), joined(batch, roots), [eps.get(name, 0.0) for name in batch])
            sums.index_add_(0, sent(index, sums.device), found.to(sums.device))
        return torch.cat([sums, counts], 1)


def _largest(eps: Mapping[str, float], rows: Mapping[str, str]) -> dict[str, float]:
    """The largest epsilon of each row that has one."""
    found: dict[str, float] = {}
    for name in eps.keys() & rows.keys():
        found[rows[name]] = max(eps[name], found.get(rows[name], 0.0))
    return found


def _sums(before: Mapping[str, Tensor], after: Tensor, roots: Tensor, eps: list[float]) -> Tensor:
    """Of the parts of a batch, the first columns of :class:`UpdateReport`'s table, float64 ``[len(before), 4]``."""
    weights, roots = with_float64(joined(before)), with_float64(roots)
    update = widened(with_float64(after)) - weights
    touched = roots > 0  # others have not had a gradient yet, and make no step to be damped
    if len(before) == 1:
        squares = [torch.linalg.vector_norm(values, dtype=torch.float64).square() for values in (update, weights)]
        counts = [(touched & (roots < eps[0])).sum(), touched.sum()]
        return torch.stack([*squares, *(count.double() for count in counts)])[None]
    sizes = sent(torch.tensor([part.numel() for part in before.values()], device="cpu"), weights.device)
    owners = torch.repeat_interleave(sizes, output_size=len(weights))
    limits = sent(torch.tensor(eps, dtype=roots.dtype, device="cpu"), weights.device)[owners]
    values = [update.double().square(), weights.double().square(), touched & (roots < limits), touched]
    terms = torch.stack([value.double() for value in values], 1)
    return terms.new_zeros(len(before), _SUMS).index_add_(0, owners, terms)
