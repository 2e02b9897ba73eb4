"""The section of the page on carrying a learning rate from one batch size to another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import figures
import numpy as np
from evidence import FIT, MEAN, Evidence
from page import NOT_MEASURED, Columns, Page, Row, between, count, listed, number, percent, text
from training import NOISE_GRADIENTS
from transfers import (
    AS_IT_IS,
    BEST,
    FACTORS,
    FROM_OTHERS,
    LAWS,
    NONE,
    ONE,
    Method,
    Outcome,
    Score,
    best_factors,
    chosen_on,
    interval,
    outcomes,
    scores,
)

GOAL_MEAN, GOAL_WORST = 0.02, 0.10
SHOWN = 8

Found = Mapping[str, Evidence]
Outcomes = Mapping[str, Mapping[Method, Outcome]]
Name = tuple[str, str, str]
"""Law, estimate and source of the factor."""
DEFAULT: Name = ("surge", MEAN, AS_IT_IS)
"""What the package does with the record of a run."""


@dataclass(frozen=True)
class Summary:
    """How a method does on all workloads.

    Attributes:
        scores: by workload.
        beaten: workloads where every plain law has a higher mean excess.
    """

    scores: Mapping[str, Score]
    beaten: Sequence[str]

    @property
    def means(self) -> np.ndarray:
        """Mean over workloads of the mean excess, ``[1 + draws]``."""
        return np.mean([score.means for score in self.scores.values()], 0)

    @property
    def worst(self) -> float:
        """The largest excess of all transfers."""
        return max(score.worst for score in self.scores.values())

    @property
    def diverged(self) -> int:
        """Number of transfers that diverge."""
        return sum(score.diverged for score in self.scores.values())

    @property
    def bounds(self) -> int:
        """Number of transfers whose excess is a lower bound."""
        return sum(score.bounds for score in self.scores.values())

    @property
    def below(self) -> bool:
        """Whether the mean excess is at most 2%, and below every plain law's on every workload."""
        return bool(self.means[0] <= GOAL_MEAN) and len(self.beaten) == len(self.scores)

    @property
    def safe(self) -> bool:
        """Whether the worst transfer costs at most 10%, and none diverges."""
        return self.worst <= GOAL_WORST and not self.diverged


def carried(found: Found, losses: str, draws: int) -> Outcomes:
    """All transfers on every workload, of the losses that an attribute of the evidence has."""
    generator = np.random.default_rng(0)
    return {name: outcomes(ev.bench(getattr(ev, losses)), draws, generator) for name, ev in found.items()}


def ranked(results: Outcomes) -> dict[Name, Summary]:
    """The methods that can be had on every workload, the lowest mean excess first."""
    found = {name: {score.method: score for score in own} for name, own in scores(results).items()}
    plain = {name: min(s.means[0] for s in own.values() if s.estimate == NONE) for name, own in found.items()}
    shared = [method for method in next(iter(found.values())) if all(method in own for own in found.values())]
    summaries = {
        method: Summary(
            {name: own[method] for name, own in found.items()},
            [name for name, own in found.items() if own[method].means[0] < plain[name]],
        )
        for method in shared
    }
    return dict(sorted(summaries.items(), key=lambda item: item[1].means[0]))


def honest(methods: Mapping[Name, Summary]) -> dict[Name, Summary]:
    """Those that need no run at the batch size that the rate is carried to."""
    return {method: summary for method, summary in methods.items() if method[2] != BEST and method[1] != FIT}


