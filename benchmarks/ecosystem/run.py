"""Other people's projects with our callbacks in them: ``make ecosystem``, or ``python run.py [PROJECT ...]``.

Each project gets a virtual environment of its own, and trains its own example on generated data in six ways, each in a
process of its own (``ways.py``). A row of ``results/ecosystem.csv`` is written after each way, and at the end the table in
``docs/support.md``. Without names, projects that have all their rows are left alone, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from reporting import RESULTS, Row, machine, read_csv, write_csv  # noqa: E402

PAGE = ROOT / "docs" / "support.md"
START, END = "<!-- made by benchmarks/ecosystem/run.py -->\n", "<!-- end -->"
HEAD = ("Project", "Monitor", "`apply=False`", "`apply=True`", "Record, 4 x batch", "ALTO")
WAYS = ("plain", "monitor", "apply=False", "apply=True", "record x4", "ALTO")
COLUMNS = [*"project version lightning way status note seconds date python torch lightning_gradhist".split()]
LIMIT = 300  # seconds of one way


@dataclass(frozen=True)
class Project:
    """A project, what is installed for it, and the distribution whose version is reported."""

    name: str
    requirements: tuple[str, ...]
    distribution: str


PROJECTS = [
    Project("transformers_gpt2", ("transformers",), "transformers"),
    Project("transformers_bert", ("transformers",), "transformers"),
    Project("lightly_byol", ("lightly",), "lightly"),
    Project("torch_geometric_gcn", ("torch_geometric",), "torch_geometric"),
    Project("pytorch_forecasting_tft", ("pytorch-forecasting",), "pytorch-forecasting"),
    Project("chemprop_mpnn", ("chemprop",), "chemprop"),
    Project("gluonts_deepar", ("gluonts[torch]",), "gluonts"),
    Project("neuralforecast_nhits", ("neuralforecast",), "neuralforecast"),
    Project("darts_nbeats", ("darts[torch]",), "darts"),
    Project("scvi_scvi", ("scvi-tools",), "scvi-tools"),
    Project("scvi_scanvi", ("scvi-tools",), "scvi-tools"),
    Project("pytorch_tabular_mlp", ("pytorch_tabular", "requests"), "pytorch_tabular"),
    Project("litgpt_gpt", ("litgpt",), "litgpt"),
    Project("litdata_stream", ("litdata",), "litdata"),
    Project("nequip_model", ("nequip",), "nequip"),
]


def environment(project: Project, folder: Path) -> Path:
    """The interpreter of a project's environment, which is made if it is not there."""
    place = folder / "-".join(sorted(project.requirements)).replace("[", "_").replace("]", "_")
    interpreter, ready = place / "bin" / "python", place / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, *project.requirements, "tensorboard", "torch==2.13.0"], check=True)
        subprocess.run([*pip, "--editable", str(ROOT), "torch==2.13.0"], check=True)
        ready.touch()
    return interpreter


def versions(interpreter: Path, project: Project) -> Row:
    """Of what is reported."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "def v(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return ''\n"
        f"names = [{project.distribution!r}, 'lightning', 'pytorch-lightning', 'torch', 'lightning-gradhist']\n"
        "print(json.dumps([*map(v, names), platform.python_version()]))"
    )
    done = subprocess.run([str(interpreter), "-c", code], check=True, capture_output=True, text=True)
    own, lightning, older, torch, ours, python = json.loads(done.stdout)
    both = ", ".join(filter(None, (lightning and f"lightning {lightning}", older and f"pytorch_lightning {older}")))
    return {"version": own, "lightning": both, "torch": torch, "lightning_gradhist": ours, "python": python}


def run_way(interpreter: Path, project: str, way: str, folder: Path, log: Path) -> Row:
    """Runs one way; what it says of itself, and the time."""
    start = monotonic()
    with tempfile.TemporaryDirectory() as empty, log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {project}: {way}\n")
        file.flush()
        try:
            command = [str(interpreter), str(HERE / "ways.py"), project, way, str(folder)]
            done = subprocess.run(command, cwd=empty, stdout=subprocess.PIPE, stderr=file, text=True, timeout=LIMIT)
            found = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else died(log)
        except subprocess.TimeoutExpired:
            found = {"status": "hangs"}
    return {"project": project, "way": way, **found, "seconds": monotonic() - start}


def died(log: Path) -> Row:
    """What is known of a process that has printed nothing: its last words."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return {"status": "died", "note": lines[-1][:300]}


