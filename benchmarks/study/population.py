"""Many LoRA runs of one model at once: a batch dimension over runs, seeds and settings alike.

On a CPU a small model spends its time between operations. Here the runs share each operation: every
adapted Linear layer holds an adapter for each run, and all else in the model treats the runs'
examples as one batch. The numbers are those of ``runs`` separate trainings with
:class:`flatlora_optim.FlatLoRAOptimizer` around ``torch.optim.AdamW`` (tests/test_study.py compares).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Examples:
    """Inputs of the model and their labels, one row an example; label -100 doesn't count."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> Examples:
        return Examples(tuple(x[index] for x in self.inputs), self.labels[index])

    def to(self, device: torch.device) -> Examples:
        return Examples(tuple(x.to(device) for x in self.inputs), self.labels.to(device))


class AdaptedLinear(nn.Module):
    """A frozen Linear layer with LoRA adapters of all runs: ``A`` (runs, r, n), ``B`` (runs, m, r)."""

    A: Tensor
    B: Tensor

    def __init__(self, linear: nn.Linear, rank: int, adapters: int, scaling: float) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)
        self.rank, self.adapters, self.scaling = rank, adapters, scaling
        self.noisy: Tensor | None = None
        """``W + noise`` of each run, shape (runs, m, n)."""
        self.keep: Tensor | None = None
        """Chance of each run that dropout keeps an input of the adapter, shape (runs, 1, 1)."""

    def parts(self) -> dict[str, tuple[int, ...]]:
        m, n = self.weight.shape
        rank = self.adapters * self.rank
        return {"A": (rank, n), "B": (m, rank)}

    def reset(self, generator: torch.Generator) -> dict[str, Tensor]:
        """A first adapter, or another to go beside it. As PEFT does: A uniform (Kaiming), B zero."""
        m, n = self.weight.shape
        return {
            "A": (2 * torch.rand(self.rank, n, generator=generator) - 1) / math.sqrt(n),
            "B": torch.zeros(m, self.rank),
        }

    def merged(self) -> Tensor:
        return torch.baddbmm(self.weight.expand(len(self.A), -1, -1), self.B, self.A, alpha=self.scaling)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.A), -1, x.shape[-1])
        if self.noisy is None:
            y = F.linear(rows, self.weight, self.bias)
        else:
            y = torch.baddbmm(self.bias, rows, self.noisy.transpose(1, 2))
        if self.keep is not None:
            rows = rows * (torch.rand_like(rows) < self.keep) / self.keep
        low = torch.bmm(rows, self.A.transpose(1, 2))
        y = torch.baddbmm(y, low, self.B.transpose(1, 2), alpha=self.scaling)
        return y.view(*x.shape[:-1], -1)


class TrainedLinear(nn.Module):
    """A Linear layer (the head of a classifier) that each run trains from its own random start."""

    weight: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.sizes = linear.out_features, linear.in_features

    def parts(self) -> dict[str, tuple[int, ...]]:
        return {"weight": self.sizes, "bias": (1, self.sizes[0])}

    def reset(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.sizes[1])
        shapes = self.parts().items()
        return {name: (2 * torch.rand(shape, generator=generator) - 1) * bound for name, shape in shapes}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(len(self.weight), -1, x.shape[-1])
        y = torch.baddbmm(self.bias, rows, self.weight.transpose(1, 2))
        return y.view(*x.shape[:-1], -1)