def transfers(page: Page, found: Found, results: Outcomes, draws: int) -> None:
    """What it costs to carry a rate, and what the noise scale's factor is."""
    page.heading("Carrying a learning rate from one batch size to another")
    page.say(
        "The best rate of one batch size times the law's ratio, at another batch size: how far is the loss above that of the rate"
        " tuned there? Every ordered pair of batch sizes of a workload, and, where the law takes a noise scale, with each run"
        " that measured it at the batch size that the rate comes from, as if it were the only one. An excess is counted up to"
        " 100%; beyond the rates that were measured it is that of the last one, a lower bound. A rate that is tuned again has an"
        f" excess of 0 by definition. Intervals: 95%, from {draws} draws of the seeds with repetition, the best rates and the"
        " factors chosen again in each. Seeds being few, they are rather too narrow; and as a draw has fewer different seeds than"
        " there are, its excess tends to lie above the one measured."
    )
    page.say(
        "Laws: `keep`, `fourth_root`, `sqrt` and `linear` take no noise scale. `falling_surge` is Theorem 3; `surge` stays where"
        " it is past Theorem 3's bound, and is the package's default;"
        " `saturating` is `sqrt((1 + Bn/B0) / (1 + Bn/B))`. Factor: `1` takes"
        " the noise scale as measured; `from the others` multiplies it by the factor that is best on the other workloads;"
        f" `best` by the one that is best on the workload itself, which nobody can know. `{ONE}` is one noise scale for all batch"
        " sizes that is not measured at all: `from the others` it is the null that a measurement must beat, `best` is the oracle."
        f" `{FIT}` needs runs at all batch sizes, which who carries a rate has not; the goals are not judged on it."
    )
    methods = ranked(results)
    page.keep("transfers", [_score_row(name, s) for name, own in scores(results).items() for s in own])
    candidates = [m for m in methods if m[2] != BEST or m[1] == ONE]
    shown = [m for rank, m in enumerate(candidates) if rank < SHOWN or m[1] in (NONE, ONE) or m[1:] == (MEAN, AS_IT_IS)]
    page.show([summary_row(method, methods[method]) for method in shown], summary_columns(list(found)))
    page.say(
        f"Of {len(candidates)} methods the best {SHOWN}, and those without a measured noise scale or with the mean `B_adam` as it"
        " is. Worst: the largest of all transfers. At least: transfers whose excess is a lower bound, over all runs. Below:"
        " workloads where the mean is below that of all four plain laws. Pairs without an estimate are left out and counted in"
        " the table."
    )
    single = [name for name, ev in found.items() if any(losses.seeds < 2 for losses in ev.losses.values())]
    if single:
        page.say(f"Some best rate has a single seed yet, so that the intervals say little: {listed(single)}.")
    lacking = {name: sum(size not in ev.noise for size in ev.losses) for name, ev in found.items()}
    if any(lacking.values()):
        left = ", ".join(f"{name}: {n} of {len(found[name].losses)}" for name, n in lacking.items() if n)
        page.say(f"Batch sizes without a run that measured the noise scale: {left}.")
    _cost(page, found)
    drawn = _drawn(methods)
    page.figure(
        "transfers",
        figures.scores_by_method(
            [label(method) for method in drawn],
            {name: [_point(methods[method].scores[name]) for method in drawn] for name in found},
        ),
        "Mean excess loss over all transfers by workload, with its interval; dotted: the goal of 2%.",
    )


def in_short(page: Page, methods: Mapping[Name, Summary]) -> None:
    """The best methods, and which meet the goals."""
    page.heading("In short")
    groups = {
        "A law with a measured noise scale": [m for m in honest(methods) if m[1] not in (NONE, ONE)],
        "A law with one noise scale, chosen on the other workloads and never measured": [
            m for m in honest(methods) if m[1] == ONE
        ],
        "A law without a noise scale": [m for m in methods if m[1] == NONE],
    }
    for title, group in groups.items():
        if not group:
            page.say(f"{title}: {NOT_MEASURED.lower()}")
            continue
        page.say(f"{title}, the best of {len(group)}: {_told(group[0], methods[group[0]])}")
    page.say(
        "The best of several is chosen with these workloads in sight: on others it need not be, and will rather be worse."
    )
    if DEFAULT in methods:
        page.say(
            f"The package's default: {_told(DEFAULT, methods[DEFAULT])} It levels off, as Theorem 4 has it. How it compares with"
            " the one that falls where no run is short, and where all have as many steps, stands"
            " [here](#without-the-largest-batch-size) and [here](#at-equal-steps)."
        )
    goals(page, methods)


def _told(method: Name, summary: Summary) -> str:
    return (
        f"**{label(method)}**: mean excess loss {_cell(mean_point(summary))} over all transfers, worst"
        f" {percent(summary.worst)}, {count(summary.diverged, 'divergence')}; by workload"
        f" {listed([f'{name} {_cell(_point(score))}' for name, score in summary.scores.items()])}."
    )


def _cost(page: Page, found: Found) -> None:
    """What tuning costs against a measurement of the noise scale."""
    page.say(
        "To tune the rate again at one batch size took as many runs with one seed, within half an octave; one measurement of the"
        " noise scale takes as many passes forward and backward, which is a share of one run's samples:"
    )
    rows = []
    for name, evidence in found.items():
        tuning = sum(row["stage"] in ("rates", "refine") for row in evidence.results.values())
        samples = NOISE_GRADIENTS * evidence.workload.noise_batch_size
        rows.append(
            {
                "workload": name,
                "runs": tuning / len(evidence.losses),
                "passes": NOISE_GRADIENTS,
                "share": samples / evidence.workload.samples,
            }
        )
    page.show(
        rows,
        {
            "workload": ("workload", text),
            "runs": ("runs to tune a batch size", number),
            "passes": ("passes of a measurement", text),
            "share": ("share of a run", percent),
        },
    )


