"""MagnitudeHistogram against an oracle written in numpy."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import MetricCollection

from lightning_gradhist.callbacks.strategies import slice_of
from lightning_gradhist.histogram import BINS_PER_OCTAVE, MagnitudeHistogram, flat_values
from lightning_gradhist.metric import MagnitudeHistogramMetric

FLOAT8 = ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
BITS = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def oracle(values: np.ndarray) -> np.ndarray:
    """Zeros, counts, infinities and NaN, from frexp in float64: exact for every format that float64 holds."""
    wide = np.abs(values.astype(np.float64).ravel())
    row = np.zeros(254 * BINS_PER_OCTAVE + 3, dtype=np.int64)
    row[-1] = np.isnan(wide).sum()
    row[-2] = (wide >= 2.0**128).sum()
    row[0] = (wide < 2.0**-126).sum()
    fraction, exponent = np.frexp(wide[(wide >= 2.0**-126) & (wide < 2.0**128)])  # fraction in [0.5, 1)
    bins = (exponent - 1 + 126) * BINS_PER_OCTAVE + np.floor((2 * fraction - 1) * BINS_PER_OCTAVE).astype(np.int64)
    np.add.at(row, 1 + bins, 1)
    return row


def counted(tensor: Tensor) -> list[int]:
    histogram = MagnitudeHistogram(["x"])
    histogram.update({"x": tensor})
    assert histogram.table.dtype == torch.int64
    assert histogram.total().tolist() == [tensor.numel()]
    return histogram.table[0].tolist()


def expected(tensor: Tensor) -> list[int]:
    return oracle(tensor.detach().double().numpy()).tolist()


def of(values: Tensor, name: str = "x") -> MagnitudeHistogram:
    histogram = MagnitudeHistogram([name])
    histogram.update({name: values})
    return histogram


def from_bits(bits: list[int]) -> Tensor:
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32).copy())


def sample(number: int = 3000, seed: int = 0, spread: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp(spread * torch.randn(number, generator=generator))
    return torch.randn(number, generator=generator) * scale * 1e-4


# --- counts, bit for bit ---------------------------------------------------------------------------------------------


def test_random_float32_bits() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    magnitude = bits & 0x7FFFFFFF  # the second oracle: the bits themselves
    shift = 23 - int(math.log2(BINS_PER_OCTAVE))
    raw = np.bincount((magnitude >> shift)[magnitude < 0x7F800000], minlength=255 * BINS_PER_OCTAVE)
    row = [raw[:BINS_PER_OCTAVE].sum(), *raw[BINS_PER_OCTAVE:], (magnitude == 0x7F800000).sum()]
    row.append((magnitude > 0x7F800000).sum())
    assert counted(values) == [int(x) for x in row] == expected(values)


def test_random_float64_bits() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**64, 50_000, dtype=np.uint64)
    # Most random float64 are beyond float32: half of the values get an exponent around its range.
    exponents = rng.integers(1023 - 140, 1023 + 140, 50_000, dtype=np.uint64) << np.uint64(52)
    near = (bits & np.uint64(0x800FFFFFFFFFFFFF)) | exponents
    values = torch.from_numpy(np.concatenate([bits, near]).view(np.float64).copy())
    assert counted(values) == expected(values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert counted(values) == expected(values)


@pytest.mark.parametrize("name", FLOAT8)
def test_every_float8_value(name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip(f"this torch has no {name}")
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    assert counted(values) == expected(values)


BIN = {"zero": 0, "inf": -2, "nan": -1}
TOP = 254 * 8  # index in the row of the last finite bin


@pytest.mark.parametrize(
    ("value", "index"),
    [
        pytest.param(torch.tensor(0.0), BIN["zero"], id="zero"),
        pytest.param(torch.tensor(-0.0), BIN["zero"], id="minus-zero"),
        pytest.param(torch.tensor(1e-45), BIN["zero"], id="smallest-subnormal"),
        pytest.param(from_bits([0x007FFFFF]), BIN["zero"], id="largest-subnormal"),
        pytest.param(from_bits([0x00800000]), 1, id="smallest-normal"),
        pytest.param(from_bits([0x807FFFFF]), BIN["zero"], id="negative-subnormal"),
        pytest.param(torch.tensor(1.0), 1 + 126 * 8, id="one"),
        pytest.param(torch.tensor(-1.0), 1 + 126 * 8, id="minus-one"),
        pytest.param(from_bits([0x3F7FFFFF]), 126 * 8, id="just-below-one"),
        pytest.param(torch.tensor(1.125), 2 + 126 * 8, id="second-bin"),
        pytest.param(torch.tensor(3e38), TOP - 1, id="large"),
        pytest.param(from_bits([0x7F7FFFFF]), TOP, id="largest"),
        pytest.param(torch.tensor(math.inf), BIN["inf"], id="inf"),
        pytest.param(torch.tensor(-math.inf), BIN["inf"], id="minus-inf"),
        pytest.param(torch.tensor(math.nan), BIN["nan"], id="nan"),
        pytest.param(from_bits([0x7F800001]), BIN["nan"], id="nan-lowest-payload"),
        pytest.param(from_bits([0xFF800001]), BIN["nan"], id="minus-nan-lowest-payload"),
        pytest.param(from_bits([0x7FFFFFFF]), BIN["nan"], id="nan-full-payload"),
        pytest.param(from_bits([0xFFFFFFFF]), BIN["nan"], id="minus-nan-full-payload"),
        pytest.param(torch.tensor(2.0**-24, dtype=torch.float16), 1 + 102 * 8, id="float16-subnormal"),
        pytest.param(torch.tensor(65504.0, dtype=torch.float16), 1 + 141 * 8 + 7, id="float16-largest"),
        pytest.param(torch.tensor(1e39, dtype=torch.float64), BIN["inf"], id="float64-beyond"),
        pytest.param(torch.tensor(2.0**128, dtype=torch.float64), BIN["inf"], id="float64-at-2**128"),
        pytest.param(torch.tensor(math.nextafter(2.0**128, 0), dtype=torch.float64), TOP, id="float64-below-2**128"),
        pytest.param(torch.tensor(1.7e308, dtype=torch.float64), BIN["inf"], id="float64-largest"),
        pytest.param(torch.tensor(1e-300, dtype=torch.float64), BIN["zero"], id="float64-tiny"),
        pytest.param(torch.tensor(5e-324, dtype=torch.float64), BIN["zero"], id="float64-subnormal"),
        pytest.param(torch.tensor(math.nextafter(1.0, 0), dtype=torch.float64), 126 * 8, id="float64-truncated"),
        pytest.param(torch.tensor([0x7FF0000000000001]).view(torch.float64), BIN["nan"], id="float64-nan-low-payload"),
        pytest.param(torch.tensor(-math.inf, dtype=torch.float64), BIN["inf"], id="float64-minus-inf"),
    ],
)
def test_special_values(value: Tensor, index: int) -> None:
    row = [0] * (254 * 8 + 3)
    row[index] = 1
    assert counted(value) == row


def test_nan_and_infinities_far_apart() -> None:
    # More than one chunk, with non-finite values in some of them only.
    values = torch.ones(400_000)
    values[[5, 300_000, 399_999]] = torch.tensor([math.inf, math.nan, -math.inf])
    assert counted(values) == expected(values)


def test_small_and_large_tensors_in_one_update() -> None:
    sizes = [1, 2**15, 2**15 + 1, 0, 2**17 + 5, *[30_000] * 6, 7, 400_000]
    values = {f"{i}": sample(size, i) for i, size in enumerate(sizes)}
    values["0"][0] = math.nan
    values["6"][[3, -1]] = torch.tensor([math.inf, math.nan])
    values["7"] = values["7"].bfloat16()
    values["9"] = values["9"].double()
    histogram = MagnitudeHistogram([*reversed(values), "absent"])  # rows are in another order than values
    histogram.update(values)
    histogram.update(values)
    for name, row in zip(histogram.names[:-1], histogram.table.tolist(), strict=False):
        assert row == [2 * count for count in expected(values[name])]
    assert histogram.total()[-1] == 0


def test_nothing_is_counted_of_refused_values() -> None:
    histogram = MagnitudeHistogram(["a", "b"])
    with pytest.raises(TypeError, match="got torch.int64"):
        histogram.update({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.int64)})
    assert histogram.total().tolist() == [0, 0]


# --- shapes and layouts ----------------------------------------------------------------------------------------------


def uncoalesced() -> Tensor:
    indices = torch.tensor([[0, 0, 2], [1, 1, 3]])
    return torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, -4.0]), (3, 4))


def hybrid() -> Tensor:
    values = torch.tensor([[1.0, 0.0], [math.nan, 2.0], [4.0, 8.0]])
    return torch.sparse_coo_tensor(torch.tensor([[0, 5, 5]]), values, (7, 2))


def csr() -> Tensor:
    return torch.sparse_csr_tensor(torch.tensor([0, 1, 3]), torch.tensor([2, 0, 1]), torch.tensor([1.0, 0.0, 3.0]))


def negative_view() -> Tensor:
    values = torch.imag(torch.complex(torch.ones(3), torch.tensor([1.0, 2.0, 4.0])).conj())
    assert values.is_neg()
    return values


LAYOUTS: list[Any] = [
    pytest.param(lambda: torch.empty(0), id="empty"),
    pytest.param(lambda: torch.empty(3, 0, 2), id="empty-3d"),
    pytest.param(lambda: torch.tensor(2.5), id="0-d"),
    pytest.param(lambda: sample(240).reshape(12, 20)[::2, 3::4], id="non-contiguous"),
    pytest.param(lambda: sample(240).reshape(12, 20).t(), id="transposed"),
    pytest.param(
        lambda: sample(240).reshape(2, 5, 4, 6).contiguous(memory_format=torch.channels_last), id="channels-last"
    ),
    pytest.param(lambda: sample(6).reshape(1, 6, 1).expand(5, 6, 3), id="expanded"),
    pytest.param(lambda: sample(20).as_strided((4, 8), (2, 1)), id="overlapping"),
    pytest.param(lambda: torch.nn.Parameter(sample(9)), id="requires-grad"),
    pytest.param(lambda: sample(64).double().reshape(8, 8).t()[1:], id="float64-strided"),
    pytest.param(negative_view, id="negative-bit"),
]


@pytest.mark.parametrize("make", LAYOUTS)
def test_dense_layouts(make: Callable[[], Tensor]) -> None:
    tensor = make()
    before = tensor.detach().clone()
    assert counted(tensor) == expected(tensor)
    assert torch.equal(tensor.detach(), before)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(uncoalesced, id="coo-uncoalesced"),
        pytest.param(hybrid, id="coo-hybrid"),
        pytest.param(csr, id="csr"),
        pytest.param(lambda: torch.eye(6).to_sparse_csc(), id="csc"),
        pytest.param(lambda: torch.eye(6).to_sparse_bsr((2, 3)), id="bsr"),
        pytest.param(lambda: torch.sparse_coo_tensor(size=(4, 5)), id="coo-nothing-stored"),
        pytest.param(lambda: torch.eye(3, dtype=torch.float64).to_sparse(), id="coo-float64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:Sparse .* tensor support is in beta")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_layouts_equal_their_dense_form(make: Callable[[], Tensor]) -> None:
    tensor = make()
    assert counted(tensor) == expected(tensor.to_dense())


def test_channels_last_is_not_copied() -> None:
    tensor = sample(240).reshape(2, 5, 4, 6).contiguous(memory_format=torch.channels_last)
    assert flat_values(tensor)[0].data_ptr() == tensor.data_ptr()


# --- edges and statistics --------------------------------------------------------------------------------------------


def test_edges_agree_with_the_counts() -> None:
    histogram = MagnitudeHistogram(["low", "below"])
    edges = histogram.edges
    assert edges.dtype == torch.float64 and edges.shape == (254 * BINS_PER_OCTAVE + 1,)
    assert edges[0] == 2.0**-126 and edges[-1] == 2.0**128 and edges.diff().gt(0).all()
    assert torch.equal(edges[:-1], edges[:-1].float().double())
    last_below = torch.nextafter(edges[1:], torch.zeros((), dtype=torch.float64))
    histogram.update({"low": edges[:-1].float(), "below": last_below})
    assert histogram.counts.eq(1).all()
    widths = edges.diff() / edges[:-1]
    assert widths.max() == 1 / BINS_PER_OCTAVE and widths.min() >= 1 / (2 * BINS_PER_OCTAVE)


QUANTILES = [0.0, 0.02, 0.25, 0.5, 0.98, 0.999, 1.0]


def assert_within_one_bin(found: float, exact: float) -> None:
    edges = MagnitudeHistogram(["x"]).edges
    bin_ = int(torch.searchsorted(edges, torch.tensor(exact, dtype=torch.float64), right=True)) - 1
    assert edges[bin_] <= found <= edges[bin_ + 1]


@pytest.mark.parametrize("q", QUANTILES)
def test_quantile_is_the_sorted_value_to_one_bin(q: float) -> None:
    values = {"a": sample(777, 1), "b": sample(50, 2) * 1e3, "one": torch.tensor([3.0])}
    noisy = {name: torch.cat([v, torch.tensor([0.0, math.inf, math.nan])]) for name, v in values.items()}
    histogram = MagnitudeHistogram(list(values))
    histogram.update(noisy)
    found = histogram.quantile(q)
    assert found.dtype == torch.float64
    for name, number in zip(values, found.tolist(), strict=True):
        ascending = sorted(values[name].abs().tolist())
        assert_within_one_bin(number, ascending[min(int(q * len(ascending)), len(ascending) - 1)])
    everything = sorted(torch.cat(list(values.values())).abs().tolist())
    pooled = histogram.quantile(q, pooled=True)
    assert pooled.dim() == 0
    assert_within_one_bin(float(pooled), everything[min(int(q * len(everything)), len(everything) - 1)])


@pytest.mark.parametrize("number", [2**24 + 1, 2**31 + 3, 2**40 + 1], ids=["2**24", "2**31", "2**40"])
def test_quantile_of_huge_counts(number: int) -> None:
    histogram = MagnitudeHistogram(["x"])
    one, two = 1 + 126 * 8, 1 + 127 * 8
    histogram.table[0, one], histogram.table[0, two] = number, 1
    assert 1 <= histogram.quantile((number - 0.5) / (number + 1)) < 1.125  # the last of the small ones
    assert 2 <= histogram.quantile(1.0) < 2.25
    histogram.table[0, two] = number
    assert 1 <= histogram.quantile(0.4999) < 1.125 and 2 <= histogram.quantile(0.5) < 2.25
    assert histogram.total().tolist() == [2 * number]
    assert histogram.share_below(2.0).tolist() == [0.5]


def test_nothing_counted() -> None:
    histogram = MagnitudeHistogram(["x", "zeros"])
    histogram.update({"zeros": torch.zeros(4)})
    assert histogram.quantile(0.5).isnan().all() and histogram.share_below(1.0).isnan().all()
    assert histogram.quantile(0.5, pooled=True).isnan()
    assert histogram.norm().tolist() == [0.0, 0.0]


def test_share_below() -> None:
    values = sample(4000, 3)
    histogram = of(values)
    magnitudes = values.abs().double()
    for edge in (2.0**-20, 1.375 * 2.0**-14, 1.0):
        assert float(histogram.share_below(edge)) == float((magnitudes < edge).double().mean())
    for inside in (3e-6, 1e-4, 0.77e-2):
        bin_share = float(((magnitudes > inside / 1.13) & (magnitudes < inside * 1.13)).double().mean())
        assert abs(float(histogram.share_below(inside)) - float((magnitudes < inside).double().mean())) <= bin_share
    assert float(histogram.share_below(0.0)) == 0.0 and float(histogram.share_below(math.inf)) == 1.0


def test_norm() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = float(of(values).norm())
    assert found == pytest.approx(float(values.double().norm()), rel=3e-3)
    single = float(of(torch.tensor([1.001])).norm())
    assert abs(single / 1.001 - 1) <= 0.6 / BINS_PER_OCTAVE


@pytest.mark.parametrize("power", [-16, -1, 3, 16])
def test_a_power_of_two_shifts_the_counts(power: int) -> None:
    values = sample(5000, 4)
    before, after = of(values), of(values * 2.0**power)
    assert torch.equal(before.counts.roll(8 * power, 1), after.counts)


# --- merging ---------------------------------------------------------------------------------------------------------


def test_merge_is_commutative_and_associative() -> None:
    parts = [sample(100, seed) for seed in range(3)]

    def merged(*groups: Any) -> Tensor:
        first, *rest = [of(parts[g]) if isinstance(g, int) else g for g in groups]
        for other in rest:
            first.merge(other)
        return first.table

    together = of(torch.cat(parts)).table
    right = of(parts[1])
    right.merge(of(parts[2]))
    for table in (merged(0, 1, 2), merged(2, 1, 0), merged(1, 2, 0), merged(0, right)):
        assert torch.equal(table, together)


def test_merge_leaves_the_other_alone() -> None:
    one, other = of(sample(10)), of(sample(20, 1))
    before = other.table.clone()
    one.merge(other)
    one.update({"x": torch.ones(3)})
    assert torch.equal(other.table, before)
    assert one.total().tolist() == [10 + 20 + 3]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(MagnitudeHistogram(["y"]), id="names"),
        pytest.param(MagnitudeHistogram(["x", "y"]), id="more-names"),
    ],
)
def test_merge_refuses_other_names(other: MagnitudeHistogram) -> None:
    with pytest.raises(ValueError, match="other must have the same names to be merged"):
        MagnitudeHistogram(["x"]).merge(other)


# --- slices ----------------------------------------------------------------------------------------------------------

TENSORS = {
    "a": torch.arange(10.0).reshape(2, 5).t(),
    "empty": torch.empty(0, 3),
    "b": torch.arange(10.0, 17.0),
    "absent": torch.arange(17.0, 40.0),
    "scalar": torch.tensor(40.0),
    "tail": torch.arange(41.0, 44.0).reshape(3, 1, 1),
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 60])
@pytest.mark.parametrize("missing", [(), ("absent",), ("a", "scalar"), tuple(TENSORS)], ids=str)
def test_slices_are_a_partition(ranks: int, missing: tuple[str, ...]) -> None:
    there = {name: tensor for name, tensor in TENSORS.items() if name not in missing}
    sizes = {name: tensor.numel() for name, tensor in TENSORS.items()}
    pieces: dict[str, list[float]] = {name: [] for name in TENSORS}
    for rank in range(ranks):
        mine = list(slice_of(there, sizes, rank, ranks))
        assert all(piece.dim() == 1 and piece.numel() > 0 for _, piece in mine)
        assert sum(piece.numel() for _, piece in mine) <= -(-sum(sizes.values()) // ranks)
        for name, piece in mine:
            pieces[name] += piece.tolist()
    assert {name: sorted(found) for name, found in pieces.items()} == {
        name: sorted(tensor.flatten().tolist()) if name in there else [] for name, tensor in TENSORS.items()
    }


# --- a metric among metrics ------------------------------------------------------------------------------------------


def metric_of(values: Tensor) -> MagnitudeHistogramMetric:
    metric = MagnitudeHistogramMetric(["x"])
    metric.update({"x": values})
    return metric


def test_compute_is_a_copy() -> None:
    metric = metric_of(torch.ones(3))
    found = metric.compute()
    metric.update({"x": torch.ones(4)})
    assert int(found.total()) == 3 and int(metric.compute().total()) == 7
    assert torch.equal(metric.compute().table, of(torch.ones(7)).table)


def test_forward_gives_the_batch_and_keeps_the_total() -> None:
    metric = metric_of(torch.ones(3))
    batch = metric({"x": torch.tensor([0.0, 1.0])})
    assert int(batch.counts.sum()) == 1 and int(batch.zeros) == 1
    assert metric.compute().total().tolist() == [5]


def test_reset() -> None:
    for made in (of(torch.ones(3)), metric_of(torch.ones(3))):
        made.reset()
        assert int(made.table.sum()) == 0
        made.update({"x": torch.ones(2)})
        made.reset()
        assert int(made.table.sum()) == 0  # the default was not updated in place


@pytest.mark.parametrize(
    "again",
    [pytest.param(copy.deepcopy, id="deepcopy"), pytest.param(lambda h: pickle.loads(pickle.dumps(h)), id="pickle")],
)
@pytest.mark.parametrize("make", [of, metric_of])
def test_copies(make: Callable[[Tensor], Any], again: Callable[[Any], Any]) -> None:
    histogram = make(sample(50))
    other = again(histogram)
    assert torch.equal(other.table, histogram.table) and other.names == ["x"]
    other.update({"x": torch.ones(1)})
    assert int(histogram.table.sum()) == 50 and int(other.table.sum()) == 51


def test_state_dict() -> None:
    metric = metric_of(sample(50))
    assert metric.state_dict() == {}  # a torchmetrics state is not persistent unless asked for
    metric.persistent(True)
    buffer = io.BytesIO()
    torch.save(metric.state_dict(), buffer)
    buffer.seek(0)
    other = MagnitudeHistogramMetric(["x"])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.table, metric.table)


@pytest.mark.parametrize(
    "convert",
    [
        pytest.param(lambda m: m.half(), id="half"),
        pytest.param(lambda m: m.double(), id="double"),
        pytest.param(lambda m: m.to(torch.bfloat16), id="to-dtype"),
        pytest.param(lambda m: m.to("cpu"), id="to-device"),
    ],
)
def test_a_module_that_is_converted_keeps_int64(convert: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    holder = torch.nn.Module()
    holder.metric = metric_of(sample(50))
    convert(holder)
    convert(holder.metric)
    holder.metric.update({"x": torch.ones(2, dtype=torch.float16)})
    assert holder.metric.table.dtype == torch.int64 and holder.metric.compute().total().tolist() == [52]


def test_metric_collection() -> None:
    collection = MetricCollection({"one": MagnitudeHistogramMetric(["x"]), "two": MagnitudeHistogramMetric(["x", "y"])})
    for _ in range(2):  # from the second update on, torchmetrics looks for metrics that share their state
        collection.update({"x": torch.tensor([1.0, 1.5])})
    assert collection["one"].compute().total().tolist() == [4] and collection["two"].compute().total().tolist() == [
        4,
        0,
    ]
    collection.reset()
    assert int(collection["one"].table.sum()) == 0


def test_updates_add_up_and_names_may_be_missing() -> None:
    histogram = MagnitudeHistogram(["a", "b"])
    histogram.update({"b": torch.ones(2)})
    histogram.update({"b": torch.ones(3, dtype=torch.float16)})
    histogram.update({})
    assert histogram.total().tolist() == [0, 5]
    assert histogram.pooled().names == ["all"] and histogram.pooled().total().tolist() == [5]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: MagnitudeHistogram(["a", "b", "a"]), ValueError, r"\['a'\] more than once", id="names"),
        pytest.param(
            lambda: MagnitudeHistogram(["a"]).update({"b": torch.ones(1)}), ValueError, "'b' is not one", id="name"
        ),
        pytest.param(lambda: of(torch.ones(2).int()), TypeError, "got torch.int32", id="int"),
        pytest.param(lambda: of(torch.ones(2).cfloat()), TypeError, "got torch.complex64", id="cplx"),
        pytest.param(lambda: of(torch.ones(2).bool()), TypeError, "got torch.bool", id="bool"),
        pytest.param(lambda: of(torch.ones(1)).quantile(1.01), ValueError, r"\[0, 1\], got 1.01", id="q"),
        pytest.param(lambda: of(torch.ones(1)).quantile(math.nan), ValueError, r"\[0, 1\], got nan", id="q-nan"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- properties ------------------------------------------------------------------------------------------------------


@given(bits=BITS)
def test_property_counts_are_the_oracles(bits: list[int]) -> None:
    values = from_bits(bits)
    assert counted(values) == expected(values)


@given(bits=BITS)
def test_property_sign_and_order_do_not_matter(bits: list[int]) -> None:
    values = from_bits(bits)
    assert counted(values) == counted(-values.flip(0))


@given(values=st.lists(st.floats(2.0**-126, 2.0**127, width=32), min_size=1, max_size=40), q=st.floats(0, 1))
def test_property_quantile(values: list[float], q: float) -> None:
    ascending = sorted(values)
    exact = ascending[min(int(q * len(values)), len(values) - 1)]
    assert_within_one_bin(float(of(torch.tensor(values)).quantile(q)), exact)


@given(values=st.lists(st.floats(allow_nan=True, width=64), max_size=40))
def test_property_float64(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    assert counted(tensor) == expected(tensor)


@given(bits=BITS, a=st.floats(0, 1e30), b=st.floats(0, 1e30))
def test_property_share_below_is_monotone(bits: list[int], a: float, b: float) -> None:
    histogram = of(from_bits(bits))
    low, high = (float(histogram.share_below(x)) for x in sorted((a, b)))
    assert math.isnan(low) or 0.0 <= low <= high <= 1.0


@st.composite
def tensors(draw: Any) -> Tensor:
    """Of any dtype, shape, strides and range, between other values in memory."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    steps = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in shape)
    before = draw(st.integers(0, 3))
    room = tuple(size * step for size, step in zip(shape, steps, strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = sorted((draw(st.integers(-50, 42)), draw(st.integers(-50, 42))))
    values = rng.standard_normal(before + math.prod(room)) * 10.0 ** rng.integers(low, high + 1)
    special = rng.choice([0.0, -0.0, 1e-45, -1e-40, 3e38, math.inf, -math.inf, math.nan], len(values))
    values = np.where(rng.random(len(values)) < draw(st.sampled_from([0.0, 0.1, 1.0])), special, values)
    tensor = torch.from_numpy(values).to(dtype)[before:].view(room)
    tensor = tensor[tuple(slice(None, None, step) for step in steps)]
    tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
    return tensor.unsqueeze(-1).expand(*tensor.shape, 3) if draw(st.booleans()) else tensor


MODELS = st.lists(tensors(), min_size=1, max_size=6).map(lambda found: {f"p{i}": each for i, each in enumerate(found)})


def table_of(values: dict[str, Tensor], names: list[str]) -> Tensor:
    histogram = MagnitudeHistogram(names)
    histogram.update(values)
    return histogram.table


@given(model=MODELS)
def test_property_counts_of_any_tensors_are_the_oracles(model: dict[str, Tensor]) -> None:
    table = table_of(model, list(model))
    assert table.tolist() == [expected(tensor) for tensor in model.values()]
    assert table.sum(1).tolist() == [tensor.numel() for tensor in model.values()]


@given(parts=st.lists(MODELS, min_size=3, max_size=3), order=st.permutations(range(3)))
def test_property_merging_is_commutative_and_associative(parts: list[dict[str, Tensor]], order: list[int]) -> None:
    names = [f"p{i}" for i in range(6)]

    def counted_part(part: int) -> MagnitudeHistogram:
        histogram = MagnitudeHistogram(names)
        histogram.update(parts[part])
        return histogram

    one_by_one = counted_part(order[0])  # (a + b) + c
    one_by_one.merge(counted_part(order[1]))
    one_by_one.merge(counted_part(order[2]))
    last_two, nested = counted_part(1), counted_part(0)  # a + (b + c)
    last_two.merge(counted_part(2))
    nested.merge(last_two)
    together = MagnitudeHistogram(names)
    for part in parts:
        together.update(part)
    assert torch.equal(one_by_one.table, nested.table) and torch.equal(nested.table, together.table)


@given(model=MODELS, there=st.sets(st.integers(0, 5)), ranks=st.integers(1, 9))
def test_property_slices_add_up_to_the_whole(model: dict[str, Tensor], there: set[int], ranks: int) -> None:
    sizes = {name: tensor.numel() for name, tensor in model.items()}
    found = {name: tensor for name, tensor in model.items() if int(name[1:]) in there}
    parts = MagnitudeHistogram(list(sizes))
    for rank in range(ranks):
        parts.update(dict(slice_of(found, sizes, rank, ranks)))
    assert torch.equal(parts.table, table_of(found, list(sizes)))
