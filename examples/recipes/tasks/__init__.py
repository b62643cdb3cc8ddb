"""What the modalities differ in: how model and data are made from a recipe."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel
from torch import nn

from settings import Recipe


@dataclass
class Task:
    """Everything that the training script needs of a modality.

    Args:
        model: Its forward returns the loss. Holds ``adapted``, or is it.
        adapted: The part that carries the adapters.
        rows: The training set.
        collate: Makes a batch of rows; None for the trainer's own.
        tokenizer: Saved beside the adapters, if there is one.
    """

    model: nn.Module
    adapted: PeftModel
    rows: Any
    collate: Callable[[list[Any]], Any] | None = None
    tokenizer: Any = None


MODULES = {
    "causal_lm": "text",
    "seq2seq": "text",
    "image_classification": "image_classification",
    "text_to_image": "text_to_image",
}


def build(recipe: Recipe) -> Task:
    """Loads model and data of a recipe. Imports what its modality needs, and no more."""
    module = importlib.import_module(f".{MODULES[recipe['task']]}", __name__)
    task: Task = module.build(recipe)
    return task


def lora_config(recipe: Recipe, **more: Any) -> LoraConfig:
    return LoraConfig(**recipe["lora"], **more)


def read_rows(recipe: Recipe, split: str = "split") -> Dataset:
    data = recipe["data"]
    return load_dataset(data["path"], data.get("subset"), split=data[split])


def first(rows: Dataset, recipe: Recipe) -> Dataset:
    """As many rows as the recipe trains on; all of them where it gives no number."""
    limit = recipe["data"]["rows"]
    return rows if limit is None else rows.select(range(min(limit, len(rows))))
