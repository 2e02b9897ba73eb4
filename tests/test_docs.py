"""The docs' page on troubleshooting has every message of the package, and no other; tests that the docs name are there."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_gradhist"
PAGE = ROOT / "docs" / "troubleshooting.md"
LABELS = {"__main__.py", "figures.py", "magnitude_report.py"}
"""Modules of which only what they raise is a message: help texts, axes, titles, columns."""
NO_MESSAGES = (
    "nothing is to be done",
    "the first batch is to be calibrated",
    "the first batch shows whether the run goes on at its batch size",
    "gradient magnitudes by layer, step",
    "root of the second moment by layer, step",
    "Calibration: a probe of … batches",
    "The given NumPy array is not writable",
    "a copy of it lacks what it has",
    "what more GPUs would buy",
    "steps to the same loss",
    "samples to the same loss",
    "Calibration of the optimizer",
    "…, as multiples of now",
    "**…**, as multiples of now",
    "no signal out of the noise",
    "samples a step of the reference",
    "epsilon search space, ",
    "noise scale … (…",
    "…, recorded at … samples a step",
    "critical batch size",
    "(apply=False: nothing was changed)",
    "not applied (apply=False)",
    "samples or more",
    "out of memory",
    "can't allocate memory",
    "The noise scale goes into",
    "… from epoch … on",
    "The parameters are …; the layers",
    "lower every_n_steps=…, or",
    "parameter … of its group",
    "the recorded run",
    "tell the length of the run",
    "The param groups of the inner",
    "The state of the inner",
    "The defaults of the inner",
)
"""How texts begin that are part of a message, of a table or of a figure, or words for the reader of the code."""


def template(node: ast.AST) -> str:
    """A text with an ellipsis in place of what is put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "…"


def texts(tree: ast.AST) -> Iterator[str]:
    """The texts in a module of three words or more, and those that are put into them; docstrings do not count."""
    if isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant):
        return
    text = " ".join(template(tree).split())
    if " " in text and len(re.findall(r"[A-Za-z]{2,}", text)) >= 3:
        yield text
    for child in parts(tree):
        yield from texts(child)


def parts(tree: ast.AST) -> list[ast.AST]:
    """What else may hold texts: of a text what is put into it."""
    if isinstance(tree, ast.JoinedStr):
        return [part for part in tree.values if isinstance(part, ast.FormattedValue)]
    if isinstance(tree, ast.BinOp) and template(tree) != "…":
        return parts(tree.left) + parts(tree.right)
    return list(ast.iter_child_nodes(tree))


def messages() -> list[tuple[str, str]]:
    """Where each message of the package stands, and its text."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise)]
        where = str(path.relative_to(PACKAGE))
        found += [(where, text) for part in (raised if path.name in LABELS else [tree]) for text in texts(part)]
    return [(where, text) for where, text in found if not text.startswith(NO_MESSAGES)]


def entries() -> list[str]:
    """The words by which the page has its messages: in code, as a heading or as the first cell of a row."""
    found = re.findall(r"^(?:### |\| )`([^`]+)`", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [" ".join(entry.replace(r"\|", "|").split()) for entry in found]


def test_every_message_is_on_the_page() -> None:
    known = entries()
    missing = [f"{where}: {text}" for where, text in messages() if not any(entry in text for entry in known)]
    assert not missing, "add to docs/troubleshooting.md, or to NO_MESSAGES here:\n" + "\n".join(missing)


def test_no_entry_of_the_page_is_stale() -> None:
    said = [text for _, text in messages()]
    stale = [entry for entry in entries() if not any(entry in text for text in said)]
    assert not stale, "no message has these words any more:\n" + "\n".join(stale)


def test_every_exception_to_it_is_there() -> None:
    assert {path.name for path in PACKAGE.rglob("*.py")} >= LABELS
    modules = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    said = [text for module in modules for text in texts(module)]
    assert [part for part in NO_MESSAGES if not any(text.startswith(part) for text in said)] == []


@pytest.mark.parametrize("page", [pytest.param(path, id=path.name) for path in sorted((ROOT / "docs").rglob("*.md"))])
def test_tests_and_pictures_that_a_page_names_are_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert [name for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests] == []
    pictures = {ROOT / "docs" / path for path in re.findall(r"\]\((pictures/[\w-]+\.png)\)", text)}
    assert [path.name for path in pictures if not path.exists() and path.name != "readme.png"] == []


def test_pictures_are_small() -> None:
    sizes = [
        path.stat().st_size for path in [*(ROOT / "docs" / "pictures").glob("*.png"), ROOT / "examples" / "readme.png"]
    ]
    assert max(sizes) <= 100_000 and sum(sizes) <= 1_000_000


@pytest.mark.filterwarnings("ignore")
def test_pictures_are_made_from_runs(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "pictures.py"))
    script["save"](script["vanishing"](), tmp_path / "picture.png")
    assert 5_000 < (tmp_path / "picture.png").stat().st_size < 100_000
