"""What is reported of the noise scale while a run goes on."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.noise_record import METRICS
from lightning_gradhist.tradeoff import critical_batch_size

_KIND = "noise_scale"


def noise_scalars(record: NoiseRecord, suffix: str = "") -> dict[str, float]:
    """The noise scale over the run so far, by tag, in samples; one whose interval has no bound is left out.

    ``noise_scale/simple`` and ``noise_scale/adam`` with ``_lower`` and ``_upper``, the ends of their intervals; beside them
    ``noise_scale/batch_size``, that of the run, and ``noise_scale/critical_batch_size``. What the device has not measured
    yet is not waited for.
    """
    found: dict[str, float] = {}
    for metric in METRICS:
        estimate = record.estimate(metric, wait=False)
        if not estimate.bounded:  # a chart with margins takes all three, or none
            continue
        found |= dict(zip(_interval_tags(metric), (estimate.value, estimate.lower, estimate.upper), strict=True))
        if metric == "adam":
            found[f"{_KIND}/critical_batch_size"] = critical_batch_size(estimate).value
    if found:
        found[f"{_KIND}/batch_size"] = record.batch_size
    return {f"{tag}{suffix}": value for tag, value in found.items()}


def noise_margins(suffixes: Sequence[str] = ("",)) -> dict[str, tuple[str, str, str]]:
    """Charts of a value with its interval, by title: the tags of the value and of its ends."""
    return {f"{metric}{suffix}": _interval_tags(metric, suffix) for suffix in suffixes for metric in METRICS}


def _interval_tags(metric: str, suffix: str = "") -> tuple[str, str, str]:
    return f"{_KIND}/{metric}{suffix}", f"{_KIND}/{metric}_lower{suffix}", f"{_KIND}/{metric}_upper{suffix}"
