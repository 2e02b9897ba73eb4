"""Other people's projects with our callbacks in them: ``make ecosystem``, or ``python run.py [PROJECT ...]``.

Each project gets a virtual environment of its own, and trains its own example on generated data in six ways, each in a
process of its own (``ways.py``). A row of ``results/ecosystem.csv`` is written after each way, and at the end the table in
``docs/support.md``. Without names, projects that have all their rows are left alone, so that a run that was stopped goes on.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from ecosystem.projects import PROJECTS  # noqa: E402
from reporting import RESULTS, Row, machine, read_csv, write_csv  # noqa: E402

OUTPUT, PAGE = RESULTS / "ecosystem.csv", ROOT / "docs" / "support.md"
ENVIRONMENTS = ROOT / ".ecosystem"
START, END = "<!-- made by benchmarks/ecosystem/run.py -->\n", "<!-- end -->"
HEAD = ("Project", "Monitor", "`apply=False`", "`apply=True`", "Record, 4 x batch", "ALTO")
WAYS = ("plain", "monitor", "apply=False", "apply=True", "record x4", "ALTO")
COLUMNS = "project version lightning way status note seconds date python torch lightning_gradhist".split()
LIMIT = 300  # seconds of one way
TORCH = "torch==2.13.0"


def environment(requirements: str) -> Path:
    """The interpreter of a project's environment, which is made if it is not there."""
    place = ENVIRONMENTS / re.sub(r"[^\w-]", "_", requirements)
    interpreter, ready = place / "bin" / "python", place / ".ready"
    if not ready.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
        for wanted in ([], [*requirements.split(), "tensorboard"], ["--editable", str(ROOT)]):
            subprocess.run([str(interpreter), "-m", "pip", "install", "--quiet", *wanted, TORCH], check=True)
        ready.touch()
    return interpreter


def versions(interpreter: Path, requirements: str) -> Row:
    command = [str(interpreter), "-m", "pip", "list", "--format=json"]
    listed = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found = {one["name"].lower().replace("-", "_"): one["version"] for one in listed}
    own = re.split(r"[\[ ]", requirements)[0].replace("-", "_")
    both = [f"{name} {found[name]}" for name in ("lightning", "pytorch_lightning") if name in found]
    ours = {name: found[name] for name in ("torch", "lightning_gradhist")}
    return {"version": found[own], "lightning": ", ".join(both), **ours, "python": platform.python_version()}


def run_way(interpreter: Path, project: str, way: str, folder: Path) -> Row:
    """Runs one way; what it says of itself, and the time."""
    start, log = monotonic(), ENVIRONMENTS / "log.txt"
    with tempfile.TemporaryDirectory() as empty, log.open("a", encoding="utf-8") as file:
        file.write(f"\n===== {project}: {way}\n")
        file.flush()
        try:
            command = [str(interpreter), str(HERE / "ways.py"), project, way, str(folder)]
            done = subprocess.run(command, cwd=empty, stdout=subprocess.PIPE, stderr=file, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            found: Row = {"status": "hangs"}
        else:
            last_words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
            died = {"status": "died", "note": last_words[:300]}
            found = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else died
    return {"project": project, "way": way, **found, "seconds": monotonic() - start}


def judged(row: Row, plain: Row) -> Row:
    """Where the weights must be those of the plain run, whether they are."""
    if row is plain or "bits" not in row or "bits" not in plain:
        return row
    return {**row, "status": "same bits" if row["bits"] == plain["bits"] else "OTHER BITS"}


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
    lines = [HEAD, ("---",) * len(HEAD)]
    for name in dict.fromkeys(row["project"] for row in rows):
        mine = {row["way"]: row for row in rows if row["project"] == name}
        if "install" in mine:
            lines.append((name, *[cell(mine["install"])] * (len(HEAD) - 1)))
            continue
        title = f"`{name}`, {mine['plain']['version']}"
        lines.append((title, *(cell(mine.get(way)) for way in WAYS[1:])))
    days = sorted({row["date"] for row in rows})
    with_what = {f"Python {row['python']}, torch {row['torch']}, {row['lightning']}" for row in rows if row["torch"]}
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\nRun from {days[0]} to {days[-1]} with {'; '.join(sorted(with_what))}.\n"


def measure(project: str, rows: list[Row]) -> None:
    requirements = PROJECTS[project].requirements
    try:
        interpreter = environment(requirements)
    except subprocess.CalledProcessError as error:
        rows.append({"project": project, "way": "install", "status": "failed", "note": str(error)[-200:]})
        write_csv(OUTPUT, COLUMNS, rows)
        return
    common = {**versions(interpreter, requirements), "date": machine()["date"]}
    folder = ENVIRONMENTS / f"{project}.run"
    folder.mkdir(exist_ok=True)
    plain: Row = {}
    for way in WAYS:
        row = run_way(interpreter, project, way, folder)
        plain = plain or row
        rows.append({**judged(row, plain), **common})
        write_csv(OUTPUT, COLUMNS, rows)
        print(f"{project}  {way}: {rows[-1]['status']}  {row.get('note', '')[:150]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Other people's projects with our callbacks in them.")
    parser.add_argument("projects", nargs="*", choices=[*PROJECTS, []], metavar="PROJECT")
    named = parser.parse_args().projects
    for project in PROJECTS:
        there = read_csv(OUTPUT)
        whole = sum(row["project"] == project for row in there) == len(WAYS)
        if project in named if named else not whole:
            measure(project, [row for row in there if row["project"] != project])
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    PAGE.write_text(before + START + table(read_csv(OUTPUT)) + END + rest.split(END, 1)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
