"""Running torch operations on several threads without oversubscribing torch's own.

torch's generators fill a tensor on one thread, and its intra-op threads keep spinning for a
while after each operation. So whole pieces of work go to threads of our own, whose operations
stay on the thread they are called from. (Native kernels need this only where the OpenMP library of
torch can't be found: see ``native.py``.)
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}
_this_thread = threading.local()


def interprets_triton() -> bool:
    """Whether Triton's interpreter runs its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def for_each(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Calls ``work`` once per item, on as many threads as torch uses. Runs inline when nested.

    Returns or raises only after every started call has ended; the first exception is raised.
    """
    threads = 1 if interprets_triton() else torch.get_num_threads()
    if threads == 1 or len(items) < 2 or getattr(_this_thread, "is_worker", False):
        for item in items:
            work(item)
        return
    todo = deque(items)
    all_known = threading.Event()

    def drain() -> None:
        all_known.wait()
        try:
            for item in _taken_from(todo):
                work(item)
        except BaseException:
            todo.clear()
            raise

    futures: list[Future[None]] = []
    try:
        with suppress(RuntimeError):  # no more threads, as when the interpreter exits
            futures.extend(_pool_of(threads).submit(drain) for _ in range(min(threads, len(items))))
        all_known.set()
        if not futures:
            drain()
        wait(futures)
    except BaseException:
        # Also on Ctrl-C: nothing may write a weight any more once we are gone.
        todo.clear()
        all_known.set()
        wait(futures)
        raise
    for future in futures:
        future.result()


def _taken_from(todo: deque[T]) -> Iterator[T]:
    while True:
        try:
            item = todo.popleft()
        except IndexError:
            return
        yield item


def _pool_of(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            ready = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(
                threads, thread_name_prefix="flatlora", initializer=_become_worker, initargs=(ready,)
            )
            try:
                for _ in range(threads):
                    pool.submit(int)
                ready.wait()
            except BaseException:
                ready.abort()  # waiting threads would keep the interpreter from exiting
                raise
            finally:
                # The workers' own setting also changed the default of threads yet to come.
                torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]


def _become_worker(ready: threading.Barrier) -> None:
    _this_thread.is_worker = True
    torch.set_num_threads(1)
    with suppress(threading.BrokenBarrierError):
        ready.wait()


@functools.lru_cache(maxsize=1024)
def rows_at_once(row_size: int, device_type: str) -> int:
    """How many rows to work on at a time: on the CPU they stay in a core's own cache meanwhile, and
    an accelerator wants few, large kernels instead."""
    elements = 1 << 18 if device_type == "cpu" else 1 << 22
    return max(1, elements // max(1, row_size))


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
        buffer = buffers[slot, dtype] = lasting_empty((numel,), dtype, device)
    return buffer[:numel].view(*shape)


def lasting_empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that can also be written after the ``torch.inference_mode()`` it was asked for in."""
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=dtype, device=device)


def _forget_pools() -> None:
    global _lock
    _pools.clear()
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork; a child that inherited the pool would wait for ever.
    os.register_at_fork(after_in_child=_forget_pools)
