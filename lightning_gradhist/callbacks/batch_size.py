"""How many samples batches and optimizer steps have: what comes is counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import IterableDataset, SequentialSampler

from lightning_gradhist.callbacks._lightning import Trainer
from lightning_gradhist.callbacks.strategies import averages_in_backward, is_cut_up, sum_over_ranks
from lightning_gradhist.tensors import as_real

_FEW = 3  # batches an epoch, of which a short one is too many to leave out
_PLACES = 1021
_SHORT = 10  # batches of an epoch
_MAY_BE_TIME = (
    "the first dimension of a batch may be time, as layers of the model have batch_first=False, and the training"
    " loader does not say that it is the samples"
)
_UNKNOWN = "the batch size cannot be read from the training loader, nor counted in a batch"
_BY_HAND = "under manual optimization nobody but you knows how many samples a step has"


def taken_as(samples: float, callback: str) -> str:
    """What is said where neither loader nor user confirm the samples that were counted in a batch."""
    return (
        f"a batch is taken as {samples:g} samples, the first dimension of its tensors, which the training loader does not"
        f" confirm; if that dimension is another one, as time or channels, pass {callback}(batch_size=...)"
    )


def count_samples(batch: Any) -> int | None:
    """The samples of a batch: the first length that all its tensors have in common.

    Looks into mappings, sequences and dataclasses, to any depth. A tensor without dimensions has one sample, a packed
    sequence as many as its first step, and a batch of graphs its ``num_graphs``. What is no tensor says nothing. None where
    the lengths differ, as of ragged or sequence-first data, and where there are none.
    """
    try:
        found = set(_lengths(batch))
    except Exception:  # a class of the user's may raise whatever it likes
        return None
    return found.pop() or None if len(found) == 1 else None


def digest(batch: Any) -> Tensor | None:
    """A number that other samples hardly give, float64 ``[]``; None or NaN where none can be told."""
    try:
        tensors = list(_tensors(batch))
        device = max(tensors, key=Tensor.numel).device  # what lies elsewhere is not waited for
        values = [as_real(tensor).reshape(-1) for tensor in tensors if tensor.device == device and tensor.numel()]
        total = torch.stack([_weighted(value) for value in values]).sum()
        # of one value in many places nobody can tell whether it is data
        is_plain = torch.stack([value.min() == value.max() for value in values]).all()
        return total.masked_fill(is_plain | ~total.isfinite(), math.nan)
    except Exception:  # there is no tensor, or one of a kind that cannot be summed up
        return None


class Digests:
    """Digests of the batches of this rank, by which two with the same samples are found.

    Of data that are indexed single batches may be alike, but not all: there it is what all digests so far add up to.
    """

    def __init__(self) -> None:
        self._seen: Tensor | float = 0.0

    def of(self, trainer: Trainer, batch: Any) -> Tensor | None:
        """As :func:`digest`; None, too, where there is nothing to compare it to."""
        indexed = is_indexed(trainer)
        told = None if indexed and trainer.world_size == 1 else digest(batch)
        if told is None or not indexed:
            return told
        seen = told + self._seen / 2
        self._seen = torch.where(told.isnan(), self._seen, seen)
        return seen


def _weighted(values: Tensor) -> Tensor:
    """The sum of values, each by its place: so that it is another one in another order."""
    whole = values.numel() // _PLACES * _PLACES
    sums = values[:whole].view(-1, _PLACES).sum(0, dtype=torch.float64)
    sums[: values.numel() - whole] += values[whole:]
    # by roots, as multiples of which few whole numbers have the same sum
    return sums @ torch.arange(1, _PLACES + 1, dtype=torch.float64, device=values.device).sqrt()


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    for member in _members(part):
        yield from _tensors(member)


def _lengths(part: Any) -> Iterator[int]:
    if isinstance(part, Tensor):
        yield part.size(0) if part.ndim else 1
    elif isinstance(part, PackedSequence):
        yield int(part.batch_sizes[0])  # which is always in the host's memory
    elif isinstance(getattr(part, "num_graphs", None), int):
        yield part.num_graphs
    else:
        for member in _members(part):
            yield from _lengths(member)


def _members(part: Any) -> Iterable[Any]:
    if isinstance(part, Mapping):
        return part.values()
    if isinstance(part, (list, tuple)):
        return part
    return [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else ()


@dataclass(frozen=True)
class StepSamples:
    """The samples of an optimizer step.

    The variance of its gradient is a multiple of one sample's, this rank's share of the sum over all ranks: the gradient is
    the mean of its micro-batches' gradients, each with a variance by its own samples.
    """

    first: float  # of its first micro-batch on this rank
    batches: int  # micro-batches on this rank
    micro_batches: int  # over all data-parallel ranks
    variance: float
    effective: float  # samples that a step has as a rule, over all ranks


class SampleCount:
    """Counts the samples of the batches that come on this rank.

    The loader's word is taken where a batch cannot be counted. Where the two contradict each other at the first batch,
    neither is believed. Data smaller than one batch may have fewer than the loader says. Where layers may take time
    first, the loader has to say the same. What the user says is believed before either. A loader that says another size in
    a later epoch is looked at anew.

    Args:
        given: samples of a micro-batch, as the user says it; under manual optimization, of a step.

    Attributes:
        varies: whether batches have other sizes than the loader's first, but for a shorter one at the end of an epoch.
        problem: why the batch size is not known, or None.
    """

    def __init__(self, given: float | None) -> None:
        self._given = given
        self._counts = False  # whether what is counted is believed
        self._declared: float | None = None
        self._first = 0.0
        self._total, self._number = 0.0, 0
        self._epoch: int | None = None
        self._short = 0  # of the epoch, this many batches were shorter than the first
        self._index = 0  # of the last batch in its epoch
        self._step: list[float | None] = []  # samples of the micro-batches of the coming step so far
        self.varies = False
        self.problem: str | None = None

    @property
    def usual(self) -> float | None:
        """Samples that a micro-batch has as a rule: as the first, or where they vary their average so far."""
        if self.problem is not None:
            return None
        return self._total / self._number if self.varies else self._first

    @property
    def unconfirmed(self) -> float | None:
        """Samples of the first batch, where neither loader nor user say the same; else None."""
        return self._first if self._counts and self._first != (self._declared or 1) else None

    @property
    def is_steady(self) -> bool:
        """Whether loader or user say the same as was counted, or several batches, of which none has more."""
        return not self.varies and (self.unconfirmed is None or self._number > 1)

    def start_batch(self, trainer: Trainer, batch: Any, batch_index: int) -> None:
        """Counts a batch that is trained on; to be called at ``on_train_batch_start``."""
        manual = not trainer.lightning_module.automatic_optimization
        if manual or batch_index % trainer.accumulate_grad_batches == 0:
            self._step = []
        self._index = batch_index
        size = self.count(trainer, batch)
        if not self._counts and trainer.is_last_batch and batch_index >= _FEW:
            size = None  # it may be a short one
        self._step.append(size)

    def count(self, trainer: Trainer, batch: Any) -> float | None:
        """Samples of a batch; None where they are not known."""
        manual = not trainer.lightning_module.automatic_optimization
        counted = None if manual else count_samples(batch)
        if trainer.current_epoch != self._epoch:
            self._start_epoch(trainer, batch, counted)
        if self._counts and self.problem is None and counted is not None:
            self._compare(trainer, counted)
        return counted if self._counts and self.problem is None else self.usual

    def of_step(self, trainer: Trainer) -> StepSamples | None:
        """The samples of the step whose micro-batches have come.

        None where they are not known, and for a step that is shorter than the others, as the last of an epoch may be: it
        tells less than they do. Epochs of up to three batches have no others.
        """
        sizes = [size for size in self._step if size is not None]
        usual, whole = self.usual, accumulated(trainer)
        if usual is None or not sizes or len(sizes) < len(self._step):
            return None
        if not self.varies and sum(sizes) < usual * whole and self._index >= _FEW:
            return None
        ranks = data_ranks(trainer)
        alike = trainer.world_size / ranks  # ranks that share their samples
        micro_batches = len(sizes) * ranks
        variance = math.fsum(1 / size for size in sizes) / alike / micro_batches**2
        return StepSamples(sizes[0], len(sizes), micro_batches, variance, usual * whole / alike)

    def _start_epoch(self, trainer: Trainer, batch: Any, counted: int | None) -> None:
        """Begins, also anew where the loader, which may be made for each epoch, says another size than before."""
        is_first, before, self._declared = self._epoch is None, self._declared, self._given or _declared(trainer, batch)
        self._short, self._epoch = 0, trainer.current_epoch
        if is_first or (self._declared != before and self.problem is None):
            self._begin(trainer, counted)

    def _begin(self, trainer: Trainer, counted: int | None) -> None:
        self._counts = self.varies = False
        self._total, self._number = 0.0, 0
        workers, batches = _number(trainer.train_dataloader, "num_workers") or 0, trainer.num_training_batches
        few = trainer.is_last_batch or batches <= workers or (workers > 1 and math.isinf(batches))
        if counted is None:
            is_automatic = trainer.lightning_module.automatic_optimization
            known = self._declared if is_automatic else self._given
            self._first, self.problem = known or 0.0, None if known else _UNKNOWN if is_automatic else _BY_HAND
        elif self._declared == counted or self._believes(trainer, counted, few):
            self._first, self._counts = counted, True
        elif self._given:
            self._first = self._given
        elif self._declared is None:
            self.problem = _MAY_BE_TIME
        else:
            self._contradict(counted)

    def _believes(self, trainer: Trainer, counted: int, few: bool) -> bool:
        """Whether what was counted is believed where the loader does not say the same."""
        layers = () if counted == 1 else trainer.lightning_module.modules()
        if any(isinstance(layer, (nn.RNNBase, nn.MultiheadAttention)) and not layer.batch_first for layer in layers):
            return False
        return self._declared is None or (few and counted < self._declared)

    def _compare(self, trainer: Trainer, counted: int) -> None:
        """Notices batches of other sizes; each worker's last of an epoch may be short."""
        if self._declared and counted > self._declared and not self._given:
            self._contradict(counted)
            return
        self._total, self._number = self._total + counted, self._number + 1
        self._short += counted < (self._declared or self._first)
        workers = _number(trainer.train_dataloader, "num_workers") or 0
        is_many = self._short > max(1, workers)
        if is_many and self._first < (self._declared or 0) and not self._given:  # so it was not the last of a few
            self._contradict(counted)
        self.varies |= counted > self._first or is_many

    def _contradict(self, counted: int) -> None:
        self.problem = (
            f"the training loader says {self._declared} samples a batch, and the tensors of one that came have {counted} in"
            " their first dimension"
        )


