"""Flat-LoRA in Hugging Face Trainer: one callback.

python examples/hf_trainer.py [--steps 200] [--sigma 0.05]      # several GPUs: torchrun instead of python
"""

import tempfile

import torch
from transformers import Trainer, TrainingArguments

import tiny
from flatlora_optim.integrations.transformers import FlatLoRACallback


def main(steps: int, sigma: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            tiny.model(),
            TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                learning_rate=5e-3,
                warmup_steps=steps // 10,
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
            callbacks=[FlatLoRACallback(sigma=sigma)],
        )
        trainer.train()  # logs sigma and the norm of the noise with the loss
        print(f"Result: loss {trainer.evaluate()['eval_loss']:.3f} on held-out sequences")


if __name__ == "__main__":
    main(**tiny.options(__doc__))
