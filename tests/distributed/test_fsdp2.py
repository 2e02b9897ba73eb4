from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from shard_jobs import (
    OPTIMIZERS,
    Tidy,
    Whole,
    crossed,
    flat,
    loaded,
    model,
    saved,
    train,
    trained,
    unreduced,
    unused,
    whole,
)
from support import assert_state_is_logged, events, expected_counts, logged_counts

from lightning_gradhist import ALTO, NoiseScale
from lightning_gradhist.noise.step import adam_weight, measure_pair, noise_and_signal

TWO_RANKS = pytest.param(2, id="two ranks", marks=pytest.mark.xdist_group("two ranks"))
THREE_RANKS = pytest.param(3, id="three ranks", marks=[pytest.mark.xdist_group("three ranks"), pytest.mark.slow])


@pytest.fixture(scope="module", params=[TWO_RANKS, THREE_RANKS])
def run(request, tmp_path_factory) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("shards")
    return folder, run_ranks(trained, request.param, folder)


def test_sharded_is_one_process(run) -> None:
    found = [rank["trajectories"] for rank in run[1]]
    for name, make in OPTIMIZERS.items():
        module = model()
        optimizer = make(module.parameters())
        train(module, optimizer, range(12))
        optimizer.step()
        expected = whole(module)
        for weights, calls, same_placement, _ in (of_rank[name] for of_rank in found):
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
            assert calls == ([2 * len(expected)] if name == "ALTO" else [])  # one collective, for all layer norms
            assert same_placement
    assert sum(of_rank["ALTO"][3] for of_rank in found) > 0, "no shard was empty"


def test_a_rank_without_a_gradient_still_joins_the_collective(tmp_path) -> None:
    assert run_ranks(unused, 2, tmp_path) == [True, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path) -> None:
    expected = run_ranks(saved, 2, tmp_path)[0]
    for weights in run_ranks(loaded, 3, tmp_path):
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [TWO_RANKS, THREE_RANKS])
def test_alto_under_fsdp1_is_one_process(ranks: int, tmp_path) -> None:
    module = model()
    optimizer = OPTIMIZERS["ALTO"](module.parameters())
    train(module, optimizer, range(12))
    optimizer.step()
    expected, found = whole(module), run_ranks(flat, ranks, tmp_path)
    for how in ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "before"):
        for weights, calls, _ in (rank[how] for rank in found):
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
            assert calls == ([] if how == "NO_SHARD" else [2 * len(expected)])  # one collective, for all layer norms
    assert any(0 in rank["FULL_SHARD"][2] for rank in found), "no rank was without a piece"
    assert all("FSDP1" in rank["refused"] and "use_orig_params=True" in rank["refused"] for rank in found)