def judged(row: Row, plain: Row | None) -> Row:
    """Where the weights must be those of the plain run, whether they are."""
    if "bits" not in row or plain is None or "bits" not in plain or row["way"] == "plain":
        return row
    same = row["bits"] == plain["bits"]
    return {**row, "status": "same bits" if same else "OTHER BITS"}


def why(note: str) -> str:
    """Of what a calibration said, why a rate was kept."""
    refused = re.search(r"surge law refused: ([^:;]*)", note)
    return refused[1].strip() if refused else note.split(". ", 1)[1].split(";")[0]


def cell(row: Row | None) -> str:
    """What a way came to, in a few words."""
    if row is None:
        return "not run"
    status, note = row["status"], row["note"]
    if status not in ("ran", "same bits"):
        return f"{status}: {note}" if note else status
    if row["way"] == "record x4" and note.startswith("eps"):
        ratio = re.search(r"times (\S+) \((\w+)\)", note)
        return f"rate kept: {why(note)}" if ratio is None or ratio[2] == "keep" else f"rate times {ratio[1]}"
    if row["way"] in ("record x4", "ALTO") and note:
        return note
    done = "same bits" if status == "same bits" else "trains"
    unprobed = re.search(r"no probe: (.*?)(?:, which|\. What|;|$)", note)
    return f"{done}; no probe: {unprobed[1]}" if unprobed else done


def table(rows: list[Row]) -> str:
    """One line a project, with the versions and the days of the runs below."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for name in dict.fromkeys(row["project"] for row in rows):
        mine = {row["way"]: row for row in rows if row["project"] == name}
        if "install" in mine:
            lines.append((name, *[cell(mine["install"])] * (len(HEAD) - 1)))
            continue
        title = f"`{name}`, {mine['plain']['version']}"
        lines.append((title, *(cell(mine.get(way)) for way in WAYS[1:])))
    days = sorted({row["date"] for row in rows})
    with_what = sorted(
        {f"Python {row['python']}, torch {row['torch']}, {row['lightning']}" for row in rows if row["torch"]}
    )
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\nRun from {days[0]} to {days[-1]} with {'; '.join(with_what)}.\n"


def write(rows: list[Row], page: Path = PAGE) -> None:
    """Puts the table in its place."""
    before, rest = page.read_text(encoding="utf-8").split(START)
    page.write_text(before + START + table(rows) + END + rest.split(END, 1)[1], encoding="utf-8")


def main() -> None:
    """Runs the projects that are named, or all."""
    parser = argparse.ArgumentParser(description="Other people's projects with our callbacks in them.")
    parser.add_argument("projects", nargs="*", choices=[*(project.name for project in PROJECTS), []], metavar="PROJECT")
    parser.add_argument("--environments", type=Path, default=ROOT / ".ecosystem")
    parser.add_argument("--output", type=Path, default=RESULTS / "ecosystem.csv")
    args = parser.parse_args()
    for project in PROJECTS:
        there = read_csv(args.output)
        whole = sum(row["project"] == project.name for row in there) == len(WAYS)
        if project.name not in args.projects if args.projects else whole:
            continue
        rows = [row for row in there if row["project"] != project.name]
        try:
            interpreter = environment(project, args.environments)
        except subprocess.CalledProcessError as error:
            rows.append({"project": project.name, "way": "install", "status": "failed", "note": str(error)[-200:]})
            write_csv(args.output, COLUMNS, rows)
            continue
        common, plain = {**versions(interpreter, project), "date": machine()["date"]}, None
        folder = args.environments / f"{project.name}.run"
        folder.mkdir(exist_ok=True)
        for way in WAYS:
            row = judged(run_way(interpreter, project.name, way, folder, args.environments / "log.txt"), plain)
            plain = row if way == "plain" else plain
            rows.append({**row, **common})
            write_csv(args.output, COLUMNS, rows)
            print(f"{project.name}  {way}: {row['status']}  {row.get('note', '')[:150]}", flush=True)
    if args.output == RESULTS / "ecosystem.csv":
        write(read_csv(args.output))


if __name__ == "__main__":
    main()