def goals(page: Page, methods: Mapping[Name, Summary]) -> None:
    """Which methods meet the goals."""
    fair = honest(methods)
    page.say(
        f"Mean at most {percent(GOAL_MEAN)} and below all four plain laws on every workload: "
        f"{_labels(m for m, s in fair.items() if s.below)}."
    )
    page.say(f"Worst at most {percent(GOAL_WORST)} and no divergence: {_labels(m for m, s in fair.items() if s.safe)}.")
    both = [m for m, s in fair.items() if s.below and s.safe]
    page.say(f"**Both: {_labels(both)}.**")
    if not both:
        page.bad.append("No law with any estimate meets the goals for the mean and for the worst transfer together.")


def factors(page: Page, results: Outcomes) -> None:
    """Whether one factor links an estimate to the noise scale of a law on every workload."""
    page.heading("Does one factor link the measured noise scale to the law's?", 3)
    rows = [_factor_row(law, estimate, results) for law, estimate in _linked(results)]
    if not rows:
        page.say(NOT_MEASURED)
        return
    names = list(results)
    page.say(
        "The factor with the lowest mean excess on each workload, with its interval; whether all intervals have a value in"
        " common; the one factor that is best over all of them, and the mean excess with it. A lowest mean excess that many"
        f" factors share gives a wide interval. Factors from {number(FACTORS[0])} to {number(FACTORS[-1])} were tried."
    )
    page.keep("factors", rows)
    page.show(
        [row for row in rows if row["estimate"] == ONE or row["estimate"].endswith(" mean")],
        {
            "law": ("law", text),
            "estimate": ("noise scale", text),
            **{name: (name, _factor_cell) for name in names},
            "overlap": ("in common", text),
            "one": ("one for all", number),
            "mean": ("mean excess with it", percent),
        },
    )
    apart = [
        f"{row['law']} with {row['estimate']}" for row in rows if row["overlap"] == "none" and row["estimate"] == MEAN
    ]
    if apart:
        page.bad.append(f"No one factor lies in the intervals of all workloads: {listed(apart)}.")
    if any(estimate == MEAN for _, estimate in _linked(results)):
        page.figure(
            "factors",
            figures.excess_by_factor(
                {
                    law: {
                        name: (own[law, MEAN].factors, own[law, MEAN].means)
                        for name, own in results.items()
                        if (law, MEAN) in own
                    }
                    for law in LAWS
                },
                MEAN,
            ),
            f"Mean excess loss over all transfers, over the factor on the {MEAN} of the reference run; dotted: the goal of 2%.",
        )


