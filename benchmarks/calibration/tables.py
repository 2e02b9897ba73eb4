"""Draws the tables and figures of the calibration's evidence from what the grids measured: ``make evidence``.

``PYTHONPATH=benchmarks:examples python benchmarks/calibration/tables.py``. It reads the tables of ``grid.py``,
``formula.py``, ``side_grids.py`` and ``claims.py`` as far as they have come, and writes the page ``README.md`` beside them,
with a folder of tables and figures. What it measures itself at fixed weights (``probes.py``) is the search space of
epsilon, each time, and the coverage of intervals, which takes minutes, so that it is kept in that folder until ``--again``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import claims
import claims_section
import epsilon_section
import formula_section
import noise_section
import optimizer_section
import probes
import rate_section
import side_section
import theorem5_section
import transfer_section
from evidence import Evidence, collect
from grid import FOLDER
from page import Page, Row
from workloads import FASHION_MNIST

CHOICES = Path(__file__).parent / "choices.md"


def main(arguments: list[str] | None = None) -> None:
    """Writes the page, its tables and its figures."""
    options = parse(arguments)
    found = collect(options.results)
    if not found:
        raise SystemExit(f"--results must be a folder with the tables of grid.py, got {options.results}; run it first")
    page = Page(options.output)
    page.heading("The calibration's evidence", 1)
    page.say(
        "This page is written by `make evidence` from the tables beside it, down to each sentence with a number;"
        " `make evidence-full` makes the missing runs first, which takes hours. It covers four small workloads on a CPU:"
        " what holds here need not hold elsewhere."
    )
    results = transfer_section.carried(found, "losses", options.draws)
    methods = transfer_section.ranked(results)
    transfer_section.in_short(page, methods)
    rate_section.runs(page, found)
    rate_section.best_rates(page, found, options.draws)
    side = side_section.collect(options.results)
    side_section.surge(page, side, options.draws)
    side_section.momentum(page, found, side, options.draws)
    transfer_section.transfers(page, found, results, options.draws)
    transfer_section.factors(page, results)
    transfer_section.without_largest(page, found, options.draws)
    transfer_section.equal_steps(page, found, options.draws)
    noise_section.growth(page, found)
    noise_section.coverage(page, probed(options, found, "coverage", probes.coverage, options.again))
    formula_section.formula(page, found, methods)
    theorem5_section.tradeoff(page, found)
    epsilon_section.epsilon(page, found, probed(options, found, "epsilon_range", probes.epsilon_ranges, True))
    optimizer_section.optimizers(page, found)
    claims_section.claims(page, claims.read(options.results / claims.TABLE))
    page.heading("What turned out badly")
    page.say("\n".join(f"- {sentence}" for sentence in page.bad) or "Nothing that this page looks for.")
    page.heading("How the workloads came about, and what to bear in mind")
    page.say(CHOICES.read_text(encoding="utf-8").strip())
    page.write()


def probed(
    options: argparse.Namespace,
    found: dict[str, Evidence],
    name: str,
    measure: Callable[[Evidence, Path], list[Row]],
    again: bool,
) -> list[Row]:
    """The rows of a table that is measured ``again``, or where it lacks a workload; unless ``--no-probes`` forbids it."""
    path = options.output / "tables" / f"{name}.csv"
    if again and options.probes:
        path.unlink(missing_ok=True)
    rows = []
    for workload, evidence in found.items():
        rows += probes.kept(path, workload, partial(measure, evidence, options.data_dir) if options.probes else list)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the tables of grid.py")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the page")
    parser.add_argument("--draws", type=int, default=200, help="draws of the seeds for the intervals")
    parser.add_argument("--again", action="store_true", help="measure the intervals' coverage again")
    parser.add_argument("--no-probes", dest="probes", action="store_false", help="measure nothing at fixed weights")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
