"""Hand-written LoRA modules: those that :func:`register` describes, and loralib-style layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .attributes import find, has, is_set
from .target import LowRank, Target, values_of
from .weights import FrozenWeight, UnsupportedAdapterError, read_weight


@dataclass(frozen=True)
class Registration:
    """Where a hand-written LoRA module keeps its parts; see :func:`register`."""

    weight: str
    lora_A: str
    lora_B: str
    scaling: str | float
    transposed: bool = False


class HandWrittenLoRA(Target):
    """Modules described by :func:`register`, and loralib-style layers, found by themselves."""

    LORALIB: ClassVar[Registration] = Registration("weight", "lora_A", "lora_B", "scaling")

    def __init__(
        self, name: str, layer: nn.Module, owner: nn.Module, weight: FrozenWeight, parts: Registration
    ) -> None:
        super().__init__(name, layer, owner, weight)
        self.parts = parts

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        parts = module.__dict__.get("flatlora_registration")
        if parts is None:
            if not (
                isinstance(getattr(module, "lora_A", None), nn.Parameter)
                and has(module, "weight", "lora_B", "scaling")
            ):
                return None
            parts = cls.LORALIB
            if getattr(module, "fan_in_fan_out", False):
                raise UnsupportedAdapterError(
                    "its weight is stored transposed (`fan_in_fan_out`); describe it by "
                    "`flatlora_optim.register(module, ..., transposed=True)`"
                )
            if find(module, "weight").ndim != 2 or isinstance(module, nn.Embedding):
                raise UnsupportedAdapterError(
                    "of loralib-style layers only Linear is recognized; describe it by `register` (an "
                    "Embedding with `transposed=True`)"
                )
        path, _, attribute = parts.weight.rpartition(".")
        owner = module.get_submodule(path)
        weight = read_weight(owner, module, int(parts.transposed), attribute)
        target = cls(name, module, owner, weight, parts)
        try:
            target.delta()
        except UnsupportedAdapterError as error:
            if parts is cls.LORALIB:
                raise
            raise ValueError(str(error)) from None
        return target

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        for path in (self.parts.lora_A, self.parts.lora_B):
            part = find(self.layer, path)
            if isinstance(part, nn.Parameter):
                yield part

    def delta(self) -> LowRank | None:
        if is_set(self.layer, "disable_adapters"):
            return None
        device, parts = self.weight.device, self.parts
        scaling = find(self.layer, parts.scaling) if isinstance(parts.scaling, str) else parts.scaling
        left = values_of(find(self.layer, parts.lora_B), device).flatten(1)
        right = values_of(find(self.layer, parts.lora_A), device).flatten(1)
        return self.low_rank(left, right, float(scaling.detach() if isinstance(scaling, Tensor) else scaling))


def register(
    module: nn.Module,
    *,
    lora_A: str,
    lora_B: str,
    weight: str = "weight",
    scaling: str | float = 1.0,
    transposed: bool = False,
) -> nn.Module:
    """Describes a hand-written LoRA module, so that :class:`FlatLoRAOptimizer` perturbs it.

    The parts are named by attribute path and looked up anew at each step, so the module may be
    moved, cast, copied or pickled afterwards.

    Args:
        module: Computes ``x @ (weight + scaling * B @ A).T`` in whatever way.
        lora_A: Path of A, shape ``(r, n)`` (or its convolution kernel).
        lora_B: Path of B, shape ``(m, r)``.
        weight: Path of the frozen weight, shape ``(m, n)``.
        scaling: A number, or the path of one.
        transposed: Whether the weight is stored ``(n, m)``.

    Returns:
        ``module``, so that the call can wrap its construction.

    Raises:
        AttributeError: A path does not exist.
        TypeError: A path names something that is not a tensor, or not a number for ``scaling``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from flatlora_optim import find_targets, register
        >>> class LoRALinear(nn.Module):
        ...     def __init__(self, linear, rank):
        ...         super().__init__()
        ...         self.linear = linear.requires_grad_(False)
        ...         self.down = nn.Parameter(torch.randn(rank, linear.in_features))
        ...         self.up = nn.Parameter(torch.zeros(linear.out_features, rank))
        ...         register(self, weight="linear.weight", lora_A="down", lora_B="up")
        ...
        ...     def forward(self, x):
        ...         return self.linear(x) + x @ self.down.T @ self.up.T
        >>> model = nn.Sequential(LoRALinear(nn.Linear(6, 4), rank=2))
        >>> [target.name for target in find_targets(model).targets]
        ['0']
    """
    for path in (weight, lora_A, lora_B):
        if not isinstance(find(module, path), Tensor):
            raise TypeError(f"{path!r} of {type(module).__name__} is not a tensor; name the parameter itself")
    value = find(module, scaling) if isinstance(scaling, str) else scaling
    if not isinstance(value, (int, float, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"scaling must be a single number or the path of one, got {value!r:.80}")
    module.flatlora_registration = Registration(weight, lora_A, lora_B, scaling, transposed)  # type: ignore[assignment]
    return module