class Population:
    """The runs of one model.

    All trained numbers are ``theta``, shape (runs, parameters); ``A``, ``B`` and the heads are views.

    Args:
        model: Called with flat examples of all runs, gives logits. Left as it is: this is a copy.
        seeds: One for each run: of its adapters and, by :meth:`generators`, of its noise.
        adapters: How many each layer has, side by side.
        targets: Last parts of the names of the Linear layers that carry adapters.
        heads: The same of those that are trained as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        seeds: Sequence[int],
        *,
        targets: Sequence[str],
        heads: Sequence[str] = (),
        rank: int = 4,
        adapters: int = 1,
        scaling: float = 2.0,
        device: torch.device | None = None,
    ) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval().to(device)
        self.seeds, self.rank, self.device = list(seeds), rank, device or torch.device("cpu")
        self.layers: list[AdaptedLinear] = []
        trained: list[AdaptedLinear | TrainedLinear] = []
        for name, module in list(self.model.named_modules()):
            last = name.rpartition(".")[2]
            if not isinstance(module, nn.Linear) or last not in (*targets, *heads):
                continue
            new = AdaptedLinear(module, rank, adapters, scaling) if last in targets else TrainedLinear(module)
            if isinstance(new, AdaptedLinear):
                self.layers.append(new)
            setattr(self.model.get_submodule(name.rpartition(".")[0]), last, new)
            trained.append(new)
        self._lay_out(trained, adapters)
        self.last_losses = torch.zeros(len(seeds), device=self.device)
        """Of the runs, where the last gradient was taken."""

    def __len__(self) -> int:
        return len(self.seeds)

    def _lay_out(self, trained: list[AdaptedLinear | TrainedLinear], adapters: int) -> None:
        runs = len(self)
        generators = [torch.Generator().manual_seed(1_000_003 * seed) for seed in self.seeds]
        # Second adapters come after all first ones, which so are the same as without them.
        starts = [[module.reset(generator) for module in trained] for generator in generators]
        for start, generator in zip(starts, generators, strict=True):
            for _ in range(1, adapters):
                for parts, module in zip(start, trained, strict=True):
                    if isinstance(module, AdaptedLinear):
                        more = module.reset(generator)
                        parts["A"] = torch.cat([parts["A"], more["A"]])
                        parts["B"] = torch.cat([parts["B"], more["B"]], 1)
        count = sum(math.prod(shape) for module in trained for shape in module.parts().values())
        self.theta = torch.empty(runs, count, device=self.device)
        self.on_adapters = torch.zeros(count, dtype=torch.bool, device=self.device)
        """Which of the parameters are in A or B."""
        self.where: dict[tuple[int, str], slice] = {}
        """Columns of ``theta`` that hold A or B of a layer."""
        self.leaves: list[Tensor] = []
        begin = 0
        for number, module in enumerate(trained):
            for name, shape in module.parts().items():
                part = slice(begin, begin + math.prod(shape))
                begin = part.stop
                self.theta[:, part] = torch.stack([start[number][name].flatten() for start in starts])
                leaf = self.theta[:, part].unflatten(1, shape).requires_grad_()
                setattr(module, name, leaf)
                self.leaves.append(leaf)
                if isinstance(module, AdaptedLinear):
                    self.on_adapters[part] = True
                    self.where[self.layers.index(module), name] = part

    def generators(self, stream: int) -> list[torch.Generator]:
        """One for each run, of its own seed; streams from 1 don't share numbers."""
        return [torch.Generator(self.device).manual_seed(1_000_003 * seed + stream) for seed in self.seeds]

    def logits(self, examples: Examples) -> Tensor:
        """Of flat examples, all runs one after the other."""
        return self.model(*examples.inputs)

    def losses(self, examples: Examples) -> Tensor:
        """Mean loss of each run on its examples, shape (runs,)."""
        return mean_losses(self.logits(examples), examples.labels, len(self))

    def gradients(self, examples: Examples) -> Tensor:
        """Of each run's own loss, shape (runs, parameters)."""
        losses = self.losses(examples)
        self.last_losses = losses.detach()
        grads = torch.autograd.grad(losses.sum(), self.leaves)
        return torch.cat([g.flatten(1) for g in grads], 1)

    @contextmanager
    def shifted(self, shift: Tensor) -> Iterator[None]:
        """The parameters elsewhere for a while; they come back bit for bit."""
        before = self.theta.clone()
        with torch.no_grad():
            self.theta.add_(shift)
        try:
            yield
        finally:
            with torch.no_grad():
                self.theta.copy_(before)

    @contextmanager
    def noisy(self, numbers: Callable[[AdaptedLinear], Tensor], sigma: Tensor) -> Iterator[None]:
        """Noise of strength ``sigma`` (runs,) on the full frozen weights.

        ``numbers`` gives standard normal numbers for a layer, shape (runs, m, n) or (1, m, n).
        """
        with torch.no_grad():
            for layer in self.layers:
                scale = (
                    layer.merged().norm(dim=2, keepdim=True)
                    * (sigma / layer.weight.shape[1] ** 0.5)[:, None, None]
                )
                layer.noisy = torch.addcmul(layer.weight, numbers(layer), scale)
        try:
            yield
        finally:
            for layer in self.layers:
                layer.noisy = None


def mean_losses(logits: Tensor, labels: Tensor, runs: int) -> Tensor:
    logits = logits.flatten(0, -2)
    each = F.cross_entropy(logits, labels.flatten(), ignore_index=-100, reduction="none").view(runs, -1)
    return each.sum(1) / (labels != -100).view(runs, -1).sum(1)


class AdamW:
    """torch.optim.AdamW with a learning rate and weight decay for each run."""

    def __init__(self, theta: Tensor, lr: Tensor, weight_decay: Tensor) -> None:
        self.theta, self.lr, self.weight_decay = theta, lr[:, None], weight_decay[:, None]
        self.mean, self.square = torch.zeros_like(theta), torch.zeros_like(theta)
        self.steps = 0

    @torch.no_grad()
    def step(self, gradient: Tensor, factor: float) -> None:
        """``factor`` is the learning rate schedule's."""
        self.steps += 1
        lr = self.lr * factor
        self.mean.lerp_(gradient, 0.1)
        self.square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        deviation = (self.square / (1 - 0.999**self.steps)).sqrt_().add_(1e-8)
        self.theta.mul_(1 - lr * self.weight_decay)
        self.theta.sub_(self.mean / deviation * (lr / (1 - 0.9**self.steps)))
