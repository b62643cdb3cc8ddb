"""Flat-LoRA in a plain PyTorch loop: one line more than LoRA.

python examples/plain_loop.py [--steps 200] [--sigma 0.05]
"""

import argparse
from itertools import cycle

import torch
from torch.utils.data import DataLoader

import tiny
from flatlora_optim import FlatLoRAOptimizer


def main(steps: int, sigma: float) -> None:
    model = tiny.model()
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    optimizer = FlatLoRAOptimizer(base, model, sigma=sigma, total_steps=steps, seed=42)
    print(optimizer)

    batches = cycle(DataLoader(tiny.Counting(2048), batch_size=32))
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next(batches)).loss  # noise on
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
    held_out = next(iter(DataLoader(tiny.Counting(256, seed=1), batch_size=256)))
    with torch.no_grad():
        print(f"Result: loss {model(**held_out).loss.item():.3f} on held-out sequences")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--sigma", type=float, default=0.05)
    options = parser.parse_args()
    main(options.steps, options.sigma)
