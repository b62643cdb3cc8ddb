"""What is learned: each task has training, validation and test data in and out of its domain."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import packages

Scores = dict[str, float]
B = TypeVar("B")


class Task(Generic[B]):
    """One task of one size.

    Args:
        train: Number of training examples, at most.
        tests: Number of test examples of each domain, at most.
        flat: Number of training examples on which flatness is measured.
        label_noise: Share of the labels, for training and validation, that are wrong.
    """

    in_domain = ""
    """The score that is expected to be best; all others of the same unit are out of domain."""
    out_of_domain: tuple[str, ...] = ()

    def __init__(self, train: int, tests: int, flat: int, label_noise: float = 0.0) -> None:
        self.train, self.tests, self.flat, self.label_noise = train, tests, flat, label_noise

    def model(self, seed: int) -> nn.Module:
        """The pretrained model with a fresh adapter; the frozen weights are the same for all seeds."""
        raise NotImplementedError

    def batches(self, size: int, seed: int) -> Iterator[B]:
        """Training batches without end, in an order that only depends on the seed."""
        raise NotImplementedError

    def loss(self, model: nn.Module, batch: B) -> Tensor:
        raise NotImplementedError

    def validate(self, model: nn.Module) -> Scores:
        """``score`` (higher is better) and ``loss`` on data that is in no test."""
        raise NotImplementedError

    def test(self, model: nn.Module) -> Scores:
        raise NotImplementedError

    def training_loss(self, model: nn.Module) -> Tensor:
        """The loss whose flatness is measured, on fixed training examples."""
        raise NotImplementedError


def add_lora(model: nn.Module, targets: list[str], rank: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))


def endless(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of batches: each epoch in a new order."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(range(count), count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def with_wrong_labels(labels: Tensor, classes: int, share: float, seed: int = 0) -> Tensor:
    """Exactly this share of the labels is replaced by another class."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels = labels.clone()
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    labels[wrong] = (labels[wrong] + shift) % classes
    return labels


# ---------------------------------------------------------------------- digits


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """A vision transformer for 8x8 images in patches of 2x2."""

    def __init__(self, classes: int = 5, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        x = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(x.mean(1)))


