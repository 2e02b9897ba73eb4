"""Time and memory of one optimizer step: ours, torch's, the authors', and the LAMB of timm and pytorch_optimizer.

``make bench-optim``; how it measures is told in ``benchmarks/README.md``.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from measuring import extra_peak_bytes, seconds_per_call
from optim_implementations import Implementation, built, check, implementations
from reporting import Row, parser, peer_version, print_table, print_verdicts, quartiles, report
from torch import Tensor
from torch.nn import Parameter

LR, WARM_UP = 1e-4, 2
GRADIENT = 1e-5  # a norm of 0.1 at 100 M parameters
STEPS = {"cpu": 2, "cuda": 20}
TURN = 0.25  # seconds on a GPU, after which slow implementations make no more steps
BASELINES = {"ratio_to_adamw": "AdamW", "ratio_to_adamw_fused": "AdamW fused", "ratio_to_authors_alto": "authors' ALTO"}
MEASURED_ONCE = "state_bytes_per_parameter extra_peak_share first_steps_seconds".split()
COLUMNS = [
    *"model tensors parameters dtype implementation version rounds seconds seconds_q25 seconds_q75".split(),
    *(*BASELINES, "floor_bytes_per_parameter", "share_of_copy_bandwidth", *MEASURED_ONCE, "note"),
    *"date device cpu cores threads gpu python torch triton lightning_gradhist".split(),
]
SHOWN = ["model", "implementation", "seconds", *BASELINES, "share_of_copy_bandwidth", *MEASURED_ONCE]


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

    def columns(self) -> Row:
        dtype = str(self.dtype).removeprefix("torch.")
        return {"model": self.name, "tensors": len(self.params), "parameters": self.size, "dtype": dtype}


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


def copy(params: list[Parameter], _lr: float, bytes_per_parameter: int) -> SimpleNamespace:
    words = sum(param.numel() for param in params) * bytes_per_parameter // 2 // 4
    # written to, since the pages of fresh zeros are all the same one
    source, target = (torch.ones(words, dtype=torch.float32, device=params[0].device) for _ in range(2))
    return SimpleNamespace(source=source, target=target, step=partial(target.copy_, source), state={})


def copies(bytes_per_parameter: set[int]) -> list[Implementation]:
    return [
        Implementation(f"copy {floor}", "torch", (0, 0), partial(copy, bytes_per_parameter=floor), fixed_bytes=floor)
        for floor in sorted(bytes_per_parameter)
    ]


def footprint(model: Model, implementation: Implementation) -> Row:
    """What is measured once: the first steps, the state, and the peak of memory in a step."""
    optimizer = model.build(implementation)
    with torch.compiler.config.patch(force_disable_caches=True):
        first = WARM_UP * seconds_per_call(optimizer.step, WARM_UP, model.device)
    extra = extra_peak_bytes(optimizer.step, model.device)
    shares = state_bytes(optimizer) / model.size, extra / (model.size * model.dtype.itemsize)
    return dict(zip(MEASURED_ONCE, (*shares, first), strict=True))


def state_bytes(optimizer: Any) -> int:
    """Bytes of all state tensors of more than one element, those of an optimizer within the authors' E included."""
    states = [optimizer.state, optimizer.opt.state] if hasattr(optimizer, "opt") else [optimizer.state]
    tensors = [value for state in states for of_param in state.values() for value in of_param.values()]
    return sum(value.nbytes for value in tensors if isinstance(value, Tensor) and value.numel() > 1)


def timed(model: Model, implementation: Implementation) -> float:
    optimizer = model.build(implementation)
    warm = seconds_per_call(optimizer.step, WARM_UP, model.device)
    steps = STEPS[model.device.type] if model.device.type == "cpu" else min(STEPS["cuda"], 1 + int(TURN / warm))
    return seconds_per_call(optimizer.step, steps, model.device)


def alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    """Call, and give back the memory that the call has held."""
    result = measure(*arguments)
    gc.collect()
    torch.cuda.empty_cache()
    return result


def measure_model(model: Model, contestants: list[Implementation], repeats: int) -> Iterator[list[Row]]:
    """Measure all on one model; after each turn the rows so far, so that a kill loses only what is to come."""
    print(f"{model.name}: {len(model.params):,} tensors, {model.size:,} parameters", flush=True)
    torch.compiler.reset()
    # any training lets go of 28 MB once: from then on the allocator keeps memory of that size for its next use, else which
    # implementation has to ask the system for its temporary tensors depends on which came before it
    torch.empty(28 * 2**18)
    footprints: dict[str, Row] = {}
    seconds: dict[str, list[float]] = {}
    for repeat in range(repeats):
        for contestant in contestants:
            if repeat == 0:
                footprints[contestant.name] = alone(footprint, model, contestant)
            seconds.setdefault(contestant.name, []).append(alone(timed, model, contestant))
            there = [one for one in contestants if one.name in seconds]
            yield [{**model.columns(), **timing(one, model.dtype, seconds), **footprints[one.name]} for one in there]
        print(f"  round {repeat + 1} of {repeats}", flush=True)
    for index, param in enumerate(model.params):
        assert param.isfinite().all(), f"parameter {index} of {model.name} is not finite after the timing"


def timing(contestant: Implementation, dtype: torch.dtype, seconds: dict[str, list[float]]) -> Row:
    mine, floor = seconds[contestant.name], contestant.bytes_per_parameter(dtype)
    return {
        "implementation": contestant.name,
        "version": peer_version(contestant.distribution),
        "rounds": len(mine),
        **quartiles("seconds", mine),
        **{column: ratio(mine, seconds[peer]) for column, peer in BASELINES.items() if peer in seconds},
        "floor_bytes_per_parameter": floor,
        "share_of_copy_bandwidth": ratio(seconds[f"copy {floor}"], mine),
    }


def ratio(seconds: list[float], baseline: list[float]) -> float:
    """The median over the rounds that both have made of the ratio within each."""
    return statistics.median(mine / theirs for mine, theirs in zip(seconds, baseline, strict=False))


MODELS = {"transformer": transformer_shapes, "small tensors": small_shapes}


def run(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Iterator[list[Row]]:
    """Check everything, then measure; the rows of a model so far but for the machine, with a note where nothing can be built."""
    wanted = [one for one in implementations() if args.only is None or one.name in args.only]
    good, reasons = built(wanted, lambda implementation: check(implementation, device, dtype))
    print(f"correct: {', '.join(implementation.name for implementation in good)}", flush=True)
    contestants = [*copies({one.bytes_per_parameter(dtype) for one in good}), *good]
    gc.freeze()  # a collection between two turns then does not go through all that is imported
    for name in args.models:
        model = Model(name, MODELS[name](args.parameters), device, dtype)
        left_out = [{**model.columns(), "implementation": name, "note": note} for name, note in reasons.items()]
        if left_out:
            yield left_out
        for rows in measure_model(model, contestants, args.repeats):
            yield rows + left_out
    gc.unfreeze()


def main(arguments: list[str] | None = None) -> None:
    names = [one.name for one in implementations()]
    options = parser("Time and memory of one optimizer step, against the peers.", list(MODELS), names, "optim_step")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    options.add_argument("--parameters", type=float, default=100e6, help="fewer for a try-out (default: 100e6)")
    options.add_argument("--repeats", type=int, default=7, help="rounds (default: 7)")
    args = options.parse_args(arguments)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    rows = report(args, "optim_step", COLUMNS, run(args, device, dtype), "triton")
    print_table(rows, SHOWN)
    if dtype is torch.float32:
        print(f"targets (for 100 M parameters in fp32; this run: {args.parameters:,.0f})")
        print_verdicts("optim_step", rows, "implementation", args.device)


if __name__ == "__main__":
    main()
