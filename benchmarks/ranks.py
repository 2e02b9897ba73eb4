"""Jobs on gloo ranks, each in a process of its own."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_ranks(job: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
    """Run a job on ranks that make up a process group, with one thread each.

    Args:
        job: A function of a module, since every process imports it.
        ranks: How many, from 1 up.
        *arguments: What the job is called with.

    Returns:
        What the job returned on each rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _on_rank, (job, ranks, Path(folder), arguments), nprocs=ranks, start_method="spawn"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def _on_rank(rank: int, job: Callable[..., Any], ranks: int, folder: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        # as torchrun sets them, so that Lightning starts no processes of its own
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        GROUP_RANK="0",
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        TORCHELASTIC_RUN_ID="benchmark",
    )
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(job(*arguments), folder / f"{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