def test_the_partitions_of_zero_are_refused() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    param.ds_id = 0
    with pytest.raises(TypeError, match="ALTO needs the norm of each layer.*DeepSpeed ZeRO"):
        ALTO([param])
    optimizer = ALTO([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(TypeError, match="DeepSpeed ZeRO"):
        optimizer.add_param_group({"params": [param]})
    assert len(optimizer.param_groups) == 1


def test_the_monitor_counts_every_shard_once(run) -> None:
    folder, found = run[0], [rank["monitored"] for rank in run[1]]
    assert 0 in [size for rank in found for size in rank["sharded"][3].values()], "no shard was empty"
    for case in ("sharded", "replicated"):
        gradients, moments, samples, _, state = found[0][case]
        assert_state_is_logged(folder / case, state, [0, 2, 4], eps=1e-8)
        tags = events(folder / case).Tags()["histograms"]
        assert {"gradient_magnitude/body.2.bias", "gradient_clipped_magnitude/body"} < set(tags)
        for step in (0, 2, 4):
            for name, gradient in gradients[step].items():
                logged = logged_counts(folder / case, f"gradient_magnitude/{name}", step)
                assert logged == expected_counts(gradient), (case, name, step)
            pooled = torch.cat([gradient.flatten() for gradient in gradients[step].values()])
            assert logged_counts(folder / case, "gradient_magnitude/all", step) == expected_counts(pooled)
            clipped = events(folder / case).Histograms("gradient_clipped_magnitude/all")[step // 2].histogram_value
            assert clipped.num == pooled.numel()
            assert logged_counts(folder / case, "gradient_clipped_magnitude/all", step) != expected_counts(pooled)
        assert [sample["step"] for sample in samples] == [0, 2, 4]
        for sample in samples:
            step = sample["step"]
            weights = {name: adam_weight(v, 1e-8) for name, v in moments[step].items()} or None
            pair = measure_pair(gradients[step], gradients[step + 1], weights)
            expected = noise_and_signal(pair, 2.0, 0.0, 1.0).tolist()
            numbers = [sample[f"{kind}_{metric}"] for metric in ("simple", "adam") for kind in ("noise", "signal")]
            assert numbers[: 4 if weights else 2] == pytest.approx(expected[: 4 if weights else 2], rel=1e-4, abs=1e-9)
            assert sample["batch_size"] == 4 * len(found)
        assert all(rank[case][2] == samples for rank in found)
    assert "when='local' counts what each rank computed before averaging" in found[0]["local"]
    assert found[0]["partial"] == 5 * [len(found)]  # added up, as the parameter lies


def test_gradients_that_are_still_to_be_summed_are_counted_where_every_rank_has_room(tmp_path) -> None:
    (gradients, _), (_, said) = run_ranks(unreduced, 2, tmp_path)
    assert said == []  # rank zero alone speaks
    assert [event.step for event in events(tmp_path / "unreduced").Histograms("gradient_magnitude/all")] == [0, 4]
    for step in (0, 4):
        pooled = torch.cat([gradient.flatten() for gradient in gradients[step].values()])
        assert logged_counts(tmp_path / "unreduced", "gradient_magnitude/all", step) == expected_counts(pooled)


def test_a_probe_of_shards_is_that_of_the_whole(run) -> None:
    found = [rank["calibrated"] for rank in run[1]]
    for how in ("sharded", "replicated"):
        seen = [rank[how][2] for rank in found]
        noise = NoiseScale(seen[0]["weights"], batch_size=8)
        for index in range(8):
            expected = mean_gradient(seen[0]["weights"], [rank["batches"][index] for rank in seen])
            if index == 4:
                noise.split(eps=1e-3)
            noise.update(expected)
            assert seen[0]["parts"][index].keys() == {
                name for name in expected if "norm" not in name
            }  # which is not used
            for name in seen[0]["parts"][index]:
                of_ranks = torch.cat([rank["parts"][index][name] for rank in seen])
                torch.testing.assert_close(of_ranks, expected[name].flatten(), msg=f"{how} {name}")
        assert seen[0]["noise"].value == pytest.approx(noise.adam().value, rel=1e-4)
        assert [rank["noise"] for rank in seen] == len(seen) * [seen[0]["noise"]]


@pytest.mark.slow
def test_layers_on_one_dimension_of_a_mesh_are_counted_once(tmp_path) -> None:
    found = run_ranks(crossed, 4, tmp_path)
    gradients, samples, state, _ = found[0]
    assert_state_is_logged(tmp_path / "monitored", state, [0, 2], eps=1e-8)
    for step in (0, 2):
        for name, gradient in gradients[step].items():
            logged = logged_counts(tmp_path / "monitored", f"gradient_magnitude/{name}", step)
            assert logged == expected_counts(gradient), (name, step)
        pooled = torch.cat([gradient.flatten() for gradient in gradients[step].values()])
        assert logged_counts(tmp_path / "monitored", "gradient_magnitude/all", step) == expected_counts(pooled)
    for sample in samples:
        pair = measure_pair(gradients[sample["step"]], gradients[sample["step"] + 1], None)
        noise, signal, *_ = noise_and_signal(pair, 2.0, 0.0, 1.0).tolist()
        assert [sample["noise_simple"], sample["signal_simple"]] == pytest.approx([noise, signal], rel=1e-4, abs=1e-9)
        assert sample["batch_size"] == 8
    seen = [rank[3] for rank in found]
    noise = NoiseScale(seen[0]["weights"], batch_size=8)
    for index in range(8):
        expected = mean_gradient(seen[0]["weights"], [rank["batches"][index] for rank in seen], Tidy())
        if index == 4:
            noise.split(eps=1e-3)
        noise.update(expected)
        sizes = {name: sum(rank["parts"][index][name].numel() for rank in seen) for name in expected}
        assert sizes == {name: gradient.numel() for name, gradient in expected.items()}
    assert seen[0]["noise"].value == pytest.approx(noise.adam().value, rel=1e-4)
    assert all(rank["samples"] == 8 and rank["left"] for rank in seen)  # of two ranks; the others have the same


def mean_gradient(weights: dict[str, torch.Tensor], batches: list[Any], module: Any = None) -> dict[str, torch.Tensor]:
    """What one process makes of the ranks' batches."""
    module = module or Whole("plain")
    module.load_state_dict(weights, strict=False)
    losses = [torch.nn.functional.cross_entropy(module.logits(inputs), labels) for inputs, labels in batches]
    sum(losses).div(len(losses)).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def test_a_calibration_of_shards_is_invisible_and_the_same_on_all_ranks(run) -> None:
    found = [rank["calibrated"] for rank in run[1]]
    for how in ("sharded", "replicated", "noisy"):
        for rank in found:
            result, (with_probe, without), seen = rank[how]
            torch.testing.assert_close(with_probe, without, rtol=0, atol=0)
            assert seen["left"] and len(seen["parts"]) == result.gradients == (6 if how == "noisy" else 8)
            assert int(result.epsilon_range.histogram.total().sum()) == sum(w.numel() for w in seen["weights"].values())
            assert result.effective_batch_size == 8 * len(found)  # two batches of four, on each rank
            assert result.noise_scale == found[0][how][0].noise_scale and result.noise_source == "probe"
    said, every = " ".join(found[0]["noisy"][0].problems), f"{len(found)} of {8 * len(found)} batches of the probe gave"
    assert f"{every} a gradient that is not finite" in said and f"{every} no loss that depends on a parameter" in said
    assert "no probe: parameter 'head.weight' is not sharded" in found[0]["partly"][0]
