"""MiniLM learns the sentiment of movie reviews; tested on three domains never trained on, too.

    python examples/compare.py --task examples/sentiment.py --seeds 3

The data is ICWSM-2014, with ratings by people from -4 to 4. Those within 0.5 of zero are left out:
there the raters themselves disagree about the sign.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

from digits import endless
from packages import icwsm2014, minilm

DOMAINS = {
    "movies": "movieReviewSnippets",
    "Amazon": "amazonReviewSnippets",
    "NYT": "nytEditorialSnippets",
    "tweets": "tweets",
}
Example = tuple[str, int]


@cache
def sentences(domain: str) -> list[Example]:
    """Shuffled: 1 for a positive mean rating, 0 for a negative."""
    labels = {}
    with (icwsm2014() / f"{DOMAINS[domain]}_GroundTruth.txt").open(encoding="utf-8") as lines:
        for line in lines:
            _, rating, text = line.rstrip("\n").split("\t")
            if abs(float(rating)) >= 0.5:
                labels[text] = int(float(rating) > 0)
    examples = list(labels.items())
    random.Random(0).shuffle(examples)
    return examples


class Task:
    title = "MiniLM on movie reviews"
    steps = 200
    lr = 2e-3
    sigma = 0.2
    rho = 0.05
    batch = 16
    tests = 400
    """Sentences of each domain."""

    def __init__(self) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(minilm())

    def _collate(self, examples: list[Example]) -> Any:
        texts, labels = zip(*examples, strict=True)
        batch = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        batch["labels"] = torch.tensor(labels)
        return batch

    def model(self, seed: int) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=2)
        config = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules="all-linear")
        return get_peft_model(model, config)

    def batches(self, seed: int) -> Iterator[Any]:
        train = sentences("movies")[1000:]
        return (self._collate([train[i] for i in batch]) for batch in endless(len(train), self.batch, seed))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss

    def training_loss(self, model: nn.Module, seed: int) -> Tensor:
        return self.loss(model, next(self.batches(seed)))

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        accuracies = {}
        for domain in DOMAINS:
            # Sentences of like length together, so that little is padded.
            examples = sorted(sentences(domain)[: self.tests], key=lambda example: len(example[0]))
            right = 0
            for i in range(0, len(examples), 32):
                batch = self._collate(examples[i : i + 32])
                right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
            accuracies[domain] = right / len(examples)
        return accuracies
