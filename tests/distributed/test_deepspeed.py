"""DeepSpeed: in all stages of ZeRO every value is counted once, and what is logged is that of one process."""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import pytest
import torch
from ranks import run_ranks
from support import GradientSpy, assert_state_is_logged, events, expected_counts, logged_counts, logged_scalars

from lightning_gradhist import GradientHistogramMonitor

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

from deepspeed_jobs import STAGES, alone, calibrated, invisible, watched

stages = pytest.mark.parametrize("stage", STAGES)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, run_ranks(watched, 2, folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Any:
    folder, spy = tmp_path_factory.mktemp("alone"), GradientSpy()
    monitor = GradientHistogramMonitor(every_n_steps=2, optimizer_state=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an epsilon that is large on purpose
        alone(folder, monitor, spy)
    return folder, spy.seen


@stages
def test_every_value_is_counted_once_in_every_stage_of_zero(found, single, stage: int) -> None:
    folder, ranks = found
    for step in (0, 2, 4):
        gradients = ranks[0][stage]["gradients"][step]
        assert gradients.keys() == single[1][step].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, single[1][step][name], rtol=1e-4, atol=1e-6)
            assert logged_counts(folder / str(stage), f"gradient_magnitude/{name}", step) == expected_counts(gradient)
        pooled = torch.cat([gradient.flatten() for gradient in gradients.values()])
        assert logged_counts(folder / str(stage), "gradient_magnitude/all", step) == expected_counts(pooled)


@stages
def test_what_zero_logs_is_what_one_process_logs(found, single, stage: int) -> None:
    both = events(found[0] / str(stage)), events(single[0])
    tags = [log.Tags()["histograms"] for log in both]
    assert tags[0] == tags[1]
    for tag in tags[0]:
        for step in (0, 2, 4):
            assert logged_counts(found[0] / str(stage), tag, step) == logged_counts(single[0], tag, step), (tag, step)
    tags = [{tag for tag in log.Tags()["scalars"] if not tag.startswith("noise_scale/")} for log in both]
    assert tags[0] == tags[1]
    for tag in tags[0]:
        one, other = (logged_scalars(folder, tag) for folder in (found[0] / str(stage), single[0]))
        assert one == pytest.approx(other, rel=1e-4), tag


@stages
def test_ranks_of_zero_ask_for_the_same_sums(found, stage: int) -> None:
    first, second = (rank[stage] for rank in found[1])
    assert first["collectives"] == second["collectives"]
    assert first["samples"] == second["samples"]


@stages
def test_the_state_of_zero_is_seen_through_its_parts(found, stage: int) -> None:
    assert_state_is_logged(found[0] / str(stage), found[1][0][stage]["state"], [0, 2, 4], eps=1e-3)


def test_the_monitor_changes_no_bit_under_zero(tmp_path) -> None:
    for rank in run_ranks(invisible, 2, tmp_path):
        for stage in STAGES:
            with_it, without = rank[stage]
            assert len(with_it) == len(without) > 2
            for one, other in zip(with_it, without, strict=True):
                assert torch.equal(one, other), stage


def test_the_rate_is_calibrated_from_a_record_of_zero(tmp_path) -> None:
    first, second = run_ranks(calibrated, 2, tmp_path)
    for stage in STAGES:
        found = first[stage]
        assert {**second[stage], "layerwise": found["layerwise"]} == found  # of which rank zero tells alone
        assert found["ratio"] == pytest.approx(2.0)  # the square root of four times the batch
        assert found["groups"] == [{"lr": pytest.approx(2e-2 * 0.5**3), "eps": 1e-7}] * 2
        before, after = found["rates"]
        assert len(before) > 2 and after == [pytest.approx([2 * rate for rate in rates]) for rates in before]
        assert any("DeepSpeedStrategy" in problem and "from a record" in problem for problem in found["problems"])
        (refusal,) = found["layerwise"]
        assert "ALTO(layerwise=True)" in refusal and "make it with layerwise=False" in refusal
        model = json.loads((tmp_path / str(stage) / "first" / "calibration.json").read_text())["model"]
        assert model["body.0.weight"] == [7, 8] and model["scale"] == [1] and "frozen.weight" not in model
