from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_jobs import (
    apart,
    calibrated,
    clipped,
    dealt_out,
    exit_codes,
    fails_in_measuring,
    hostile_record,
    invisible,
    killed,
    monitored,
    not_averaged,
    numbers,
    out_of_step,
    short_of_memory,
    streamed,
    told_to_stop,
    uneven,
    unlike_batches,
    zero,
)
from ranks import run_ranks
from support import assert_state_is_logged, events, expected_counts, logged_counts

from lightning_gradhist import MagnitudeHistogram, NoiseScale
from lightning_gradhist.noise.run_record import RunRecord

RANKS = [pytest.param(2, id="two ranks"), pytest.param(3, id="three ranks", marks=pytest.mark.slow)]


@pytest.mark.parametrize("ranks", RANKS)
def test_numbers_of_all_ranks_are_those_of_one_process(tmp_path, ranks: int) -> None:
    found = run_ranks(numbers, ranks, tmp_path)
    one = MagnitudeHistogram(["a", "b"])
    one.update({"a": found[0]["whole"], "b": found[0]["whole"][0, :7]})
    noise = NoiseScale({"w": torch.zeros(50)}, batch_size=4)
    gradients = torch.cat(found[0]["gradients"])
    for gradient in gradients:
        noise.update({"w": gradient})
    noise.split(eps=1e-8)
    for gradient in gradients + 0.1:
        noise.update({"w": gradient})
    for result in found:
        assert torch.equal(result["reduced"], one.table)
        assert result["calls"] == [one.table.numel()]  # one collective
        assert torch.equal(result["of_metric"], one.table)
        count, mean, variance = result["moments"]
        assert count == len(gradients)
        torch.testing.assert_close(mean, gradients.mean(0))
        torch.testing.assert_close(variance, gradients.var(0))
        simple, adam, measurements = result["noise"]
        assert measurements == len(gradients)
        assert simple.value == pytest.approx(noise.simple().value, rel=1e-4)
        assert adam.value == pytest.approx(noise.adam().value, rel=1e-4)
        assert adam.lower == pytest.approx(noise.adam().lower, rel=1e-3)
        assert result["noise"] == found[0]["noise"]


@pytest.mark.parametrize("ranks", RANKS)
def test_slices_of_all_ranks_add_up_to_the_whole_gradient(tmp_path, ranks: int) -> None:
    found = run_ranks(monitored, ranks, tmp_path)
    for case, mine in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[case]["gradients"], mine["gradients"], rtol=0, atol=0)
            assert other[case]["samples"] == mine["samples"]
        steps = [event.step for event in events(tmp_path / case).Histograms("gradient_magnitude/all")]
        assert steps == list(range(0, mine["steps"], 2)) and steps
        for step, gradients in zip(steps, mine["gradients"], strict=True):
            for name, gradient in gradients.items():
                if gradient.any():
                    logged = logged_counts(tmp_path / case, f"gradient_magnitude/{name}", step)
                    assert logged == expected_counts(gradient), (case, name, step)
            pooled = torch.cat([gradient.flatten() for gradient in gradients.values()])
            assert logged_counts(tmp_path / case, "gradient_magnitude/all", step) == expected_counts(pooled)
        if case in ("unused", "channels_last"):
            assert_state_is_logged(tmp_path / case, mine["state"], steps, eps=1e-8)
        accumulated = 2 if case == "accumulated" else 1
        assert mine["batch_size"] == 4 * accumulated * ranks
        (samples,) = mine["samples"]
        measured = {sample["step"]: sample for sample in samples}
        assert list(measured) == [step for step in steps if ranks == 2 or step < 10]  # the last step of three is short
        for step, gradients in zip(steps, mine["gradients"], strict=True):
            windows = [rank[case]["own"][step * accumulated : (step + 1) * accumulated] for rank in found]
            assert_local_counts(tmp_path / case, step, windows)
            if step in measured:
                assert_noise(measured[step], gradients, [window[0] for window in windows], accumulated)
    assert len({"extra.weight" in rank["unused"]["own"][0] for rank in found}) == 2  # the ranks' names differ


def assert_noise(
    sample: dict[str, float], whole: dict[str, torch.Tensor], firsts: list[dict[str, torch.Tensor]], accumulated: int
) -> None:
    """Each rank's first micro-batch against all of the step; what a rank has no gradient of is zero there."""
    parts = accumulated * len(firsts)
    own = [{name: accumulated * first.get(name, torch.zeros_like(g)) for name, g in whole.items()} for first in firsts]
    squares = [sum((mine[name] - g).double().square().sum() for name, g in whole.items()) for mine in own]
    noise = float(sum(squares)) / len(firsts) / (parts - 1)
    signal = float(sum(g.double().square().sum() for g in whole.values())) - noise
    assert sample["noise_simple"] == pytest.approx(noise, rel=1e-4)
    assert sample["signal_simple"] == pytest.approx(signal, rel=1e-3, abs=1e-4 * noise)


