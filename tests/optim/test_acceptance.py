"""The acceptance table (ACCEPTANCE.md) names tests that exist, for every row."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from kernels.interpreted import CASES

HERE = Path(__file__)
TESTS = {path.stem: path for path in HERE.parents[1].rglob("test_*.py")}


def rows() -> dict[int, list[str]]:
    """The tests of each row, as ``file::function``."""
    lines = HERE.with_name("ACCEPTANCE.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|") for line in lines if re.match(r"\| \d+ \|", line)]
    return {int(cell[1]): re.findall(r"`([^`]+::[^`]+)`", cell[3]) for cell in cells}


def functions(file: str) -> set[str]:
    tree = ast.parse(TESTS[file].read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist() -> None:
    found = rows()
    assert list(found) == list(range(1, 30))
    for row, tests in found.items():
        assert tests, f"row {row} has no test"
        for test in tests:
            file, _, name = test.partition("::")
            function, _, case = name.rstrip("]").partition("[")
            assert function in functions(file), f"row {row}: {test}"
            assert not case or case in CASES, f"row {row}: {test}"
