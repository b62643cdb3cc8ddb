"""What is compared: optimizers of the same adapters, all around AdamW, all stepped by a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer
from flatlora_optim.optimizer import schedule as schedules

Closure = Callable[[], Tensor]


class Stepper(Protocol):
    def step(self, closure: Closure) -> object: ...


class SAM:
    """Sharpness-aware minimization (Foret et al., 2021) in the space of A and B.

    The step follows the gradient at ``p + rho * g / ||g||``, which costs a second gradient.
    """

    def __init__(self, base: torch.optim.Optimizer, adapters: list[nn.Parameter], rho: float) -> None:
        self._base, self._adapters, self._rho = base, adapters, rho

    def step(self, closure: Closure) -> None:
        closure()
        gradients = [p.grad for p in self._adapters if p.grad is not None]
        norm = torch.stack([g.norm() for g in gradients]).norm() + 1e-12
        with _shifted(self._adapters, [g * (self._rho / norm) for g in gradients]):
            closure()
        self._base.step()


class AdapterNoise:
    """Noise like Flat-LoRA's, but relative to the rows of A and B and on them only."""

    def __init__(
        self, base: torch.optim.Optimizer, adapters: list[nn.Parameter], sigma: float, steps: int, seed: int
    ) -> None:
        self._base, self._adapters = base, adapters
        self._sigma, self._steps, self._done = sigma, steps, 0
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, closure: Closure) -> None:
        sigma = self._sigma * schedules.factor("cosine", self._done, self._steps)
        with _shifted(self._adapters, [self._noise(p.detach(), sigma) for p in self._adapters]):
            closure()
        self._base.step()
        self._done += 1

    def _noise(self, p: Tensor, sigma: float) -> Tensor:
        z = torch.randn(p.shape, generator=self._generator)
        return z * p.norm(dim=1, keepdim=True) * (sigma / p.shape[1] ** 0.5)


@contextmanager
def _shifted(parameters: list[nn.Parameter], shifts: list[Tensor]) -> Iterator[None]:
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, shift in zip(parameters, shifts, strict=True):
            p.add_(shift)
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


@dataclass(frozen=True)
class Method:
    name: str
    sigma: float = 0.0
    rho: float = 0.0
    on_adapters: bool = False

    def build(self, model: nn.Module, base: torch.optim.Optimizer, steps: int, seed: int) -> Stepper:
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        if self.rho:
            return SAM(base, adapters, self.rho)
        if self.on_adapters:
            return AdapterNoise(base, adapters, self.sigma, steps, seed)
        if self.sigma:
            return FlatLoRAOptimizer(base, model, sigma=self.sigma, total_steps=steps, seed=seed, auto=False)
        return base


METHODS = (
    Method("LoRA"),
    Method("Flat-LoRA 0.05", sigma=0.05),
    Method("Flat-LoRA 0.1", sigma=0.1),
    Method("Flat-LoRA 0.2", sigma=0.2),
    Method("LoRA + SAM", rho=0.05),
    Method("noise on A, B", sigma=0.1, on_adapters=True),
)
