"""The rules of the design: arrows point down only, and every optional dependency is optional."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import lightning_gradhist

PACKAGE = Path(lightning_gradhist.__file__).parent
# Bottom to top. A module may import what stands in its own layer (but for cycles) or below.
LAYERS = [
    {"_dtensor", "_flat", "_version", "explore", "kernels", "tensors"},
    {"histogram", "noise"},
    {"epsilon", "learning_rate", "metric", "tradeoff"},
    {"plan"},
    {"logging", "optim"},
    {"__main__", "callbacks"},
]
RESULTS = {"EpsilonRange", "NoiseEstimate"}  # only ever returned: the example is that of what returns them


def module_name(path: Path) -> str:
    parts = ["lightning_gradhist", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """Absolute names of all that a module imports, also within functions; modules of ours as far as they are known."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            assert node.module is not None
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def ours(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] == "lightning_gradhist"}


def top(module: str) -> str:
    return (module.split(".") + [""])[1]


def layer(module: str) -> int:
    return next(index for index, members in enumerate(LAYERS) if top(module) in members)


INNER = [name for name in MODULES if name != "lightning_gradhist"]


def test_every_module_has_a_layer() -> None:
    assert {top(name) for name in INNER} <= set().union(*LAYERS)
    assert len(INNER) > 15


@pytest.mark.parametrize("module", INNER)
def test_arrows_point_down(module: str) -> None:
    for name in ours(module) - {module}:
        assert name != "lightning_gradhist", f"{module} imports the package that imports it"
        same_part = top(name) == top(module)
        assert layer(name) < layer(module) or same_part, f"{module} imports {name}"
    if top(module) == "kernels":
        assert {name.split(".")[1] for name in ours(module)} <= {"kernels"}


def test_no_cycle() -> None:
    graph = {module: ours(module) - {module} for module in INNER}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("module", INNER)
def test_optimizers_and_callbacks_meet_in_param_groups_only(module: str) -> None:
    other = {"optim": "callbacks", "callbacks": "optim"}.get(top(module))
    assert not [name for name in ours(module) if top(name) == other]


@pytest.mark.parametrize("module", list(MODULES))
def test_one_module_imports_lightning_and_one_torchmetrics(module: str) -> None:
    hosts = {"lightning", "pytorch_lightning", "lightning_fabric"}
    imported = {name.split(".")[0] for name in imports(module)} & hosts
    assert not imported or module == "lightning_gradhist.callbacks._lightning"
    assert "torchmetrics" not in imports(module) or module == "lightning_gradhist.metric"


@pytest.mark.parametrize("module", list(MODULES))
def test_optional_dependencies_are_imported_where_they_are_needed(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {alias.name for node in at_import if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in at_import if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {
        *("matplotlib", "wandb", "mlflow", "comet_ml", "tensorboard", "tensorboardX")
    }
    assert "matplotlib.pyplot" not in imports(module)  # its state is the user's


BLOCKED = """
    import importlib.abc, importlib.metadata, importlib.util, sys

    names = {"lightning", "pytorch_lightning", "lightning_fabric", "triton", "matplotlib", "wandb"}

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in names:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocked())

    # Who asks first what is installed must hear that these are not.
    distribution, find_spec = importlib.metadata.distribution, importlib.util.find_spec

    def no_distribution(name):
        if name in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    importlib.metadata.distribution = no_distribution
    importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in names else find_spec(name, *rest)

    import torch
    import lightning_gradhist as lg

    assert not names & {name.split(".")[0] for name in sys.modules}

    histogram = lg.MagnitudeHistogram(["w"])
    histogram.update({"w": torch.logspace(-6, -2, 1001)})
    assert lg.epsilon_range(histogram).lower == 1e-6

    noise = lg.NoiseScale({"w": torch.zeros(50)}, 4)
    generator = torch.Generator().manual_seed(0)
    for half in range(2):
        for _ in range(8):
            noise.update({"w": 3 + torch.randn(50, generator=generator)})
        if half == 0:
            noise.split(1e-8)
    assert 0.3 < noise.simple().value < 0.6
    assert lg.SurgeLaw(100.0).ratio(64, 64) == 1.0

    for optimizer in (lg.ALTO, lg.AdamE):
        weight = torch.nn.Parameter(torch.ones(3))
        steps = optimizer([weight], lr=0.1)
        weight.square().sum().backward()
        steps.step()
        assert bool((weight < 1).all())

    from lightning_gradhist.logging import calibration_result, figures, sinks

    assert not figures.available()
    for name in ("GradientHistogramMonitor", "OptimizerCalibration"):
        try:
            getattr(lg, name)
        except ImportError:
            pass
        else:
            raise AssertionError(f"{name} came without Lightning")
    print("whole")
"""


def run(code: str) -> str:
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_without_lightning_triton_matplotlib_and_wandb() -> None:
    assert run(BLOCKED) == "whole"


def test_importing_the_package_imports_neither_lightning_nor_torchmetrics() -> None:
    code = "import sys, lightning_gradhist; print({'lightning', 'pytorch_lightning', 'torchmetrics', 'wandb'} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.parametrize("name", [name for name in lightning_gradhist.__all__ if name != "__version__"])
def test_public_names_have_a_docstring_with_an_example(name: str) -> None:
    documented = getattr(lightning_gradhist, name)
    text = inspect.getdoc(documented)
    assert text and documented.__doc__
    assert name in RESULTS or ("Example:" in text and ">>> " in text)


def test_public_names_are_sorted_and_there() -> None:
    assert lightning_gradhist.__all__ == sorted(lightning_gradhist.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        lightning_gradhist.Nothing  # noqa: B018


def test_version() -> None:
    assert lightning_gradhist.__version__ == importlib.metadata.version("lightning-gradhist")