class Digits(Task[Tensor]):
    """Scikit-learn's digits: a ViT that knows 0 to 4 learns 5 to 9. The shift: corrupted images."""

    in_domain = "clean"
    out_of_domain = ("noise", "blur", "shift", "contrast", "rotation", "dropped pixels")

    @cached_property
    def _data(self) -> dict[str, tuple[Tensor, Tensor]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images / 16.0, dtype=torch.float32)
        labels = torch.tensor(digits.target)
        new = torch.where(labels >= 5)[0]
        new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0))]
        old = torch.where(labels < 5)[0]
        parts = {"test": new[:400], "validation": new[400:600], "train": new[600 : 600 + self.train]}
        data = {name: (images[part], labels[part] - 5) for name, part in parts.items()}
        for name in ("train", "validation"):
            x, y = data[name]
            data[name] = x, with_wrong_labels(y, 5, self.label_noise)
        data["old"] = images[old], labels[old]
        clean, y = data["test"]
        data["test"] = clean[: self.tests], y[: self.tests]
        return data

    @cached_property
    def _pretrained(self) -> ViT:
        path = packages.cache() / "digits-vit.pt"
        torch.manual_seed(0)
        model = ViT()
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        x, y = self._data["old"]
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator = random.Random(0)
        for batch, _ in zip(endless(len(x), 64, 0), range(400), strict=False):
            shifts = generator.randint(-1, 1), generator.randint(-1, 1)
            F.cross_entropy(model(x[batch].roll(shifts, (1, 2))), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model

    def model(self, seed: int) -> nn.Module:
        model = add_lora(copy.deepcopy(self._pretrained), ["qkv", "proj", "fc1", "fc2"], 4, seed)
        model.base_model.model.head.reset_parameters()
        model.base_model.model.head.requires_grad_(True)
        return model

    def batches(self, size: int, seed: int) -> Iterator[Tensor]:
        return map(torch.tensor, endless(len(self._data["train"][0]), size, seed))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        x, y = self._data["train"]
        return F.cross_entropy(model(x[batch]), y[batch])

    def training_loss(self, model: nn.Module) -> Tensor:
        return self.loss(model, torch.arange(min(self.flat, len(self._data["train"][0]))))

    @torch.no_grad()
    def validate(self, model: nn.Module) -> Scores:
        x, y = self._data["validation"]
        logits = model(x)
        return {"score": accuracy(logits, y), "loss": F.cross_entropy(logits, y).item()}

    @torch.no_grad()
    def test(self, model: nn.Module) -> Scores:
        x, y = self._data["test"]
        images = {"clean": x} | {name: self._corrupted(name, x) for name in self.out_of_domain}
        return {name: accuracy(model(changed), y) for name, changed in images.items()}

    @staticmethod
    def _corrupted(name: str, x: Tensor) -> Tensor:
        from scipy import ndimage

        generator = torch.Generator().manual_seed(1)
        images = x.numpy()
        if name == "noise":
            return (x + 0.2 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
        if name == "blur":
            return torch.from_numpy(ndimage.gaussian_filter(images, (0, 0.8, 0.8)))
        if name == "shift":
            return torch.from_numpy(ndimage.shift(images, (0, 0, 1)))
        if name == "contrast":
            return 0.5 * x
        if name == "rotation":
            return torch.from_numpy(ndimage.rotate(images, 15, axes=(1, 2), reshape=False, order=1))
        return x * (torch.rand(x.shape, generator=generator) > 0.15)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).float().mean().item()


# ---------------------------------------------------------------------- sentiment


LAYERS_LEFT_ALONE = 4


class SentenceClassifier(nn.Module):
    """The last layers of MiniLM, mean pooling as in its sentence embedding, and a linear head."""

    def __init__(self, layers: nn.ModuleList, width: int) -> None:
        super().__init__()
        self.layers = layers
        self.head = nn.Linear(width, 2)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, mask[:, None, None, :])
        weight = mask[..., None].to(states.dtype)
        return self.head((states * weight).sum(1) / weight.sum(1))


class Sentence(NamedTuple):
    states: Tensor
    """What the layers that are left alone make of it, shape (tokens, width)."""
    label: int
    rating: float


