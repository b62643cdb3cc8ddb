"""Adapters and the frozen weights under them.

Adapter layers are recognized by their attributes, never by their class, so that no library is
imported and subclasses, renamed adapters and quantized variants are found alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .modules import find, has, innermost_base_layer, is_set
from .noise import Noise, NoiseKey, NoiseSource
from .sharding import gathered, whole
from .weights import FrozenWeight, UnsupportedAdapterError, read_weight


class LowRank(NamedTuple):
    """An adapter product ``scaling * left @ right``.

    Shapes ``(m, r)`` and ``(r, n)``, float32, where ``m`` counts output neurons.
    """

    left: Tensor
    right: Tensor
    scaling: float


class Target:
    """One frozen weight and the adapter on top of it.

    Args:
        name: Where the adapter layer sits in the model.
        layer: The adapter layer.
        owner: The module that holds the frozen weight (PEFT's ``base_layer``).
        weight: Reads the frozen weight.
    """

    def __init__(self, name: str, layer: nn.Module, owner: nn.Module, weight: FrozenWeight) -> None:
        self.name = name
        self.layer: Any = layer
        self.owner = owner
        self.weight = weight
        self.tied: list[Target] = []
        """Further adapter layers on the same weight; it is perturbed once, for all of them."""
        self.first_block = 0

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        """The target that ``module`` is, or None if it is of another type.

        Raises:
            UnsupportedAdapterError: It is of this type but can't be perturbed.
        """
        raise NotImplementedError

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the active adapters."""
        raise NotImplementedError

    def delta(self) -> LowRank | Tensor | None:
        """The scaled product of all active adapters: low-rank, or dense of the stored shape.

        None when no adapter is active, which leaves the weight unperturbed.
        """
        raise NotImplementedError

    def noise(self, source: NoiseSource, key: NoiseKey, scales: Tensor) -> Noise:
        """Noise for the weight, of these standard deviations in its rows."""
        return Noise(source, key, self.weight.grid(self.first_block), scales, self.weight.row_dim)

    @property
    def sharing(self) -> list[Target]:
        """This target, and those whose weight is the same."""
        return [self, *self.tied]

    @property
    def owners(self) -> list[nn.Module]:
        return list({id(each.owner): each.owner for each in self.sharing}.values())

    @property
    def merged(self) -> bool:
        """Whether an adapter has been written into the base weight."""
        return any(is_set(each.layer, "merged") for each in self.sharing)

    def check_ties(self) -> None:
        """Raises RuntimeError unless all layers that shared this weight still do."""
        for other in self.tied:
            if other.weight.identity() != self.weight.identity():
                raise RuntimeError(
                    f"{self.name} and {other.name} shared a weight when this optimizer was built, and "
                    "don't any more: build a new FlatLoRAOptimizer"
                )

    def all_parameters(self) -> Iterator[nn.Parameter]:
        """Those of all active adapters on this weight."""
        for sharing in self.sharing:
            yield from sharing.adapter_parameters()

    def has_gradient(self) -> bool:
        """Whether an active adapter on this weight has learned anything since the last step."""
        return any(p.grad is not None and bool(p.grad.any()) for p in self.all_parameters())

    def low_rank(self, left: Tensor, right: Tensor, scaling: float) -> LowRank:
        """The product, checked.

        Raises:
            UnsupportedAdapterError: It is not of the weight's shape.
        """
        rows, columns = self.weight.rows, self.weight.columns
        if right.ndim != 2 or left.shape != (rows, right.shape[0]) or right.shape[1] != columns:
            raise UnsupportedAdapterError(
                f"{self.name or type(self.layer).__name__}: B @ A has shapes {tuple(left.shape)} @ "
                f"{tuple(right.shape)}, but the weight has {rows} output neurons and {columns} inputs; check "
                "lora_A, lora_B (shapes (r, n) and (m, r)) and `transposed`"
            )
        return LowRank(left, right, scaling)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.weight.kind}, {tuple(self.weight.shape)})"


