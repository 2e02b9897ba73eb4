"""Time and memory of one optimizer step: ours, torch's, the authors', and the LAMB of timm and pytorch_optimizer.

``make bench-optim``, or ``python benchmarks/optim_step.py``. First every implementation is checked
(``optim_implementations.py``); a wrong one ends the run before anything is timed. Then all take turns, once a round,
so that drift of the machine hits all alike. At its turn an implementation is built anew on the same parameters and
gradients, warmed up, and timed over some steps without a pause; only one has its state in memory at a time. Reported
are the median over the rounds with its quartiles, and as a ratio the median of the ratios within the rounds.

Models: the 150 tensors of a transformer of 12 blocks, 100 M parameters in all; and 10,000 vectors of 32 to 1,024
elements. All implementations have the same hyper-parameters, weight decay included, and gradients so small that
nobody's clipping changes them.

``copy N`` copies a buffer so large that reading and writing it moves N bytes per parameter, where N is the floor of
one of the algorithms (``Traffic``). The share of the copy's bandwidth is the time of the copy at an implementation's
own floor over the implementation's time.

Measured once, before the rounds, and in no other number: the bytes of state per parameter, in tensors of more than
one element; the peak of memory in a step above what is held before it, as a share of the parameters
(``measuring.extra_peak_bytes`` says how; on CPU the 10,000 tensors take it some minutes and 6 GB); and the seconds of
the first two steps together, which make the state and, with ``fused=True`` on CPU, compile without torch.compile's
caches.

``make peers`` installs the peers beside torch. timm and pytorch_optimizer come without their dependencies (``pip
install --no-deps timm pytorch_optimizer``): their optimizers need none but torch and numpy.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import (
    extra_peak_bytes,
    installed_version,
    machine,
    prime_the_heap,
    print_table,
    seconds_per_call,
    write_csv,
)
from optim_implementations import Implementation, LeftOut, Traffic, check, implementations
from torch import Tensor
from torch.nn import Parameter

LR = 1e-4
GRADIENT = 1e-5  # a norm of 0.1 at 100 M parameters
WARM_UP = 2
STEPS = {"cpu": 2, "cuda": 20}
BASELINES = {
    "ratio_to_adamw": "AdamW",
    "ratio_to_adamw_fused": "AdamW fused",
    "ratio_to_authors_alto": "authors' ALTO",
}
MACHINE = "date device cpu cores threads gpu python torch triton lightning_gradhist".split()
COLUMNS = [
    *"model tensors parameters dtype implementation version rounds seconds seconds_q25 seconds_q75".split(),
    *BASELINES,
    *"floor_bytes_per_parameter share_of_copy_bandwidth state_bytes_per_parameter extra_peak_share".split(),
    *"first_steps_seconds note".split(),
    *MACHINE,
]
SHOWN = [
    *"model implementation seconds".split(),
    *BASELINES,
    *"share_of_copy_bandwidth state_bytes_per_parameter extra_peak_share first_steps_seconds".split(),
]
TRANSFORMER, SMALL = "transformer", "small tensors"
Row = dict[str, Any]


# --- models -----------------------------------------------------------------------------------------------------------


class Model:
    """Parameters and gradients, which all implementations share."""

    def __init__(self, name: str, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale: float) -> list[Tensor]:
            return [torch.empty(s, device=device, dtype=dtype).normal_(0, scale, generator=generator) for s in shapes]

        self.name, self.device, self.dtype = name, device, dtype
        self.params = [Parameter(tensor) for tensor in draw(0.02)]
        self.grads = draw(GRADIENT)
        self.size = sum(param.numel() for param in self.params)

    def build(self, implementation: Implementation) -> Any:
        """Build an implementation; the gradients are ours again, whatever the one before has put in their place."""
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        return implementation.make(self.params, LR)


def transformer_shapes(parameters: float) -> list[tuple[int, ...]]:
    """150 shapes with about that many parameters in all; the width is a multiple of 8."""
    width = 8 * max(1, round((parameters / 169) ** 0.5 / 8))
    vector = (width,)
    attention = [vector, vector, (3 * width, width), (3 * width,), (width, width), vector]
    mlp = [vector, vector, (4 * width, width), (4 * width,), (width, 4 * width), vector]
    embeddings = [(24 * width, width), (width, width), *[vector] * 4]  # tokens, positions, two norms
    return [*embeddings, *(attention + mlp) * 12]


def small_shapes(parameters: float) -> list[tuple[int, ...]]:
    """10,000 vectors of 32, 64, ..., 1,024 elements in turn at 100 M parameters, in proportion at fewer."""
    return [(32 << index % 6,) for index in range(max(6, round(parameters / 10_000)))]


def models(parameters: float, device: torch.device, dtype: torch.dtype) -> Iterator[Model]:
    """Make both models, one after another."""
    yield Model(TRANSFORMER, transformer_shapes(parameters), device, dtype)
    yield Model(SMALL, small_shapes(parameters), device, dtype)


class Copy:
    """A copy in the place of an optimizer."""

    def __init__(self, params: list[Parameter], _lr: float, bytes_per_parameter: int) -> None:
        words = sum(param.numel() for param in params) * bytes_per_parameter // 2 // 4
        # written to, since the pages of fresh zeros are all the same one
        self.source = torch.ones(words, dtype=torch.float32, device=params[0].device)
        self.target = torch.ones_like(self.source)
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        """Copy once."""
        self.target.copy_(self.source)


def copies(bytes_per_parameter: set[int]) -> list[Implementation]:
    """One copy for each floor."""
    return [
        Implementation(f"copy {floor}", "torch", Traffic(0, 0, floor), partial(Copy, bytes_per_parameter=floor))
        for floor in sorted(bytes_per_parameter)
    ]


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What is measured once for each model and implementation."""

    first_steps_seconds: float
    state_bytes: int
    extra_peak_bytes: int


