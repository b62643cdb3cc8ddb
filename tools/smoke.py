"""Trains a hand-written LoRA layer with the package that is installed, and needs torch alone.

Run by `tools/package.py` in a fresh environment, without NumPy and without a compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer, register


class LoRALinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, 2))
        register(self, weight="linear.weight", lora_A="down", lora_B="up")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + x @ self.down.T @ self.up.T


def train(dtype: torch.dtype, **options: object) -> None:
    model = nn.Sequential(LoRALinear(64, 48), nn.Tanh(), LoRALinear(48, 8)).to(dtype)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatLoRAOptimizer(
        torch.optim.AdamW(adapters, lr=1e-2), model, sigma=0.1, schedule="constant", **options
    )
    for x in torch.randn(3, 5, 64, dtype=dtype):
        loss = model(x).square().mean()
        assert optimizer.is_perturbed
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], values) for name, values in frozen.items())
    assert all(bool(p.any()) for p in adapters)
    optimizer.close()


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for restore in ("exact", "snapshot"):
            train(dtype, restore=restore)
        train(dtype, noise="table")
        train(dtype, mode="virtual")
    print("Training works: frozen weights are back to the bit, adapters have learned")


if __name__ == "__main__":
    main()
