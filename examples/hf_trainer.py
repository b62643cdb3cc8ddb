"""Flat-LoRA in Hugging Face Trainer: pass the optimizer in `optimizers`.

python examples/hf_trainer.py [--steps 200] [--sigma 0.05]      # several GPUs: torchrun instead of python
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

import tiny
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.transformers import FlatLoRACallback


def main(steps: int, sigma: float) -> None:
    model = tiny.model()
    base = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    # The callback sets total_steps from the trainer, whether max_steps or epochs are given.
    optimizer = FlatLoRAOptimizer(base, model, sigma=sigma, total_steps="deferred", seed=42)
    scheduler = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=16,
                gradient_accumulation_steps=2,
                logging_steps=max(1, steps // 10),
                eval_strategy="steps",
                eval_steps=max(1, steps // 2),
                save_steps=max(1, steps // 2),
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
            ),
            train_dataset=tiny.Counting(2048),
            eval_dataset=tiny.Counting(256, seed=1),
            optimizers=(optimizer, scheduler),
            callbacks=[FlatLoRACallback(optimizer)],
        )
        trainer.train()
        print(f"Result: loss {trainer.evaluate()['eval_loss']:.3f} on held-out sequences")


if __name__ == "__main__":
    main(**tiny.options(__doc__))
