"""Runs with the real W&B, MLflow and Comet, offline, where they are installed, and what they then hold."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CometLogger, MLFlowLogger, WandbLogger
from support import Net, fit

from lightning_gradhist import GradientHistogramMonitor, OptimizerCalibration
from lightning_gradhist.logging.sinks import CometSink, MLflowSink, WandbSink, sink_of

pytestmark = pytest.mark.filterwarnings("default")  # theirs
STEPS = [0, 4, 8, 12]
DRAWN = [12]


def run(folder: Path, logger: Any, kind: type, recwarn: pytest.WarningsRecorder) -> None:
    sink = sink_of(logger)
    assert type(sink) is kind and sink.shows_figures
    fit(folder, GradientHistogramMonitor(every_n_steps=4, noise_scale=False), logger=logger, log_every_n_steps=1)
    assert not [str(warning.message) for warning in recwarn if "GradientHistogramMonitor" in str(warning.message)]


def test_wandb(tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(project="test", save_dir=tmp_path, offline=True)
    run(tmp_path, logger, WandbSink, recwarn)
    last = logger.experiment.summary._as_dict()
    histogram = last["gradient_magnitude/all"]
    assert histogram["_type"] == "histogram" and len(histogram["bins"]) == len(histogram["values"]) + 1 <= 513
    assert 200 < sum(histogram["values"]) <= 227  # of all parameters, those that are not zero
    assert 0 < last["gradient_norm/head.weight"] < 10 and last["train_loss"] > 0
    assert "<pre>| layer |" in next(tmp_path.rglob("gradient_worst_layers*.html")).read_text()
    assert len(list(tmp_path.rglob("gradient_magnitude_by_layer*.png"))) == len(DRAWN)
    wandb.finish()


def test_the_probe_writes_nothing_of_what_wandb_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    module, logger, written = Net(), WandbLogger(project="test", save_dir=tmp_path, offline=True), []
    monkeypatch.setattr(type(logger.experiment), "_log", lambda run, data, **options: written.extend(data))
    logger.watch(module, log="gradients", log_freq=1)
    calibration = OptimizerCalibration(epsilon="auto", apply=False, probe_batches=8)
    fit(tmp_path, calibration, module=module, logger=logger, max_steps=2)
    assert calibration.result.gradients == 8
    assert len([name for name in written if name.startswith("gradients/head.bias")]) == 2
    wandb.finish()


def test_mlflow(tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger("test", tracking_uri=f"file:{tmp_path / 'mlruns'}")
    run(tmp_path, logger, MLflowSink, recwarn)
    client, of_run = logger.experiment, logger.run_id
    for tag in ("gradient_norm/head.weight", "gradient_magnitude_p01/all", "gradient_fp8_e5m2_loss_share/all"):
        assert [metric.step for metric in client.get_metric_history(of_run, tag)] == STEPS
    assert len(client.get_metric_history(of_run, "train_loss")) == 16  # the training thread's own
    for tag, kind in (("gradient_magnitude_by_layer", "png"), ("gradient_worst_layers", "md")):
        files = {artifact.path for artifact in client.list_artifacts(of_run, tag)}
        assert files == {f"{tag}/step_{step}.{kind}" for step in DRAWN}


def test_comet(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    comet_ml = pytest.importorskip("comet_ml")
    logger = CometLogger(online=False, offline_directory=str(tmp_path), project="test")
    # Lightning disables an experiment that is not online.
    logger._experiment = comet_ml.OfflineExperiment(offline_directory=str(tmp_path), project_name="test")
    run(tmp_path, logger, CometSink, recwarn)
    logger.experiment.end()
    (archive,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(archive) as opened:
        messages = [json.loads(line) for line in opened.read("messages.json").decode().splitlines()]
    metrics = [message["payload"]["metric"] for message in messages if message["type"] == "metric_msg"]
    for tag in ("gradient_norm/head.weight", "gradient_magnitude_p99/all"):
        assert [metric["step"] for metric in metrics if metric["metricName"] == tag] == STEPS
    uploads = [message["payload"] for message in messages if message["type"] == "file_upload"]
    for kind in ("visualization", "text-sample"):
        steps = [upload["additional_params"]["step"] for upload in uploads if upload["upload_type"] == kind]
        assert steps == DRAWN