def assert_local_counts(folder: Path, step: int, windows: list[list[dict[str, torch.Tensor]]]) -> None:
    """The counts before averaging are those of each rank's sum over the micro-batches of a step, over all ranks."""
    own: dict[str, list[torch.Tensor]] = {}
    for window in windows:
        for name in window[0]:
            own.setdefault(name, []).append(sum(batch[name] for batch in window).flatten())
    for name, gradients in own.items():
        if torch.cat(gradients).any():
            logged = logged_counts(folder, f"gradient_local_magnitude/{name}", step)
            assert logged == expected_counts(torch.cat(gradients)), (folder, name, step)
    pooled = torch.cat([gradient for gradients in own.values() for gradient in gradients])
    assert logged_counts(folder, "gradient_local_magnitude/all", step) == expected_counts(pooled)


@pytest.mark.parametrize("ranks", RANKS[:1])
def test_all_ranks_end_with_the_same_values(tmp_path, ranks: int) -> None:
    found = run_ranks(calibrated, ranks, tmp_path)
    for case in ("probe", "record"):
        group, result, weights = found[0][case]
        for other in found[1:]:
            assert other[case][0] == group
            torch.testing.assert_close(other[case][2], weights, rtol=0, atol=0)
        assert result.effective_batch_size == {"probe": 4, "record": 512}[case] * ranks
    group, result, _ = found[0]["probe"]
    assert group["eps"] == result.epsilon < 1e-1
    assert group["lr"] == pytest.approx(1e-2 * result.ratio) and 1 <= result.ratio <= 2
    assert result.gradients == 8 * ranks
    group, result, _ = found[0]["record"]
    assert result.noise_source == "record" and result.reference_batch_size == 4 * ranks
    assert group["lr"] == pytest.approx(1e-2 * result.ratio)
    assert (group["alpha"], group["explore_beta"]) == (-5.0, 0.99)  # 1,024 samples and more


def test_a_hostile_record_ends_all_ranks_with_the_same_message(tmp_path) -> None:
    one, other = run_ranks(hostile_record, 2, tmp_path)
    assert one == other and "learning_rates must be from 0 to 1e+15, got -0.01" in one


def test_a_calibration_that_is_not_applied_is_invisible_on_two_ranks(tmp_path) -> None:
    found = run_ranks(invisible, 2, tmp_path)
    for rank in found:
        for case, (with_probe, without, gradients) in rank.items():
            assert gradients == 12
            _assert_equal(with_probe, without, case)