class Sentiment(Task[list[Sentence]]):
    """ICWSM-2014, binary: trained on movie reviews, tested on three other domains too.

    The human ratings run from -4 to 4; as in the demo, sentences rated within 0.5 of zero are
    left out. ``r`` is the correlation of the difference of the logits with the rating. Adapters
    are on the last two of six layers, so that what the others make of a sentence is computed once.
    """

    in_domain = "movies"
    out_of_domain = ("Amazon", "NYT", "tweets")
    FILES: ClassVar = {
        "movies": "movieReviewSnippets",
        "Amazon": "amazonReviewSnippets",
        "NYT": "nytEditorialSnippets",
        "tweets": "tweets",
    }

    @cached_property
    def _encoder(self) -> tuple[nn.Module, nn.ModuleList]:
        """The model without its last layers, and these."""
        from transformers import AutoModel

        model = AutoModel.from_pretrained(packages.minilm(), add_pooling_layer=False).eval()
        layers = model.encoder.layer
        model.encoder.layer = layers[:LAYERS_LEFT_ALONE]
        return model, layers[LAYERS_LEFT_ALONE:]

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(packages.minilm())

    def _read(self, domain: str, start: int, count: int) -> list[Sentence]:
        """A part of the shuffled sentences of one domain."""
        path = packages.icwsm2014() / f"{self.FILES[domain]}_GroundTruth.txt"
        rows = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")]
        rated = [(text, float(rating)) for _, rating, text in rows if abs(float(rating)) >= 0.5]
        random.Random(0).shuffle(rated)
        rated = rated[start : start + count]
        states = self._states([text for text, _ in rated])
        return [Sentence(x, int(r > 0), r) for x, (_, r) in zip(states, rated, strict=True)]

    @torch.no_grad()
    def _states(self, texts: list[str]) -> list[Tensor]:
        model, _ = self._encoder
        states = []
        for i in range(0, len(texts), 32):
            tokens = self._tokenizer(
                texts[i : i + 32], truncation=True, max_length=48, padding=True, return_tensors="pt"
            )
            batch = model(**tokens).last_hidden_state
            lengths = tokens["attention_mask"].sum(1).tolist()
            states += [x[:length].clone() for x, length in zip(batch, lengths, strict=True)]
        return states

    @cached_property
    def _data(self) -> dict[str, list[Sentence]]:
        data = {domain: self._read(domain, 0, self.tests) for domain in self.FILES}
        data["validation"] = self._read("movies", 1000, 300)
        data["train"] = self._read("movies", 1300, self.train)
        for part in ("train", "validation"):
            labels = torch.tensor([sentence.label for sentence in data[part]])
            noisy = with_wrong_labels(labels, 2, self.label_noise).tolist()
            data[part] = [s._replace(label=label) for s, label in zip(data[part], noisy, strict=True)]
        return data

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        bottom, top = self._encoder
        model = SentenceClassifier(copy.deepcopy(top), bottom.config.hidden_size)
        adapted = add_lora(model, ["query", "key", "value", "dense"], 8, seed)
        adapted.base_model.model.head.requires_grad_(True)
        return adapted

    def batches(self, size: int, seed: int) -> Iterator[list[Sentence]]:
        train = self._data["train"]
        return ([train[i] for i in batch] for batch in endless(len(train), size, seed))

    def loss(self, model: nn.Module, batch: list[Sentence]) -> Tensor:
        return F.cross_entropy(self._logits(model, batch), torch.tensor([s.label for s in batch]))

    def training_loss(self, model: nn.Module) -> Tensor:
        return self.loss(model, self._data["train"][: self.flat])

    def validate(self, model: nn.Module) -> Scores:
        logits, labels, _ = self._predictions(model, "validation")
        return {"score": accuracy(logits, labels), "loss": F.cross_entropy(logits, labels).item()}

    def test(self, model: nn.Module) -> Scores:
        scores = {}
        for domain in self.FILES:
            logits, labels, ratings = self._predictions(model, domain)
            scores[domain] = accuracy(logits, labels)
            scores[f"{domain} r"] = float(np.corrcoef((logits[:, 1] - logits[:, 0]).numpy(), ratings)[0, 1])
        return scores

    @staticmethod
    def _logits(model: nn.Module, batch: list[Sentence]) -> Tensor:
        states = nn.utils.rnn.pad_sequence([s.states for s in batch], batch_first=True)
        lengths = torch.tensor([len(s.states) for s in batch])
        return model(states, torch.arange(states.shape[1]) < lengths[:, None])

    @torch.no_grad()
    def _predictions(self, model: nn.Module, part: str) -> tuple[Tensor, Tensor, list[float]]:
        # Sentences of like length together, so that little is padded.
        data = sorted(self._data[part], key=lambda sentence: len(sentence.states))
        logits = torch.cat([self._logits(model, data[i : i + 32]) for i in range(0, len(data), 32)])
        return logits, torch.tensor([s.label for s in data]), [s.rating for s in data]


# ---------------------------------------------------------------------- arithmetic


Exercise = tuple[list[int], int]
"""Tokens of question and answer, and where the answer begins."""


