"""The record of a run, ``calibration.json``: what the next run, at another batch size, is calibrated from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from lightning_gradhist.explore import is_number
from lightning_gradhist.noise.interval import NoiseEstimate

FILE_NAME = "calibration.json"
SCHEMA_VERSION = 1
_LARGEST = 1e15  # beyond any number of steps or samples, and any learning rate; only a noise scale may be larger


class RecordError(ValueError):
    """A record cannot be used; the message says which, why, and the way out."""


@dataclass(frozen=True)
class RunLength:
    """How long a run was planned to be, and how its learning rate was to go.

    Attributes:
        planned: optimizer steps; None where nobody knew, as of an endless loader without ``max_steps``.
        warm_up: steps before the learning rate is first at its highest, 0 without a schedule; None where not known.
        schedule: the learning rate at 0, 1/16, ... and 1 of the run as a share of its highest; empty where not known.
        made: steps that this optimizer has made; None in records of older releases.
    """

    planned: int | None = None
    warm_up: int | None = None
    schedule: list[float] = field(default_factory=list)
    made: int | None = None

    @property
    def rises(self) -> bool:
        """Whether the learning rate is first at its highest when the run is over: its warm-up is as long, or longer."""
        return bool(self.planned and self.warm_up == self.planned)

    @property
    def first_share(self) -> float | None:
        """The learning rate of the first step as a share of the highest; None where not known."""
        return self.schedule[0] if self.schedule else None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> RunLength:
        """The inverse of ``asdict``; what lacks is not known, and what is no number from 0 up raises ``ValueError``."""
        steps = {key: entry.get(key) for key in ("planned", "warm_up", "made")}
        known = {key: None if value is None else int(_number(key, value)) for key, value in steps.items()}
        return cls(**known, schedule=[_number("schedule", share) for share in entry.get("schedule", ())])


@dataclass(frozen=True)
class OptimizerRecord:
    """What a run found for one optimizer.

    Attributes:
        name: class of the optimizer.
        learning_rates: base learning rate of each parameter group.
        batch_size: samples of an optimizer step.
        noise: noise scale over the run by metric, ``"simple"`` and ``"adam"``.
        samples: the measurements behind it, see :class:`lightning_gradhist.noise.NoiseRecord`.
        parameters: names of its parameters; empty in records that do not know them.
        length: of its run, and its schedule; in records of older releases nothing is known of them.
    """

    name: str
    learning_rates: list[float]
    batch_size: float
    noise: dict[str, NoiseEstimate]
    samples: list[dict[str, Any]]
    parameters: list[str] = field(default_factory=list)
    length: RunLength = field(default_factory=RunLength)


@dataclass(frozen=True)
class RunRecord:
    """The record of a run.

    Attributes:
        model: names and shapes of the parameters, None where it has none yet; a record is of use for the same model only.
            Those of older releases have the trained ones alone.
        steps: optimizer steps that the run had made, of all optimizers together.
        optimizers: one entry an optimizer.
        run: what tells the run from others; empty in records of older releases.
    """

    model: dict[str, list[int] | None]
    steps: int
    optimizers: list[OptimizerRecord]
    run: str = ""

    def save(self, path: str | Path) -> None:
        """Writes the record whole or not at all: to a file beside it, which then takes its place.

        Args:
            path: of a file, whose folder is made, or a URL that fsspec knows (``s3://``, ``gs://``, ``memory://``).
        """
        content = finite({"schema_version": SCHEMA_VERSION, **asdict(self)})
        text = json.dumps(content, indent=1, allow_nan=False) + "\n"
        if is_url(path):
            filesystem, place = _file_system(str(path))
            filesystem.makedirs(place.rpartition("/")[0], exist_ok=True)
            with filesystem.open(place, "wb") as file:  # object stores show a file when it is closed, whole
                file.write(text.encode())
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed meanwhile
            left.unlink(missing_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    def save_in(self, directory: str) -> str:
        """Writes the record as ``calibration.json`` or ``calibration-1.json``, ...: the first that is no other run's.

        At a URL, where a file can seldom be made in one step with the question for it, two runs may get the same one within
        an instant.

        Returns:
            Its path.
        """
        names = (FILE_NAME if i == 0 else FILE_NAME.replace(".", f"-{i}.") for i in count())
        paths = (path_in(directory, name) for name in names)
        path = next(path for path in paths if _is_new(path) or (self.run and _run_of(path) == self.run))
        try:
            self.save(path)
        except BaseException:
            with suppress(OSError):
                if not is_url(path) and not os.path.getsize(path):
                    os.unlink(path)
            raise
        return path

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Reads a record.

        Args:
            path: as for :meth:`save`.

        Raises:
            RecordError: for a file that is missing, is no whole record, is of another version, or has illegal numbers.
        """
        try:
            content = json.loads(_text(path))
        except FileNotFoundError:
            raise RecordError(
                f"the record {str(path)!r} does not exist; a run with GradientHistogramMonitor leaves {FILE_NAME} in its"
                " log directory"
            ) from None
        except IsADirectoryError:
            raise RecordError(f"the record {str(path)!r} is a directory; pass the {FILE_NAME} in it") from None
        except Exception as error:  # of the file, of the text, or of a file system behind a URL
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
            entries = [_optimizer_record(entry) for entry in content["optimizers"]]
            record = cls(
                run=str(content.get("run", "")),
                model={str(name): None if s is None else list(s) for name, s in content["model"].items()},
                steps=int(_number("steps", content["steps"])),
                optimizers=[entry for entry in entries if entry.batch_size >= 1],  # others have measured nothing
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise RecordError(f"the record {str(path)!r} is not whole: {error!r}") from error
        if not record.optimizers:
            raise RecordError(f"the record {str(path)!r} holds no optimizer with a batch size; record the run again")
        return record

    def of_optimizer(self, name: str, parameters: Collection[str]) -> OptimizerRecord:
        """The entry of an optimizer, by the names of its parameters, of several that have them by its class.

        Where none has the same ones, as the run has frozen some, it is one that has some more, or some less.

        Raises:
            RecordError: where none fits, or more than one.
        """
        asked = {*parameters}
        fitting = [entry for entry in self.optimizers if not entry.parameters or {*entry.parameters} == asked]
        if not fitting:
            fitting = [e for e in self.optimizers if asked <= {*e.parameters} or {*e.parameters} <= asked]
        if len(fitting) > 1:
            fitting = [entry for entry in fitting if entry.name == name]
        if len(fitting) != 1:
            there = ", ".join(f"{e.name} of {len(e.parameters) or 'unknown'} parameters" for e in self.optimizers)
            raise RecordError(
                f"the record has {len(fitting) or 'no'} optimizers that fit {name} of {len(parameters)} parameters; it has"
                f" {there}; record a run with this optimizer"
            )
        return fitting[0]

    def check_model(self, model: Mapping[str, list[int] | None], frozen: Collection[str] = ()) -> None:
        """Refuses a record of another model than that with these names and shapes: a ``RecordError`` names what differs.

        Those that are ``frozen`` may lack in it, as in records of older releases.
        """
        for name in [*self.model, *(name for name in model if name not in frozen)]:
            recorded, present = self.model.get(name, "none"), model.get(name, "none")
            if recorded != present and None not in (recorded, present):
                raise RecordError(
                    f"the record is of another model: parameter {name!r} has shape {recorded} in the record and {present}"
                    " in this model (none: not there, or frozen when an older release recorded it); record a run of this model"
                )


def _is_new(path: str) -> bool:
    if is_url(path):
        filesystem, place = _file_system(path)
        return not filesystem.exists(place)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(FileExistsError):
        Path(path).open("x").close()
        return True
    return False


def _run_of(path: str) -> str | None:
    """The run that a record is of; None of what cannot be read."""
    with suppress(Exception):
        return str(json.loads(_text(path)).get("run", ""))
    return None


def path_in(directory: str, name: str = FILE_NAME) -> str:
    """The path of a file in a directory, which may be a URL."""
    return f"{directory.rstrip('/')}/{name}" if is_url(directory) else str(Path(directory) / name)


def is_url(path: str | Path) -> bool:
    """Whether a path is one of fsspec's, as ``s3://...``."""
    return "://" in str(path)


def _file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    from fsspec.core import url_to_fs  # type: ignore[import-untyped]

    filesystem, path = url_to_fs(url)
    return filesystem, path


def _text(path: str | Path) -> str:
    if is_url(path):
        filesystem, place = _file_system(str(path))
        return bytes(filesystem.cat_file(place)).decode()
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError("it is no regular file")  # to open a pipe would wait for somebody who writes
    return path.read_text(encoding="utf-8")


def _optimizer_record(entry: dict[str, Any]) -> OptimizerRecord:
    noise = {metric: _noise_estimate(estimate) for metric, estimate in entry["noise"].items()}
    rates = [_number("learning_rates", rate) for rate in entry["learning_rates"]]
    batch_size = _number("batch_size", entry["batch_size"])
    parameters = [str(name) for name in entry.get("parameters", ())]
    read: dict[str, Any] = {"name": str(entry["name"]), "learning_rates": rates, "batch_size": batch_size}
    read |= {"noise": noise, "parameters": parameters, "length": RunLength.read(entry.get("length", {}))}
    return OptimizerRecord(**{**entry, **read})


def _noise_estimate(entry: dict[str, Any]) -> NoiseEstimate:
    numbers = {key: math.inf if value is None else _number(key, value, 1e300) for key, value in entry.items()}
    estimate = NoiseEstimate(**{**numbers, "measurements": int(numbers["measurements"])})  # type: ignore[arg-type]
    is_in_order = estimate.lower * (1 - 1e-9) <= estimate.value <= estimate.upper * (1 + 1e-9)
    if not is_in_order or not estimate.lower <= estimate.upper or not estimate.confidence < 1:
        raise ValueError(f"the interval of a noise scale must be in order, with the value in it, got {estimate}")
    return estimate


def _number(name: str, value: Any, largest: float = _LARGEST) -> float:
    if not is_number(value):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= largest:
        raise ValueError(f"{name} must be from 0 to {largest:g}, got {str(value)[:20]}")
    return float(value)


def finite(content: Any) -> Any:
    """What JSON can hold of some content: an infinite number, as of an estimate without a bound, is null."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
