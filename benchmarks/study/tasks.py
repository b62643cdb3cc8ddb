"""What is learned: each task has data to learn from and tests in and out of its domain."""

from __future__ import annotations

import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .population import Examples, Population

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import digits
import packages

__all__ = ["Split", "Task", "accuracy", "digits", "packages", "rated_sentences"]


class Split(NamedTuple):
    """What one seed learns from: labels may be wrong in both parts."""

    train: Examples
    validation: Examples


class Task(ABC):
    """Inputs are what the frozen lower part of a model makes of the data: computed once."""

    in_domain = ""
    """The test like the training data; all others are out of domain."""
    out_of_domain: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    """Last parts of the names of the layers that carry adapters."""
    heads: tuple[str, ...] = ()
    rank = 8
    scaling = 2.0
    classes = 2
    at_once = 1
    """How many runs share an operation: as many as are fastest."""
    device = torch.device("cpu")
    flatness_examples = 100
    """Training examples on which flatness is measured."""

    pool: Examples
    """Where training and validation data are drawn from, with true labels."""
    tests: dict[str, Examples]

    @abstractmethod
    def model(self) -> nn.Module:
        """Makes logits of the inputs. Not changed by anybody."""

    def population(self, seeds: Sequence[int], adapters: int = 1) -> Population:
        return Population(
            self.model(),
            seeds,
            targets=self.targets,
            heads=self.heads,
            rank=self.rank,
            adapters=adapters,
            scaling=self.scaling,
            device=self.device,
        )

    def split(self, seed: int, train: int, validation: int, wrong: float) -> Split:
        """Each seed has examples and wrong labels of its own."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)
        parts = []
        for index in (order[:train], order[train : train + validation]):
            part = self.pool.take(index)
            labels = digits.with_wrong_labels(part.labels, self.classes, wrong, generator)
            parts.append(Examples(part.inputs, labels).to(self.device))
        return Split(*parts)

    def remembered(self, population: Population) -> list[float] | None:
        """Accuracy of each run on what the model could do before, where that can be asked."""
        return None


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of examples, along the second dimension, whose every label is the most likely."""
    right = (logits.argmax(-1) == labels) | (labels == -100)
    return right.flatten(2).all(2).float().mean(1) if right.dim() > 2 else right.float().mean(1)


# ---------------------------------------------------------------------- sentiment


class SentenceClassifier(nn.Module):
    """The last layers of MiniLM, mean pooling as in its sentence embedding, and a linear head."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, 2)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        length = int(mask.sum(1).max())  # what is padding for all is left out
        states, mask = states[:, :length], mask[:, :length]
        for layer in self.layers:
            states = layer(states, mask[:, None, None, :])
        weight = mask[..., None].to(states.dtype)
        return self.head((states * weight).sum(1) / weight.sum(1))


FILES = {
    "movies": "movieReviewSnippets",
    "Amazon": "amazonReviewSnippets",
    "NYT": "nytEditorialSnippets",
    "tweets": "tweets",
}


def rated_sentences(domain: str) -> list[tuple[str, float]]:
    """Sentences of ICWSM-2014 with their mean rating from -4 to 4, shuffled; those near 0 are left out."""
    path = packages.icwsm2014() / f"{FILES[domain]}_GroundTruth.txt"
    rows = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")]
    rated = [(text, float(rating)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
    random.Random(0).shuffle(rated)
    return rated


class Sentiment(Task):
    """ICWSM-2014, binary: trained on movie reviews, tested on three other domains too.

    Adapters are on the last two of MiniLM's six layers.
    """

    in_domain = "movies"
    out_of_domain = ("Amazon", "NYT", "tweets")
    targets, heads, rank = ("query", "key", "value", "dense"), ("head",), 8
    flatness_examples = 40
    LAYERS_LEFT_ALONE = 4
    LONGEST = 32
    TESTS = 400
    POOL = 4000

    @cached_property
    def _encoder(self) -> tuple[nn.Module, nn.ModuleList]:
        """The model without its last layers, and these."""
        from transformers import AutoModel

        model = AutoModel.from_pretrained(packages.minilm(), add_pooling_layer=False).eval()
        layers = model.encoder.layer
        model.encoder.layer = layers[: self.LAYERS_LEFT_ALONE]
        return model, layers[self.LAYERS_LEFT_ALONE :]

    @cached_property
    def _top(self) -> nn.Module:
        bottom, layers = self._encoder
        return SentenceClassifier(layers, bottom.config.hidden_size)

    def model(self) -> nn.Module:
        return self._top

    def _read(self, domain: str, start: int, count: int) -> Examples:
        """A part of the shuffled sentences of one domain."""
        rated = rated_sentences(domain)[start : start + count]
        return self._examples([text for text, _ in rated], torch.tensor([int(r > 0) for _, r in rated]))

    @torch.no_grad()
    def _examples(self, texts: list[str], labels: Tensor) -> Examples:
        from transformers import AutoTokenizer

        model, _ = self._encoder
        tokenizer = AutoTokenizer.from_pretrained(packages.minilm())
        states, masks = [], []
        for i in range(0, len(texts), 32):
            tokens = tokenizer(
                texts[i : i + 32], truncation=True, max_length=self.LONGEST, padding="max_length",
                return_tensors="pt",
            )  # fmt: skip
            states.append(model(**tokens).last_hidden_state)
            masks.append(tokens["attention_mask"].bool())
        return Examples((torch.cat(states), torch.cat(masks)), labels)

    @cached_property
    def pool(self) -> Examples:
        return self._read("movies", self.TESTS, self.POOL)

    @cached_property
    def tests(self) -> dict[str, Examples]:
        return {domain: self._read(domain, 0, self.TESTS) for domain in FILES}
