"""One project's own example, trained some thirty steps in one way: ``python ways.py PROJECT WAY FOLDER``; prints JSON.

The examples are in ``projects.py``.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Lightning imports torchvision where there is one. A wheel whose operators were compiled for another build of torch ends then
# for the lack of these two. No example calls them, so that they need only be declared.
try:
    import torchvision  # noqa: F401
except ModuleNotFoundError:
    pass
except RuntimeError:
    DECLARED = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from projects import PROJECTS  # noqa: E402

from lightning_gradhist import ALTO, GradientHistogramMonitor, OptimizerCalibration  # noqa: E402

RECORD = "calibration.json"
Train = Callable[..., torch.nn.Module]
Found = dict[str, Any]


def bits(module: torch.nn.Module) -> str:
    """A hash of all weights and buffers."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def plain(train: Train, folder: Path) -> Found:
    return {"bits": bits(train([], 1, None))}


def monitor(train: Train, folder: Path) -> Found:
    """With the monitor, which must change nothing and leave a record."""
    watched = train([GradientHistogramMonitor(every_n_steps=2)], 1, None)
    records = sorted(Path.cwd().rglob(RECORD))
    if records:
        (folder / RECORD).write_bytes(records[-1].read_bytes())
    return {"bits": bits(watched), "note": "" if records else "no record"}


def probe(train: Train, folder: Path, apply: bool) -> Found:
    """With a probe, which must change nothing where it is not applied."""
    used = [OptimizerCalibration(reference_batch_size=8, apply=apply)]
    module = train(used, 1, None)
    return {"note": said(*used)} if apply else {"bits": bits(module), "note": said(*used)}


def record(train: Train, folder: Path) -> Found:
    """At four times the batch, from the record of the monitored run."""
    if not (folder / RECORD).exists():
        return {"note": "there is no record"}
    used = [OptimizerCalibration(reference=str(folder / RECORD))]
    train(used, 4, None)
    return {"note": said(*used)}


def alto(train: Train, folder: Path) -> Found:
    """With ALTO as the project's optimizer."""
    module = train([GradientHistogramMonitor(every_n_steps=5)], 1, ALTO)
    finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    return {"note": "" if finite else "weights are not finite"}


WAYS = {
    **{"plain": plain, "monitor": monitor},
    **{f"apply={apply}": partial(probe, apply=apply) for apply in (False, True)},
    **{"record x4": record, "ALTO": alto},
}


def said(calibration: OptimizerCalibration) -> str:
    """What the calibration found, in a line."""
    result = calibration.result
    if result is None:
        return "no result"
    found = f"eps {result.epsilon}, lr {result.learning_rate}, times {result.ratio:.3g} ({result.law})"
    return f"{found}. {'; '.join(result.problems)}".strip()


def main(project: str, way: str, folder: Path) -> None:
    """Trains, and prints what came of it as the last line."""
    warnings.simplefilter("ignore")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        example = PROJECTS[project]
        if way == "ALTO" and example.own_optimizer:
            found = {"status": "not possible", "note": example.own_optimizer}
        else:
            found = {"status": "ran", **WAYS[way](example.train, folder)}
    except BaseException as error:
        traceback.print_exc()
        found = {"status": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
