# ruff: noqa: RUF001 (× and – are meant)
"""Timing, memory and the machine: what all parts of the suite measure with."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.kernels import native

Seconds = dict[str, list[float]]
"""Each variant's seconds, one per round; the i-th ones were measured in the same round."""


class Ratio(NamedTuple):
    """The median of paired ratios, and their quartiles."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}}–{self.high:{spec}})"


def interleave(variants: Mapping[str, Callable[[], float | None]], rounds: int, device: str) -> Seconds:
    """Runs A, B, C, A, B, C, … so that whatever else the machine does meets all alike.

    The first round warms up and is not counted. A variant may return its own seconds.
    """
    seconds: Seconds = {name: [] for name in variants}
    for round_number in range(rounds + 1):
        for name, work in variants.items():
            synchronize(device)
            start = time.perf_counter()
            own = work()
            synchronize(device)
            if round_number:
                seconds[name].append(time.perf_counter() - start if own is None else own)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(ratios) == 1:
        return Ratio(*ratios * 3)
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(median, low, high)


def peak_memory(work: Callable[[], object], device: str) -> int:
    """The most bytes that were allocated at one time by ``work``, over what there was before.

    On the CPU, torch's profiler reports each allocation that torch makes, temporaries inside of
    operators included. It sees only the thread it was started on, so ``work`` runs on one
    thread: a new one, which has none of the buffers that threads keep for later. What native code
    allocates is added as it is told to ``add_untracked``.
    """
    global _untracked
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    _untracked = 0
    try:
        with num_threads(torch.get_num_threads()), ThreadPoolExecutor(1) as thread:
            return thread.submit(_peak_on_this_thread, work).result() + _untracked
    finally:
        _untracked = None


_untracked: int | None = None


def add_untracked(optimizer: FlatLoRAOptimizer) -> None:
    """To be called while the weights are perturbed. Does nothing but while memory is measured."""
    global _untracked
    if _untracked is not None:
        parts = (part for p in optimizer._weights.perturbations for part in getattr(p, "_parts", ()))
        journals = sum(part.nbytes for part in parts if isinstance(part, native.Part))
        _untracked = max(_untracked, journals)


def _peak_on_this_thread(work: Callable[[], object]) -> int:
    with num_threads(1), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"]
    assert changes, "this build of torch does not report its allocations"
    now = peak = 0
    for _, _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def machine(device: str) -> dict[str, Any]:
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device == "cuda":
        described["gpu"] = torch.cuda.get_device_name()
    return described


def commit() -> str:
    """The code that is measured; with a plus sign where the package is not quite that of the commit."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "-s", "flatlora_optim") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def load_average() -> float:
    """Runnable processes over the last minute: far more than one before a run means a busy machine."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else float("nan")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()
