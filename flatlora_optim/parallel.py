"""Running CPU work on several threads without oversubscribing torch's own.

torch's generators fill a tensor on one thread, and its intra-op threads keep spinning for a
while after each operation. So whole pieces of work go to threads of our own, whose operations
stay on the thread they are called from.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_this_thread = threading.local()


def for_each(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Calls ``work`` once per item, on as many threads as torch uses. Runs inline when nested.

    Returns or raises only after every started call has ended; the first exception is raised.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) < 2 or getattr(_this_thread, "is_worker", False):
        for item in items:
            work(item)
        return
    queue = iter(items)
    next_item = threading.Lock()
    failed = threading.Event()

    def drain() -> None:
        while not failed.is_set():
            with next_item:
                item = next(queue, queue)
            if item is queue:
                return
            try:
                work(item)  # type: ignore[arg-type]
            except BaseException:
                failed.set()
                raise

    futures: list[Future[None]] = []
    try:
        pool = _pool_of(threads)
        futures.extend(pool.submit(drain) for _ in range(min(threads, len(items))))
    finally:
        # Also on Ctrl-C: nothing may write a weight any more once we are gone.
        _wait(futures, failed)
    for future in futures:
        future.result()


def _wait(futures: list[Future[None]], failed: threading.Event) -> None:
    try:
        wait(futures)
    except BaseException:
        failed.set()
        wait(futures)
        raise


def _pool_of(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            ready = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(
                threads, thread_name_prefix="flatlora", initializer=_become_worker, initargs=(ready,)
            )
            for _ in range(threads):
                pool.submit(int)
            ready.wait()
            # The workers' own setting also changed the default of threads yet to come.
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]


def _become_worker(ready: threading.Barrier) -> None:
    _this_thread.is_worker = True
    torch.set_num_threads(1)
    ready.wait()


def scratch(slot: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that this thread's next call with the same slot overwrites.

    Blocks are small and many: on the CPU, fresh memory for each would cost more than the work.
    """
    if device.type != "cpu":
        return torch.empty(*shape, dtype=dtype, device=device)
    buffers: dict[tuple[str, torch.dtype], Tensor] = _this_thread.__dict__.setdefault("buffers", {})
    numel = math.prod(shape)
    buffer = buffers.get((slot, dtype))
    if buffer is None or buffer.numel() < numel:
        buffer = buffers[slot, dtype] = torch.empty(numel, dtype=dtype)
    return buffer[:numel].view(*shape)


def _forget_pools() -> None:
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork; a child that inherited the pool would wait for ever.
    os.register_at_fork(after_in_child=_forget_pools)
