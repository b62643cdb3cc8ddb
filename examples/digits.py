"""A task of seconds on real data: a vision transformer that knows the digits 0 to 4 learns 5 to 9.

It learns from few examples, of which some have wrong labels, and is tested on clean and on corrupted
images. :class:`Task` is what ``compare.py`` asks of a task.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

CORRUPTIONS = ("noise", "blur", "shift", "contrast", "rotation", "dropped pixels")


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
    """For square images in 4 x 4 patches. What comes before the blocks is frozen, and so made once."""

    def __init__(self, patch: int, classes: int = 5, width: int = 48, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(patch * patch, width)
        self.position = nn.Parameter(torch.randn(16, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def embedded(self, images: Tensor) -> Tensor:
        patches = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        return self.embed(patches.flatten(3).flatten(1, 2)) + self.position

    def features(self, states: Tensor) -> Tensor:
        return self.norm(self.blocks(states).mean(1))

    def forward(self, states: Tensor) -> Tensor:
        return self.head(self.features(states))


def pretrained(images: Tensor, labels: Tensor, *, patch: int, steps: int, shift: int) -> ViT:
    """Trained on these images, moved by up to ``shift`` pixels; the same for any number of threads."""
    torch.manual_seed(0)
    model = ViT(patch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = random.Random(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for batch, _ in zip(endless(len(images), 64, 0), range(steps), strict=False):
        by = [shift * generator.randint(-1, 1) for _ in range(2)]
        F.cross_entropy(model(model.embedded(images[batch].roll(by, (1, 2)))), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return model


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits of 8 x 8 pixels from 0 to 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 16.0, dtype=torch.float32), torch.tensor(data.target)


def new_and_old(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of the new classes, in a fixed random order, then of the old ones."""
    new, old = torch.where(labels >= 5)[0], torch.where(labels < 5)[0]
    new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0))]
    return images[new], labels[new] - 5, images[old], labels[old]


def corrupted(x: Tensor, name: str, pixel: int = 1) -> Tensor:
    """``pixel`` is how many pixels stand for one of an 8 x 8 image."""
    from scipy import ndimage

    generator = torch.Generator().manual_seed(1)
    images = x.numpy()
    if name == "noise":
        return (x + 0.2 * pixel**0.5 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    if name == "blur":
        return torch.from_numpy(ndimage.gaussian_filter(images, (0, 0.8 * pixel, 0.8 * pixel)))
    if name == "shift":
        return torch.from_numpy(ndimage.shift(images, (0, 0, pixel)))
    if name == "contrast":
        return 0.5 * x
    if name == "rotation":
        return torch.from_numpy(ndimage.rotate(images, 15, axes=(1, 2), reshape=False, order=1))
    return x * (torch.rand(x.shape, generator=generator) > 0.15)


def with_wrong_labels(labels: Tensor, classes: int, share: float, generator: torch.Generator) -> Tensor:
    """Exactly this share of the labels is replaced by another class."""
    wrong = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels = labels.clone()
    shift = torch.randint(1, classes, (len(wrong),), generator=generator)
    labels[wrong] = (labels[wrong] + shift) % classes
    return labels


def endless(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Indices of batches: each epoch in a new order."""
    generator = random.Random(seed)
    while True:
        order = generator.sample(range(count), count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


class Task:
    """Digits 5 to 9 from few examples. Each seed has its own examples, wrong labels and adapter."""

    title = "digits 5–9 from 100 examples, 20 % of them with wrong labels"  # noqa: RUF001
    steps = 600
    lr = 0.02
    sigma = 0.6
    rho = 0.1
    examples, wrong, batch = 100, 0.2, 25
    tests_new = 400

    def __init__(self, pretraining: int = 400) -> None:
        self.pretraining = pretraining

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return new_and_old(*digits())

    @cached_property
    def _pretrained(self) -> ViT:
        return pretrained(*self._data[2:], patch=2, steps=self.pretraining, shift=1)

    @cached_property
    def _tests(self) -> dict[str, Tensor]:
        x = self._data[0][: self.tests_new]
        images = {"clean": x} | {name: corrupted(x, name) for name in CORRUPTIONS}
        return {name: self._pretrained.embedded(changed).detach() for name, changed in images.items()}

    def _training_data(self, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, y = (part[self.tests_new :] for part in self._data[:2])
        chosen = torch.randperm(len(x), generator=generator)[: self.examples]
        return self._pretrained.embedded(x[chosen]).detach(), with_wrong_labels(
            y[chosen], 5, self.wrong, generator
        )

    def model(self, seed: int) -> nn.Module:
        """With a fresh adapter; the frozen weights are the same for all seeds."""
        vit = copy.deepcopy(self._pretrained)
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv", "proj", "fc1", "fc2"])
        model = get_peft_model(vit, config)
        head = model.base_model.model.head
        head.reset_parameters()
        head.requires_grad_(True)
        return model

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches without end."""
        x, y = self._training_data(seed)
        return ((x[index], y[index]) for index in endless(len(x), self.batch, seed))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def training_loss(self, model: nn.Module, seed: int) -> Tensor:
        """The loss whose flatness is measured."""
        return self.loss(model, self._training_data(seed))

    @torch.no_grad()
    def scores(self, model: nn.Module) -> dict[str, float]:
        """Accuracies from 0 to 1. ``in domain`` is like the training data, the rest is not."""
        labels = self._data[1][: self.tests_new]
        accuracy = {
            name: (model(x).argmax(-1) == labels).float().mean().item() for name, x in self._tests.items()
        }
        return {
            "clean images": accuracy.pop("clean"),
            "corrupted images": sum(accuracy.values()) / len(accuracy),
        }
