"""What it costs to carry the best learning rate of a run to another batch size and length, by law."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import figures
import numpy as np
from evidence import SAMPLES, STEPS, Cell, Curve, Evidence, Measured, cells_of, drawn_curves, with_interval
from page import Page, listed, percent
from reporting import Row, read_csv
from training import warm_up

from lightning_gradhist import learning_rate as laws

CLOSE = 1.25  # runs whose numbers of steps are less than this factor apart have equal steps
ACROSS, LENGTH = "across", "length"
KINDS = (SAMPLES, STEPS, ACROSS, LENGTH, f"{SAMPLES}, long", f"{ACROSS}, long")
"""Transfers at equal samples, at equal steps, all others, those of them at one batch size, and without short runs."""
GOALS = {SAMPLES: 0.025, STEPS: 0.035, ACROSS: 0.04, f"{SAMPLES}, long": 0.018}
POWERS, SCALES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35), 2.0 ** np.arange(0, 20.25, 0.25)  # tried; noise scales in samples

Law = Callable[[float, Cell, Cell], float]  # of a noise scale: the rate at a cell over that at a known one


def at_equal_samples(noise: float, to: Cell, known: Cell) -> float:
    """The package's law where nothing is known of the lengths: surge, which levels off."""
    return laws.surge_ratio(noise, to.batch_size, known.batch_size, from_record=True)


def _share(to: Cell, known: Cell) -> float:
    return laws.share_of_equal_samples(to.batch_size, known.batch_size, to.steps, known.steps)


def falling(noise: float, to: Cell, known: Cell) -> float:
    return laws.SurgeLaw(noise).ratio(to.batch_size, known.batch_size)


def power(exponent: float) -> Law:
    return lambda _noise, to, known: (to.batch_size / known.batch_size) ** exponent


def within(law: Law, exponent: float) -> Law:
    """A law, kept between 1 and a power of the batch size."""
    bound = power(exponent)
    return lambda *of: float(np.clip(law(*of), *sorted((1.0, bound(*of)))))


def mixed(samples: Law, steps: Law) -> Law:
    """One law at equal samples, another one at equal steps, and between them as the steps go with the batch size."""
    return lambda noise, *pair: samples(noise, *pair) ** _share(*pair) * steps(noise, *pair) ** (1 - _share(*pair))


def by_steps(noise: float, to: Cell, known: Cell) -> float:
    """As the surge law at the batch size that would have as many steps at equal samples, times the samples^0.25."""
    alike = replace(to, batch_size=known.batch_size * known.steps / to.steps)
    return at_equal_samples(noise, alike, known) * (to.batch_size / alike.batch_size) ** 0.25


def by_samples(noise: float, to: Cell, known: Cell) -> float:
    """The surge law times samples^-0.32 where the batch is small against the noise scale (arXiv 2409.19913)."""
    longer = to.batch_size * to.steps / (known.batch_size * known.steps)
    return at_equal_samples(noise, to, known) * longer ** (-0.32 / (1 + to.batch_size / noise))


BEFORE, FREE = "surge", "surge, within the fourth root at equal steps"
NOW, FALLING = f"{FREE}, and the first step", "falling, power 0.2 at equal steps"
BOUNDED = {NOW: FREE} | {f"{law}, and the first step": law for law in (FALLING, "fourth_root", "sqrt")}
"""Laws that raise no rate beyond where the first step would raise the loss."""
OTHERS = FREE.replace("the fourth root", "a power of the others")
LAWS: dict[str, Law] = {
    **{name: power(laws.EXPONENTS[name]) for name in laws.PLAIN_LAWS},
    BEFORE: at_equal_samples,
    "falling": falling,
    FREE: lambda noise, to, known: laws.surge_ratio(noise, to.batch_size, known.batch_size, True, _share(to, known)),
    "surge, fourth root at equal steps": mixed(at_equal_samples, power(0.25)),
    FALLING: mixed(falling, power(0.2)),
    "surge of the steps, samples^0.25": by_steps,
    "surge, samples^-0.32 at small batches": by_samples,
}
LAWS |= {bounded: LAWS[law] for bounded, law in BOUNDED.items()}


