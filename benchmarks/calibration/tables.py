"""Draws the tables and figures of the calibration's evidence from what the grids measured: ``make evidence``.

It reads the tables of ``grid.py`` as far as they have come, and writes the page ``README.md`` beside them, with a folder of
tables and figures. What it measures itself (``probes.py``) is kept in tables until ``--again``.
"""

import argparse
import math
from pathlib import Path

import optimizer_section
import probes
import run_sections
import transfers
from evidence import collect
from grid import FOLDER, read
from page import Page
from workloads import FASHION_MNIST

HERE = Path(__file__).parent


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the tables of grid.py")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the page")
    parser.add_argument("--draws", type=int, default=200, help="draws of the seeds for the intervals")
    parser.add_argument("--again", action="store_true", help="measure again what is measured here")
    parser.add_argument("--data-dir", type=Path, default=FASHION_MNIST, help="folder of Fashion-MNIST's four files")
    parser.add_argument("--public", type=Path, help="folder of step_law_dense.csv and step_law_moe.csv")
    options = parser.parse_args(arguments)
    found, side = collect(options.results), collect(options.results, side=True)
    if not found:
        raise SystemExit(f"--results must be a folder with the tables of grid.py, got {options.results}; run it first")
    page, draws = Page(options.output), options.draws
    tables, measure = options.output / "tables", (options.data_dir, options.again)
    probes.kept(options.results / "recorded.csv", found, probes.recorded, *measure)
    for row in probes.kept(options.results / "critical.csv", found, probes.critical_rates, *measure):
        found[row["workload"]].critical[row["batch_size"]].append(math.log2(row["critical_rate"] or 2**-99))
    run_sections.runs(page, found)
    run_sections.best_rates(page, found, draws)
    run_sections.surge(page, side, draws)
    transfers.carrying(page, found, side, draws)
    transfers.public(page, options.public)
    run_sections.growth(page, found)
    run_sections.coverage(page, probes.kept(tables / "coverage.csv", found, probes.coverage, *measure))
    run_sections.tradeoff(page, found)
    ranges = probes.kept(tables / "epsilon_range.csv", found, probes.epsilon_ranges, *measure)
    optimizer_section.epsilon(page, found, ranges)
    optimizer_section.optimizers(page, found)
    optimizer_section.claims(page, read(options.results / "claims.csv"))
    page.fill("bad", sentences="\n".join(f"- {said}" for said in page.bad) or "Nothing that this page looks for.")
    for name in ("left_out", "choices"):
        page.fill(name, text=(HERE / f"{name}.md").read_text(encoding="utf-8").strip())
    page.write()


if __name__ == "__main__":
    main()
