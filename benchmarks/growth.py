"""How the cost of a perturbation grows: with the weights, the rank, threads, accumulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cycles import Cycle, ours
from layers import flatlora, stack
from measure import interleave, num_threads

SIZE = "weight size"
LAYERS = "layers"
RANKS = "rank"
THREADS = "threads"
ACCUMULATION = "micro-batches per step"

Work = Callable[[], float | None]


def run(quick: bool) -> list[dict[str, Any]]:
    width = 512 if quick else 2048
    sizes = [256, 512, 1024] if quick else [1024, 2048, 4096, 8192]
    axes: dict[str, tuple[list[int], Callable[[int, str], Work]]] = {
        SIZE: (sizes, lambda n, noise: _cycle([(n, n)], noise)),
        LAYERS: ([1, 4, 16, 64], lambda n, noise: _cycle([(512, 512)] * n, noise)),
        RANKS: ([4, 8, 16, 32, 64], lambda n, noise: _cycle([(width, width)] * 2, noise, rank=n)),
        ACCUMULATION: ([1, 2, 4, 8], lambda n, noise: _accumulation(n, width, noise)),
        THREADS: ([1, 2], lambda n, noise: _on_threads(n, _cycle([(width, width)] * 2, noise))),
    }
    records = []
    for axis, (values, build) in axes.items():
        for noise in ("gaussian", "table"):
            print(f"  {axis}, {noise}", flush=True)
            variants = {str(value): build(value, noise) for value in values}
            seconds = interleave(variants, 3 if quick else 9, "cpu")
            records.append({"axis": axis, "noise": noise, "seconds": seconds})
    return records


def _cycle(shapes: list[tuple[int, int]], noise: str, **adapter: int) -> Cycle:
    return ours(stack(shapes, **adapter), noise=noise)  # type: ignore[arg-type]


def _on_threads(threads: int, cycle: Cycle) -> Work:
    def work() -> None:
        with num_threads(threads):
            cycle()

    return work


def _accumulation(micro_batches: int, width: int, noise: str) -> Work:
    """The time spent on noise, not on the model, in one optimizer step of the automatic style."""
    model = stack([(width, width)] * 2)
    optimizer = flatlora(model, noise=noise, auto=True)
    x = torch.randn(4, width)

    def work() -> float:
        before = optimizer.metrics()["seconds"]
        for _ in range(micro_batches):
            model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return optimizer.metrics()["seconds"] - before

    return work
