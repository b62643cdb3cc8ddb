"""Flat-LoRA in a plain PyTorch loop: one line more than LoRA.

python examples/plain_loop.py [--steps 200] [--sigma 0.05]
"""

from itertools import cycle

import torch
from torch.utils.data import DataLoader

import tiny
from flatlora_optim import FlatLoRAOptimizer


def main(steps: int, sigma: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny.model().to(device)
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    optimizer = FlatLoRAOptimizer(base, model, sigma=sigma, total_steps=steps, seed=42)
    print(optimizer)

    batches = cycle(DataLoader(tiny.Counting(2048), batch_size=32))
    model.train()
    for step in range(1, steps + 1):
        batch = {name: tensor.to(device) for name, tensor in next(batches).items()}
        loss = model(**batch).loss  # noise on
        loss.backward()
        metrics = optimizer.metrics()
        optimizer.step()  # noise off, then the step of AdamW
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            print(
                f"step {step:4d}/{steps}  loss {loss.item():.3f}  "
                f"sigma {metrics['sigma']:.4f}  noise norm {metrics['noise_norm']:.2f}"
            )

    model.eval()
    held_out = tiny.Counting(256, seed=1).rows.to(device)
    with torch.no_grad():
        loss = model(input_ids=held_out, labels=held_out).loss
    print(f"Result: loss {loss.item():.3f} on held-out sequences")


if __name__ == "__main__":
    main(**tiny.options(__doc__))
