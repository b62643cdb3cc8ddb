"""Perturb and restore alone, over the layer shapes of real models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flatlora_optim.targets.scales import RowNorms, merged_norms
from layers import (
    LLAMA_BLOCK,
    MINILM_LAYER,
    SMOLLM2_LAYER,
    adapted_weights,
    flatlora,
    frozen_bytes,
    stack,
    twin,
)
from measure import add_untracked, interleave, peak_memory
from transcription import Transcription

MODES = {
    f"{restore}, {noise}": {"restore": restore, "noise": noise}
    for noise in ("gaussian", "table")
    for restore in ("exact", "snapshot", "subtract")
}
TRANSCRIPTION = "transcription"
MEMORY_LIMIT = "memory limit"
ROW_SCALES = "row scales alone"

SHAPES = {
    "MiniLM (6 layers)": MINILM_LAYER * 6,
    "SmolLM2-135M (6 layers)": SMOLLM2_LAYER * 6,
    "Llama-2-7B (1 block)": LLAMA_BLOCK,
}
QUICK_SHAPES = {"MiniLM (1 layer)": MINILM_LAYER, "SmolLM2-135M (1 layer)": SMOLLM2_LAYER}

Cycle = Callable[[], None]


def run(quick: bool) -> list[dict[str, Any]]:
    return [
        _measure(name, stack(shapes, dtype=dtype), 3 if quick else _rounds(shapes))
        for name, shapes in (QUICK_SHAPES if quick else SHAPES).items()
        for dtype in (torch.float32, torch.bfloat16)
    ]


def _rounds(shapes: list[tuple[int, int]]) -> int:
    """More of them where one is short: about the same time for each model."""
    elements = sum(rows * columns for rows, columns in shapes)
    return min(15, max(3, round(6e8 / elements)))


def _measure(name: str, model: nn.Module, rounds: int) -> dict[str, Any]:
    dtype = str(next(adapted_weights(model)).weight.dtype).removeprefix("torch.")
    print(f"  {name}, {dtype}", flush=True)
    builders: dict[str, Callable[[nn.Module], Cycle]] = {
        MEMORY_LIMIT: memory_limit,
        TRANSCRIPTION: transcription,
        **{mode: lambda model, options=options: ours(model, **options) for mode, options in MODES.items()},
    }
    cycles: dict[str, Cycle] = {}
    memory: dict[str, int] = {}
    for variant, build in builders.items():

        def first_cycle(variant: str = variant, build: Callable[[nn.Module], Cycle] = build) -> None:
            cycles[variant] = build(twin(model))
            cycles[variant]()

        memory[variant] = peak_memory(first_cycle, "cpu") - _adapter_bytes(model)
    cycles[ROW_SCALES] = row_scales(twin(model))
    return {
        "model": name,
        "dtype": dtype,
        "bytes": frozen_bytes(model),
        "elements": sum(a.weight.numel() for a in adapted_weights(model)),
        "memory": memory,
        "seconds": interleave(cycles, rounds, "cpu"),
    }


def _adapter_bytes(model: nn.Module) -> int:
    """What a twin of the model itself takes."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def ours(model: nn.Module, **options: Any) -> Cycle:
    """A step without a forward: no gradients, so the base optimizer has nothing to do."""
    optimizer = flatlora(model, **options)

    def cycle() -> None:
        optimizer.perturb()
        add_untracked(optimizer)
        optimizer.step()

    return cycle


def transcription(model: nn.Module) -> Cycle:
    published = Transcription(model)

    def cycle() -> None:
        published.perturb()
        published.restore()

    return cycle


def memory_limit(model: nn.Module) -> Cycle:
    """The least that any method must do: read and write each weight twice."""
    weights = [a.weight for a in adapted_weights(model)]

    @torch.no_grad()
    def cycle() -> None:
        for weight in weights:
            weight.add_(0.0)
        for weight in weights:
            weight.sub_(0.0)

    return cycle


def row_scales(model: nn.Module) -> Cycle:
    """The part of a step's cost that lies in the norms of the merged weight's rows."""
    norms = [RowNorms(target) for target in flatlora(model).targets]

    def cycle() -> None:
        merged_norms(norms)

    return cycle
