"""Running a function in several processes that form a gloo group."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

# One clean process imports the libraries; the workers are forked from it and start at once.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed.fsdp", "peft"])


def launch(worker: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 100) -> list[Any]:
    """What ``worker(*args)`` returns on each rank. Raises what a worker raises."""
    with TemporaryDirectory() as folder:
        group = start_processes(
            _main, (worker, args, world, folder), world, join=False, start_method="forkserver"
        )
        deadline = time.monotonic() + timeout
        try:
            while not group.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{worker.__name__} did not end within {timeout} s")
        finally:
            for process in group.processes:
                process.kill()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def refusal(call: Callable[[], object]) -> str:
    """The message of the ValueError that the call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _main(rank: int, worker: Callable[..., Any], args: tuple[Any, ...], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    # A file instead of a port: nothing else on the machine can be in the way.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(worker(*args), Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
