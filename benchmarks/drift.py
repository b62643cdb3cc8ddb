"""What is left of a frozen weight after thousands of cycles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cycles import Cycle, ours, transcription
from layers import adapted_weights, stack

WEIGHT = (128, 256)
CYCLES = (1, 100, 1000, 10_000)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("exact", "snapshot", "subtract", "transcription")


def run(quick: bool) -> list[dict[str, Any]]:
    checkpoints = CYCLES[:2] if quick else CYCLES
    return [_drift(mode, dtype, checkpoints) for mode in MODES for dtype in DTYPES]


def _drift(mode: str, dtype: torch.dtype, checkpoints: tuple[int, ...]) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    print(f"  {mode}, {name}", flush=True)
    model = stack([WEIGHT], dtype=dtype)
    weight = next(adapted_weights(model)).weight
    clean = weight.clone()
    cycle: Cycle = transcription(model) if mode == "transcription" else ours(model, restore=mode)
    measured = {}
    for count in range(1, checkpoints[-1] + 1):
        cycle()
        if count in checkpoints:
            measured[str(count)] = _difference(weight, clean)
    return {"mode": mode, "dtype": name, "after": measured}


def _difference(weight: Tensor, clean: Tensor) -> dict[str, float]:
    """Compared by bits; the root mean square relative to that of the clean weight."""
    view = torch.int32 if clean.element_size() == 4 else torch.int16
    changed = (weight.view(view) != clean.view(view)).double().mean()
    difference = (weight.double() - clean.double()).square().mean().sqrt()
    return {"changed": float(changed), "rms": float(difference / clean.double().square().mean().sqrt())}