def _assert_equal(one: dict[str, Any], other: dict[str, Any], case: str) -> None:
    assert one["losses"] == other["losses"], case
    assert one["logged"] == other["logged"], case
    torch.testing.assert_close(one["weights"], other["weights"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer"], other["optimizer"], rtol=0, atol=0)
    assert torch.equal(one["rng"], other["rng"])


def test_a_rank_without_finite_gradients_stops_nothing(tmp_path) -> None:
    found = run_ranks(uneven, 2, tmp_path)
    (group, reasons, gradients, _), other = found
    assert other[0] == group and other[2] == gradients == 4
    assert any("4 of 8 batches of the probe gave a gradient that is not finite" in reason for reason in reasons)


def test_trainers_of_their_own_are_not_added_up(tmp_path) -> None:
    found = run_ranks(apart, 2, tmp_path)
    for rank, steps in enumerate(found):
        for step, gradients in enumerate(steps):
            pooled = torch.cat([gradient.flatten() for gradient in gradients.values()])
            assert logged_counts(tmp_path / str(rank), "gradient_magnitude/all", 4 * step) == expected_counts(pooled)


def test_ranks_that_differ_do_not_wait_for_each_other(tmp_path) -> None:
    found = run_ranks(out_of_step, 2, tmp_path)
    assert found[0] == found[1]
    gradients, problems = found[0]["uneven"]
    assert gradients == 0 and any("no probe" in problem for problem in problems)
    gradients, problems = found[0]["stream"]
    assert gradients == 0 and any("train_dataloader.dataset.source is a generator" in problem for problem in problems)
    gradients, problems = found[0]["fails"]
    assert gradients == 0 and any("no probe" in problem for problem in problems)
    assert found[0]["overflows"][0] == 16
    gradients, problems = found[0]["heavy"]
    assert gradients == 15 and any("1 of 16 batches of the probe ran out of memory" in problem for problem in problems)
    gradients, problems = found[0]["short"]
    assert gradients == 16 and not problems  # one batch of three, on one rank
    gradients, problems = found[0]["alike"]
    assert gradients == 8 and any(
        "8 of 16 batches of the probe had the same samples" in problem for problem in problems
    )
    gradients, problems = found[0]["no room"]
    assert gradients == 0 and any("no probe: to hold gradients raised OutOfMemory" in problem for problem in problems)
    assert "group_by gives other groups on other ranks" in found[0]["groups"]


@pytest.mark.parametrize("ranks", RANKS)
def test_an_error_in_measuring_on_one_rank_ends_the_probe_on_all(tmp_path, ranks: int) -> None:
    found = run_ranks(fails_in_measuring, ranks, tmp_path)
    assert all(one == found[0] for one in found)
    for problem, group, steps in found[0].values():
        assert "no probe: to hold gradients raised OutOfMemoryError" in problem
        assert (group["eps"], group["lr"], steps) == (1e-8, 1e-2, 2)


def test_ranks_whose_batches_differ_decide_the_same(tmp_path) -> None:
    one, other = run_ranks(unlike_batches, 2, tmp_path)
    assert one == other
    assert one["varies"][1] == 7.25 and one["time first"][1] is None


def test_ranks_that_are_told_to_stop_in_the_probe_end_with_the_batch(tmp_path) -> None:
    assert run_ranks(told_to_stop, 2, tmp_path) == [("SIGTERMException", "xx", None)] * 2


def test_a_rank_that_dies_ends_the_others_and_leaves_what_was_logged(tmp_path) -> None:
    codes = exit_codes(killed, 2, tmp_path)
    assert codes == [3, -signal.SIGKILL], "the other rank hangs, or ended otherwise"
    assert (tmp_path / "error.txt").read_text()
    assert [event.step for event in events(tmp_path).Histograms("gradient_magnitude/all")] == [0, 2, 4, 6]
    assert len(RunRecord.load(tmp_path / "calibration.json").optimizers[0].samples) == 4


def test_gradients_that_are_not_averaged_are_left_out_with_one_warning(tmp_path) -> None:
    found = run_ranks(not_averaged, 2, tmp_path)[0]
    for when, kind in (("before_clip", "gradient"), ("after_clip", "gradient_clipped"), ("local", "gradient_local")):
        said, noise = found[when]
        assert noise == []  # under a hook of one's own none is measured
        logged = [tag for tag in events(tmp_path / when).Tags()["histograms"] if tag == f"{kind}_magnitude/all"]
        assert bool(logged) == (when == "local")
        assert [("differ from rank to rank" in one) for one in said] == ([] if when == "local" else [True])


def test_the_same_samples_on_every_rank_tell_of_no_noise(tmp_path) -> None:
    assert run_ranks(streamed, 2, tmp_path)[0] == [0, 0, 4, 4, 8, 16]


def test_equal_samples_of_an_indexed_dataset_are_no_mistake_but_where_all_are(tmp_path) -> None:
    """Two batches are alike on both ranks at first; from the third on one is not, and what came before tells the rest."""
    assert run_ranks(dealt_out, 2, tmp_path)[0] == [(2, 14), (2, 14), (0, 8), (0, 8), (0, 8)]


def test_clipping_within_backward_or_after_it_is_not_taken_for_noise_of_ranks(tmp_path) -> None:
    assert run_ranks(clipped, 2, tmp_path)[0] == [pytest.approx(4, rel=0.1), 0, 16]


def test_a_step_that_one_rank_cannot_count_is_left_out_with_one_warning(tmp_path) -> None:
    found = run_ranks(short_of_memory, 2, tmp_path)[0]
    for case, tag in (
        ("count", "gradient_magnitude/all"),
        ("part", "gradient_magnitude/all"),
        ("copy", "gradient_local_magnitude/all"),
        ("state", "optimizer_second_moment/all"),
        ("table", "optimizer_second_moment/all"),
    ):
        said, nonzero = found[case]
        assert len(said) == 1 and "so that the step is left out" in said[0], (case, said)
        logged = events(tmp_path / case).Histograms(tag)
        assert [event.step for event in logged] == [0, 8], case
        if tag == "gradient_magnitude/all":
            assert logged[-1].histogram_value.num == nonzero  # no rank's part is missing


def test_an_optimizer_that_zero_spreads_is_known_by_what_it_spreads(tmp_path) -> None:
    for eps, result, noise in run_ranks(zero, 2, tmp_path):
        assert eps == result.epsilon < 1e-1 and not result.problems
        assert noise is not None and noise.value > 0
    tags = events(tmp_path).Tags()["scalars"]
    assert "optimizer_update_ratio/all" in tags and "optimizer_damped_share/all" not in tags
