"""The section of the page on Theorem 5: samples and steps to a loss, against what a noise scale predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import figures
import numpy as np
from evidence import FIT, MEAN, Evidence, median_of
from page import Page, listed, number
from reporting import Row
from transfers import AS_IT_IS, BEST, FACTORS, FROM_OTHERS

SAME = "none: the same samples"


def errors(noise: np.ndarray, samples: Mapping[float, np.ndarray], sizes: Sequence[int]) -> np.ndarray:
    """Log2 of predicted over measured samples, from each size to each other.

    Theorem 5 predicts the ratio ``(B + B_noise) / (B_0 + B_noise)``. Steps have the same errors, as a step is always of
    the same size.

    Args:
        noise: in samples, ``[..., n]``, at each batch size that is known.
        samples: at each batch size, by target.
        sizes: batch sizes, ``[n]``.

    Returns:
        ``[..., targets, n, n]``, NaN on the diagonal.
    """
    batch, known = np.array(sizes, float), noise[..., None]
    predicted = np.log2((batch + known) / (batch[:, None] + known))
    logs = np.log2(list(samples.values()))
    found = predicted[..., None, :, :] - (logs[:, None, :] - logs[:, :, None])
    return np.where(np.eye(len(sizes), dtype=bool), np.nan, found)


def tradeoff(page: Page, found: Mapping[str, Evidence]) -> None:
    """Steps and samples to a loss, against Theorem 5."""
    reached = {name: evidence for name, evidence in found.items() if evidence.common}
    if not reached:
        return
    needed = [
        {
            "workload": name,
            "target": target,
            "samples": "; ".join(f"{size:,}: {number(samples)}" for size, samples in by_size.items()),
            "fit": evidence.fits[target],
        }
        for name, evidence in found.items()
        for target, by_size in sorted(evidence.needed.items(), reverse=True)
        if by_size
    ]
    predicted = page.keep("theorem5", [row for name in reached for row in _predictions(name, reached)])
    page.fill(
        "theorem5",
        needed=needed,
        left_out=listed([name for name in found if name not in reached]),
        predicted=[row for row in predicted if row["estimate"] in (FIT, MEAN, SAME)],
    )
    typical = {(row["workload"], row["estimate"]): row["typical"] for row in predicted if row["source"] == AS_IT_IS}
    useless = [name for name in reached if typical.get((name, MEAN), 0.0) >= typical[name, SAME]]
    if useless:
        page.bad.append(
            f"Theorem 5 with the {MEAN} as it is predicts no better than the same samples: {listed(useless)}."
        )
    lowest = {name: min(evidence.common) for name, evidence in reached.items()}
    figure = figures.tradeoff(
        {name: (lowest[name], list(ev.losses), ev.common[lowest[name]]) for name, ev in reached.items()},
        {name: ev.fits[lowest[name]] for name, ev in reached.items()},
        {name: median_of(ev.estimates.get(MEAN, np.array([math.nan]))) for name, ev in reached.items()},
    )
    page.draw("theorem5", figure)


def _predictions(name: str, reached: Mapping[str, Evidence]) -> list[Row]:
    own, others = reached[name], [evidence for other, evidence in reached.items() if other != name]
    rows = []
    if not math.isnan(own.fitted_noise):
        rows.append(_prediction(own, FIT, np.full((1, len(own.losses)), own.fitted_noise), AS_IT_IS, 1.0))
    for estimate, values in own.estimates.items():
        if not np.isnan(values).all():
            chosen = {AS_IT_IS: 1.0, FROM_OTHERS: _best_factor(estimate, others), BEST: _best_factor(estimate, [own])}
            rows += [_prediction(own, estimate, values, source, factor) for source, factor in chosen.items()]
    rows.append(_prediction(own, SAME, np.full((1, len(own.losses)), 1e30), AS_IT_IS, 1.0))
    return [row for row in rows if not math.isnan(row["factor"])]


def _best_factor(estimate: str, found: Sequence[Evidence]) -> float:
    """The factor with the lowest mean error over workloads; NaN without any."""
    usable = [ev for ev in found if estimate in ev.estimates and not np.isnan(ev.estimates[estimate]).all()]
    if not usable:
        return math.nan
    scaled = FACTORS[:, None, None]
    of_each = [np.abs(errors(scaled * ev.estimates[estimate], ev.common, list(ev.losses))) for ev in usable]
    return float(FACTORS[np.argmin(sum(np.nanmean(of.reshape(len(FACTORS), -1), 1) for of in of_each))])


def _prediction(own: Evidence, estimate: str, values: np.ndarray, source: str, factor: float) -> Row:
    found = np.abs(errors(factor * values, own.common, list(own.losses)))
    known = found[~np.isnan(found)]
    typical, worst = (2.0 ** float(of) for of in (known.mean(), known.max())) if known.size else (math.nan, math.nan)
    return {
        "workload": own.workload.name,
        "estimate": estimate,
        "source": source,
        "factor": factor,
        "typical": typical,
        "worst": worst,
    }
