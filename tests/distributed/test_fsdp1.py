"""FSDP1: each rank has a flat piece of the parameters, and every value is counted once."""

from __future__ import annotations

import json
from typing import Any

import lightning as L
import pytest
import torch
from fsdp1_jobs import PROBED, WAYS, Probed, calibrated, hybrid, probed, watched
from ranks import run_ranks
from support import events, expected_counts, logged_counts, logged_scalars

from lightning_gradhist import NoiseScale
from lightning_gradhist.noise.step import measure_pair, noise_and_signal

pytestmark = pytest.mark.xdist_group("fsdp1")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("fsdp1")
    return folder, run_ranks(watched, 2, folder)


def whole(found: Any, way: str, step: int) -> dict[str, torch.Tensor]:
    """The gradients of a step, put together from the ranks' pieces."""
    first, second = (rank[way][0][step] for rank in found)
    if way == "NO_SHARD":  # both ranks hold all
        for name, gradient in first.items():
            assert torch.equal(gradient, second[name])
        return first
    return {name: torch.cat([gradient.flatten(), second[name].flatten()]) for name, gradient in first.items()}


@pytest.mark.parametrize("way", [*WAYS, "accumulated"])
def test_every_value_is_counted_once_whatever_the_way(found, way: str) -> None:
    folder, ranks = found
    tags = events(folder / way).Tags()["histograms"]
    assert not [tag for tag in tags if "fsdp" in tag]
    for step in (0, 2):
        gradients = whole(ranks, way, step)
        pooled = torch.cat([gradient.flatten() for gradient in gradients.values()])
        assert logged_counts(folder / way, "gradient_magnitude/all", step) == expected_counts(pooled)
        for name, gradient in gradients.items():
            assert logged_counts(folder / way, f"gradient_magnitude/{name}", step) == expected_counts(gradient), name
    size = sum(gradient.numel() for gradient in whole(ranks, "NO_SHARD", 0).values())
    event = events(folder / way).Histograms("gradient_magnitude/all")[0].histogram_value
    zeros = logged_scalars(folder / way, "gradient_zero_share/all")[0] * size
    assert event.num + zeros == pytest.approx(size)  # what torch has padded is not counted


@pytest.mark.parametrize("way", [way for way in WAYS if way != "flat"])
def test_gradients_and_noise_are_those_of_whole_tensors(found, way: str) -> None:
    _, ranks = found
    plain = [whole(ranks, "NO_SHARD", step) for step in range(5)]
    for step in range(5):
        for name, gradient in whole(ranks, way, step).items():
            torch.testing.assert_close(gradient.flatten(), plain[step][name].flatten(), rtol=1e-4, atol=1e-6)
    samples = ranks[0][way][1]
    assert samples == ranks[1][way][1]
    if way == "NO_SHARD":
        return
    assert [sample["step"] for sample in samples] == [0, 2]
    gradients = [whole(ranks, way, step) for step in range(5)]
    for sample in samples:
        pair = measure_pair(gradients[sample["step"]], gradients[sample["step"] + 1], None)
        noise, signal, *_ = noise_and_signal(pair, 2.0, 0.0, 1.0).tolist()
        assert [sample["noise_simple"], sample["signal_simple"]] == pytest.approx([noise, signal], rel=1e-4, abs=1e-9)
        assert sample["batch_size"] == 8


def test_the_second_moment_and_the_update_are_seen_through_the_pieces(found) -> None:
    folder, _ = found
    for way in WAYS:
        assert list(logged_scalars(folder / way, "optimizer_update_ratio/all")) == [0, 2, 4]
    for way in ("FULL_SHARD", "SHARD_GRAD_OP", "one unit"):
        for step, ratio in logged_scalars(folder / way, "optimizer_update_ratio/all").items():
            same = logged_scalars(folder / "NO_SHARD", "optimizer_update_ratio/all")[step]
            assert ratio == pytest.approx(same, rel=1e-3), (way, step)


