"""Many steps: nothing drifts, nothing grows. `FLATLORA_SOAK=10000` runs as many as a real training."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
import time
from typing import Any

import pytest
import torch
from torch import nn

from helpers import MLP, flatlora, int_view, loss_of, mlp_batch, trainable, with_lora

STEPS = int(os.environ.get("FLATLORA_SOAK", "150"))
MODES: dict[str, dict[str, Any]] = {
    "exact": {"restore": "exact"},
    "snapshot": {"restore": "snapshot"},
    "virtual": {"mode": "virtual"},
    "table": {"noise": "table"},
}


def digest(model: nn.Module) -> str:
    """sha256 of every frozen bit."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            total.update(name.encode())
            total.update(int_view(parameter).numpy().tobytes())
    return total.hexdigest()


def resident() -> int:
    """Bytes of memory that the process holds right now; 0 where the system does not say."""
    if not sys.platform.startswith("linux"):
        return 0
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nothing_drifts_and_nothing_grows(dtype: torch.dtype, mode: str) -> None:
    torch.manual_seed(0)
    model = with_lora(MLP().to(dtype), ["fc1", "fc2"])
    options = {"schedule": "cosine", "total_steps": STEPS, "sigma": 0.1, **MODES[mode]}
    optimizer = flatlora(model, base=torch.optim.AdamW, lr=1e-3, **options)
    before, peak_noise = digest(model), 0.0
    batches = [mlp_batch(i, dtype) for i in range(8)]
    early, start = (0, 0), time.perf_counter()
    for step in range(STEPS):
        loss_of(model, batches[step % 8]).backward()
        peak_noise = max(peak_noise, optimizer.metrics()["noise_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if step == STEPS // 5:
            gc.collect()
            early = len(gc.get_objects()), resident()
    speed = STEPS / (time.perf_counter() - start)
    gc.collect()
    late = len(gc.get_objects()), resident()
    print(
        f"{dtype}, {mode}: {STEPS} steps, {speed:.0f} per second; from step {STEPS // 5} to the end "
        f"{early[0]:,} -> {late[0]:,} objects, {early[1] / 2**20:.2f} -> {late[1] / 2**20:.2f} MiB resident"
    )
    assert digest(model) == before
    assert peak_noise > 0.1
    assert late[0] - early[0] < 100
    assert late[1] - early[1] < 4 * 2**20
    assert all(p.isfinite().all() for p in trainable(model))
    assert optimizer.step_count == STEPS
