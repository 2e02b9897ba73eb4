"""What runs on a GPU; ``GRADHIST_DEVICE=cpu`` runs it on the host, without what only a GPU can show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = torch.device(os.environ.get("GRADHIST_DEVICE", "cuda"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = DEVICE.type == "cuda" and not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason="there is no GPU"))
            elif DEVICE.type == "cpu" and item.get_closest_marker("cuda_only"):
                item.add_marker(pytest.mark.skip(reason="only a GPU can show it"))


@pytest.fixture
def device() -> torch.device:
    return DEVICE
