"""Time and memory of a call."""

from collections.abc import Callable
from time import perf_counter

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "measured step"


def seconds_per_call(
    function: Callable[[], object], calls: int, device: torch.device, clock: Callable[[], float] = perf_counter
) -> float:
    """Time calls that follow one another without a pause, warmed up by the caller: the mean, on the CPU by a ``clock``.

    On CUDA between two events, with nothing in the queue before: a call takes as long as the slower of host and
    device. There is no flush of the L2 cache, as there is none between the steps of a training run.
    """
    if device.type == "cpu":
        start = clock()
        for _ in range(calls):
            function()
        return (clock() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / calls


def extra_peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Measure by how many bytes the tensors in memory grow, at most, during a call that makes no lasting ones.

    On CPU from the allocations and releases that torch's profiler records. It does not see the release of memory that was
    allocated before it started; a call before the measured one makes up for it where state is replaced at each step.
    """
    if device.type == "cpu":
        return _extra_peak_bytes_on_cpu(function)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _extra_peak_bytes_on_cpu(function: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
        with record_function(_MARK):
            function()
    # The public ways to these events write them to a file, or give each to the operator around it.
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    begin = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for when, change in sorted(changes, key=lambda item: item[0]):
        if when >= begin:
            held += change
            peak = max(peak, held)
    return peak
