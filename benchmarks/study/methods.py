"""What is compared, as gradients of a population: all update A and B by AdamW.

Each method has one strength. Sources: SAM, Foret et al. 2021 (on A and B); Flat-LoRA, arXiv 2409.14396;
Bi-LoRA, arXiv 2508.19564; EFMLoRA, arXiv 2508.00522v3, equations 12, 13, 15 and 18.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .population import AdaptedLinear, Examples, Population

EMA = 0.9
"""Beta of EFMLoRA, the weight of the newest perturbation (the paper's notation)."""


class Method:
    """Plain LoRA; others change where the gradient is taken.

    Args:
        strength: Of each run, shape (runs,).
    """

    adapters = 1
    """How many adapters of the rank each layer has."""

    def __init__(self, population: Population, strength: Tensor, steps: int) -> None:
        self.population, self.strength, self.steps, self.done = population, strength, steps, 0

    @property
    def weight_decay(self) -> Tensor:
        return torch.zeros_like(self.strength)

    def gradient(self, batch: Examples) -> Tensor:
        return self.population.gradients(batch)

    def after(self) -> None:
        """Called after each optimizer step."""
        self.done += 1

    def finish(self) -> None:
        """Called when training has ended, and before every look at validation data."""

    def sigma(self) -> Tensor:
        """Strength now, by the paper's cosine."""
        return self.strength * (0.5 - 0.5 * math.cos(math.pi * self.done / self.steps))


class Dropout(Method):
    """Dropout of the adapter's input, as ``lora_dropout`` of PEFT."""

    def gradient(self, batch: Examples) -> Tensor:
        keep = (1 - self.strength)[:, None, None]
        for layer in self.population.layers:
            layer.keep = keep
        try:
            return self.population.gradients(batch)
        finally:
            for layer in self.population.layers:
                layer.keep = None


class WeightDecay(Method):
    @property
    def weight_decay(self) -> Tensor:
        return self.strength


class SAM(Method):
    """The gradient at ``p + rho * g / |g|`` for p in A and B."""

    def gradient(self, batch: Examples) -> Tensor:
        population = self.population
        ascent = population.gradients(batch) * population.on_adapters
        ascent *= (self.strength / (ascent.norm(dim=1) + 1e-12))[:, None]
        with population.shifted(ascent):
            return population.gradients(batch)


class AdapterNoise(Method):
    """Noise like Flat-LoRA's, but on A and B and relative to their rows (the paper's ablation)."""

    def __init__(self, population: Population, strength: Tensor, steps: int) -> None:
        super().__init__(population, strength, steps)
        self._generators = population.generators(1)

    def gradient(self, batch: Examples) -> Tensor:
        population = self.population
        shift = torch.zeros_like(population.theta)
        normal(shift, self._generators)
        shift *= population.on_adapters
        for (number, name), part in population.where.items():
            p = getattr(population.layers[number], name).detach()
            scale = p.norm(dim=2, keepdim=True) * (self.sigma() / p.shape[2] ** 0.5)[:, None, None]
            shift[:, part].unflatten(1, p.shape[1:]).mul_(scale)
        with population.shifted(shift):
            return population.gradients(batch)


class FlatLoRA(Method):
    """Gaussian noise on the full weights: what FlatLoRAOptimizer does."""

    def __init__(self, population: Population, strength: Tensor, steps: int) -> None:
        super().__init__(population, strength, steps)
        self._generators = population.generators(2)

    def numbers(self, layer: AdaptedLinear) -> Tensor:
        return normal(layer.weight.new_empty(len(self.population), *layer.weight.shape), self._generators)

    def gradient(self, batch: Examples) -> Tensor:
        with self.population.noisy(self.numbers, self.sigma()):
            return self.population.gradients(batch)


class LowRankFlatLoRA(FlatLoRA):
    """Noise ``diag(s) U V' / sqrt(r)``: of the same covariance."""

    rank = 4

    def numbers(self, layer: AdaptedLinear) -> Tensor:
        rows, columns = layer.weight.shape
        u = normal(layer.A.new_empty(len(self.population), rows, self.rank), self._generators)
        v = normal(layer.A.new_empty(len(self.population), columns, self.rank), self._generators)
        return torch.bmm(u, v.transpose(1, 2)).div_(self.rank**0.5)


class BiLoRA(Method):
    """A second adapter, ``W + s B1 A1 + s B2 A2``, ascends while the first descends.

    After each step its parts are scaled by ``sqrt(rho / c)`` where ``c``, the norm of all
    ``s B2 A2`` together, exceeds rho. It is taken away at the end. Ascent has the learning rate
    of descent, and AdamW too.
    """

    adapters = 2

    def __init__(self, population: Population, strength: Tensor, steps: int) -> None:
        super().__init__(population, strength, steps)
        half = population.rank
        second = torch.zeros_like(population.on_adapters)
        for (number, name), part in population.where.items():
            mask = torch.zeros_like(getattr(population.layers[number], name)[0], dtype=torch.bool)
            (mask[half:] if name == "A" else mask[:, half:]).fill_(True)
            second[part] = mask.flatten()
        self._second, self._half = second, half

    def gradient(self, batch: Examples) -> Tensor:
        return torch.where(self._second, -1.0, 1.0) * self.population.gradients(batch)

    @torch.no_grad()
    def after(self) -> None:
        super().after()
        squares = torch.zeros_like(self.strength)
        for layer in self.population.layers:
            a, b = layer.A[:, self._half :], layer.B[:, :, self._half :]
            gram = (b.transpose(1, 2) @ b) * (a @ a.transpose(1, 2))
            squares += layer.scaling**2 * gram.sum((1, 2))
        factor = (self.strength / squares.clamp_min(1e-24).sqrt()).clamp_max(1).sqrt()
        self.population.theta.mul_(torch.where(self._second, factor[:, None], 1.0))

    @torch.no_grad()
    def finish(self) -> None:
        self.population.theta.masked_fill_(self._second, 0.0)


class EFMLoRA(Method):
    """SAM in the full weights, carried over to B, by a moving average of past perturbations.

    At ``B + E``: the gradient of W is estimated from those of A and B by pseudo-inverses (eq. 12),
    scaled to norm rho in each layer, carried over to B (eq. 15) and averaged (eq. 18). The paper's
    printed sign(g) g / |g| of eq. 9 and 13 is read as SAM's g / |g|, as its own eq. 3 and 16.
    """

    def __init__(self, population: Population, strength: Tensor, steps: int) -> None:
        super().__init__(population, strength, steps)
        self._average = torch.zeros_like(population.theta)

    @torch.no_grad()
    def gradient(self, batch: Examples) -> Tensor:
        population = self.population
        with population.shifted(self._average), torch.enable_grad():
            gradient = population.gradients(batch)
        for number, layer in enumerate(population.layers):
            a, b = population.where[number, "A"], population.where[number, "B"]
            s, A, B = layer.scaling, layer.A, layer.B
            B = B + self._average[:, b].unflatten(1, B.shape[1:])  # where the gradient was taken
            grad_A = gradient[:, a].unflatten(1, A.shape[1:])
            grad_B = gradient[:, b].unflatten(1, B.shape[1:])
            inverse_A = pseudo_inverse(A)  # (runs, n, r)
            full = 0.5 / s * (grad_B @ inverse_A.transpose(1, 2) + pseudo_inverse(B).transpose(1, 2) @ grad_A)
            norm = full.flatten(1).norm(dim=1).clamp_min(1e-12)
            ascent = full * (self.strength / norm)[:, None, None]
            self._average[:, b].mul_(1 - EMA).add_((ascent @ inverse_A / s).flatten(1), alpha=EMA)
        return gradient


def pseudo_inverse(x: Tensor) -> Tensor:
    """Moore-Penrose, of a batch of thin matrices; zero where ``x`` is, as B is at the start."""
    if x.shape[1] < x.shape[2]:
        return pseudo_inverse(x.transpose(1, 2)).transpose(1, 2)
    thin = x.transpose(1, 2)
    return torch.linalg.pinv(thin @ x, rtol=1e-6, hermitian=True) @ thin


def normal(out: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Fills each run's part from the run's generator."""
    for part, generator in zip(out, generators, strict=True):
        part.normal_(generator=generator)
    return out


METHODS: dict[str, type[Method]] = {
    "LoRA": Method,
    "LoRA + dropout": Dropout,
    "LoRA + weight decay": WeightDecay,
    "early stopping": Method,
    "LoRA + SAM": SAM,
    "noise on A, B": AdapterNoise,
    "Flat-LoRA": FlatLoRA,
    "Flat-LoRA, low rank": LowRankFlatLoRA,
    "Bi-LoRA": BiLoRA,
    "EFMLoRA": EFMLoRA,
}
