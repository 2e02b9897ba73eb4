"""The record of a run: whole or not at all, and refused with a reason."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_gradhist.noise import NoiseRecord
from lightning_gradhist.noise.interval import NoiseEstimate
from lightning_gradhist.noise.run_record import (
    FILE_NAME,
    SCHEMA_VERSION,
    OptimizerRecord,
    RecordError,
    RunLength,
    RunRecord,
    path_in,
)


def record() -> RunRecord:
    samples = NoiseRecord()
    samples.add(0, 64, torch.tensor([1.5, 0.25, math.nan, math.inf], dtype=torch.float64))
    samples.add(50, 64, torch.tensor([1e-30, 1 / 3, 2.0, -1e30], dtype=torch.float64))
    noise = {
        "simple": NoiseEstimate(316.25, 200.0, math.inf, 0.95, 12),
        "adam": NoiseEstimate(math.inf, 0.0, math.inf, 0.95, 0),
    }
    adam = OptimizerRecord("AdamW", [1e-3, 0.1 + 0.2], 64, noise, samples.samples)
    return RunRecord(
        {"layer.weight": [3, 4], "layer.bias": [3], "scale é": []}, 1234, [adam, replace(adam, name="SGD")]
    )


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / FILE_NAME
    record().save(path)
    assert RunRecord.load(path) == record() == RunRecord.load(str(path))
    assert os.listdir(path.parent) == [FILE_NAME]


def test_the_length_of_the_run_is_kept(tmp_path: Path) -> None:
    known = RunLength(planned=400, warm_up=20, schedule=[0.1, 1.0, 0.5])
    run = replace(record(), optimizers=[replace(entry, length=known) for entry in record().optimizers])
    run.save(tmp_path / FILE_NAME)
    assert RunRecord.load(tmp_path / FILE_NAME) == run
    assert known.rises is False and replace(known, warm_up=400).rises and not RunLength().rises


def test_a_directory_has_a_file_for_each_run(tmp_path) -> None:
    older, one, other = (replace(record(), run=run) for run in ("", "one", "other"))
    names = [Path(each.save_in(str(tmp_path))).name for each in (older, one, other, one, older)]
    assert names == [FILE_NAME, "calibration-1.json", "calibration-2.json", "calibration-1.json", "calibration-3.json"]
    assert RunRecord.load(tmp_path / names[2]) == other


def test_a_record_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        record().save_in(str(tmp_path))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("length", [..., {}, {"planned": None, "warm_up": None, "schedule": []}])
def test_a_record_of_an_older_release_knows_no_length(tmp_path: Path, length: Any) -> None:
    entry = OPTIMIZER if length is ... else {**OPTIMIZER, "length": length}
    (tmp_path / FILE_NAME).write_text(edited(optimizers=[entry]))
    assert RunRecord.load(tmp_path / FILE_NAME).optimizers[0].length == RunLength()


@pytest.mark.parametrize("length", [3, {"planned": "many"}, {"warm_up": -1}, {"schedule": [None]}, {"schedule": 1}])
def test_a_length_that_is_none_is_refused(tmp_path: Path, length: Any) -> None:
    (tmp_path / FILE_NAME).write_text(edited(optimizers=[{**OPTIMIZER, "length": length}]))
    with pytest.raises(RecordError, match="is not whole"):
        RunRecord.load(tmp_path / FILE_NAME)


@pytest.mark.parametrize(
    ("other", "kept"),
    [
        pytest.param({"learning_rates": []}, ["SGD", "Adam"], id="no rate"),
        pytest.param({"learning_rates": [0.0]}, ["SGD", "Adam"], id="a rate of zero"),
        pytest.param({"learning_rates": [], "batch_size": 0}, ["Adam"], id="no step"),
    ],
)
def test_an_optimizer_that_is_of_little_use_does_not_spoil_the_others(tmp_path: Path, other: Any, kept: Any) -> None:
    (tmp_path / FILE_NAME).write_text(edited(optimizers=[{**OPTIMIZER, "name": "SGD", **other}, OPTIMIZER]))
    assert [entry.name for entry in RunRecord.load(tmp_path / FILE_NAME).optimizers] == kept


def test_an_empty_record(tmp_path: Path) -> None:
    RunRecord({}, 0, []).save(tmp_path / FILE_NAME)
    with pytest.raises(RecordError, match="holds no optimizer with a batch size"):
        RunRecord.load(tmp_path / FILE_NAME)


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    def refuse(token: str) -> Any:
        raise AssertionError(f"{token} is no JSON")

    record().save(tmp_path / FILE_NAME)
    content = json.loads((tmp_path / FILE_NAME).read_text(encoding="utf-8"), parse_constant=refuse)
    assert content["schema_version"] == SCHEMA_VERSION
    assert content["optimizers"][0]["noise"]["simple"]["upper"] is None
    assert content["optimizers"][0]["samples"][0]["noise_adam"] is None


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


def half_written(self: Path, text: str, encoding: str) -> None:
    with open(self, "w", encoding=encoding) as file:
        file.write(text[: len(text) // 2])
    no_space()


@pytest.mark.parametrize(
    ("target", "name", "stand_in"),
    [
        pytest.param(os, "replace", no_space, id="on-replacing"),
        pytest.param(Path, "write_text", half_written, id="half-way"),
        pytest.param(json, "dumps", no_space, id="before-writing"),
    ],
)
def test_an_error_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str, stand_in: Any
) -> None:
    path = tmp_path / FILE_NAME
    record().save(path)
    before = path.read_bytes()
    monkeypatch.setattr(target, name, stand_in)
    with pytest.raises(OSError, match="No space"):
        replace(record(), steps=9999).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [FILE_NAME]


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    record().save(path)
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        replace(record(), steps=torch.tensor(3)).save(path)  # type: ignore[arg-type]
    assert RunRecord.load(path) == record() and os.listdir(tmp_path) == [FILE_NAME]


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    record().save(path)
    whole = path.read_bytes()
    assert whole.endswith(b"}\n")
    for length in [*range(0, len(whole) - 2, 7), len(whole) - 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(RecordError, match=r"cannot be read, it may be truncated"):
            RunRecord.load(path)


def edited(**changes: Any) -> str:
    content = {"schema_version": SCHEMA_VERSION, "model": {"w": [1]}, "steps": 3, "optimizers": []}
    return json.dumps({key: value for key, value in {**content, **changes}.items() if value is not ...})


ESTIMATE = {"value": 1, "lower": 0, "upper": None, "confidence": 0.95, "measurements": 4}
OPTIMIZER = {"name": "Adam", "learning_rates": [0.1], "batch_size": 8, "noise": {"adam": ESTIMATE}, "samples": []}


def test_the_smallest_legal_record(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(edited(optimizers=[OPTIMIZER]))
    (found,) = RunRecord.load(tmp_path / FILE_NAME).optimizers
    assert found.noise["adam"] == NoiseEstimate(1.0, 0.0, math.inf, 0.95, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(None, "does not exist; a run with GradientHistogramMonitor leaves calibration.json", id="missing"),
        pytest.param("", "cannot be read, it may be truncated", id="empty"),
        pytest.param("\udcff", "cannot be read", id="not-utf-8"),
        pytest.param("[1, 2]", "schema version None, and this release reads 1; record the run again", id="list"),
        pytest.param("3", "schema version None", id="number"),
        pytest.param("{}", "schema version None", id="no-version"),
        pytest.param(edited(schema_version=2), "schema version 2, and this release reads 1", id="later-version"),
        pytest.param(edited(schema_version="1"), "schema version '1'", id="version-as-text"),
        pytest.param(edited(model=...), "is not whole: KeyError.'model'", id="no-model"),
        pytest.param(edited(model=[1]), "is not whole", id="model-is-a-list"),
        pytest.param(edited(model={"w": 3}), "is not whole", id="shape-is-a-number"),
        pytest.param(edited(steps="many"), "is not whole: ValueError", id="steps"),
        pytest.param(edited(steps=-1), "steps must be from 0 to 1e.15, got -1", id="steps-negative"),
        pytest.param(edited(steps=True), "steps must be a number, got True", id="steps-bool"),
        pytest.param(edited(steps=10**400), "steps must be from 0 to", id="steps-huge"),
        *[
            pytest.param(edited(optimizers=[{**OPTIMIZER, "learning_rates": rates}]), message, id=f"rates-{rates}"[:20])
            for rates, message in [
                ([-0.01], "learning_rates must be from 0"),
                ([math.nan], "learning_rates must be from 0"),
                ([0.1, math.inf], "learning_rates must be from 0"),
                ([1e300], "learning_rates must be from 0"),
                ([10**400], "learning_rates must be from 0"),
                (["0.1"], "learning_rates must be a number, got '0.1'"),
                ([True], "learning_rates must be a number, got True"),
            ]
        ],
        *[
            pytest.param(edited(optimizers=[{**OPTIMIZER, "batch_size": size}]), message, id=f"batch-{size}"[:20])
            for size, message in [
                (math.inf, "batch_size must be from 0"),
                (math.nan, "batch_size must be from 0"),
                (-8, "batch_size must be from 0"),
                (1e-300, "holds no optimizer with a batch size"),
                (10**400, "batch_size must be from 0"),
                ("8", "batch_size must be a number"),
            ]
        ],
        *[
            pytest.param(
                edited(optimizers=[{**OPTIMIZER, "noise": {"adam": {**ESTIMATE, **wrong}}}]),
                message,
                id=f"noise-{wrong}",
            )
            for wrong, message in [
                ({"value": -1}, "value must be from 0"),
                ({"lower": 9, "upper": 8}, "the interval of a noise scale must be in order"),
                ({"value": 1, "lower": 2}, "in order, with the value in it"),
                ({"confidence": 95}, "the interval of a noise scale must be in order"),
                ({"measurements": None}, "is not whole"),
            ]
        ],
        pytest.param(edited(optimizers=None), "is not whole", id="no-optimizers"),
        pytest.param(edited(optimizers=[3]), "is not whole", id="optimizer-is-a-number"),
        pytest.param(edited(optimizers=[{**OPTIMIZER, "more": 1}]), "is not whole", id="unknown-key"),
        pytest.param(edited(optimizers=[{**OPTIMIZER, "batch_size": "many"}]), "is not whole", id="batch-size"),
        pytest.param(edited(optimizers=[{**OPTIMIZER, "learning_rates": [None]}]), "is not whole", id="rate"),
        pytest.param(edited(optimizers=[{**OPTIMIZER, "noise": {"adam": {}}}]), "is not whole", id="empty-noise"),
        pytest.param(
            edited(optimizers=[{**OPTIMIZER, "noise": {"adam": {**ESTIMATE, "value": "large"}}}]),
            "is not whole",
            id="noise-as-text",
        ),
    ],
)
def test_refusals(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / FILE_NAME
    if text is not None:
        path.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    with pytest.raises(RecordError, match=message) as caught:
        RunRecord.load(path)
    assert repr(str(path)) in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(RecordError, match="it is no regular file"):
        RunRecord.load(tmp_path / FILE_NAME)


def test_what_a_killed_process_left_is_gone_after_the_next_save(tmp_path: Path) -> None:
    (tmp_path / f".{FILE_NAME}.12345").write_text("{")
    record().save(tmp_path / FILE_NAME)
    assert os.listdir(tmp_path) == [FILE_NAME]


def test_a_url_is_written_and_read_through_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    url = path_in("memory://bucket/deep/logs/")
    record().save(url)
    assert RunRecord.load(url) == record() and not os.listdir(tmp_path)
    with pytest.raises(RecordError, match="'memory://bucket/none.json' does not exist"):
        RunRecord.load("memory://bucket/none.json")
    with pytest.raises(RecordError, match="'nosuch://bucket/none.json' cannot be read"):
        RunRecord.load("nosuch://bucket/none.json")


def entry(name: str, *parameters: str) -> OptimizerRecord:
    return OptimizerRecord(name, [0.1], 8, {}, [], list(parameters))


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        pytest.param([entry("SGD")], 0, id="the-only-one-though-of-another-class"),
        pytest.param([entry("Adam", "g"), entry("Adam", "d")], 1, id="by-parameters"),
        pytest.param([entry("Adam", "g"), entry("SGD", "d")], 1, id="by-parameters-of-another-class"),
        pytest.param([entry("SGD"), entry("Adam")], 1, id="by-class-in-an-older-record"),
        pytest.param([entry("Adam"), entry("Adam")], None, id="both-may-be-meant"),
        pytest.param([entry("Adam", "g")], None, id="of-other-parameters"),
        pytest.param([entry("Adam", "g"), entry("Adam", "d", "frozen")], 1, id="of-more-parameters"),
        pytest.param([entry("Adam", "d", "late"), entry("Adam", "d")], 1, id="of-the-same-before-more"),
        pytest.param([entry("SGD"), entry("RMSprop")], None, id="of-other-classes"),
    ],
)
def test_a_record_of_several_optimizers_is_used_for_the_one_that_fits(
    entries: list[OptimizerRecord], found: int | None
) -> None:
    run = RunRecord({}, 1, entries)
    if found is not None:
        assert run.of_optimizer("Adam", ["d"]) is entries[found]
        return
    with pytest.raises(RecordError, match="optimizers that fit Adam of 1 parameters; it has"):
        run.of_optimizer("Adam", ["d"])


def test_a_folder_is_no_record(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"is a directory; pass the calibration\.json in it"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param({"w": [3, 4]}, r"'b' has shape \[3\] in the record and none", id="fewer"),
        pytest.param({"w": [3, 4], "b": [4]}, r"'b' has shape \[3\] in the record and \[4\]", id="shape"),
        pytest.param({"w": [3, 4], "b": [3], "c": []}, r"'c' has shape none in the record and \[\]", id="more"),
        pytest.param({}, "record is of another model", id="empty"),
    ],
)
def test_another_model_is_refused(model: dict[str, list[int]], message: str) -> None:
    with pytest.raises(RecordError, match=message):
        RunRecord({"w": [3, 4], "b": [3]}, 1, []).check_model(model)


def test_the_same_model_is_not() -> None:
    record = RunRecord({"w": [3, 4], "b": [3]}, 1, [])
    record.check_model({"b": [3], "w": [3, 4]})
    record.check_model({"b": None, "w": [3, 4], "backbone": [5]}, frozen=["w", "backbone"])
