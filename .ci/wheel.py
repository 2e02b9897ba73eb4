"""Builds the wheel from what git has, installs it into a bare environment, and looks at it from there: ``make test-wheel``.

torch, Lightning and the rest come from the environment of the interpreter that runs this; its editable install does not.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

NAME = "lightning_gradhist"
LOOK = f"""
import importlib, pkgutil, sys
import {NAME} as package
assert package.__file__.startswith(sys.prefix), package.__file__
for module in pkgutil.walk_packages(package.__path__, "{NAME}."):
    importlib.import_module(module.name)
"""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """A command that must not fail; what it prints is of no interest."""
    subprocess.run([*map(str, command)], check=True, cwd=cwd, stdout=subprocess.DEVNULL)


def check_contents(wheel: Path) -> None:
    """All modules that git has, the mark of types and the licence, and nothing else than the package."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    listed = subprocess.run(["git", "ls-files", NAME], check=True, capture_output=True, text=True).stdout.split()
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == set(listed), inside ^ set(listed)
    assert any(name.endswith("licenses/LICENSE") for name in names), names


def main() -> None:
    """Builds, installs and looks."""
    pip = [sys.executable, "-m", "pip", "--quiet"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("git", "checkout-index", "--all", f"--prefix={folder}/source/")
        run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, folder / "source")
        (wheel,) = folder.glob("*.whl")
        check_contents(wheel)
        bare = folder / "bare"
        venv.create(bare)
        binaries = bare / ("Scripts" if sys.platform == "win32" else "bin")
        run(*pip, "--python", binaries / "python", "install", "--no-deps", wheel)
        (path,) = bare.rglob("site-packages")
        (path / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
        run(binaries / "python", "-c", LOOK, cwd=folder)
        run(binaries / "python", "-m", NAME, "--help", cwd=folder)
        run(binaries / "gradhist", "--help", cwd=folder)
        print(f"{wheel.name}: nothing but the package, and it works in a bare environment")


if __name__ == "__main__":
    main()