@pytest.mark.slow
def test_pieces_that_several_ranks_hold_are_counted_once(tmp_path) -> None:
    found = run_ranks(hybrid, 4, tmp_path)
    ranks, probes = [rank[0] for rank in found], [rank[1] for rank in found]
    for (crossed, _), (plain, _) in probes:
        assert crossed.noise_scale.value == pytest.approx(plain.noise_scale.value, rel=1e-4)
        assert crossed.epsilon_range.histogram.total().sum() == plain.epsilon_range.histogram.total().sum()
        assert crossed.epsilon == plain.epsilon == probes[0][0][0].epsilon
    of_ranks = [[rank[way][1] for rank in holders] for way, holders in ((0, probes[:2]), (1, probes))]
    two, four = ([torch.cat([p.flatten() for p in pieces]) for pieces in zip(*some, strict=True)] for some in of_ranks)
    torch.testing.assert_close(two, four, rtol=1e-5, atol=1e-6)  # the weights that ALTO has left
    for name in ranks[0][0]:
        first, second, again, once_more = (rank[0][name] for rank in ranks)
        assert torch.equal(first, again) and torch.equal(second, once_more)
        gradient = torch.cat([first.flatten(), second.flatten()])
        assert logged_counts(tmp_path, f"gradient_magnitude/{name}", 0) == expected_counts(gradient)


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> Any:
    return run_ranks(probed, 2, tmp_path_factory.mktemp("probed"))


@pytest.mark.parametrize("way", PROBED)
def test_a_probe_of_pieces_leaves_no_trace(probes, way: str) -> None:
    for result, (with_probe, without), seen in (rank[way] for rank in probes):
        torch.testing.assert_close(with_probe, without, rtol=0, atol=0)
        assert result.noise_source == "probe" and result.gradients == (6 if "noisy" in way else 8)
        assert seen["left"]
        first = probes[0][way][0]
        assert (result.noise_scale, result.epsilon_range.lower) == (first.noise_scale, first.epsilon_range.lower)
        size = sum(p.numel() for p in Probed("plain").parameters())
        assert int(result.epsilon_range.histogram.total().sum()) == size


@pytest.mark.parametrize("way", ["FULL_SHARD", "SHARD_GRAD_OP", "one unit"])
def test_alto_steps_pieces_as_whole_tensors(probes, way: str) -> None:
    expected, ranks = probes[0]["NO_SHARD"][1][1]["pieces"], [rank[way][1][1]["pieces"] for rank in probes]
    for whole_one, *pieces in zip(expected, *ranks, strict=True):
        torch.testing.assert_close(torch.cat(pieces), whole_one.flatten(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", [way for way in PROBED if "noisy" not in way])
def test_a_probe_of_pieces_is_that_of_the_whole(probes, way: str) -> None:
    L.seed_everything(7, verbose=False)
    module, seen = Probed("plain"), [rank[way][2] for rank in probes]
    noise = NoiseScale(dict(module.named_parameters()), batch_size=8)
    for index in range(8):
        batches = [rank["batches"][index] for rank in seen]
        losses = [torch.nn.functional.cross_entropy(module.logits(inputs), labels) for inputs, labels in batches]
        module.zero_grad()
        sum(losses).div(2).backward()
        gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        if index == 4:
            noise.split(eps=1e-3)
        noise.update(gradients)
        for name, gradient in gradients.items():
            pieces = [rank["parts"][index][name] for rank in seen if name in rank["parts"][index]]
            torch.testing.assert_close(torch.cat(pieces), gradient.flatten(), msg=f"{way} {name}")
    assert seen[0]["noise"] == seen[1]["noise"]
    assert "use_orig_params=True" in probes[0]["flat"][0]
    assert seen[0]["noise"].value == pytest.approx(noise.adam().value, rel=1e-4)


def test_the_rate_is_calibrated_from_a_record(tmp_path) -> None:
    first, second = run_ranks(calibrated, 2, tmp_path)
    assert first == second
    assert first["ratio"] == pytest.approx(2.0)  # the square root of four times the batch
    assert first["rate"] == pytest.approx(2e-2)
    model = json.loads((tmp_path / "first" / "calibration.json").read_text())["model"]
    assert model["body.0.weight"] == [7, 8] and model["head.bias"] == [3]
