"""All that only a GPU can show, in one call of at most 8 minutes: ``make gpu``, or ``python benchmarks/gpu.py``.

The parts run one after another, the most important first, each in a process of its own with its own limit of time. What
is found is written part by part, so that a kill loses nothing: CSVs, ``gpu_parts.csv`` and ``summary.md``.
``--device cpu --tiny`` runs every part on the host, small, to show that it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from time import monotonic

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.append(str(ROOT))  # the package need not be installed

from reporting import NOT_MEASURED, RESULTS, Row, machine, read_csv, write_csv  # noqa: E402

WHOLE = 480
STATUS = {0: "passed", NOT_MEASURED: "not measured"}
COLUMNS = "part status seconds last_line date device cpu gpu python torch triton lightning_gradhist".split()


@dataclass(frozen=True)
class Part:
    """One thing that is measured or checked: what runs it, but for the interpreter, and the seconds after which it is killed."""

    name: str
    command: list[str]
    seconds: int
    program: str = ""  # that it needs beside Python


def parts(device: str, out: Path, tiny: bool, data_dir: Path | None = None) -> list[Part]:
    """All, the most important first; the limits of all but the evidence, which takes what is left, add up to the whole."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--override-ini", "filterwarnings=ignore", "--tb=short"]
    at_once = (
        ["--numprocesses", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    )  # much of it is numpy's
    at_once += ["-k", "not torch.float16"] if tiny else []
    small = ["tests/gpu/test_steps.py", "tests/gpu/test_counts.py", "-k", "same_bits or 4097"]
    few = ["--only", "AdamW fused", "AdamE fused", "ALTO fused"]
    fast = [*few, "AdamW foreach"]  # others take seconds for a step of 10,000 tensors
    optim = [str(HERE / "optim_step.py"), "--device", device]
    kernels = [str(HERE / "kernel_speed.py"), "--device", device, "--output", str(out / "kernels.csv")]
    evidence = [str(HERE / "gpu_evidence.py"), "--device", device, *(["--tiny"] if tiny else [])]
    evidence += ["--data-dir", str(data_dir.resolve())] if data_dir else []
    rates, resnet = ([*evidence, name, "--output", str(out / f"gpu_{name}.csv")] for name in ("rates", "resnet"))
    optim += ["--repeats", "1", "--parameters", "2e5"] if tiny else ["--repeats", "3"]
    step = [*optim, "--output", str(out / f"optim_step_{device}.csv")]
    of_transformer, of_small = (["--only", "AdamW fused", "AdamE", "ALTO"],) * 2 if tiny else ([], fast)
    large = ["--parameters", "4e5" if tiny else "1.5e9", "--dtype", "bfloat16", "--models", "transformer", *few]
    large += ["--output", str(out / "optim_step_large.csv")]
    small_kernels = ["--size", "20000", "--parameters", "1"] if tiny else []
    longer = 4 if tiny else 1  # the host may be busy, and nothing is measured
    sanitized = ["compute-sanitizer", "--error-exitcode", "9", sys.executable, *tests, *small]
    return [
        Part("correctness", [*tests, *at_once, "tests/gpu"], 120 * longer),
        Part("sanitizer", sanitized, 45 * longer, program="compute-sanitizer"),
        Part("step", [*step, "--models", "transformer", *of_transformer], 70 * longer),
        Part("step, small tensors", [*step, "--models", "small tensors", *of_small], 25 * longer),
        Part("kernels", [*kernels, *small_kernels], 30 * longer),
        *captures(device, out, tiny),
        Part("large step, bfloat16", [*optim, *large], 30 * longer),
        Part("rates of a character GPT", rates, 150 * longer),
        Part("ResNet-20 at large batches", resnet, 150 * longer),
    ]


def captures(device: str, out: Path, tiny: bool) -> list[Part]:
    """What the monitor costs, one model after another; the peers take minutes on the largest, and so are left out there."""
    output = ["--device", device, "--output", str(out / f"capture_cost_{device}.csv")]
    command = [str(HERE / "capture_cost.py"), *output, "--rounds", "1" if tiny else "2"]
    ours = ["--only", "none, again", "monitor", "monitor, every step", "monitor, off-steps"]
    if tiny:
        return [Part("capture, CNN", [*command, "--scale", "1e-3", "--models", "CNN", *ours], 240)]
    limits = {"CNN": (45, ["add_histogram", "wandb.watch"]), "transformer": (45, ["add_histogram", "wandb.watch"])}
    limits |= {"small tensors": (30, []), "transformer, 350 M": (40, [])}
    return [
        Part(f"capture, {name}", [*command, "--models", name, *ours, *peers], seconds)
        for name, (seconds, peers) in limits.items()
    ]


def run(part: Part, seconds: float, log: Path, device: str) -> Row:
    """Runs one part for at most so many seconds; its output goes to the log."""
    if part.program and shutil.which(part.program) is None:
        return {"part": part.name, "status": "not measured", "last_line": f"{part.program} is not installed"}
    if seconds <= 1:
        return {"part": part.name, "status": "not measured", "last_line": "no time was left"}
    command = part.command if part.program else [sys.executable, *part.command]
    folders = (ROOT, HERE, HERE / "calibration", ROOT / "examples", ROOT / "tests")  # the package need not be installed
    quiet = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **quiet, "GRADHIST_DEVICE": device}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    start = monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {part.name}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = STATUS.get(process.wait(seconds), "failed")
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return {"part": part.name, "status": status, "seconds": monotonic() - start, "last_line": lines[-1][:200]}


def results(wanted: list[Part], whole: float, log: Path, device: str) -> Iterator[Row]:
    """Runs the parts, each within its own limit and what is left of the whole."""
    end = monotonic() + whole
    for part in wanted:
        yield run(part, min(part.seconds, end - monotonic()), log, device)


def summary(rows: list[Row], out: Path) -> str:
    """What was found so far, in Markdown."""
    found = [f"| {row['part']} | {row['status']} | {row.get('seconds', 0):.0f} | {row['last_line']} |" for row in rows]
    tables = [path for path in sorted(out.glob("*.csv")) if path.name != "gpu_parts.csv"]
    rows_of = [f"- {path.name}: {len(read_csv(path))} rows" for path in tables]
    return "\n".join(["| part | status | seconds | last line |", "|---|---|---|---|", *found, "", *rows_of]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts from the command line; the exit status is 1 where a part has failed."""
    parser = argparse.ArgumentParser(description="All that only a GPU can show, within 8 minutes.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every part, small: shows that it runs, measures nothing")
    parser.add_argument("--seconds", type=float, default=WHOLE, help=f"for all parts together (default: {WHOLE})")
    parser.add_argument("--only", nargs="+", metavar="PART")
    parser.add_argument("--data-dir", type=Path, help="the four idx files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny shows that every part runs")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the running part is killed, too
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "log.txt"
    log.write_text("", encoding="utf-8")
    every = parts(args.device, args.output.resolve(), args.tiny, args.data_dir)
    wanted = [part for part in every if not args.only or part.name in args.only]
    described = machine(torch.device(args.device), "triton")
    rows: list[Row] = []
    for row in results(wanted, args.seconds * (4 if args.tiny else 1), log, args.device):
        rows.append({**row, **described})
        write_csv(args.output / "gpu_parts.csv", COLUMNS, rows)
        (args.output / "summary.md").write_text(summary(rows, args.output), encoding="utf-8")
        print(f"{row['part']}: {row['status']}, {row.get('seconds', 0):.0f} s: {row['last_line']}", flush=True)
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
