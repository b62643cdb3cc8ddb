"""Trains a recipe of this folder with Flat-LoRA.

    python examples/recipes/train.py math
    python examples/recipes/train.py nlu --variant cola --set sigma=0      # plain LoRA
    accelerate launch examples/recipes/train.py math                       # all GPUs
    python examples/recipes/train.py math --smoke                          # seconds, no download

The device is chosen by itself. ``--set`` changes any setting of the recipe.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import Trainer, TrainingArguments, set_seed

import settings
from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.integrations.transformers import FlatLoRACallback
from settings import Recipe
from tasks import build


def train(recipe: Recipe, output: Path, resume: bool = False) -> Trainer:
    """Trains, and saves adapters, tokenizer and recipe to ``output``."""
    arguments = training_arguments(recipe, output)
    set_seed(arguments.seed)
    task = build(recipe)
    base = torch.optim.AdamW(
        [p for p in task.model.parameters() if p.requires_grad],
        lr=arguments.learning_rate,
        weight_decay=arguments.weight_decay,
    )
    optimizer = FlatLoRAOptimizer(
        base, task.model, sigma=recipe["sigma"], total_steps="deferred", seed=arguments.seed
    )
    trainer = Trainer(
        task.model,
        arguments,
        train_dataset=task.rows,
        data_collator=task.collate,
        optimizers=(optimizer, None),
        callbacks=[FlatLoRACallback(optimizer)],
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_world_process_zero():
        task.adapted.save_pretrained(output)
        if task.tokenizer is not None:
            task.tokenizer.save_pretrained(output)
        settings.save(recipe, output)
    return trainer


def training_arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """Splits the recipe's batch over devices and accumulation steps."""
    devices = settings.processes().num_processes
    share, rest = divmod(recipe["batch_size"], devices)
    if rest or not share:
        raise SystemExit(f"batch_size {recipe['batch_size']} can't be split over {devices} devices")
    per_device = next(n for n in range(recipe["micro_batch_size"], 0, -1) if share % n == 0)
    defaults = {"logging_steps": 10, "logging_first_step": True, "report_to": "none"}
    return TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=share // per_device,
        remove_unused_columns=False,
        **(defaults | recipe["training"]),
    )


def main(arguments: list[str] | None = None) -> Trainer:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", choices=settings.NAMES)
    parser.add_argument("--variant", help="the data set, for recipes of several")
    parser.add_argument("--output", type=Path, help="folder of the run (default: outputs/<recipe>)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change settings")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model and a few rows, offline")
    options = parser.parse_args(arguments)

    recipe = settings.load(options.recipe, options.variant)
    output = options.output or Path("outputs") / (recipe["name"] + ("-smoke" if options.smoke else ""))
    if options.smoke:
        from smoke import shrink

        recipe = shrink(recipe, output / "smoke")
    return train(settings.override(recipe, options.set), output, options.resume)


if __name__ == "__main__":
    main()
