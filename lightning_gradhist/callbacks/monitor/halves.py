"""The gradients of the two halves of a batch, apart, from one backward pass."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.utils.hooks import RemovableHandle

from lightning_gradhist.noise.sample import Sample
from lightning_gradhist.noise.step import measure_part

_LEAST_SHARE = 0.5  # of all values, that are looked at or stood for by a sample
_LEAST_SAMPLES = 16  # of a batch; the halves of a smaller one tell less than two batches
_MOST = 2**16  # values that are looked at; each is computed, which takes longer than to read it
_MOST_LAYERS = 128  # that are looked at in a step; Python's work is a tenth of a millisecond for each
_PARAMETERS = ("weight", "bias")
_CONVOLUTIONS = {nn.Conv1d: conv1d_weight, nn.Conv2d: conv2d_weight, nn.Conv3d: conv3d_weight}
Pick = tuple[slice, ...]  # places in the first dimensions of a parameter


@dataclass(frozen=True)
class _Halves:
    """What each half of a batch has put into the gradient of a parameter, of the values that are picked."""

    sizes: tuple[int, int]
    first: Tensor
    second: Tensor


class HalfBatches:
    """Of layers whose gradient is a sum over the samples of a batch, what the first half has put in, and the second.

    A hook on what a layer puts out is given its gradient, and knows the layer's input: of some rows of a weight the rest is
    a thousandth of a backward pass. Linear layers, convolutions, embeddings and layer norms are known, where the samples are
    the first dimension of their input. Where the two halves do not add up to the gradient, as of a weight that is also used
    elsewhere, it is left out.

    Args:
        module: whose layers are looked at, from now on to :meth:`close`, or some of them where there are many.
        parameters: names and parameters.
        step: at which; at other steps other values and layers are looked at.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items() if parameter.requires_grad}
        self._sample = Sample.at(step, {n: p.numel() for n, p in parameters.items() if p.requires_grad}, _MOST)
        self._found: dict[str, _Halves] = {}
        self._has_failed = False
        layers = [] if _is_compiled(module) else [layer for layer in module.modules() if _rule_of(layer) is not None]
        embeddings = [layer for layer in layers if isinstance(layer, nn.Embedding)]
        self._by_columns = {self._names.get(id(layer.weight)) for layer in embeddings}  # whose rows are words
        self._every = max(1, math.ceil(len(layers) / _MOST_LAYERS))
        some = layers[self._sample.first("", self._every) :: self._every]
        self._handles: list[RemovableHandle] = [layer.register_forward_hook(self._after_forward) for layer in some]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # hooks stay with the layers of this process: a copy is None

    def close(self) -> None:
        """Looks at nothing any more."""
        for handle in self._handles:
            handle.remove()

    def measure(
        self,
        gradients: Mapping[str, Tensor],
        batch_size: float,
        scale: float,
        tolerance: float,
        metric: Callable[[Callable[[dict[str, Tensor]], dict[str, Tensor]]], Mapping[str, Tensor] | None],
    ) -> Tensor | None:
        """The first half's gradient against the whole, as :func:`lightning_gradhist.noise.step.measure_part` has it.

        Args:
            gradients: of the whole batch.
            batch_size: its samples.
            scale: of the loss.
            tolerance: relative error up to which the halves are said to add up to the whole.
            metric: makes the metric's weights, of the values that a function picks from those of whole tensors.

        Returns:
            float64 ``[4]``, NaN where less than half of all values are known; None where no layer is.
        """
        firsts: dict[str, Tensor] = {}
        wholes: dict[str, Tensor] = {}
        known: list[Tensor] = []
        for name, halves in {} if self._has_failed else self._found.items():
            if name not in gradients or sum(halves.sizes) != batch_size:
                continue
            whole = gradients[name][self._pick(name, gradients[name])].float()
            error = (halves.first + halves.second) / scale - whole
            unknown = error.norm() > tolerance * whole.norm()
            # as Sample.of_gradients has it
            factor = math.sqrt(self._every * gradients[name].numel() / max(1, whole.numel()))
            firsts[name] = (halves.first * (factor * batch_size / halves.sizes[0] / scale)).masked_fill(unknown, 0)
            wholes[name] = (whole * factor).masked_fill(unknown, 0)
            known.append(~unknown * (self._every * gradients[name].numel()))
        if not known:
            return None

        def picked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensors[name][self._pick(name, tensors[name])] for name in wholes.keys() & tensors}

        share = torch.stack([number.to(known[0].device) for number in known]).sum() / sum(
            map(Tensor.numel, gradients.values())
        )
        sums = measure_part(firsts, wholes, metric(picked))
        return sums.masked_fill_((share < _LEAST_SHARE).to(sums.device), math.nan)

    def _pick(self, name: str, tensor: Tensor) -> Pick:
        """Which rows and columns of a parameter are looked at, of an embedding's only columns."""
        stride, dims = self._sample.strides.get(name, 1), min(tensor.dim(), 2)
        rows = 1 if name in self._by_columns else stride if dims < 2 else math.ceil(math.sqrt(stride))
        rows = min(rows, tensor.shape[0] if dims else 1)
        columns = min(math.ceil(stride / rows), tensor.shape[1] if dims == 2 else 1)
        column, row = divmod(self._sample.first(name, rows * columns), rows)  # each pair of them comes equally often
        return (slice(row, None, rows), slice(column, None, columns))[:dims]

    def _after_forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        plain = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
        if plain and output.requires_grad and not _is_checkpointed():
            output.register_hook(partial(self._after_backward, layer, inputs[0].detach()))

    def _after_backward(self, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        try:
            with torch.no_grad():
                self._add(layer, inputs, gradient)
        except Exception:  # within the user's backward, which goes on; a pair of steps is measured in its place
            self._has_failed = True

    def _add(self, layer: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        rule, size = _rule_of(layer), inputs.shape[0] if inputs.dim() else 0
        if rule is None or size < _LEAST_SAMPLES or size in _further_dims(layer, inputs):
            return
        half = size // 2
        for attribute in _PARAMETERS:
            parameter = getattr(layer, attribute, None)
            name = self._names.get(id(parameter))
            if name is None or parameter is None:
                continue
            pick = self._pick(name, parameter)
            first = rule(layer, attribute, inputs[:half], gradient[:half], pick).float()
            second = rule(layer, attribute, inputs[half:], gradient[half:], pick).float()
            sizes, before = (half, size - half), self._found.get(name)
            if before is not None:  # of a layer that is called again, or of another one with the same weight
                sizes = sizes if sizes == before.sizes else (0, 0)
                first, second = before.first + first, before.second + second
            self._found[name] = _Halves(sizes, first, second)


Rule = Callable[[Any, str, Tensor, Tensor, Pick], Tensor]


def _rule_of(layer: nn.Module) -> Rule | None:
    """How a layer's gradient is made of its input and the gradient of its output; None where it is not known."""
    forward = getattr(type(layer), "forward", None)
    if forward is nn.Linear.forward:
        return _of_linear
    if isinstance(layer, tuple(_CONVOLUTIONS)) and forward in {kind.forward for kind in _CONVOLUTIONS}:
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return _of_convolution if plain else None
    if forward is nn.Embedding.forward:
        return None if layer.max_norm is not None or layer.scale_grad_by_freq else _of_embedding
    return _of_layer_norm if forward is nn.LayerNorm.forward and layer.elementwise_affine else None


def _further_dims(layer: Any, inputs: Tensor) -> torch.Size:
    """The dimensions behind the first that might be the samples', were it not the first."""
    if isinstance(layer, nn.Embedding):
        return inputs.shape[1:]
    if isinstance(layer, nn.LayerNorm):
        return inputs.shape[1 : inputs.dim() - len(layer.normalized_shape)]
    return inputs.shape[1:-1] if isinstance(layer, nn.Linear) else torch.Size()


def _of_linear(layer: nn.Linear, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick) -> Tensor:
    rows = gradient.flatten(0, -2)
    if attribute == "bias":
        return rows[:, pick[0]].sum(0, dtype=torch.float32)
    return rows[:, pick[0]].float().T @ inputs.flatten(0, -2)[:, pick[1]].float()


def _of_convolution(layer: Any, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick) -> Tensor:
    rows = gradient[:, pick[0]]
    if attribute == "bias":
        return rows.flatten(2).sum((0, 2), dtype=torch.float32)
    columns = inputs[:, pick[1]].float()
    shape = (rows.shape[1], columns.shape[1], *layer.kernel_size)
    make: Any = next(make for kind, make in _CONVOLUTIONS.items() if isinstance(layer, kind))
    return make(columns, shape, rows.float(), layer.stride, layer.padding, layer.dilation)  # type: ignore[no-any-return]


def _of_embedding(layer: nn.Embedding, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick) -> Tensor:
    columns = gradient[..., pick[1]].flatten(0, -2).float()
    words = inputs.flatten()
    if layer.padding_idx is not None:
        columns = columns.masked_fill((words == layer.padding_idx)[:, None], 0)
    return columns.new_zeros(layer.num_embeddings, columns.shape[1]).index_add_(0, words, columns)


def _of_layer_norm(layer: nn.LayerNorm, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick) -> Tensor:
    values = gradient.float()
    if attribute == "weight":
        values = values * functional.layer_norm(inputs.float(), layer.normalized_shape, eps=layer.eps)
    return values.flatten(0, -1 - len(layer.normalized_shape)).sum(0)[pick]


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been at work, which would compile again for a hook; it has no public way to tell."""
    dynamo = sys.modules.get("torch._dynamo")
    frames = dynamo is not None and dynamo.utils.counters["frames"]
    return bool(frames) or any(getattr(layer, "_compiled_call_impl", None) is not None for layer in module.modules())


def _is_checkpointed() -> bool:
    """Whether what autograd saves goes elsewhere, so that to keep a layer's input would cost memory; also private."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
