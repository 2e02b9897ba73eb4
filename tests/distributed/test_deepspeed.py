"""DeepSpeed: in all stages of ZeRO every value is counted once, and what is logged is that of one process."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import re
import warnings
from typing import Any

import pytest
import torch
from ranks import run_ranks
from support import GradientSpy, assert_state_is_logged, events, expected_counts, logged_counts, logged_scalars

from lightning_gradhist import GradientHistogramMonitor
from lightning_gradhist.callbacks import _deepspeed

os.environ.setdefault("DS_ACCELERATOR", "cpu")
pytest.importorskip("deepspeed")

from deepspeed_jobs import STAGES, WAYS, alone, calibrated, invisible, modules, probed, refused, watched, ways

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
    return folder, spy.seen, monitor.noise_records[0].samples


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
    tags = [log.Tags()["scalars"] for log in both]
    assert tags[0] == tags[1]
    for tag in tags[0]:
        one, other = (logged_scalars(folder, tag) for folder in (found[0] / str(stage), single[0]))
        assert one == pytest.approx(other, rel=1e-4), tag


@stages
def test_the_noise_under_zero_is_that_of_one_process(found, single, stage: int) -> None:
    samples = found[1][0][stage]["samples"]
    assert len(samples) == len(single[2]) == 2
    for one, other in zip(samples, single[2], strict=True):
        numbers = {name: value for name, value in other.items() if value is not None and "adam" not in name}
        assert {name: one[name] for name in numbers} == pytest.approx(numbers, rel=1e-3)
        assert one.keys() == other.keys()
    # of a shard, the metric is without the mean square of the whole
    ratios = [last["noise_adam"] / last["signal_adam"] for last in (samples[1], single[2][1])]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.3)


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
        assert any("stage 3" in problem for problem in found["problems"]) == (stage == 3)
        assert len(found["layerwise"]) == 2  # of the monitor and of the calibration
        assert all("make it with layerwise=False" in refusal for refusal in found["layerwise"])
        model = json.loads((tmp_path / str(stage) / "first" / "calibration.json").read_text())["model"]
        assert model["body.0.weight"] == [7, 8] and model["scale"] == [1] and math.prod(model["frozen.weight"]) > 0


def test_a_probe_under_zero_leaves_no_trace_and_is_that_of_ddp(tmp_path) -> None:
    first, second = run_ranks(probed, 2, tmp_path)
    plain = first.pop("ddp")
    assert "do not accumulate" in first.pop("accumulated")[0]
    for way, found in first.items():
        for with_probe, without in (found["ends"], second[way]["ends"]):
            assert len(with_probe) == len(without) > 2
            assert all(torch.equal(one, other) for one, other in zip(with_probe, without, strict=True)), way
        result = found["result"]
        assert result.noise_source == "probe" and result.gradients == (14 if way == "noisy" else 16)
        assert result.noise_scale == second[way]["result"].noise_scale
        assert found["groups"] == [found["epsilon"]] * 2 == second[way]["groups"]
        if way != "noisy":
            tolerance = 1e-2 if "16" in way else 1e-5
            assert result.noise_scale.value == pytest.approx(plain.noise_scale.value, rel=tolerance)
            assert result.epsilon_range.lower == plain.epsilon_range.lower
            assert int(result.epsilon_range.histogram.total().sum()) == int(plain.epsilon_range.histogram.total().sum())


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("ways")
    return folder, run_ranks(ways, 2, folder)


@pytest.mark.parametrize("way", WAYS)
def test_steps_of_zero_are_counted_in_every_way(tried, way: str) -> None:
    folder, (found, other) = tried[0] / way, (rank[way] for rank in tried[1])
    (steps, skipped), gradients = found["steps"], found["gradients"]
    assert found["warned"] == other["warned"] == []
    assert steps == len(gradients) >= 5
    logged = [event.step for event in events(folder).Histograms("gradient_magnitude/all")]
    assert len(logged) == steps - skipped
    finite = [one for one in gradients if all(g.isfinite().all() for g in one.values())]
    assert len(finite) == len(logged)
    for position, gradient in enumerate(finite):
        counts = expected_counts(torch.cat([g.flatten() for g in gradient.values()]))
        event = events(folder).Histograms("gradient_magnitude/all")[position].histogram_value
        pairs = zip(event.bucket_limit, event.bucket, strict=True)
        assert counts == {round(limit, 9): count for limit, count in pairs if count}
    if "fp16" in way:
        assert skipped > 0
        assert list(logged_scalars(folder, "gradient_skipped_steps").values())[-1] == skipped
    if "clipped" in way:
        norms = logged_scalars(folder, "gradient_norm/all")
        factors = logged_scalars(folder, "gradient_clip_factor")
        assert factors == {step: pytest.approx(min(1.0, 0.1 / norm)) for step, norm in norms.items()}
    assert found["samples"] == other["samples"] and len(found["samples"]) >= 1
    assert logged_scalars(folder, "optimizer_update_ratio/all").keys() == set(logged)


def test_modules_of_every_kind_are_counted_under_zero(tmp_path) -> None:
    (found, _) = run_ranks(modules, 2, tmp_path)
    for kind, gradients in found.items():
        assert len(gradients) == 5 + kind.startswith("Manual"), kind
        for step, gradient in enumerate(gradients):
            for name in [name for name, values in gradient.items() if values.any()]:
                values = gradient[name]
                assert logged_counts(tmp_path / kind, f"gradient_magnitude/{name}", step) == expected_counts(values)
        if kind.startswith("Unused"):  # ZeRO steps it as if its gradient were zero
            assert set(logged_scalars(tmp_path / kind, "gradient_zero_share/unused.weight").values()) == {1.0}


def test_what_zero_does_not_have_is_refused(tmp_path) -> None:
    said, _ = run_ranks(refused, 2, tmp_path)
    assert "is off" in said["stage 0"] and "ZeRO in stages 1, 2 and 3" in said["stage 0"]
    assert "when='local'" in said["local"] and "when='before_clip'" in said["local"]
    assert "when='after_clip'" in said["after_clip"] and "use when='before_clip'" in said["after_clip"]


def test_deepspeed_has_the_names_that_are_read_of_it() -> None:
    from deepspeed.runtime import base_optimizer, engine
    from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
    from deepspeed.utils import mixed_precision_linkage, tensor_fragment

    modules = (
        base_optimizer,
        engine,
        partition_parameters,
        stage3,
        stage_1_and_2,
        mixed_precision_linkage,
        tensor_fragment,
    )
    theirs = "\n".join(inspect.getsource(module) for module in modules)
    ours = ast.walk(ast.parse(inspect.getsource(_deepspeed)))
    owners = {"optimizer", "parameter", "mapping", "address", "p"}
    read = {n.attr for n in ours if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") in owners}
    asked = re.findall(r"getattr\(\w+, \"(\w+)\"", inspect.getsource(_deepspeed))
    assert len(read) > 15 and len(asked) > 3
    assert [
        name for name in sorted({*read, *asked} - {"shape", "new_empty"}) if not re.search(rf"\b{name}\b", theirs)
    ] == []
    assert stage_1_and_2.DeepSpeedZeroOptimizer.__name__ in _deepspeed._ZERO
    assert stage3.DeepSpeedZeroOptimizer_Stage3.__name__ in _deepspeed._ZERO
