"""The gradients of the two halves of a batch, apart, from one backward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from lightning_gradhist.noise.sample import Sample
from lightning_gradhist.noise.step import measure_part
from lightning_gradhist.tensors import sent, wide, widened, with_float64

_LEAST_SHARE = 0.5  # of all values but embeddings', which hardly have a gradient, that known layers hold
_LEAST_KNOWN = 0.9  # of the square of the gradients that are looked at
_LEAST_SAMPLES = 16  # of a batch; the halves of a smaller one tell less than two batches
_LEAST_NORMED = 64  # where batch norm has the halves depend on each other, the less the larger it is
_MOST = 2**16  # values that are looked at; each is computed, which takes longer than to read it
_MOST_LAYERS = 128  # that are looked at in a step; Python's work is a tenth of a millisecond for each
_PARAMETERS = ("weight", "bias")
_CONVOLUTIONS = {nn.Conv1d: conv1d_weight, nn.Conv2d: conv2d_weight, nn.Conv3d: conv3d_weight}
Pick = tuple[slice, ...]  # places in the first dimensions of a parameter
Rule = Callable[[Any, str, Tensor, Tensor, Pick, Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class _Known:
    """A layer, how its gradient is made, and the names of its parameters that are trained, by attribute."""

    layer: nn.Module
    rule: Rule
    names: Mapping[str, str]

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.layer, nn.Embedding)


@dataclass(frozen=True)
class _Halves:
    """What each half of a batch has put into the gradient of a parameter, of the values that are picked."""

    sizes: tuple[int, int]
    first: Tensor
    second: Tensor


class HalfBatches:
    """Of layers whose gradient is a sum over the samples of a batch, what one half of them has put in, and the other.

    A hook on what a layer puts out is given its gradient, and knows the layer's input: of some rows and columns of a weight
    the rest is a thousandth of a backward pass. Linear layers, convolutions, embeddings and layer norms are known, where the
    samples are the first dimension of their input. Where the two halves do not add up to the gradient, as of a weight that
    is also used elsewhere, it is left out. Which samples are in which half is drawn, so that their order does not matter.

    Args:
        module: whose layers are looked at, from now on to :meth:`close`, or some of them where there are many.
        parameters: names and parameters.
        step: at which; at other steps other values, layers and halves are looked at. No global random number is drawn.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        trained = {name: p for name, p in parameters.items() if p.requires_grad and p.numel()}
        self._names = {id(parameter): name for name, parameter in trained.items()}
        self._sample = Sample.at(step, {name: parameter.numel() for name, parameter in trained.items()}, _MOST)
        self._generator = torch.Generator().manual_seed(step)
        self._halves: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of samples: their places
        self._places: dict[str, int] = {}  # that a convolution puts its weights to, by name, of a weight and a bias
        self._found: dict[str, _Halves] = {}
        self.error: Exception | None = None  # that a hook has raised, for which nothing is measured
        self._handle: RemovableHandle | None = None
        modules = [*module.modules()]
        layers = [] if any(map(_is_compiled, modules)) else modules
        known = [
            _Known(layer, rule, own) for layer in layers if (rule := _rule_of(layer)) and (own := self._own(layer))
        ]
        self._by_columns = {name for each in known if each.is_embedding for name in each.names.values()}
        shares_statistics = any(isinstance(layer, _BatchNorm) and layer.training for layer in modules)
        self._least = _LEAST_NORMED if shares_statistics else _LEAST_SAMPLES
        self._every = max(1.0, len(known) / _MOST_LAYERS)
        drawn = torch.randperm(len(known), generator=self._generator, device="cpu")[:_MOST_LAYERS].tolist()
        self._layers = {id(known[place].layer): known[place] for place in drawn}
        self._share = _share(known, trained, self._by_columns)
        if self._layers and self._share >= _LEAST_SHARE:
            # On no layer, which may be copied and saved as long as it is there.
            self._handle = register_module_forward_hook(self._after_forward)

    def close(self) -> None:
        """Looks at nothing any more."""
        if self._handle is not None:
            self._handle.remove()

    def measure(
        self,
        gradients: Mapping[str, Tensor],
        batch_size: float,
        scale: float,
        tolerance: float,
        metric: Callable[[Callable[[dict[str, Tensor]], dict[str, Tensor]]], Mapping[str, Tensor] | None],
    ) -> Tensor | None:
        """One half's gradient against the whole, as :func:`lightning_gradhist.noise.step.measure_part` has it.

        Args:
            gradients: of the whole batch.
            batch_size: its samples.
            scale: of the loss.
            tolerance: relative error up to which the halves are said to add up to the whole.
            metric: makes the metric's weights, of the values that a function picks from those of whole tensors.

        Returns:
            float64 ``[4]``, NaN where more than a tenth of the square of the gradients is not known; None where no layer is.
        """
        firsts: dict[str, Tensor] = {}
        wholes: dict[str, Tensor] = {}
        squares: list[Tensor] = []
        for name, halves in {} if self.error or batch_size < self._least else self._found.items():
            if name not in gradients or sum(halves.sizes) != batch_size:
                continue
            pick, every = self._pick(name, gradients[name])
            whole = widened(gradients[name][pick])
            error, size = map(_norm, ((halves.first + halves.second) / scale - whole, whole))
            unknown = (error > tolerance * size).to(whole.device)
            factor = math.sqrt(self._every * every)  # as Sample.of_gradients has it
            firsts[name] = (halves.first * (factor * batch_size / halves.sizes[0] / scale)).masked_fill(unknown, 0)
            wholes[name] = (whole * factor).masked_fill(unknown, 0)
            square = (size * factor).square()
            squares.append(torch.stack([square.masked_fill(unknown.to(square.device), 0), square]))
        drawn = {name for known in self._layers.values() for name in known.names.values()} & gradients.keys()
        looked_at, values = (
            sum(gradients[name].numel() for name in names - self._by_columns) for names in ({*wholes}, drawn)
        )
        # Layers may not have been called: by a compiled function, or where another one takes their weight.
        if not squares or self._share * looked_at < _LEAST_SHARE * values:
            return None

        def picked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensors[name][self._pick(name, tensors[name])[0]] for name in wholes.keys() & tensors}

        known, there = torch.stack([pair.to(squares[0].device) for pair in squares]).sum(0)
        sums = measure_part(firsts, wholes, metric(picked))
        return sums.masked_fill_((known < _LEAST_KNOWN * there).to(sums.device), math.nan)

    def _own(self, layer: nn.Module) -> dict[str, str]:
        """Names of those parameters of a layer that are trained, by attribute; a parametrized one is none."""
        names = {attribute: self._names.get(id(layer._parameters.get(attribute))) for attribute in _PARAMETERS}
        return {attribute: name for attribute, name in names.items() if name is not None}

    def _pick(self, name: str, tensor: Tensor) -> tuple[Pick, int]:
        """Which rows and columns of a parameter are looked at, of an embedding's only columns; one of how many values.

        Of a convolution they are fewer, as each takes a sum over all places of an image.
        """
        stride, dims = self._sample.strides.get(name, 1), min(tensor.dim(), 2)
        rows = 1 if name in self._by_columns else stride if dims < 2 else math.ceil(math.sqrt(stride))
        rows, fewer = min(rows, tensor.shape[0] if dims else 1), self._places.get(name, 1) ** 0.125
        columns = min(math.ceil(math.ceil(stride / rows) * fewer), tensor.shape[1] if dims == 2 else 1)
        rows = min(math.ceil(rows * fewer), tensor.shape[0] if dims else 1)
        column, row = divmod(self._sample.first(name, rows * columns), rows)  # each pair of them comes equally often
        return (slice(row, None, rows), slice(column, None, columns))[:dims], rows * columns

    def _after_forward(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():  # asked first, so that nothing else is traced
            return
        known = self._layers.get(id(layer))
        if known is None or _is_captured():
            return
        try:
            plain = len(inputs) == 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor)
            if plain and output.requires_grad and not _is_checkpointed():
                held = [_as_saved(inputs[0].detach(), output)]  # let go of as soon as it has been looked at
                output.register_hook(partial(self._after_backward, known, held))
        except Exception as error:  # within the user's forward, which goes on; a pair of steps is measured in its place
            self.error = error.with_traceback(None)  # whose frames hold activations

    def _after_backward(self, known: _Known, held: list[Tensor], gradient: Tensor) -> None:
        try:
            with torch.no_grad():
                if held:  # else torch.autograd.grad has gone over it before, and the halves do not add up
                    self._add(known, held.pop(), gradient)
        except Exception as error:
            self.error = error.with_traceback(None)

    def _add(self, known: _Known, inputs: Tensor, gradient: Tensor) -> None:
        layer, size = known.layer, inputs.shape[0] if inputs.dim() > 1 or known.is_embedding else 0
        if size < self._least or size in _further_dims(layer, inputs):
            return
        if size not in self._halves:
            order = sent(torch.randperm(size, generator=self._generator, device="cpu"), inputs.device)
            self._halves[size] = order[: size // 2], order[size // 2 :]
        for attribute, name in known.names.items():
            if isinstance(layer, tuple(_CONVOLUTIONS)):
                self._places.setdefault(name, gradient.shape[2:].numel())
            pick, _ = self._pick(name, layer._parameters[attribute])  # type: ignore[arg-type]
            first, second = known.rule(layer, attribute, inputs, gradient, pick, self._halves[size])
            sizes, before = (size // 2, size - size // 2), self._found.get(name)
            if before is not None:  # of a layer that is called again, or of another one with the same weight
                sizes = sizes if sizes == before.sizes else (0, 0)
                first, second = before.first + first, before.second + second
            self._found[name] = _Halves(sizes, first, second)


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


def _share(known: list[_Known], trained: Mapping[str, nn.Parameter], embeddings: set[str]) -> float:
    """How much of all values known layers hold, those of embeddings left out of both."""
    others = {name: parameter.numel() for name, parameter in trained.items() if name not in embeddings}
    held = {name for each in known for name in each.names.values()}
    return sum(number for name, number in others.items() if name in held) / max(1, sum(others.values()))


def _as_saved(inputs: Tensor, output: Tensor) -> Tensor:
    """What autograd holds of an input: under autocast a narrower copy."""
    is_cast = inputs.is_floating_point() and inputs.dtype.itemsize > output.dtype.itemsize
    return inputs.to(output.dtype) if is_cast else inputs


def _further_dims(layer: Any, inputs: Tensor) -> torch.Size:
    """The dimensions behind the first that might be the samples', were it not the first."""
    if isinstance(layer, nn.Embedding):
        return inputs.shape[1:]
    if isinstance(layer, nn.LayerNorm):
        return inputs.shape[1 : inputs.dim() - len(layer.normalized_shape)]
    return inputs.shape[1:-1] if isinstance(layer, nn.Linear) else torch.Size()


def _of_linear(
    layer: nn.Linear, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick, halves: Sequence[Tensor]
) -> list[Tensor]:
    rows = gradient[..., pick[0]]
    if attribute == "bias":
        return _of_samples(rows if rows.dim() == 2 else rows.flatten(1, -2).sum(1, dtype=wide(rows)), halves)
    both = [[_of_half(values, half).flatten(0, -2) for values in (rows, inputs[..., pick[1]])] for half in halves]
    return [one.T @ other for one, other in both]


def _of_convolution(
    layer: Any, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick, halves: Sequence[Tensor]
) -> list[Tensor]:
    rows = gradient[:, pick[0]]
    if attribute == "bias":
        return _of_samples(rows.flatten(2).sum(2, dtype=wide(rows)), halves)
    columns = inputs[:, pick[1]]
    shape, how = (rows.shape[1], columns.shape[1], *layer.kernel_size), (layer.stride, layer.padding, layer.dilation)
    make: Any = next(make for kind, make in _CONVOLUTIONS.items() if isinstance(layer, kind))
    return [make(_of_half(columns, half), shape, _of_half(rows, half), *how) for half in halves]


def _of_embedding(
    layer: nn.Embedding, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick, halves: Sequence[Tensor]
) -> list[Tensor]:
    found = []
    for half in halves:
        columns, words = _of_half(gradient[..., pick[1]], half).flatten(0, -2), inputs[half].flatten()
        if layer.padding_idx is not None:
            columns = columns.masked_fill((words == layer.padding_idx)[:, None], 0)
        found.append(columns.new_zeros(layer.num_embeddings, columns.shape[1]).index_add_(0, words, columns))
    return found


def _of_layer_norm(
    layer: nn.LayerNorm, attribute: str, inputs: Tensor, gradient: Tensor, pick: Pick, halves: Sequence[Tensor]
) -> list[Tensor]:
    values = widened(gradient)
    if attribute == "weight":
        values = values * functional.layer_norm(widened(inputs), layer.normalized_shape, eps=layer.eps)
    shape = (values.shape[0], -1, *layer.normalized_shape)
    return [half[pick] for half in _of_samples(values.reshape(shape).sum(1), halves)]


def _of_half(values: Tensor, half: Tensor) -> Tensor:
    return widened(values.index_select(0, half))


def _of_samples(values: Tensor, halves: Sequence[Tensor]) -> list[Tensor]:
    """The sum of each half's samples."""
    return [_of_half(values, half).sum(0) for half in halves]


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(with_float64(values), dtype=torch.float64)


def _is_compiled(layer: nn.Module) -> bool:
    """Whether it is compiled, which would warn of a hook; private. Layers that a compiled function calls, call no hook."""
    return layer._compiled_call_impl is not None or "_orig_mod" in layer._modules


def _is_captured() -> bool:
    """Whether a CUDA graph is being made, whose replays call no hook."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _is_checkpointed() -> bool:
    """Whether what autograd saves goes elsewhere, so that to keep a layer's input would cost memory; also private."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
