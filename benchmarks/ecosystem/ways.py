"""One project's own example, trained some thirty steps in one way: ``python ways.py PROJECT WAY FOLDER``; prints JSON.

The examples are in ``projects.py``.
"""

import hashlib
import json
import random
import sys
import traceback
import warnings
from collections.abc import Callable
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
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def trained(train: Train, way: str, folder: Path) -> Found:
    """What comes of one way; the folder keeps the record of the monitored run."""
    kept = folder / RECORD
    match way:
        case "plain":
            return {"bits": bits(train([], 1, None))}
        case "monitor":  # must change nothing, and leave a record
            watched = train([GradientHistogramMonitor(every_n_steps=2)], 1, None)
            records = sorted(Path.cwd().rglob(RECORD))
            if records:
                kept.write_bytes(records[-1].read_bytes())
            return {"bits": bits(watched), "note": "" if records else "no record"}
        case "apply=False":  # must change nothing
            used = [OptimizerCalibration(reference_batch_size=8, apply=False)]
            return {"bits": bits(train(used, 1, None)), "note": said(*used)}
        case "apply=True":
            used = [OptimizerCalibration(reference_batch_size=8)]
            train(used, 1, None)
            return {"note": said(*used)}
        case "record x4":  # at four times the batch
            if not kept.exists():
                return {"note": "there is no record"}
            used = [OptimizerCalibration(reference=str(kept))]
            train(used, 4, None)
            return {"note": said(*used)}
        case "ALTO":
            module = train([GradientHistogramMonitor(every_n_steps=5)], 1, ALTO)
            finite = all(bool(parameter.isfinite().all()) for parameter in module.parameters())
            return {"note": "" if finite else "weights are not finite"}
        case _:
            raise ValueError(f"way must be one of those in run.py, got {way!r}")


def said(calibration: OptimizerCalibration) -> str:
    """What the calibration found, in a line."""
    result = calibration.result
    if result is None:
        return "no result"
    found = f"eps {result.epsilon}, lr {result.learning_rate}, times {result.ratio:.3g} ({result.law})"
    return f"{found}. {'; '.join(result.problems)}".strip()


def main(project: str, way: str, folder: Path) -> None:
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
            found = {"status": "ran", **trained(example.train, way, folder)}
    except BaseException as error:
        traceback.print_exc()
        found = {"status": "failed", "note": f"{type(error).__name__}: {error}"[:300]}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
