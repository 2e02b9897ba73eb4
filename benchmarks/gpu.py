"""All that only a GPU can show, in one call of at most 8 minutes: ``make gpu``, or ``python benchmarks/gpu.py``.

The parts run one after another, the most important first, each in a process of its own with its own limit of time. What
is found is written part by part, so that a kill loses nothing: CSVs, one of which, ``gpu_parts.csv``, has a row a part.
``--device cpu --tiny`` runs every part on the host, small, to show that it runs.
"""

import argparse
import os
import shlex
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
    """One thing that is measured or checked: a row of ``gpu.csv``, with the seconds after which it is killed."""

    name: str
    command: list[str]
    seconds: int
    program: str = ""  # that runs it in place of Python


def parts(device: str, out: Path, tiny: bool, data_dir: Path | None = None) -> list[Part]:
    """All, the most important first; the limits of all but the evidence, which takes what is left, add up to the whole."""
    own = {"device": device, "out": out, "python": sys.executable}
    found = []
    for row in read_csv(HERE / "gpu.csv"):
        words = shlex.split(f"{row['command']} {row['tiny' if tiny else 'full']}")
        command = [word.format(**own) for word in words]
        if row["part"] == "correctness" and find_spec("xdist"):
            command += ["--numprocesses", str(min(8, os.cpu_count() or 1))]  # much of it is numpy's
        if data_dir and "evidence" in row["command"]:
            command += ["--data-dir", str(data_dir.resolve())]
        longer = 4 if tiny else 1  # the host may be busy, and nothing is measured
        found.append(Part(row["part"], command, row["seconds"] * longer, row["program"]))
    return found


def run(part: Part, seconds: float, log: Path, device: str) -> Row:
    """Runs one part for at most so many seconds; its output goes to the log."""
    lacking = f"{part.program} is not installed" if part.program and shutil.which(part.program) is None else ""
    if lacking or seconds <= 1:
        return {"part": part.name, "status": "not measured", "last_line": lacking or "no time was left"}
    command = [part.program or sys.executable, *part.command]
    folders = (ROOT, HERE, HERE / "calibration", ROOT / "examples", ROOT / "tests")  # the package need not be installed
    quiet = {"KINETO_LOG_LEVEL": "6", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONUNBUFFERED": "1"}
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **quiet, "GRADHIST_DEVICE": device, "PYTHONPATH": path}
    start = monotonic()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {part.name}\n")
        file.flush()
        own = {"cwd": ROOT, "env": environment, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, **own)
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


def main(arguments: list[str] | None = None) -> int:
    """Runs all parts from the command line; the exit status is 1 where a part has failed."""
    parser = argparse.ArgumentParser(description="All that only a GPU can show, within 8 minutes.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every part, small: shows that it runs, measures nothing")
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
    for row in results(wanted, WHOLE * (4 if args.tiny else 1), log, args.device):
        rows.append({**row, **described})
        write_csv(args.output / "gpu_parts.csv", COLUMNS, rows)
        print(f"{row['part']}: {row['status']}, {row.get('seconds', 0):.0f} s: {row['last_line']}", flush=True)
    return int(any(row["status"] == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