def effective_batch_size(trainer: Trainer, samples: SampleCount) -> float | None:
    """Samples that an optimizer step has as a rule: micro-batch, times accumulation, over all data-parallel ranks.

    To be called on every rank; None where one of them does not know.
    """
    usual = samples.usual
    (total,) = sum_over_ranks(trainer, math.nan if usual is None else usual)
    known = total * accumulated(trainer) * data_ranks(trainer) / trainer.world_size
    return None if math.isnan(known) else known


def accumulated(trainer: Trainer, factor: int | None = None) -> int:
    """Micro-batches of an optimizer step on one rank, now or with another factor; an epoch that is shorter ends one."""
    if not trainer.lightning_module.automatic_optimization:
        return 1
    return int(min(factor or trainer.accumulate_grad_batches, max(trainer.num_training_batches, 1)))


def parts_of_a_step(trainer: Trainer) -> int:
    """Micro-batches of a step over all ranks, where this rank's gradient of the first of them can be told; else 1."""
    if not trainer.lightning_module.automatic_optimization or is_cut_up(trainer):
        return 1
    return accumulated(trainer) * trainer.world_size


def gradients_a_step(trainer: Trainer) -> int:
    """How many of the probe's gradients, over all ranks, an optimizer step is the mean of."""
    return accumulated(trainer) * (1 if averages_in_backward(trainer) else trainer.world_size)