def without_largest(page: Page, found: Found, draws: int) -> None:
    """The same without the largest batch sizes, whose runs are short."""
    page.heading("Without the largest batch size", 3)
    steps = [ev.workload.samples // size for ev in found.values() for size in list(ev.losses)[-2:-1]]
    page.say(
        "The runs at the largest batch size of a workload are short, and a low best rate there may come from that. Without it the"
        f" shortest run has {min(steps)} steps."
    )
    _again(page, found, "losses_without_largest", draws)


def equal_steps(page: Page, found: Found, draws: int) -> None:
    """The same at equal steps."""
    page.heading("At equal steps", 3)
    equal = {name: evidence for name, evidence in found.items() if evidence.losses_at_equal_steps}
    if not equal:
        page.say(NOT_MEASURED)
        return
    page.say(
        "As many steps at every batch size instead of as many samples, with as many seeds as there are:"
        f" {', '.join(f'{name} {_fewest_seeds(evidence)}' for name, evidence in equal.items())} at the best rates at least."
        " The noise scales are those of the runs at equal samples."
    )
    _again(page, equal, "losses_at_equal_steps", draws)


def _fewest_seeds(evidence: Evidence) -> int:
    return min(losses.seeds for losses in evidence.losses_at_equal_steps.values())


def _again(page: Page, found: Found, losses: str, draws: int) -> None:
    methods = ranked(carried(found, losses, draws))
    rows = [summary_row(m, s) for m, s in methods.items() if m[2] != BEST or m[1] == ONE]
    page.show([row for row in rows if row["estimate"] in (NONE, ONE, MEAN)], summary_columns(list(found)))
    page.keep(f"transfers_{losses}", rows)


def _score_row(workload: str, score: Score) -> Row:
    low, high = _ends(score.means)
    return {
        "workload": workload,
        "law": score.law,
        "estimate": score.estimate,
        "source": score.source,
        "factor": score.factor,
        "mean": float(score.means[0]),
        "lower": low,
        "upper": high,
        "worst": score.worst,
        "diverged": score.diverged,
        "at_least": score.bounds,
        "transfers": score.transfers,
        "left_out": score.left_out,
    }


def summary_row(method: Name, summary: Summary) -> Row:
    """How a method does on all workloads."""
    return {
        "law": method[0],
        "estimate": method[1],
        "source": method[2],
        **{name: _point(score) for name, score in summary.scores.items()},
        "mean": mean_point(summary),
        "worst": summary.worst,
        "diverged": summary.diverged,
        "bounds": summary.bounds,
        "beaten": len(summary.beaten),
    }


def summary_columns(names: Sequence[str]) -> Columns:
    """Those of :func:`summary_row`, by the names of the workloads."""
    return {
        "law": ("law", text),
        "estimate": ("noise scale", text),
        "source": ("factor", text),
        **{name: (name, _cell) for name in names},
        "mean": ("mean", _cell),
        "worst": ("worst", percent),
        "diverged": ("diverged", text),
        "bounds": ("at least", text),
        "beaten": ("below", text),
    }


def _point(score: Score) -> tuple[float, float, float]:
    return float(score.means[0]), *_ends(score.means)


def mean_point(summary: Summary) -> tuple[float, float, float]:
    """The mean excess over workloads, with its interval."""
    return float(summary.means[0]), *_ends(summary.means)


def _ends(means: np.ndarray) -> tuple[float, float]:
    """The interval of what was drawn; NaN where nothing was."""
    return interval(means[1:]) if len(means) > 1 else (math.nan, math.nan)


def _cell(point: tuple[float, float, float]) -> str:
    mean, low, high = (f"{100 * value:.1f}" for value in point)
    return f"{mean}%" if math.isnan(point[1]) else f"{mean}% ({low}–{high})"


def label(method: Name) -> str:
    """The name of a method in a sentence."""
    law, estimate, source = method
    if estimate == NONE:
        return law
    return f"{law} with {estimate}" + {AS_IT_IS: "", FROM_OTHERS: " (factor of the others)", BEST: " (oracle)"}[source]


def _labels(methods: Iterable[Name]) -> str:
    return "; ".join(map(label, methods)) or "none"


def _drawn(methods: Mapping[Name, Summary]) -> list[Name]:
    """The methods of the figure: each law with the run's mean, with nothing measured, with the oracle, and the plain laws."""
    wanted = [(MEAN, AS_IT_IS), (MEAN, FROM_OTHERS), (ONE, FROM_OTHERS), (ONE, BEST), (FIT, AS_IT_IS)]
    return [method for method in methods if method[1] == NONE or method[1:] in wanted]


def _linked(results: Outcomes) -> list[Method]:
    """Laws and estimates that a factor could link on every workload."""
    methods = next(iter(results.values()))
    usable = [
        m
        for m in methods
        if m[1] != NONE and all(m in own and not np.isnan(own[m].excess).all() for own in results.values())
    ]
    return usable


def _factor_row(law: str, estimate: str, results: Outcomes) -> Row:
    own = {name: outcome[law, estimate] for name, outcome in results.items()}
    best = {name: outcome.factors[best_factors(outcome)] for name, outcome in own.items()}
    ends = {name: _ends(values) for name, values in best.items()}
    low, high = max(low for low, _ in ends.values()), min(high for _, high in ends.values())
    one = int(chosen_on(list(own.values()))[0])
    return {
        "law": law,
        "estimate": estimate,
        **{name: (float(best[name][0]), *ends[name]) for name in own},
        "overlap": between((low, high)) if low <= high else "none",
        "one": float(next(iter(own.values())).factors[one]),
        "mean": float(np.mean([outcome.means[0, one] for outcome in own.values()])),
    }


def _factor_cell(point: tuple[float, float, float]) -> str:
    return number(point[0]) if math.isnan(point[1]) else f"{number(point[0])} ({number(point[1])}–{number(point[2])})"