class Arithmetic(Task[list[Exercise]]):
    """SmolLM2 learns sums of two or three digits; out of domain are four of them, and two-digit numbers.

    Exact match: every token of the answer, and its end, is the most likely one given the tokens
    before it. That is when greedy decoding gives the answer.
    """

    in_domain = "three terms"
    out_of_domain = ("four terms", "two digits")
    # Least and most terms, and digits.
    SIZES: ClassVar = {"three terms": (3, 3, 1), "four terms": (4, 4, 1), "two digits": (2, 2, 2)}

    @cached_property
    def _language_model(self) -> tuple[nn.Module, Any]:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        gguf = packages.smollm2()
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        return model, tokenizer

    def _make(self, terms: int, most: int, digits: int, count: int, seed: int) -> list[Exercise]:
        import reasoning_gym

        items = reasoning_gym.create_dataset(
            "chain_sum",
            min_terms=terms, max_terms=most, min_digits=digits, max_digits=digits, size=count, seed=seed,
        )  # fmt: skip
        tokenizer = self._language_model[1]
        exercises = []
        for item in items:
            question = tokenizer(item["question"] + "\nAnswer:")["input_ids"]
            answer = tokenizer(" " + item["answer"])["input_ids"] + [tokenizer.eos_token_id]
            exercises.append((question + answer, len(question)))
        return exercises

    @cached_property
    def _data(self) -> dict[str, list[Exercise]]:
        # Short sums are few: no question of validation or test may be in training.
        data = {"validation": self._make(*self.SIZES[self.in_domain], self.tests, 1)}
        data |= {domain: self._make(*size, self.tests, 2) for domain, size in self.SIZES.items()}
        held_out = {tuple(ids) for exercises in data.values() for ids, _ in exercises}
        made = self._make(2, 3, 1, 2 * self.train, 0)
        data["train"] = [item for item in made if tuple(item[0]) not in held_out][: self.train]
        return data

    def model(self, seed: int) -> nn.Module:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        return add_lora(copy.deepcopy(self._language_model[0]), targets, 8, seed)

    def batches(self, size: int, seed: int) -> Iterator[list[Exercise]]:
        train = self._data["train"]
        return ([train[i] for i in batch] for batch in endless(len(train), size, seed))

    def loss(self, model: nn.Module, batch: list[Exercise]) -> Tensor:
        logits, labels = self._predictions(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    def training_loss(self, model: nn.Module) -> Tensor:
        return self.loss(model, self._data["train"][: self.flat])

    def validate(self, model: nn.Module) -> Scores:
        exercises = self._data["validation"]
        with torch.no_grad():
            loss = self.loss(model, exercises).item()
        return {"score": self._exact(model, exercises), "loss": loss}

    def test(self, model: nn.Module) -> Scores:
        return {domain: self._exact(model, self._data[domain]) for domain in self.SIZES}

    @staticmethod
    def _predictions(model: nn.Module, batch: list[Exercise]) -> tuple[Tensor, Tensor]:
        """Logits and labels of the answers' tokens only.

        Half of the work is spared: what all questions begin with is computed once, and the vocabulary
        layer for the answers alone.
        """
        model = model.get_base_model()
        columns = zip(*(ids[: start - 1] for ids, start in batch), strict=False)
        shared = [tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, columns)]
        past = model.model(input_ids=torch.tensor([shared]), use_cache=True).past_key_values
        past.batch_repeat_interleave(len(batch))

        begin, length = len(shared), max(len(ids) for ids, _ in batch)
        kept = max(len(ids) - start for ids, start in batch)
        # Padded between the two parts: the answers end together.
        ids = torch.tensor([[0] * (length - len(ids)) + ids[begin:] for ids, _ in batch])
        mask = torch.tensor(
            [[1] * begin + [0] * (length - len(ids)) + [1] * (len(ids) - begin) for ids, _ in batch]
        )
        labels = torch.full((len(batch), kept), -100)
        for row, (tokens, start) in enumerate(batch):
            labels[row, kept - len(tokens) + start :] = torch.tensor(tokens[start:])
        states = model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, begin:] - 1,
            past_key_values=past,
        ).last_hidden_state
        return model.lm_head(states[:, -kept - 1 : -1].contiguous()), labels

    @torch.no_grad()
    def _exact(self, model: nn.Module, exercises: list[Exercise]) -> float:
        right = 0
        for i in range(0, len(exercises), 16):
            logits, labels = self._predictions(model, exercises[i : i + 16])
            right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(1).sum())
        return right / len(exercises)
