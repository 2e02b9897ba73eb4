"""What holds for every test: how many cases a property tries, and that no test leaves anything behind for the next."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Few cases in every run, many and new ones with ``--hypothesis-profile nightly``.

settings.register_profile(
    "suite",
    max_examples=65,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "nightly", settings.get_profile("suite"), max_examples=1500, derandomize=False, print_blob=True
)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """Half a million objects of torch and of the tests themselves are looked through once, and not by each probe again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The demo, which takes longest, comes first: at the end all other processes would wait for it."""
    items.sort(key=lambda item: "test_the_demo" not in item.name)


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def same_numbers_in_any_order() -> None:
    """A test has the same weights and data whichever tests the process ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def leave_no_ranks_behind() -> Iterator[None]:
    """Takes back what a Trainer with DDP leaves in the process: Lightning launches no ranks where it finds LOCAL_RANK."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
