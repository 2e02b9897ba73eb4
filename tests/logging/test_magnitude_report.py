"""What is reported of a histogram."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_gradhist.histogram import MagnitudeHistogram
from lightning_gradhist.logging.magnitude_report import (
    QUANTILES,
    MagnitudeReport,
    magnitude_report,
    shown_buckets,
    worst_layers,
)

TAGS = [
    *("median", "norm", "zero_share", "nonfinite_share"),
    *("fp16_loss_share", "fp8_e4m3_loss_share", "fp8_e5m2_loss_share"),
]


def counted(values: dict[str, Tensor]) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram(list(values))
    histogram.update(values)
    return histogram


def reported(values: dict[str, Tensor]) -> MagnitudeReport:
    return magnitude_report(counted(values), "gradient")


def test_the_norm_leaves_out_what_is_not_finite_and_is_nan_where_nothing_is() -> None:
    histogram = MagnitudeHistogram(["some", "none", "zero"])
    values = {"some": [3.0, math.inf, math.nan], "none": [math.inf, math.nan], "zero": [0.0, 0.0]}
    histogram.update({name: torch.tensor(value) for name, value in values.items()})
    found = magnitude_report(histogram, "gradient").scalars
    assert found["gradient_norm/some"] == pytest.approx(3.0, rel=0.07) == found["gradient_norm/all"]
    assert math.isnan(found["gradient_norm/none"]) and found["gradient_norm/zero"] == 0


def test_tags_and_values() -> None:
    weight = 10 ** torch.linspace(-9, 1, 5001, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, 1.0, math.nan, math.inf])
    found = reported({"weight": weight, "bias": bias, "unused": torch.empty(0), "dead": torch.zeros(3)})
    names = ["weight", "bias", "dead", "all"]
    by_row = {f"gradient_norm/{name}" for name in names}
    by_row |= {"gradient_fp16_loss_share/weight", "gradient_zero_share/bias", "gradient_nonfinite_share/bias"}
    assert set(found.scalars) == {f"gradient_{tag}/all" for tag in TAGS} | by_row | {"gradient_zero_share/dead"}
    assert all(isinstance(value, float) and math.isfinite(value) for value in found.scalars.values())
    assert set(found.histograms) == {f"gradient_magnitude/{name}" for name in ("weight", "bias", "all")}
    shown = found.histograms["gradient_magnitude/weight"]
    edges, counts = shown.edges, shown.counts
    assert edges[0] <= -9 <= edges[1] and edges[-2] <= 1 <= edges[-1] and int(counts.sum()) == 5001
    assert len(counts) <= 64
    assert shown.quantiles[0.5] == pytest.approx(1e-4, rel=0.13)
    assert found.scalars["gradient_norm/weight"] == pytest.approx(float(weight.norm()), rel=0.01)
    assert found.scalars["gradient_zero_share/bias"] == pytest.approx(0.4)
    assert found.scalars["gradient_nonfinite_share/bias"] == pytest.approx(0.4)
    assert found.scalars["gradient_norm/dead"] == 0.0
    assert found.scalars["gradient_zero_share/dead"] == 1.0
    assert found.scalars["gradient_zero_share/all"] == pytest.approx(5 / 5009)


def test_quantiles_are_magnitudes() -> None:
    values = torch.logspace(-10, 0, 10_001, base=10, dtype=torch.float64)
    found = reported({"w": values}).histograms["gradient_magnitude/w"].quantiles
    assert tuple(found) == QUANTILES
    for share, value in found.items():
        assert math.log10(value) == pytest.approx(10 * share - 10, abs=0.06)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("fp16", torch.float16, id="fp16"),
        pytest.param("fp8_e4m3", torch.float8_e4m3fn, id="e4m3"),
        pytest.param("fp8_e5m2", torch.float8_e5m2, id="e5m2"),
    ],
)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param(torch.logspace(-12, 8, 20_000, base=10, dtype=torch.float64), id="wide"),
        pytest.param(torch.tensor([2.0**-26, 2.0**-18, 2.0**-11, 2.0**-9, 1.0, 440.0, 500.0, 70_000.0]), id="few"),
        pytest.param(torch.cat([torch.zeros(5), torch.full((5,), 1e-9)]), id="zeros-and-lost"),
        pytest.param(torch.ones(4), id="none"),
    ],
)
def test_a_loss_share_is_what_a_cast_loses(name: str, dtype: torch.dtype, values: Tensor) -> None:
    values = values.double()
    cast = values.float().to(dtype).double()
    half_unit = torch.finfo(dtype).eps / 2 * torch.exp2(values.log2().floor())
    too_large = (values > 1) & ~((values - cast).abs() <= half_unit)  # infinity, NaN, or clipped to the largest number
    share = float(((values != 0) & (cast == 0) | too_large).double().mean())
    assert reported({"w": values}).scalars[f"gradient_{name}_loss_share/all"] == pytest.approx(share, abs=2e-3)


def test_a_cast_to_bfloat16_loses_nothing_that_has_a_bin() -> None:
    values = torch.cat([torch.logspace(-37.92, 38.5, 20_000, base=10, dtype=torch.float64).float(), torch.ones(1)])
    histogram = counted({"w": values})
    cast = values.bfloat16()
    assert int(histogram.zeros) == 0 and int(histogram.infs) == 0
    assert bool((cast != 0).all()) and bool(cast.isfinite().all())


def test_nothing_was_counted() -> None:
    found = reported({"a": torch.empty(0), "b": torch.empty(0)})
    assert found.scalars == {} and found.histograms == {}


def test_nothing_is_finite() -> None:
    found = reported({"a": torch.tensor([math.nan, math.inf])})
    others = [value for name, value in found.scalars.items() if not name.startswith("gradient_norm/")]
    assert found.histograms == {} and len(others) > 4 and all(map(math.isfinite, others))
    assert found.scalars["gradient_nonfinite_share/all"] == 1.0


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_worst_come_first() -> None:
    layers = {
        "fine": torch.full((100,), 1e-2),
        "smaller": torch.full((100,), 1e-4),
        "dead": torch.zeros(100),
        "broken": torch.tensor([math.nan] + [1.0] * 99),
        "lost|half": torch.cat([torch.full((50,), 1e-9), torch.ones(50)]),
        "unused": torch.empty(0),
    }
    lines = worst_layers(counted(layers)).splitlines()
    rows = [[cell.strip() for cell in line.replace(r"\|", "/").strip("|").split("|")] for line in lines]
    assert rows[0] == ["layer", "values", "median", "not finite", "zero", "lost in float16"]
    assert [row[0] for row in rows[2:]] == ["broken", "dead", "lost/half", "smaller", "fine"]
    assert {len(row) for row in rows} == {6}
    assert rows[2][3:] == ["1.00%", "0.00%", "0.00%"] and rows[3][1:] == ["100", "0", "0.00%", "100.00%", "0.00%"]
    assert rows[4][5] == "50.00%"


def test_the_table_is_short() -> None:
    layers = {f"layer{i}": torch.full((4,), 10.0**-i) for i in range(30)}
    assert [line.split()[1] for line in worst_layers(counted(layers)).splitlines()[2:]] == [
        f"layer{i}" for i in range(29, 19, -1)
    ]


# --- buckets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "occupied",
    [
        pytest.param([0], id="first"),
        pytest.param([2031], id="last"),
        pytest.param([0, 2031], id="both-ends"),
        pytest.param([5, 516], id="exactly-512"),
        pytest.param([5, 517], id="one-more"),
        pytest.param([1000, 1001, 1300, 2030, 2031], id="up-to-the-end"),
        pytest.param(list(range(2032)), id="all"),
    ],
)
@pytest.mark.parametrize("most", [1, 2, 100, 512])
def test_shown_buckets(occupied: list[int], most: int) -> None:
    histogram = MagnitudeHistogram(["x"])
    edges, counts = histogram.edges.log10(), torch.zeros(2032, dtype=torch.int64)
    counts[occupied] = torch.arange(1, len(occupied) + 1)
    shown_edges, shown = shown_buckets(edges, counts, most)
    assert len(shown) <= most and len(shown_edges) == len(shown) + 1
    assert shown_edges.diff().gt(0).all() and torch.isin(shown_edges, edges).all()
    assert int(shown.sum()) == int(counts.sum())
    assert shown_edges[0] == edges[occupied[0]] and shown_edges[-1] >= edges[occupied[-1] + 1]
    assert shown[0] > 0 and shown[-1] > 0
    for low, high, number in zip(shown_edges[:-1], shown_edges[1:], shown, strict=True):
        assert number == counts[(edges[:-1] >= low) & (edges[:-1] < high)].sum()
    if occupied[-1] - occupied[0] < most:
        assert torch.equal(shown, counts[occupied[0] : occupied[-1] + 1])


def test_a_row_of_few_values_has_few_buckets() -> None:
    sizes = {"one": 1, "some": 64, "more": 900, "many": 10_000}
    generator = torch.Generator().manual_seed(0)
    found = reported({name: torch.randn(size, generator=generator) for name, size in sizes.items()}).histograms
    buckets = {name: len(found[f"gradient_magnitude/{name}"].counts) for name in [*sizes, "all"]}
    assert buckets["one"] == 1 and buckets["some"] <= 8 and 15 <= buckets["more"] <= 30
    assert 32 < buckets["many"] <= 64 and 32 < buckets["all"] <= 64
    for name, size in sizes.items():
        assert int(found[f"gradient_magnitude/{name}"].counts.sum()) == size


def test_buckets_of_the_default_size() -> None:
    histogram = counted({"x": torch.tensor([1e-37, 1e37])})
    assert len(shown_buckets(histogram.edges, histogram.counts[0])[1]) <= 512