def repeats_samples(trainer: Trainer) -> bool:
    """Whether a batch has a tenth of its samples or more from any batch of the epoch before: data that are indexed."""
    return any(_is_indexed(one) and _different_batches(one, trainer) <= _SHORT for one in _loaders(trainer))


def _different_batches(loader: Any, trainer: Trainer) -> float:
    """Batches that a loader has before any of their samples comes again."""
    in_order = isinstance(getattr(loader, "sampler", None), SequentialSampler)
    return min(length_hint(loader, _SHORT + 1), trainer.num_training_batches if in_order else math.inf)


def is_indexed(trainer: Trainer) -> bool:
    """Whether the samples are those of datasets that give them by index."""
    return all(map(_is_indexed, _loaders(trainer)))


def _is_indexed(loader: Any) -> bool:
    data = getattr(loader, "dataset", loader)
    return not isinstance(data, IterableDataset) and hasattr(data, "__getitem__")


def _loaders(trainer: Trainer) -> list[Any]:
    """The loaders of a dictionary or a list, in any depth, or the only one."""
    found = [trainer.train_dataloader]
    for one in found:  # which grows
        found += one.values() if isinstance(one, Mapping) else one if isinstance(one, (list, tuple)) else ()
    return [one for one in found if not isinstance(one, (Mapping, list, tuple))]


def _declared(trainer: Trainer, batch: Any) -> int | None:
    """What the loader says a batch has; 1, which is the default, also stands for data that are batches already."""
    loader = trainer.train_dataloader
    sizes = [_number(one, "batch_size") for one in (getattr(loader, "batch_sampler", None), loader)]
    least = 1 if _lists_one_sample(batch) else 2
    return next((size for size in sizes if size is not None and size >= least), None)


def _lists_one_sample(batch: Any) -> bool:
    """Whether there is one image, which nobody stacked: a list of it, or for each of its parts a list."""
    try:
        tensors = [*_tensors(batch)]
        parts = [part for part in _members(batch) if any(True for _ in _tensors(part))]
        in_each = all(isinstance(part, (list, tuple)) and len(part) == 1 for part in parts)
        is_list = isinstance(batch, (list, tuple)) and len(batch) == 1 and not isinstance(batch[0], Tensor)
        are_images = all(tensor.ndim == 3 and len(tensor) in (1, 3, 4) for tensor in tensors)  # by channels
        return bool(tensors) and are_images and (in_each or is_list)
    except Exception:  # a class of the user's may raise whatever it likes
        return False


def _number(thing: Any, name: str) -> int | None:
    """A whole number that a user's class may have, or raise anything in place of."""
    try:
        value = getattr(thing, name, None)
    except Exception:
        return None
    return value if isinstance(value, int) else None


def data_ranks(trainer: Trainer) -> int:
    """How many ranks have samples of their own: those of a tensor-parallel group share theirs."""
    sampler = trainer.distributed_sampler_kwargs
    return int(sampler["num_replicas"]) if sampler else trainer.world_size