def footprint(model: Model, implementation: Implementation) -> Footprint:
    """Build an implementation, and take its first steps."""
    optimizer = model.build(implementation)
    with torch.compiler.config.patch(force_disable_caches=True):
        first = WARM_UP * seconds_per_call(optimizer.step, WARM_UP, model.device)
    return Footprint(first, state_bytes(optimizer), extra_peak_bytes(optimizer.step, model.device))


def state_bytes(optimizer: Any) -> int:
    """Bytes of all state tensors of more than one element, those of an optimizer within the authors' E included."""
    states = [optimizer.state, optimizer.opt.state] if hasattr(optimizer, "opt") else [optimizer.state]
    tensors = [value for state in states for of_param in state.values() for value in of_param.values()]
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor) and value.numel() > 1)


def timed(model: Model, implementation: Implementation) -> float:
    """Seconds of a step, the mean of some."""
    optimizer = model.build(implementation)
    for _ in range(WARM_UP):
        optimizer.step()
    return seconds_per_call(optimizer.step, STEPS[model.device.type], model.device)


def alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and give back the memory that the call has held."""
    result = measure(*arguments)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def measure_model(model: Model, contestants: list[Implementation], repeats: int) -> list[Row]:
    """Measure all on one model."""
    print(f"{model.name}: {len(model.params):,} tensors, {model.size:,} parameters", flush=True)
    torch.compiler.reset()
    prime_the_heap()
    footprints = [alone(footprint, model, contestant) for contestant in contestants]
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for repeat in range(repeats):
        for contestant in contestants:
            seconds[contestant.name].append(alone(timed, model, contestant))
        print(f"  round {repeat + 1} of {repeats}", flush=True)
    for index, param in enumerate(model.params):
        assert param.isfinite().all(), f"parameter {index} of {model.name} is not finite after the timing"
    return [row(model, *pair, seconds) for pair in zip(contestants, footprints, strict=True)]


def row(model: Model, contestant: Implementation, once: Footprint, seconds: dict[str, list[float]]) -> Row:
    """Put together what was measured of one implementation."""
    mine = seconds[contestant.name]
    floor = contestant.traffic.bytes_per_parameter(model.dtype)
    low, middle, high = (quantile(mine, q) for q in (0.25, 0.5, 0.75))
    return {
        **of_model(model),
        "implementation": contestant.name,
        "version": version(contestant),
        "rounds": len(mine),
        "seconds": f"{middle:.4g}",
        "seconds_q25": f"{low:.4g}",
        "seconds_q75": f"{high:.4g}",
        **{column: ratio(mine, seconds.get(baseline)) for column, baseline in BASELINES.items()},
        "floor_bytes_per_parameter": floor,
        "share_of_copy_bandwidth": ratio(seconds[f"copy {floor}"], mine),
        "state_bytes_per_parameter": f"{once.state_bytes / model.size:.4g}",
        "extra_peak_share": f"{once.extra_peak_bytes / (model.size * model.dtype.itemsize):.4g}",
        "first_steps_seconds": f"{once.first_steps_seconds:.4g}",
    }


def of_model(model: Model) -> Row:
    """The columns that all rows of a model have in common."""
    return {
        "model": model.name,
        "tensors": len(model.params),
        "parameters": model.size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def version(implementation: Implementation) -> str:
    """The version of the peer's distribution; ours and torch's have columns of their own."""
    own_column = implementation.distribution in ("torch", "lightning-gradhist")
    return "" if own_column else f"{implementation.distribution} {installed_version(implementation.distribution)}"


def quantile(values: list[float], q: float) -> float:
    """The quantile, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(q))


def ratio(seconds: list[float], baseline: list[float] | None) -> str:
    """The median over the rounds of the ratio within each; empty without a baseline."""
    if baseline is None:
        return ""
    return f"{quantile([mine / theirs for mine, theirs in zip(seconds, baseline, strict=True)], 0.5):.4g}"


