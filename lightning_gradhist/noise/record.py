"""The record of a run, ``calibration.json``: what the next run, at another batch size, is calibrated from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_gradhist.noise.interval import NoiseEstimate

FILE_NAME = "calibration.json"
SCHEMA_VERSION = 1


class RecordError(ValueError):
    """A record cannot be used; the message says which, why, and the way out."""


@dataclass(frozen=True)
class OptimizerRecord:
    """What a run found for one optimizer.

    Attributes:
        name: class of the optimizer.
        learning_rates: base learning rate of each parameter group.
        batch_size: samples of an optimizer step.
        noise: noise scale over the run by metric, ``"simple"`` and ``"adam"``.
        samples: the measurements behind it, see :class:`lightning_gradhist.noise.NoiseRecord`.
    """

    name: str
    learning_rates: list[float]
    batch_size: float
    noise: dict[str, NoiseEstimate]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class RunRecord:
    """The record of a run.

    Attributes:
        model: names and shapes of the trained parameters; a record is of use for the same model only.
        steps: optimizer steps that the run had made.
        optimizers: one entry an optimizer.
    """

    model: dict[str, list[int]]
    steps: int
    optimizers: list[OptimizerRecord]

    def save(self, path: str | Path) -> None:
        """Writes the record whole or not at all: to a file beside it, which then takes its place."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Reads a record.

        Raises:
            RecordError: where the file is missing, is no whole record, or has another schema version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecordError(
                f"the record {str(path)!r} does not exist; a run with GradientHistogramMonitor leaves {FILE_NAME} in its"
                " log directory"
            ) from None
        except IsADirectoryError:
            raise RecordError(f"the record {str(path)!r} is a directory; pass the {FILE_NAME} in it") from None
        except (OSError, ValueError) as error:
            raise RecordError(
                f"the record {str(path)!r} cannot be read, it may be truncated or no {FILE_NAME}: {error}"
            ) from error
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise RecordError(
                f"the record {str(path)!r} has schema version {version!r}, and this release reads {SCHEMA_VERSION};"
                " record the run again with this release"
            )
        try:
            record = cls(
                model={str(name): list(shape) for name, shape in content["model"].items()},
                steps=int(content["steps"]),
                optimizers=[_optimizer_record(entry) for entry in content["optimizers"]],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise RecordError(f"the record {str(path)!r} is not whole: {error!r}") from error
        if not record.optimizers or not all(entry.batch_size > 0 for entry in record.optimizers):
            raise RecordError(f"the record {str(path)!r} holds no optimizer with a batch size; record the run again")
        return record

    def check_model(self, model: Mapping[str, list[int]]) -> None:
        """Refuses a record of another model.

        Args:
            model: names and shapes of the parameters that are to be trained.

        Raises:
            RecordError: naming the first parameter that differs.
        """
        for name in [*self.model, *model]:
            recorded, present = self.model.get(name), model.get(name)
            if recorded != present:
                raise RecordError(
                    f"the record is of another model: parameter {name!r} has shape {recorded} in the record and {present}"
                    " in this model (None: not there); record a run of this model"
                )


def _optimizer_record(entry: dict[str, Any]) -> OptimizerRecord:
    noise = {metric: _noise_estimate(estimate) for metric, estimate in entry["noise"].items()}
    numbers = {
        "learning_rates": [float(rate) for rate in entry["learning_rates"]],
        "batch_size": float(entry["batch_size"]),
    }
    return OptimizerRecord(**{**entry, **numbers, "noise": noise})


def _noise_estimate(entry: dict[str, Any]) -> NoiseEstimate:
    bounded: dict[str, Any] = {key: math.inf if value is None else float(value) for key, value in entry.items()}
    return NoiseEstimate(**{**bounded, "measurements": int(entry["measurements"])})


def _finite(content: Any) -> Any:
    # JSON has no infinity; an unbounded estimate is written as null.
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