class Transfers:
    """Every ordered pair of cells, with each noise scale that was measured at the first, and critical rate at the second."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells
        pairs = itertools.permutations(range(len(cells)), 2)
        each = [(i, j, *both) for i, j in pairs for both in itertools.product(cells[i].noise, cells[j].critical)]
        self.all = [(i, j, noise) for i, j, noise, _ in each]
        self.origins, self.targets = np.array([(i, j) for i, j, _ in self.all], int).reshape(-1, 2).T
        first = -np.log2([warm_up(cell.steps) for cell in cells])  # octaves that the first step is below the peak
        self._critical = np.array([critical for *_, critical in each]) - first[self.targets]
        self._steeper = first[self.targets] - first[self.origins]
        self.kinds = {k: np.array([k in _kinds(cells[i], cells[j]) for i, j, _ in self.all], bool) for k in KINDS}

    def shifts(self, law: Law) -> np.ndarray:
        """Octaves by which a law changes the rate, ``[transfers]``."""
        return np.log2([law(noise, self.cells[j], self.cells[i]) for i, j, noise in self.all])

    def arrive(
        self, law: str, shifts: np.ndarray, curves: Sequence[Curve] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Excess loss, and octaves from the best rate, of the rates that arrive by a law, both ``[transfers]``."""
        curves = curves or [cell.measured.mean() for cell in self.cells]
        best = np.array([curve.vertex for curve in curves])
        rates = best[self.origins] + shifts
        if law in BOUNDED:  # unless the run with the known rate began with as long a step
            rates = np.minimum(rates, np.maximum(self._critical, best[self.origins] - self._steeper))
        excess = np.empty(len(rates))
        for j, curve in enumerate(curves):
            excess[self.targets == j] = curve.excess(rates[self.targets == j])
        return excess, np.abs(rates - best[self.targets])

    def means(self, shifts: Mapping[str, np.ndarray], draws: int) -> dict[tuple[str, str], np.ndarray]:
        """Mean excess by law and kind, ``[1 + draws]``: as measured, then with the seeds drawn again."""
        found, losses = defaultdict(list), [cell.measured for cell in self.cells]
        for curves in drawn_curves(losses, draws, np.random.default_rng(0)):
            for law, of_law in shifts.items():
                excess = self.arrive(law, of_law, curves)[0]
                for kind, mask in self.kinds.items():
                    found[law, kind].append(float(excess @ mask / (mask.sum() or math.nan)))
        return {key: np.array(values) for key, values in found.items()}


def _kinds(known: Cell, to: Cell) -> set[str]:
    (few, many), length = sorted((known.steps, to.steps)), known.batch_size == to.batch_size
    if many < CLOSE * few and not length:
        return {STEPS}
    kind = SAMPLES if known.grid == to.grid != STEPS else ACROSS
    return {kind, *[LENGTH] * length, *[f"{kind}, long"] * (few >= laws.SHORT_RUN)}


def fitted(cells: Sequence[Cell], law: Law) -> float:
    """The noise scale, one for all cells of a grid of equal samples, with the lowest mean excess."""
    of_one = Transfers([replace(cell, noise=(1.0,)) for cell in cells])
    means = of_one.means({str(n): of_one.shifts(lambda _, *pair, n=n: law(n, *pair)) for n in SCALES}, 0)
    return min(SCALES, key=lambda noise: means[str(noise), SAMPLES][0])


def public_cells(path: Path) -> dict[Any, list[Cell]]:
    """The cells of Step Law's grids by model, their losses smoothed as published, one grid an amount of tokens."""
    losses: dict[Any, dict[float, float]] = defaultdict(dict)
    for row in read_csv(path):
        if row["smooth loss"] != "":
            key = (row["N"], row.get("Na")), f"{row['D']:g}", row["bs"], row["ti"]
            losses[key][math.log2(row["lr"])] = row["smooth loss"]
    found = defaultdict(list)
    for (model, *cell), by_rate in losses.items():
        rates, of_rates = np.array(sorted(by_rate.items())).T
        found[model].append(Cell(*cell, Measured(rates, of_rates[:, None])))
    return found


def lengths(mlp: Evidence, side: Mapping[str, Evidence]) -> list[Cell]:
    """The cells of ``mlp`` of all lengths, with the median noise scale and the critical rates at the nearest batch size."""
    own = cells_of(mlp)
    beside = [name for name in ("surge_small", "surge_large") if name in side]
    found = own + [replace(cell, grid=name) for name in beside for cell in cells_of(side[name])]
    known = {cell.batch_size: ([np.median(cell.noise)], cell.critical) for cell in own if len(cell.noise)}
    nearest = [known[min(known, key=lambda n, c=cell: abs(math.log(n / c.batch_size)))] for cell in found]
    return [replace(c, noise=noise, critical=at) for c, (noise, at) in zip(found, nearest, strict=True)]


