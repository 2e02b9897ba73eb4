"""The section of the page on Theorem 5: steps and samples to a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import figures
import numpy as np
import theorem5
from estimates import median_of
from evidence import FIT, MEAN, Evidence
from page import NOT_MEASURED, Page, Row, listed, number, text
from transfers import AS_IT_IS, BEST, FACTORS, FROM_OTHERS

Found = Mapping[str, Evidence]
SAME = "none: the same samples"


def tradeoff(page: Page, found: Found) -> None:
    """Steps and samples to a loss, against Theorem 5."""
    page.heading("Theorem 5: steps and samples to a loss")
    reached = {name: evidence for name, evidence in found.items() if evidence.common}
    if not reached:
        page.say(NOT_MEASURED)
        return
    page.say(
        "Samples to a target loss at the rate where they are fewest, mean over seeds; steps are these over the batch size."
        " Dash: no rate reaches it with all its seeds. Fit: the noise scale of the straight line of 1/steps over 1/samples."
    )
    rows = [
        {
            "workload": name,
            "target": target,
            **_sizes(by_size),
            "fit": evidence.fits[target],
            "reached_by": len(by_size),
        }
        for name, evidence in found.items()
        for target, by_size in sorted(evidence.needed.items(), reverse=True)
        if by_size
    ]
    for name in found:
        own = [row for row in rows if row["workload"] == name]
        sizes = list(found[name].losses)
        page.show(
            [{**row, **{str(s): found[name].needed[row["target"]].get(s, math.nan) for s in sizes}} for row in own],
            {
                "workload": ("workload", text),
                "target": ("loss", number),
                **{str(size): (f"samples at {size:,}", number) for size in sizes},
                "fit": ("fitted noise scale", number),
            },
        )
    predicted = [row for name in reached for row in _prediction_rows(name, reached)]
    page.say(
        "Prediction of the samples (and so of the steps) at every batch size from those at every other one, for the targets that"
        " all batch sizes reach. Error: predicted over measured or the reverse, whichever is above 1. Left out, as no target is"
        f" reached at every batch size: {listed([name for name in found if name not in reached])}."
    )
    page.keep("theorem5", predicted)
    page.show(
        [row for row in predicted if row["estimate"] in (FIT, MEAN, SAME)],
        {
            "workload": ("workload", text),
            "estimate": ("noise scale from", text),
            "source": ("factor", text),
            "factor": ("which is", number),
            "typical": ("typical error, times", number),
            "worst": ("worst, times", number),
        },
    )
    typical = {(row["workload"], row["estimate"]): row["typical"] for row in predicted if row["source"] == AS_IT_IS}
    useless = [name for name in reached if typical.get((name, MEAN), 0.0) >= typical[name, SAME]]
    if useless:
        page.bad.append(
            f"Theorem 5 with the {MEAN} as it is predicts no better than the same samples: {listed(useless)}."
        )
    page.figure(
        "theorem5",
        figures.tradeoff(
            {n: (min(ev.common), list(ev.losses), ev.common[min(ev.common)]) for n, ev in reached.items()},
            {n: ev.fits[min(ev.common)] for n, ev in reached.items()},
            {n: median_of(ev.estimates[MEAN]) if MEAN in ev.estimates else math.nan for n, ev in reached.items()},
        ),
        "Samples over steps to the lowest loss that every batch size reaches, each at its best rate (batch size beside the dot),"
        " and Theorem 5's curves: with the fitted noise scale and with the median over runs of the mean `B_adam`.",
    )


def _sizes(by_size: Mapping[int, float]) -> Row:
    return {"samples_by_batch_size": "; ".join(f"{size}: {samples:.6g}" for size, samples in by_size.items())}


def _prediction_rows(name: str, reached: Found) -> list[Row]:
    own = reached[name]
    candidates = {FIT: np.full((1, len(own.losses)), own.fitted_noise)} if not math.isnan(own.fitted_noise) else {}
    rows = []
    for estimate, values in {**candidates, **own.estimates}.items():
        if np.isnan(values).all():
            continue
        chosen = {AS_IT_IS: 1.0}
        if estimate != FIT:
            chosen[FROM_OTHERS] = _best_factor(estimate, [ev for n, ev in reached.items() if n != name])
            chosen[BEST] = _best_factor(estimate, [own])
        rows += [_prediction_row(own, estimate, values, source, factor) for source, factor in chosen.items()]
    nothing = np.full((1, len(own.losses)), 1e30)
    rows.append(_prediction_row(own, SAME, nothing, AS_IT_IS, 1.0))
    return [row for row in rows if not math.isnan(row["factor"])]


def _best_factor(estimate: str, found: Sequence[Evidence]) -> float:
    """The factor with the lowest mean error over workloads; NaN without any."""
    usable = [ev for ev in found if estimate in ev.estimates and not np.isnan(ev.estimates[estimate]).all()]
    if not usable:
        return math.nan
    errors = [theorem5.by_factor(ev.estimates[estimate], ev.common, list(ev.losses)) for ev in usable]
    return float(FACTORS[np.argmin(np.sum(errors, 0))])


def _prediction_row(own: Evidence, estimate: str, values: np.ndarray, source: str, factor: float) -> Row:
    errors = np.abs(theorem5.errors(factor * values, own.common, list(own.losses)))
    known = errors[~np.isnan(errors)]
    typical, worst = (2.0 ** float(of) for of in (known.mean(), known.max())) if known.size else (math.nan, math.nan)
    return {
        "workload": own.workload.name,
        "estimate": estimate,
        "source": source,
        "factor": factor,
        "typical": typical,
        "worst": worst,
    }
