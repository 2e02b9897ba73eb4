"""Jobs on gloo ranks, each in a process of its own."""

import multiprocessing
import os
import socket
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Ranks are forked from a process that has imported these and done nothing else: each starts in a second, not in five.
IMPORTED = [
    *("lightning.pytorch", "lightning_gradhist.callbacks", "matplotlib.figure", "torchmetrics.classification"),
    *("tensorboard.backend.event_processing.event_accumulator", "torch.utils.tensorboard"),
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor"),
]
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def run_ranks(job: Callable[..., Any], ranks: int, *arguments: Any, seconds: float = 240) -> list[Any]:
    """Run a job, a function of a module, on ranks that make up a process group, killed after ``seconds``; what each returned."""
    with tempfile.TemporaryDirectory() as folder:
        context = start_ranks(job, ranks, Path(folder), *arguments)
        deadline = time.monotonic() + seconds
        while not context.join(timeout=10):
            if time.monotonic() > deadline:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"{job.__name__} hangs on {ranks} ranks")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def start_ranks(job: Callable[..., Any], ranks: int, folder: Path, *arguments: Any) -> Any:
    """Start a job on ranks with one thread each, which leave in a folder what it returns; torch's context that joins them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.get_context(METHOD).set_forkserver_preload(IMPORTED)
    return torch.multiprocessing.start_processes(
        _on_rank, (job, ranks, port, folder, arguments), nprocs=ranks, join=False, start_method=METHOD
    )


def _on_rank(
    rank: int, job: Callable[..., Any], ranks: int, port: int, folder: Path, arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # as torchrun sets them, so that Lightning starts no processes of its own
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "ranks"}
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.save(job(*arguments), folder / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        torch.distributed.destroy_process_group()
