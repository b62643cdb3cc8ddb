"""CLIP's image tower under a frozen zero-shot head."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
)

from settings import Recipe, dtype, render

from . import Task, first, lora_config, read_rows

LOGIT_SCALE = 100.0
"""What CLIP's own temperature was clipped to, and ended at."""


class ZeroShotClassifier(nn.Module):
    """Scores images by the cosine to one frozen direction per class.

    Args:
        vision: Returns ``image_embeds``.
        head: One unit vector per class, shape ``(classes, dim)``.
    """

    def __init__(self, vision: nn.Module, head: Tensor) -> None:
        super().__init__()
        self.vision = vision
        self.register_buffer("head", head)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        embeds = self.vision(pixel_values=pixel_values).image_embeds
        logits = LOGIT_SCALE * F.normalize(embeds, dim=-1) @ self.head.T
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def build(recipe: Recipe) -> Task:
    rows = first(read_rows(recipe), recipe)
    vision = get_peft_model(load_vision(recipe), lora_config(recipe))
    classifier = ZeroShotClassifier(vision, make_head(recipe, rows))
    return Task(classifier, vision, with_pixels(recipe, rows))


def load_vision(recipe: Recipe) -> nn.Module:
    return CLIPVisionModelWithProjection.from_pretrained(recipe["model"], dtype=dtype(recipe))


@torch.no_grad()
def make_head(recipe: Recipe, rows: Dataset) -> Tensor:
    """What CLIP's text tower makes of the class names."""
    data = recipe["data"]
    tokenizer = AutoTokenizer.from_pretrained(recipe["model"])
    tower = CLIPTextModelWithProjection.from_pretrained(recipe["model"], dtype=dtype(recipe)).eval()
    names = [name.replace("_", " ") for name in rows.features[data["label"]].names]
    prompts = [render(data["prompt"], {"name": name}) for name in names]
    return F.normalize(tower(**tokenizer(prompts, padding=True, return_tensors="pt")).text_embeds, dim=-1)


def with_pixels(recipe: Recipe, rows: Dataset) -> Dataset:
    """The rows as the tower takes them; images are read and resized when they are asked for."""
    data = recipe["data"]
    processor = CLIPImageProcessor.from_pretrained(recipe["model"])
    side = processor.crop_size["height"]

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[data["image"]]]
        pixels = processor(
            images, size={"height": side, "width": side}, do_center_crop=False, return_tensors="pt"
        )["pixel_values"]
        return {"pixel_values": pixels.to(dtype(recipe)), "labels": batch[data["label"]]}

    return rows.with_transform(transform)