# --- targets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """What one cell of the CSV should be; None where there is no target."""

    model: str
    implementation: str
    column: str
    cpu: float | None
    cuda: float | None

    def verdict(self, rows: list[Row], device: str, measured_on: str) -> str | None:
        """Compare with what was measured, in a line; None where there is no target for ``device``."""
        limit = getattr(self, device)
        if limit is None:
            return None
        wanted = f"{'>=' if self.at_least else '<='} {limit:g}"
        found = self._found(rows, limit) if device == measured_on else f"not measured: {command(device)}"
        return f"  {device:4}  {self.model:13}  {self.implementation:11}  {self.column} {wanted}: {found}"

    @property
    def at_least(self) -> bool:
        """Whether more is better."""
        return self.column == "share_of_copy_bandwidth"

    def _found(self, rows: list[Row], limit: float) -> str:
        row = next((r for r in rows if (r["model"], r["implementation"]) == (self.model, self.implementation)), {})
        if not row.get(self.column):
            return f"not measured: {row.get('note') or 'its row or that of its baseline is missing'}"
        value = float(row[self.column])
        met = value >= limit if self.at_least else value <= limit
        return f"{value:g}, {'met' if met else 'NOT MET'}"


OURS = ("AdamE", "AdamE fused", "ALTO", "ALTO fused")
TARGETS = [
    Target(TRANSFORMER, "ALTO", "ratio_to_authors_alto", 0.6, 0.15),
    Target(TRANSFORMER, "ALTO fused", "ratio_to_authors_alto", 0.3, 0.15),
    Target(TRANSFORMER, "AdamE", "ratio_to_adamw", 1.0, 1.35),
    Target(TRANSFORMER, "AdamE fused", "ratio_to_adamw_fused", 1.6, 1.35),
    Target(TRANSFORMER, "ALTO fused", "ratio_to_adamw_fused", 2.2, 1.75),
    Target(TRANSFORMER, "AdamE fused", "share_of_copy_bandwidth", None, 0.9),
    Target(TRANSFORMER, "ALTO fused", "share_of_copy_bandwidth", None, 0.9),
    Target(SMALL, "AdamE fused", "ratio_to_adamw_fused", 1.5, 1.3),
    Target(SMALL, "ALTO fused", "ratio_to_adamw_fused", 1.5, 1.3),
    *(Target(TRANSFORMER, name, "state_bytes_per_parameter", 12, 12) for name in OURS),
    *(Target(TRANSFORMER, name, "extra_peak_share", 0.05, 0.02) for name in OURS),
]


def command(device: str) -> str:
    """What fills the cells of a device."""
    return f"python benchmarks/optim_step.py --device {device}"


# --- the run ----------------------------------------------------------------------------------------------------------


def passed(device: torch.device, dtype: torch.dtype, only: list[str] | None) -> tuple[list[Implementation], list[Row]]:
    """Check all that are asked for: those that passed, and a row with a note for each that cannot be built."""
    good: list[Implementation] = []
    left_out: list[Row] = []
    for implementation in implementations():
        if only is None or implementation.name in only:
            try:
                check(implementation, device, dtype)
            except LeftOut as reason:
                print(f"left out: {implementation.name} ({reason})")
                left_out.append({"implementation": implementation.name, "note": f"left out: {reason}"})
            else:
                good.append(implementation)
    print(f"correct: {', '.join(implementation.name for implementation in good)}", flush=True)
    return good, left_out


def run(device: torch.device, dtype: torch.dtype, parameters: float, repeats: int, only: list[str] | None) -> list[Row]:
    """Check and measure everything, and return the rows of the CSV but for the machine."""
    good, left_out = passed(device, dtype, only)
    contestants = [*copies({one.traffic.bytes_per_parameter(dtype) for one in good}), *good]
    rows: list[Row] = []
    gc.freeze()  # a collection between two turns then does not go through all that is imported
    for model in models(parameters, device, dtype):
        rows += measure_model(model, contestants, repeats)
        rows += [{**of_model(model), **noted} for noted in left_out]
    gc.unfreeze()
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description="Time and memory of one optimizer step, against the peers.")
    parser.add_argument("--device", choices=list(STEPS), default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    parser.add_argument("--parameters", type=float, default=100e6, help="fewer for a try-out (default: 100e6)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    parser.add_argument("--only", nargs="+", choices=[one.name for one in implementations()], metavar="NAME")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/optim_step_<device>.csv")
    args = parser.parse_args(arguments)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    output = args.output or Path(__file__).parent / "results" / f"optim_step_{args.device}.csv"

    described = machine(device)
    print("  ".join(f"{name}: {value}" for name, value in described.items() if value), flush=True)
    rows = [{**row, **described} for row in run(device, dtype, args.parameters, args.repeats, args.only)]
    write_csv(rows, COLUMNS, output)
    print_table(rows, SHOWN)
    if dtype is torch.float32:
        print(f"targets (for 100 M parameters in fp32; this run: {args.parameters:,.0f})")
        verdicts = (target.verdict(rows, on, args.device) for on in STEPS for target in TARGETS)
        print("\n".join(verdict for verdict in verdicts if verdict is not None))


if __name__ == "__main__":
    main()
