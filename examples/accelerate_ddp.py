"""Flat-LoRA on several processes with Accelerate; each draws its own noise.

accelerate launch --multi_gpu --num_processes 2 examples/accelerate_ddp.py [--steps 200] [--sigma 0.05]

Without a GPU, the same line starts two processes on the CPU.
"""

import gc

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

import tiny
from flatlora_optim import FlatLoRAOptimizer


def main(steps: int, sigma: float) -> None:
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), gradient_accumulation_steps=2)
    set_seed(0)
    model = tiny.model()
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    optimizer = FlatLoRAOptimizer(base, model, sigma=sigma, total_steps=steps, seed=42)
    model, prepared, loader, held_out = accelerator.prepare(
        model,
        optimizer,
        DataLoader(tiny.Counting(2048), batch_size=8, shuffle=True),
        DataLoader(tiny.Counting(256, seed=1), batch_size=128),
    )

    model.train()
    while optimizer.step_count < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                strength = optimizer.sigma  # that of this step, which ends now
                prepared.step()
                prepared.zero_grad()
            done = optimizer.step_count
            if accelerator.sync_gradients and done % max(1, steps // 10) == 0:
                accelerator.print(f"step {done:4d}/{steps}  loss {loss.item():.3f}  sigma {strength:.4f}")
            if done == steps:
                break

    model.eval()
    with torch.no_grad():
        losses = [accelerator.gather(model(**batch).loss).mean().item() for batch in held_out]
    accelerator.print(
        f"Result: loss {sum(losses) / len(losses):.3f} on held-out sequences, "
        f"{accelerator.num_processes} processes"
    )
    accelerator.free_memory()
    del model
    gc.collect()  # DDP's cycle would keep the process group until Python is torn down, where gloo can hang
    accelerator.end_training()


if __name__ == "__main__":
    main(**tiny.options(__doc__))
