"""Torch operations on several threads, and memory that they use again.

torch's generators fill a tensor on one thread. So whole pieces of work go to threads of our own, in each of
which torch runs on one thread.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

_this_thread = threading.local()


def interprets_triton() -> bool:
    """Whether Triton's interpreter runs its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def for_each(work: Callable[[T], object], items: Sequence[T]) -> None:
    """Calls ``work`` once per item, on as many threads as torch uses.

    Returns or raises only after every call that was begun has ended; the first exception is raised.
    """
    threads = 1 if interprets_triton() else torch.get_num_threads()
    if threads == 1 or len(items) < 2:
        for item in items:
            work(item)
        return
    todo = deque(items)

    def drain() -> None:
        try:
            for item in _taken_from(todo):
                work(item)
        except BaseException:
            todo.clear()
            raise

    futures: list[Future[None]] = []
    count = min(threads, len(items))
    try:
        with ThreadPoolExecutor(count, "flatlora", torch.set_num_threads, (1,)) as pool:
            try:
                with suppress(RuntimeError):  # no more threads, as when the interpreter exits
                    futures.extend(pool.submit(drain) for _ in range(count))
                if not futures:
                    drain()
                for future in futures:
                    future.result()
            except BaseException:
                todo.clear()  # nothing may write a weight any more once we are gone
                raise
    finally:
        torch.set_num_threads(threads)  # what a worker sets is the default of threads yet to come, too


def _taken_from(todo: deque[T]) -> Iterator[T]:
    with suppress(IndexError):
        while True:
            yield todo.popleft()


@functools.lru_cache(maxsize=1024)
def rows_at_once(row_size: int, device_type: str) -> int:
    """How many rows to work on at a time: few enough for a core's own cache on the CPU, more on an
    accelerator, which wants few, large kernels."""
    elements = 1 << 18 if device_type == "cpu" else 1 << 22
    return max(1, elements // max(1, row_size))


def scratch(slot: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that this thread's next call with the same slot overwrites.

    On the CPU, fresh memory for each of many small blocks would cost more than the work on it.
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
    """Memory that can be written outside of ``torch.inference_mode()``, too, if it is requested inside."""
    with torch.inference_mode(False):
        return torch.empty(*shape, dtype=dtype, device=device)
