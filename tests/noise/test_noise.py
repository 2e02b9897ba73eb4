"""Gradient moments, noise scale and its interval, against closed forms and brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_gradhist.noise import GradientMoments, NoiseRecord, NoiseScale
from lightning_gradhist.noise.interval import NoiseEstimate, ratio_estimate, student_quantile
from lightning_gradhist.noise.step import adam_weight, measure_pair, measure_part, noise_and_signal
from lightning_gradhist.tensors import elementwise

SHAPES = {"weight": (3, 4), "bias": (5,), "scalar": ()}


def gradients(number: int, seed: int = 0, mean: float = 0.0, dtype: torch.dtype = torch.float32) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {name: mean + torch.randn(shape, generator=generator, dtype=dtype) for name, shape in SHAPES.items()}
        for _ in range(number)
    ]


def like(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}


def moments_of(batch: list[dict], dtype: torch.dtype = torch.float32) -> GradientMoments:
    moments = GradientMoments(like(dtype))
    for gradient in batch:
        moments.update(gradient)
    return moments


def two_pass(batch: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    stacked = np.stack([gradient[name].double().numpy() for gradient in batch])
    return stacked.mean(0), stacked.var(0, ddof=1)


def assert_moments(moments: GradientMoments, batch: list[dict], rel: float) -> None:
    assert moments.count == len(batch)
    for name in SHAPES:
        mean, variance = two_pass(batch, name)
        np.testing.assert_allclose(moments.mean[name].double().numpy(), mean, rtol=rel, atol=rel)
        np.testing.assert_allclose(moments.variance()[name].double().numpy(), variance, rtol=rel)


# --- moments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "mean", "rel"),
    [
        pytest.param(torch.float32, 0.0, 1e-5, id="float32"),
        pytest.param(torch.float64, 0.0, 1e-12, id="float64"),
        pytest.param(torch.float64, 1e6, 1e-9, id="float64-mean-far-above-std"),
        pytest.param(torch.float32, 1e3, 2e-3, id="float32-mean-far-above-std"),  # E g^2 - (E g)^2 would lose it all
        pytest.param(torch.bfloat16, 0.0, 1e-5, id="bfloat16-gradients"),
    ],
)
def test_moments_are_those_of_two_passes(dtype: torch.dtype, mean: float, rel: float) -> None:
    wide = dtype if dtype != torch.bfloat16 else torch.float32
    batch = [{k: g.to(dtype) for k, g in one.items()} for one in gradients(40, mean=mean, dtype=wide)]
    moments = moments_of(batch, dtype)
    assert all(m.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for m in moments.mean.values())
    assert_moments(moments, batch, rel)


def test_none_and_missing_are_zero_gradients() -> None:
    batch = gradients(6)
    sparse: list[dict[str, Tensor | None]] = [dict(one) for one in batch]
    sparse[1]["bias"] = None
    del sparse[4]["weight"]
    batch[1]["bias"], batch[4]["weight"] = torch.zeros(5), torch.zeros(3, 4)
    moments = GradientMoments(like())
    for gradient in sparse:
        moments.update(gradient)
    assert_moments(moments, batch, 1e-5)


def test_the_gradients_are_neither_kept_nor_changed() -> None:
    gradient = {name: torch.ones(shape, requires_grad=True) for name, shape in SHAPES.items()}
    moments = moments_of([gradient])
    assert all(torch.equal(g, torch.ones_like(g)) for g in gradient.values())
    assert not any(m.requires_grad for m in moments.mean.values())


@pytest.mark.parametrize("ratio", [0.25, 1.0, 8.0, 64.0])
def test_second_moment_is_unbiased_where_there_is_signal(ratio: float) -> None:
    number, coordinates, sigma = 16, 100_000, 2.0
    generator = torch.Generator().manual_seed(0)
    mu = 3.0
    moments = GradientMoments({"w": torch.zeros(coordinates)})
    for _ in range(number):
        moments.update({"w": mu + sigma * torch.randn(coordinates, generator=generator)})
    found = moments.second_moment(ratio)["w"].double()
    assert abs(float(found.mean()) - (mu**2 + sigma**2 / ratio)) < 5 * float(found.std()) / math.sqrt(coordinates)


@pytest.mark.parametrize("ratio", [0.25, 1.0, 64.0])
def test_second_moment_without_signal(ratio: float) -> None:
    # mu^2 is estimated as at least zero, which costs E[max(chi^2_1 - 1, 0)] = 2 phi(1) = 0.484 of sigma^2 / n.
    number, coordinates = 64, 60_000
    generator = torch.Generator().manual_seed(1)
    moments = GradientMoments({"w": torch.zeros(coordinates)})
    for _ in range(number):
        moments.update({"w": torch.randn(coordinates, generator=generator)})
    found = moments.second_moment(ratio)["w"]
    assert (found >= moments.variance()["w"] / ratio).all()
    assert float(found.double().mean()) == pytest.approx(1 / ratio + 2 * stats.norm.pdf(1) / number, rel=0.01)


def test_adam_weight() -> None:
    second_moment = torch.tensor([0.0, 4.0, 1e-30])
    assert adam_weight(second_moment, 0.0).tolist() == pytest.approx([0.0, 0.5, 1e15])
    assert adam_weight(second_moment, 2.0).tolist() == pytest.approx([0.0, 0.25, 0.5])


# --- noise scale -----------------------------------------------------------------------------------------------------

BATCH = 8.0


class Synthetic:
    """Gradients with known mean and variance: independent coordinates, or a few factors that all of them share."""

    def __init__(self, kind: str, coordinates: int = 300, signal: float = 0.5, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.kind, self.coordinates = kind, coordinates
        self.mu = signal * self.normal(coordinates)
        self.sigma = 0.5 + 2 * torch.rand(coordinates, generator=self.generator)
        self.factors = self.normal(3, coordinates)
        if kind == "isotropic":
            self.sigma = torch.ones(coordinates)
        if kind == "factors":
            self.sigma = (self.factors.square().sum(0) + 0.01).sqrt()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def __call__(self, number: int) -> list[dict[str, Tensor]]:
        noise = self.normal(number, self.coordinates)
        if self.kind == "factors":
            noise = self.normal(number, 3) @ self.factors + 0.1 * noise
        else:
            noise = noise * self.sigma
        cut = self.coordinates // 3
        return [{"a": g[:cut], "b": g[cut:]} for g in self.mu + noise]

    def like(self) -> dict[str, Tensor]:
        cut = self.coordinates // 3
        return {"a": torch.zeros(cut), "b": torch.zeros(self.coordinates - cut)}

    def truth(self, weight: Tensor | float = 1.0) -> float:
        mu, sigma = self.mu.double(), self.sigma.double()
        return BATCH * float((weight * sigma**2).sum() / (weight * mu**2).sum())

    def exact_weight(self, eps: float, ratio: float) -> Tensor:
        return 1 / ((self.mu.double() ** 2 + self.sigma.double() ** 2 / ratio).sqrt() + eps)

    def measure(self, first: int, second: int, eps: float = 1e-8, ratio: float = 1.0) -> NoiseScale:
        noise = NoiseScale(self.like(), BATCH)
        for gradient in self(first):
            noise.update(gradient)
        noise.split(eps, ratio)
        for gradient in self(second):
            noise.update(gradient)
        return noise


def measured_weight(noise: NoiseScale) -> Tensor:
    assert noise._weights is not None
    return torch.cat([noise._weights["a"], noise._weights["b"]]).double()


@pytest.mark.parametrize("kind", ["isotropic", "scaled"])
@pytest.mark.parametrize(("eps", "ratio"), [(1e-8, 1.0), (0.3, 4.0), (1e3, 1.0)], ids=["adam", "eps", "sgd"])
def test_converges_to_the_closed_form(kind: str, eps: float, ratio: float) -> None:
    synthetic = Synthetic(kind, coordinates=3000)
    noise = synthetic.measure(200, 60, eps, ratio)
    assert noise.measurements == noise.simple().measurements == 60
    assert noise.simple().value == pytest.approx(synthetic.truth(), rel=0.02)
    assert noise.adam().value == pytest.approx(synthetic.truth(synthetic.exact_weight(eps, ratio)), rel=0.02)
    assert noise.adam().lower < noise.adam().value < noise.adam().upper


@pytest.mark.parametrize("sizes", [(2, 8, 32), (1, 1, 64)], ids=str)
def test_gradients_of_different_sizes_give_the_closed_form(sizes: tuple[int, ...]) -> None:
    synthetic = Synthetic("scaled", coordinates=3000)
    noise = NoiseScale(synthetic.like(), BATCH)
    for half in range(2):
        for i in range(200 if half == 0 else 90):
            n, (drawn,) = sizes[i % len(sizes)], synthetic(1)
            mu = dict(zip(drawn, synthetic.mu.split([1000, 2000]), strict=True))
            # the noise of a gradient of n samples in place of 8
            noise.update({name: mu[name] + (g - mu[name]) * (BATCH / n) ** 0.5 for name, g in drawn.items()}, n)
        if half == 0:
            noise.split(eps=1e-8)
    assert noise.simple().value == pytest.approx(synthetic.truth(), rel=0.03)
    assert noise.adam().value == pytest.approx(synthetic.truth(synthetic.exact_weight(1e-8, 1.0)), rel=0.03)


def test_the_order_of_different_sizes_does_not_matter() -> None:
    batch, weights = gradients(9), [0.5, 1.0, 4.0] * 3
    together, one = (GradientMoments(like()) for _ in range(2))
    for gradient, weight in zip(batch, weights, strict=True):
        together.update(gradient, weight)
    for gradient, weight in reversed(list(zip(batch, weights, strict=True))):
        one.update(gradient, weight)
    mean = sum(w * g["weight"].double() for w, g in zip(weights, batch, strict=True)) / sum(weights)
    for moments in (together, one):
        assert (moments.count, moments.weight) == (9, sum(weights))
        torch.testing.assert_close(moments.mean["weight"].double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(moments.variance()["weight"], together.variance()["weight"], rtol=1e-5, atol=1e-6)


COVERAGE = [
    pytest.param("isotropic", 8, 0.5, 1.0, id="isotropic-8"),
    pytest.param("isotropic", 16, 0.2, 1.0, id="isotropic-16-weak-signal"),
    pytest.param("isotropic", 16, 2.0, 1.0, id="isotropic-16-strong-signal"),
    pytest.param("scaled", 16, 0.5, 1.0, id="scaled-16"),
    pytest.param("scaled", 16, 0.5, 16.0, id="scaled-16-larger-batch"),
    pytest.param("factors", 8, 2.0, 1.0, id="factors-8"),
    pytest.param("factors", 16, 0.5, 1.0, id="factors-16"),
    pytest.param("factors", 16, 2.0, 16.0, id="factors-16-larger-batch"),
]


@pytest.mark.parametrize(("kind", "number", "signal", "ratio"), COVERAGE)
def test_the_interval_covers(kind: str, number: int, signal: float, ratio: float) -> None:
    """In 300 probes the 95% interval holds the truth; for ``B_adam`` that in the metric of the first half."""
    synthetic, repetitions = Synthetic(kind, signal=signal), 300
    simple = adam = 0
    for _ in range(repetitions):
        noise = synthetic.measure(number, number, ratio=ratio)
        for_simple, for_adam = noise.simple(), noise.adam()
        simple += for_simple.lower <= synthetic.truth() <= for_simple.upper
        adam += for_adam.lower <= synthetic.truth(measured_weight(noise)) <= for_adam.upper
    assert 0.90 <= simple / repetitions <= 1.0, simple / repetitions
    assert 0.90 <= adam / repetitions <= 1.0, adam / repetitions


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_adams_metric_does_not_bias_the_signal(ratio: float) -> None:
    # The metric and the mean come from the same gradients. Over 20,000 independent coordinates the interval is narrow
    # enough to show it: without Stein's correction B_adam is 4% too large at ratio 1, and 19% at ratio 16.
    synthetic = Synthetic("isotropic", coordinates=20_000)
    biases, covered = [], 0
    for _ in range(20):
        noise = synthetic.measure(16, 16, ratio=ratio)
        estimate, truth = noise.adam(), synthetic.truth(measured_weight(noise))
        biases.append(estimate.value / truth)
        covered += estimate.lower <= truth <= estimate.upper
    assert np.mean(biases) == pytest.approx(1.0, abs=0.01)
    assert covered >= 17


def test_no_signal_is_an_infinite_noise_scale() -> None:
    synthetic = Synthetic("isotropic", signal=0.0, coordinates=2000)
    for _ in range(20):
        noise = synthetic.measure(8, 8)
        for estimate in (noise.simple(), noise.adam()):
            if estimate.upper == math.inf:
                assert estimate.lower >= 0.0 and estimate.value >= estimate.lower
    uppers = [synthetic.measure(8, 8).simple().upper for _ in range(40)]
    assert sum(map(math.isinf, uppers)) >= 36
    assert any(synthetic.measure(8, 8).simple().value == math.inf for _ in range(20))


def test_no_noise_is_a_noise_scale_of_zero() -> None:
    noise = NoiseScale({"w": torch.zeros(3)}, 4)
    for half in range(2):
        for _ in range(4):
            noise.update({"w": torch.tensor([1.0, 2.0, 0.0])})
        if half == 0:
            noise.split(eps=0.0)
    assert noise.simple() == NoiseEstimate(0.0, 0.0, 0.0, 0.95, 4) == noise.adam()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        pytest.param(lambda: NoiseScale({}, 0), ValueError, "positive number of samples, got 0", id="batch"),
        pytest.param(lambda: NoiseScale({}, math.nan), ValueError, "got nan", id="batch-nan"),
        pytest.param(lambda: NoiseScale(like(), 1).split(0.0), RuntimeError, "needs two gradients", id="none-yet"),
        pytest.param(lambda: Synthetic("scaled").measure(2, 2).split(0.0), RuntimeError, "called once", id="twice"),
        pytest.param(lambda: NoiseRecord().estimate("lion"), ValueError, "got 'lion'", id="metric"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# --- Fieller's interval and Student's t ------------------------------------------------------------------------------


def fieller_set(noise: np.ndarray, signal: np.ndarray, references: float) -> np.ndarray:
    """Brute force: the ratios from a fine scan at which ``mean(noise - R * signal)`` passes a t test."""
    ratios = np.concatenate([[0.0], np.logspace(-4, 6, 200_001)])
    number = len(noise)
    t = stats.t.ppf(0.975, number - 1)
    residual = noise.mean() - ratios * signal.mean()
    covariance = np.cov(noise, signal)
    variance = covariance[0, 0] - 2 * ratios * covariance[0, 1] + ratios**2 * covariance[1, 1]
    return ratios[residual**2 <= t**2 * variance * (1 / number + 1 / references)]


@pytest.mark.parametrize(
    ("signal_mean", "noise_mean", "kind"),
    [
        pytest.param(5.0, 3.0, "bounded", id="clear"),
        pytest.param(1.2, 30.0, "bounded", id="clear-enough"),
        pytest.param(0.3, 30.0, "unbounded", id="signal-near-zero"),
        pytest.param(5.0, 0.1, "from-zero", id="noise-near-zero"),
        pytest.param(0.1, 0.1, "everything", id="both-near-zero"),
    ],
)
@pytest.mark.parametrize("references", [math.inf, 12.0])
@pytest.mark.parametrize("correlation", [-0.8, 0.0, 0.8])
def test_fieller_against_a_scan(
    signal_mean: float, noise_mean: float, kind: str, references: float, correlation: float
) -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 12))
    x, y = (x - x.mean()) / x.std(ddof=1), (y - y.mean()) / y.std(ddof=1)
    noise, signal = noise_mean + x, signal_mean + correlation * x + math.sqrt(1 - correlation**2) * y
    found = ratio_estimate(noise.tolist(), signal.tolist(), scale=1.0, confidence=0.95, references=references)
    scan = fieller_set(noise, signal, references)
    assert found.value == pytest.approx(noise_mean / signal_mean)
    assert found.lower <= found.value <= found.upper
    assert found.lower == pytest.approx(scan[0], rel=1e-3, abs=1e-3)
    assert found.lower == 0.0 or kind in ("bounded", "unbounded")
    if kind in ("unbounded", "everything"):
        assert found.upper == math.inf and scan[-1] == 1e6
    else:
        assert found.upper == pytest.approx(scan[-1], rel=1e-3)


def test_ratio_scales() -> None:
    noise, signal = [3.0, 4.0, 5.0, 4.5], [1.0, 1.1, 0.9, 1.05]
    one = ratio_estimate(noise, signal, scale=1.0, confidence=0.9)
    ten = ratio_estimate(noise, signal, scale=10.0, confidence=0.9)
    assert (ten.value, ten.lower, ten.upper) == pytest.approx((10 * one.value, 10 * one.lower, 10 * one.upper))
    assert one.confidence == 0.9 and one.measurements == 4


@pytest.mark.parametrize(
    ("noise", "signal", "estimate"),
    [
        pytest.param([], [], NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 0), id="none"),
        pytest.param([2.0], [1.0], NoiseEstimate(2.0, 0.0, math.inf, 0.95, 1), id="one"),
        pytest.param([2.0, 4.0], [1.0, 2.0], NoiseEstimate(2.0, 0.0, math.inf, 0.95, 2), id="two"),
        pytest.param([2.0, 4.0], [-1.0, 0.5], NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 2), id="no-signal"),
        pytest.param([2.0] * 3, [1.0] * 3, NoiseEstimate(2.0, 2.0, 2.0, 0.95, 3), id="constant"),
        pytest.param([0.0] * 3, [0.0] * 3, NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 3), id="zero"),
        pytest.param([2.0] * 3, [-1.0] * 3, NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 3), id="negative-signal"),
        pytest.param([2.0, math.inf], [1.0, math.nan], NoiseEstimate(2.0, 0.0, math.inf, 0.95, 1), id="not-finite"),
        pytest.param(
            [math.inf, math.inf], [math.inf, -math.inf], NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 0), id="infinite"
        ),
    ],
)
def test_ratio_of_few(noise: list[float], signal: list[float], estimate: NoiseEstimate) -> None:
    assert ratio_estimate(noise, signal, scale=1.0, confidence=0.95) == estimate


@pytest.mark.parametrize("degrees", [*range(1, 31), 50, 99, 100, 1000])
def test_student_quantile(degrees: int) -> None:
    for probability in (0.025, 0.5, 0.75, 0.9, 0.975, 0.995, 0.9995):
        exact = stats.t.ppf(probability, degrees)
        assert student_quantile(probability, degrees) == pytest.approx(exact, rel=1e-6, abs=1e-9)


# --- the record of a run ---------------------------------------------------------------------------------------------


def run(scales: list[float], batch_sizes: list[float] | None = None, error: float = 0.02, seed: int = 0) -> NoiseRecord:
    """One pair a scale: signal 1, noise ``scale / batch_size``, both with some error."""
    rng = np.random.default_rng(seed)
    record = NoiseRecord()
    for step, scale in enumerate(scales):
        batch = batch_sizes[step] if batch_sizes else 16.0
        a, b, c, d = 1 + error * rng.normal(size=4)
        record.add(step, batch, torch.tensor([a * scale / batch, b, c * 2 * scale / batch, d], dtype=torch.float64))
    return record


def test_a_constant_noise_scale() -> None:
    record = run([100.0] * 64)
    simple, adam = record.estimate("simple"), record.estimate("adam")
    assert simple.lower < 100 < simple.upper and adam.lower < 200 < adam.upper
    assert simple.value == pytest.approx(100, rel=0.02) and adam.measurements == 64
    assert record.estimate("adam", confidence=0.5).upper < adam.upper


@pytest.mark.parametrize("most", [64, 4096])
def test_where_many_gradients_were_changed_those_that_are_left_tell_nothing(most: int) -> None:
    """They are a choice of steps, as of those with small gradients."""
    found = []
    for share in (20, 19):  # one of so many
        record = NoiseRecord(most=most)
        for step in range(share * 40):
            noise = -math.inf if step % share == 0 else 1.0
            record.add(step, 8.0, torch.tensor([noise, math.nan if noise < 0 else 2.0] * 2, dtype=torch.float64))
        again = NoiseRecord(json.loads(json.dumps(record.samples)), most)
        assert again.estimate("simple") == record.estimate("simple") and len(again) == len(record) == share * 40
        found.append(record.estimate("adam"))
    assert found[0].value == pytest.approx(4) and found[0].measurements > 20 * 16
    assert found[1] == NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 0)


def test_a_growing_noise_scale_is_averaged_over_the_run() -> None:
    # The ratio of sums would weigh late and early alike in the sum only; the windows give the mean over time.
    scales = np.linspace(10, 1000, 80)
    found = run(scales.tolist()).estimate("simple")
    assert found.value == pytest.approx(scales.mean(), rel=0.03)
    assert found.lower < scales.mean() < found.upper


def test_a_signal_that_shrinks_is_averaged_as_ratios() -> None:
    # Noise 1 throughout, signal from 1 down to 1/8 in eight windows: ratios 1, 2, ..., 8.
    record = NoiseRecord()
    rng = np.random.default_rng(0)
    for step in range(80):
        noise, signal = (1 + 0.01 * rng.normal(size=2)) / [1, 1 + step // 10]
        record.add(step, 1.0, torch.tensor([noise, signal, noise, signal], dtype=torch.float64))
    assert record.estimate().value == pytest.approx(4.5, rel=0.01)


def test_a_batch_size_that_changes_does_no_harm() -> None:
    found = run([100.0] * 40, batch_sizes=[8.0] * 20 + [64.0] * 20).estimate("simple")
    assert found.value == pytest.approx(100, rel=0.02)


def test_fewer_windows_where_one_has_no_signal() -> None:
    record = run([100.0] * 64)
    for sample in record.samples[:8]:
        sample["signal_adam"] *= -1.0
    found = record.estimate("adam")
    assert math.isfinite(found.upper) and found.value == pytest.approx(200 * 64 / 48, rel=0.2)
    assert record.estimate("simple").value == pytest.approx(100, rel=0.02)


def test_samples_that_are_not_finite_are_left_out() -> None:
    record = run([100.0] * 30)
    record.add(30, 16.0, torch.tensor([1.0, 1.0, math.nan, math.nan], dtype=torch.float64))
    record.add(31, 16.0, torch.tensor([math.inf, 1.0, 1.0, -math.inf], dtype=torch.float64))
    assert record.samples[30] == {
        "step": 30,
        "batch_size": 16.0,
        "noise_simple": 1.0,
        "signal_simple": 1.0,
        "noise_adam": None,
        "signal_adam": None,
    }
    assert record.estimate("simple").measurements == 31 and record.estimate("adam").measurements == 30


def series(scales: np.ndarray, most: int, every: int = 1, seed: int = 0) -> NoiseRecord:
    """One measurement a scale, noise and signal each with an error of 30%."""
    rng, record = np.random.default_rng(seed), NoiseRecord(most=most)
    for i, scale in enumerate(scales):
        noise, signal = (1 + 0.3 * rng.normal(size=2)) * [scale, 1.0]
        record.add(i * every, 1.0, torch.tensor([noise, signal, noise, signal], dtype=torch.float64))
    return record


@pytest.mark.parametrize("number", [64, 65, 129, 700, 5000])
@pytest.mark.parametrize("late", [10.0, 1000.0], ids=["steady", "grows-at-the-end"])
def test_a_bounded_record_agrees_with_an_unbounded_one(number: int, late: float) -> None:
    scales = np.where(np.arange(number) < 0.75 * number, 10.0, late)
    bounded, whole = series(scales, most=64), series(scales, most=10**9)
    assert len(bounded.samples) <= 64 < len(whole.samples) + 1 and len(bounded) == len(whole) == number
    found, expected = bounded.estimate(), whole.estimate()
    assert found.value == pytest.approx(expected.value, rel=0.06)
    assert found.lower < expected.value < found.upper
    assert found.measurements <= number < found.measurements + 2 * number / 32


@pytest.mark.parametrize("cut", [10, 65, 100, 131, 999])
def test_a_record_goes_on_in_mid_stride_as_if_never_saved(cut: int) -> None:
    measurements = torch.rand(1000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    through, first = NoiseRecord(most=64), NoiseRecord(most=64)
    for step, measurement in enumerate(measurements):
        through.add(step, 8, measurement)
    for step in range(cut):
        first.add(step, 8, measurements[step])
    again = NoiseRecord(json.loads(json.dumps(first.samples)), most=64)
    for step in range(cut, 1000):
        again.add(step, 8, measurements[step])
    assert again.samples == through.samples and again.estimate() == through.estimate()


def test_windows_are_of_steps_however_densely_they_were_measured() -> None:
    record = NoiseRecord()
    for step in [*range(0, 800), *range(800, 1600, 20)]:  # measured rarely after a resume: half of the run all the same
        scale = 10.0 if step < 800 else 1000.0
        record.add(step, 1.0, torch.tensor([scale, 1.0, scale, 1.0], dtype=torch.float64))
    assert record.estimate().value == pytest.approx(505, rel=0.15)  # by entries it would be 57


def test_an_empty_record() -> None:
    for record in (NoiseRecord(), NoiseRecord([{"noise_adam": None, "signal_adam": None, "batch_size": 1, "step": 0}])):
        assert record.estimate() == NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 0)


def test_samples_go_through_json() -> None:
    record = run([50.0] * 20)
    record.add(20, 16, torch.full((4,), math.nan))
    again = NoiseRecord(json.loads(json.dumps(record.samples, allow_nan=False)))
    assert again.samples == record.samples and again.estimate() == record.estimate()
    again.add(21, 16, torch.ones(4))
    assert len(record.samples) == 21  # the samples that it was made of are copied


@pytest.mark.parametrize("pairs", [40, 160])
def test_the_interval_of_a_record_covers(pairs: int) -> None:
    """Pairs of real gradients, noise shared by all coordinates, metric as an optimizer would have it."""
    synthetic = Synthetic("factors", signal=1.0)
    weight = synthetic.exact_weight(1e-8, 1.0).float()
    weights = {"a": weight[:100], "b": weight[100:]}
    truths = {"simple": synthetic.truth(), "adam": synthetic.truth(weight.double())}
    repetitions, covered = 100, {"simple": 0, "adam": 0}
    for _ in range(repetitions):
        record, batch = NoiseRecord(), synthetic(2 * pairs)
        for i in range(pairs):
            pair = measure_pair(batch[2 * i], batch[2 * i + 1], weights)
            record.add(i, BATCH, noise_and_signal(pair, 2 / BATCH, 0.0, BATCH))
        for metric, truth in truths.items():
            found = record.estimate(metric)
            covered[metric] += found.lower <= truth <= found.upper
    assert all(number >= 0.90 * repetitions for number in covered.values()), covered


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_measure_pair() -> None:
    first, second = gradients(2)
    weights = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    expected = np.zeros(4)
    for name in SHAPES:
        one, two, w = (x[name].double().numpy() for x in (first, second, weights))
        noise, signal = (one - two) ** 2 / 2, one * two
        expected += [noise.sum(), signal.sum(), (w * noise).sum(), (w * signal).sum()]
    found = noise_and_signal(measure_pair(first, second, weights), 2 / 8, 0.0, 8)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


def test_measure_pair_leaves_out_what_only_one_has() -> None:
    first, second = gradients(2)
    alone = measure_pair({"bias": first["bias"]}, {"bias": second["bias"]}, {"bias": torch.ones(5)})
    with_others = {"bias": second["bias"], "new": torch.ones(3)}
    assert torch.equal(measure_pair(first, with_others, {"bias": torch.ones(5)}), alone)
    assert alone[:2].equal(alone[2:])
    unweighted = measure_pair(first, second, {"bias": torch.ones(5)})  # a name without weight has weight zero
    torch.testing.assert_close(unweighted[2:], alone[2:], rtol=1e-5, atol=1e-5)
    assert not unweighted[:2].allclose(alone[:2])


def test_measure_pair_without_weights_or_gradients() -> None:
    first, second = gradients(2)
    found = measure_pair(first, second, None)
    assert found[:2].isfinite().all() and found[2:].isnan().all()
    assert measure_pair({}, second, None).isnan().all()
    half = measure_pair({"x": torch.tensor([300.0]).half()}, {"x": torch.tensor([300.0]).half()}, None)
    assert half[:2].tolist() == [0.0, 90_000.0]  # which float16 could not hold


@pytest.mark.parametrize(
    ("size", "dtype"),
    [(1e-30, torch.float32), (1e25, torch.float32), (1e-100, torch.float64), (1e60, torch.float64)],
    ids=str,
)
@pytest.mark.parametrize("measure", [measure_pair, measure_part])
def test_the_scale_of_gradients_does_not_matter(measure: Any, size: float, dtype: torch.dtype) -> None:
    first, second = ({name: g.to(dtype) for name, g in gradient.items()} for gradient in gradients(2))
    weights = {name: gradient.abs() for name, gradient in first.items()}
    expected = measure(first, second, weights) * torch.tensor([size**2, size**2, size, size], dtype=torch.float64)
    first, second = ({name: g * size for name, g in gradient.items()} for gradient in (first, second))
    found = measure(first, second, {name: weight / size for name, weight in weights.items()})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [(8, 8), (8, 8, 8, 8), (2, 8), (1, 3, 16), (30, 1, 1, 1)], ids=str)
def test_a_part_and_the_whole_tell_noise_and_signal_without_bias(sizes: tuple[int, ...]) -> None:
    """Over many steps at fixed weights: the means are tr(Sigma) / n and |G|^2 within five standard errors."""
    mean, deviation, weight = torch.linspace(-1, 1, 20), torch.linspace(0.5, 3, 20), torch.linspace(0.1, 2, 20)
    variance = sum(1 / n for n in sizes) / len(sizes) ** 2
    spread = (1 - 2 / len(sizes)) / sizes[0] + variance
    assert sizes != (8, 8, 8, 8) or spread == 1 / 8 - 1 / 32
    generator, roots = torch.Generator().manual_seed(0), torch.tensor(sizes).sqrt().unsqueeze(1)
    found = []
    for _ in range(4000):
        of_parts = mean + deviation * torch.randn(len(sizes), 20, generator=generator) / roots
        sums = measure_part({"w": of_parts[0]}, {"w": of_parts.mean(0)}, {"w": weight})
        found.append(noise_and_signal(sums, spread, variance, 10.0))
    assert_without_bias(found, mean, deviation, weight)


@pytest.mark.parametrize("sizes", [(8, 8), (2, 8), (40, 1)], ids=str)
def test_a_pair_of_different_sizes_tells_noise_and_signal_without_bias(sizes: tuple[int, int]) -> None:
    mean, deviation, weight = torch.linspace(-1, 1, 20), torch.linspace(0.5, 3, 20), torch.linspace(0.1, 2, 20)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(4000):
        one, other = (mean + deviation * torch.randn(20, generator=generator) / n**0.5 for n in sizes)
        sums = measure_pair({"w": one}, {"w": other}, {"w": weight})
        found.append(noise_and_signal(sums, 1 / sizes[0] + 1 / sizes[1], 0.0, 10.0))
    assert_without_bias(found, mean, deviation, weight)


def assert_without_bias(found: list[Tensor], mean: Tensor, deviation: Tensor, weight: Tensor) -> None:
    """The noise of a gradient of ten samples, and the signal."""
    measured, variance = torch.stack(found), deviation.double().square() / 10
    expected = [variance.sum(), mean.double().square().sum()]
    expected += [(weight * variance).sum(), (weight * mean.double().square()).sum()]
    error = measured.std(0) / len(found) ** 0.5
    assert ((measured.mean(0) - torch.stack(expected)).abs() < 5 * error).all()


def test_a_part_without_a_gradient_is_zero_there() -> None:
    whole = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    sums = measure_part({"a": torch.tensor([0.0, 4.0])}, whole, None)
    got = noise_and_signal(sums, 1 - 1 / 3, 1 / 3, 3)  # one of three samples
    assert got[:2].tolist() == pytest.approx([(1 + 4 + 9) / 2, 14 - 7]) and got[2:].isnan().all()
    assert measure_part({}, {}, None).isnan().all()


def test_a_record_holds_few_measurements_of_the_device() -> None:
    record = NoiseRecord()
    held = []
    for step in range(300):
        record.add(step, 8, torch.ones(4, dtype=torch.float64))
        held.append(len(record._waiting))
    assert max(held) == 64 and len(record) == 300
    assert [sample["step"] for sample in record.samples] == list(range(300))


def test_large_gradients_are_measured_in_pieces_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, moments = (
        {"small": torch.randn(10, generator=generator), "large": torch.randn(3000, 2, generator=generator)}
        for _ in range(3)
    )
    weights = {name: moment.abs() for name, moment in moments.items()}
    whole = [
        measure_pair(first, second, weights),
        measure_pair(first, second, None),
        measure_part(first, second, weights),
    ]
    roots = elementwise(torch.sqrt, weights)
    monkeypatch.setattr("lightning_gradhist.tensors._BATCH", 1000)
    pieces = [
        measure_pair(first, second, weights),
        measure_pair(first, second, None),
        measure_part(first, second, weights),
    ]
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
    for name, root in elementwise(torch.sqrt, weights).items():
        assert torch.equal(root, roots[name])