def scored(of: Mapping[str, Transfers], draws: int, averaged: Collection[str]) -> list[Row]:
    """How each law does by kind and workload, and on average over some of the workloads."""
    shifts = {name: {law: own.shifts(ratio) for law, ratio in LAWS.items()} for name, own in of.items()}
    powers = {power: mixed(at_equal_samples, within(at_equal_samples, power)) for power in POWERS}
    tried = {name: own.means({str(p): own.shifts(law) for p, law in powers.items()}, 0) for name, own in of.items()}
    for name, own in of.items():
        others = [tried[other] for other in averaged if other != name]
        cost = {p: sum(means[str(p), kind][0] for means in others for kind in (STEPS, ACROSS)) for p in POWERS}
        shifts[name][OTHERS] = own.shifts(powers[min(POWERS, key=cost.__getitem__)])
    means = {name: own.means(shifts[name], draws) for name, own in of.items()}
    arrived = {(name, law): of[name].arrive(law, shift) for name, own in shifts.items() for law, shift in own.items()}
    rows = []
    for kind, law in itertools.product(KINDS, [*LAWS, OTHERS]):
        worse = [n for n in of if with_interval(means[n][law, kind] - means[n][BEFORE, kind])[1] > 0]
        there = [(*arrived[name, law], of[name].kinds[kind]) for name in averaged]
        row = {"kind": kind, "law": law, **{name: with_interval(means[name][law, kind]) for name in of}}
        row["mean"] = with_interval(np.mean([means[name][law, kind] for name in averaged], 0))
        row["octaves"] = float(np.mean([octaves @ mask / (mask.sum() or math.nan) for _, octaves, mask in there]))
        row["worst"] = max(float(excess[mask].max(initial=0)) for excess, _, mask in there)
        rows.append({**row, "worse": listed(worse, " ")})
    return rows


def carrying(page: Page, found: Mapping[str, Evidence], side: Mapping[str, Evidence], draws: int) -> None:
    of = {name: Transfers(cells_of(evidence)) for name, evidence in found.items() if evidence.losses_at_equal_steps}
    if not (names := [name for name, own in of.items() if own.all]):
        return
    of |= {"mlp, all lengths": Transfers(lengths(found["mlp"], side))} if "mlp" in names else {}
    rows = page.keep("transfers", scored(of, draws, names))
    means = {(row["kind"], row["law"]): row["mean"] for row in rows}
    goals = [f"{kind} {percent(means[kind, NOW][0])} (goal {percent(goal)})" for kind, goal in GOALS.items()]
    page.fill(
        **{"section": "transfers", "draws": draws, "goals": listed(goals)},
        means=[{"law": law, **{kind: means[kind, law] for kind in KINDS}} for law in [*LAWS, OTHERS]],
        by_workload=[row for row in rows if row["law"] in (BEFORE, NOW) and row["kind"] in (SAMPLES, STEPS, ACROSS)],
    )
    worse = [f"{row['kind']} ({row['worse']})" for row in rows if row["law"] == NOW and row["worse"] != "none"]
    page.bad.append(f"The surge law's mean excess loss: {listed(goals)}. Worse with the length: {listed(worse)}.")
    page.draw("transfers", figures.scores_by_law(rows, list(of), (SAMPLES, STEPS, ACROSS)))


def public(page: Page, folder: Path | None) -> None:
    """The same on the public grids, read from a folder that is not ours; what was found there before where there is none."""
    rows = read_csv(page.folder / "tables" / "public.csv")
    if folder is not None:
        grids = {name: public_cells(folder / f"step_law_{name}.csv") for name in ("dense", "moe")}
        rows = [_public_row(name, law, models) for name, models in grids.items() for law in LAWS]
    if rows:
        page.fill("public", public=page.keep("public", rows))


def _public_row(name: str, law: str, models: Mapping[Any, list[Cell]]) -> Row:
    """How a law does with the noise scale, one an amount of tokens, that fits it best at equal samples."""
    row, ratio, of = {"grid": name, "law": law}, LAWS[law], []
    for cells in models.values():
        noise = {grid: fitted([cell for cell in cells if cell.grid == grid], ratio) for grid in {c.grid for c in cells}}
        of.append(Transfers([replace(cell, noise=[noise[cell.grid]]) for cell in cells]))
    arrived = [(own, *own.arrive(law, own.shifts(ratio))) for own in of]
    for kind in (SAMPLES, STEPS, ACROSS, LENGTH):
        excess, octaves = (np.concatenate([one[i][one[0].kinds[kind]] for one in arrived]) for i in (1, 2))
        row |= {kind: float(excess.mean()), f"{kind}_octaves": float(octaves.mean()), f"{kind}_number": len(excess)}
    return row
