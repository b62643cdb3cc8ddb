"""LoRA layers of real shapes, and copies of models that share the frozen weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatlora_optim import FlatLoRAOptimizer

SIGMA = 0.05
RANK = 8

Shape = tuple[int, int]
"""Output and input size of a Linear layer."""

MINILM_LAYER: list[Shape] = [(384, 384)] * 4 + [(1536, 384), (384, 1536)]
SMOLLM2_LAYER: list[Shape] = [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)]
LLAMA_BLOCK: list[Shape] = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]

M = TypeVar("M", bound=nn.Module)


class LoRALinear(nn.Module):
    """A frozen Linear layer with an adapter, in the style of loralib."""

    def __init__(self, shape: Shape, rank: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        rows, columns = shape
        generator = torch.Generator(device).manual_seed(rows * columns)

        def normal(*size: int, std: float, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(
                torch.empty(size, dtype=dtype, device=device).normal_(0, std, generator=generator)
            )

        self.weight = normal(rows, columns, std=0.02, dtype=dtype).requires_grad_(False)
        self.lora_A = normal(rank, columns, std=columns**-0.5)
        self.lora_B = normal(rows, rank, std=0.02)
        self.scaling = 2.0

    def forward(self, x: Tensor) -> Tensor:
        update = self.scaling * (x.float() @ self.lora_A.T) @ self.lora_B.T
        return F.linear(x, self.weight) + update.to(x.dtype)


def stack(
    shapes: Sequence[Shape], *, rank: int = RANK, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> nn.Sequential:
    return nn.Sequential(*(LoRALinear(shape, rank, dtype, device) for shape in shapes))


class Adapted(NamedTuple):
    """One frozen weight and the product ``scaling * B @ A`` on it."""

    weight: Tensor
    A: Tensor
    B: Tensor
    scaling: float


def adapted_weights(model: nn.Module) -> Iterator[Adapted]:
    """Those of :class:`LoRALinear` and of PEFT's Linear with the adapter named "default"."""
    for module in model.modules():
        layer: Any = module
        if isinstance(module, LoRALinear):
            yield Adapted(module.weight, module.lora_A, module.lora_B, module.scaling)
        elif hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            yield Adapted(layer.base_layer.weight, a, b, layer.scaling["default"])


def frozen_bytes(model: nn.Module) -> int:
    """The size of all weights that carry an adapter."""
    return sum(a.weight.numel() * a.weight.element_size() for a in adapted_weights(model))


def twin(model: M) -> M:
    """A copy with adapters of its own whose frozen parameters lie in the same memory.

    They are parameters of their own, though: what one variant writes does not count as a change
    in another's, which would drop what that one keeps between steps.
    """
    memo = {
        # Quantized ones are of types of their own, and nobody writes them.
        id(p): nn.Parameter(p.data, requires_grad=False) if type(p) is nn.Parameter else p
        for p in model.parameters()
        if not p.requires_grad
    }
    return copy.deepcopy(model, memo)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def flatlora(model: nn.Module, **options: Any) -> FlatLoRAOptimizer:
    """Ours, with noise of constant strength, so that each step costs the same."""
    options = {"auto": False, **options}
    base = torch.optim.AdamW(trainable(model), lr=1e-4)
    return FlatLoRAOptimizer(base, model, sigma=SIGMA, schedule="constant", **options)