class PeftLoRA(Target):
    """PEFT's LoRA on Linear, ``Conv1D``, convolution or Embedding, dense or quantized."""

    VARIANTS: ClassVar[tuple[str, ...]] = ("ALora", "Dora", "MiCA", "Velora", "_Dora")
    """Those whose forward adds ``B @ A``, at least to a part of the tokens."""

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not (has(module, "base_layer", "scaling") and _lora_pairs(module)):
            return None
        if has(module, "parameter_name"):
            raise UnsupportedAdapterError(
                "adapts a bare parameter (`target_parameters`), whose axes are unknown; "
                "adapt the layer by `target_modules` instead"
            )
        if hasattr(module, "lora_E"):
            return None
        owner = innermost_base_layer(module)
        if not hasattr(owner, "weight") and hasattr(owner, "in_proj_weight"):
            raise UnsupportedAdapterError("PEFT merges the adapter into `in_proj_weight` in each forward")
        if getattr(owner, "groups", 1) > 1:
            raise UnsupportedAdapterError(
                "PEFT's adapter on a grouped convolution mixes channels that the weight keeps apart, "
                "so there is no merged weight to take the strength of the noise from"
            )
        unknown = {type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()}
        unknown = {variant for variant in unknown if not variant.startswith(cls.VARIANTS)}
        if unknown:
            raise UnsupportedAdapterError(f"{', '.join(unknown)} of PEFT does not add B @ A to the weight")
        row_dim = 1 if _is_transposed(module, owner) else 0
        target = cls(name, module, owner, read_weight(owner, module, row_dim))
        target.delta()
        return target

    def _active(self) -> Iterator[tuple[str, Any, Any]]:
        if is_set(self.layer, "disable_adapters"):
            return
        pairs = _lora_pairs(self.layer)
        for adapter in self.layer.active_adapters:
            if adapter in pairs:
                yield adapter, *pairs[adapter]

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        for _, a, b in self._active():
            for part in (a, b):
                if isinstance(part, nn.Parameter):
                    yield part
                elif "parametrizations" in part._modules:
                    yield from part.parameters()
                else:  # as fast as can be, for it is asked for at each step
                    yield from (parameter for parameter in part._parameters.values() if parameter is not None)

    def delta(self) -> LowRank | Tensor | None:
        terms = [self._product(adapter, a, b) for adapter, a, b in self._active()]
        if len(terms) < 2:
            return terms[0] if terms else None
        left = torch.cat([term.left * term.scaling for term in terms], 1)
        return LowRank(left, torch.cat([term.right for term in terms], 0), 1.0)

    def _product(self, adapter: str, a: Any, b: Any) -> LowRank:
        scaling = float(self.layer.scaling[adapter])
        a, b = _values(a, self.weight.device), _values(b, self.weight.device)
        if adapter in getattr(self.layer, "lora_embedding_A", ()):
            # Stored (tokens, dim) = A.T @ B.T: a row is what the layer outputs for one token.
            return self.low_rank(a.T, b.T, scaling)
        return self.low_rank(b.flatten(1), a.flatten(1), scaling)


class PeftAdditive(Target):
    """Other PEFT adapters that add ``get_delta_weight(adapter)``: AdaLoRA, LoHa, LoKr.

    Their delta has no cheap row norms, so it is made as a whole, one layer at a time.
    """

    MARKERS: ClassVar[tuple[str, ...]] = ("lora_E", "hada_w1_a", "lokr_w1")

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        if not (
            any(hasattr(module, marker) for marker in cls.MARKERS)
            and has(module, "base_layer", "get_delta_weight")
        ):
            return None
        owner = innermost_base_layer(module)
        weight = read_weight(owner, module, 1 if _is_transposed(module, owner) else 0)
        if weight.kind == "opaque":
            raise UnsupportedAdapterError("this adapter's norms need a base weight that can be read")
        return cls(name, module, owner, weight)

    def _active(self) -> list[str]:
        if is_set(self.layer, "disable_adapters"):
            return []
        marker = next(getattr(self.layer, m) for m in self.MARKERS if hasattr(self.layer, m))
        known = set(marker) | set(getattr(self.layer, "lokr_w1_a", ()))
        return [a for a in self.layer.active_adapters if a in known]

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        active = self._active()
        for path, parameter in self.layer.named_parameters():
            if not path.startswith("base_layer.") and set(active) & set(path.split(".")):
                yield parameter

    def delta(self) -> Tensor | None:
        return _sum_of_deltas(self, self._active())


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
        left = _values(find(self.layer, parts.lora_B), device).flatten(1)
        right = _values(find(self.layer, parts.lora_A), device).flatten(1)
        return self.low_rank(left, right, float(scaling.detach() if isinstance(scaling, Tensor) else scaling))


TARGET_TYPES: list[type[Target]] = [HandWrittenLoRA, PeftLoRA, PeftAdditive]
"""Tried in order on each module. A new type of adapter is one class and one entry here."""


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


def _lora_pairs(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A and B of each adapter, as modules or parameters."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for a_name, b_name in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        # nn.Module's own lookup is slow, and this is asked for at each step.
        a, b = module._modules.get(a_name), module._modules.get(b_name)
        if isinstance(a, (nn.ModuleDict, nn.ParameterDict)) and isinstance(
            b, (nn.ModuleDict, nn.ParameterDict)
        ):
            pairs.update({key: (a[key], b[key]) for key in a if key in b})
    return pairs


def _is_transposed(layer: nn.Module, owner: nn.Module) -> bool:
    """Whether the weight is stored (inputs, outputs), as in the Conv1D of GPT-2."""
    return bool(getattr(layer, "fan_in_fan_out", False)) and not isinstance(owner, nn.Embedding)


@torch.no_grad()
def _sum_of_deltas(target: Target, adapters: Iterable[str]) -> Tensor | None:
    """The dense products that PEFT itself makes, in the weight's stored shape."""
    total: Tensor | None = None
    layer, training = target.layer, target.layer.training
    try:
        layer.training = False  # earlier releases of PEFT apply their rank dropout here, too
        with gathered(layer, target.adapter_parameters()):
            for adapter in adapters:
                term: Tensor = layer.get_delta_weight(adapter)
                term = term.detach().to(target.weight.device, torch.float32).reshape(target.weight.shape)
                total = term if total is None else total + term
    finally:
        layer.training = training
    return total


def _values(part: nn.Module | Tensor, device: torch.device) -> Tensor:
    tensor: Tensor = part if isinstance(part, Tensor) else part.weight  # type: ignore[assignment]
    return whole(tensor).to(device, torch.float32)
