"""The optimizers where torch was built without torch.distributed, and what importing them brings along."""

from __future__ import annotations

import subprocess
import sys
import textwrap

BLOCKED = """
    import importlib.abc, sys
    import torch

    class Blocked(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torch.distributed."):
                raise ModuleNotFoundError(f"{name} is blocked", name=name)

    torch.distributed.is_available = lambda: False
    sys.meta_path.insert(0, Blocked())

    from lightning_gradhist.optim import ALTO, AdamE, EAdaptor

    def sgd(params):
        return EAdaptor(torch.optim.SGD(params, lr=0.1))

    for make in (ALTO, AdamE, sgd):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = make([weight])
        for _ in range(2):
            weight.grad = torch.ones(3)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        assert bool((weight < 1).all())
    print("stepped")
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_optimizers_step_without_torch_distributed() -> None:
    assert run(BLOCKED) == "stepped"


def test_importing_the_optimizers_imports_nothing_slow() -> None:
    slow = {"torch.distributed.tensor", "torch._dynamo", "triton"}
    code = (
        "import torch, sys; there = set(sys.modules); import lightning_gradhist.optim; print(*set(sys.modules) - there)"
    )
    assert not slow & set(run(code).split())
