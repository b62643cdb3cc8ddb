"""Hand-written LoRA modules, which :func:`register` describes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attributes import find, is_set
from .probe import complaint_of
from .target import LowRank, Target, factor_of, values_of
from .weights import FrozenWeight, UnsupportedAdapterError, read_weight

Delta = Callable[[Any], Any]


@dataclass(frozen=True)
class Registration:
    """Where a hand-written LoRA module keeps its parts; see :func:`register`."""

    weight: str
    lora_A: str | None = None
    lora_B: str | None = None
    scaling: str | float = 1.0
    transposed: bool = False
    delta: str | Delta | None = None
    parameters: tuple[str, ...] | None = None


class HandWrittenLoRA(Target):
    """Modules described by :func:`register`."""

    def __init__(
        self, name: str, layer: nn.Module, owner: nn.Module, weight: FrozenWeight, parts: Registration
    ) -> None:
        super().__init__(name, layer, owner, weight)
        self.parts = parts

    @classmethod
    def match(cls, name: str, module: nn.Module) -> Target | None:
        parts = module.__dict__.get("flatlora_registration")
        if parts is None:
            return None
        target = cls.described(name, module, parts)
        try:
            target.delta()
        except UnsupportedAdapterError as error:
            raise ValueError(str(error)) from None
        return target

    @classmethod
    def described(cls, name: str, module: nn.Module, parts: Registration) -> HandWrittenLoRA:
        """The target of a module with known parts.

        Raises:
            AttributeError: A part is not there.
            UnsupportedAdapterError: The weight can't be read.
        """
        owner, attribute = _owner_of(module, parts.weight)
        weight = read_weight(owner, module, int(parts.transposed), attribute)
        return cls(name, module, owner, weight, parts)

    def check(self) -> None:
        if (complaint := complaint_of(self)) is not None:
            raise ValueError(f"{self._called}: {complaint}")

    def adapter_parameters(self) -> Iterator[nn.Parameter]:
        parts = self.parts
        named = parts.parameters
        if named is None:
            named = tuple(path for path in (parts.lora_A, parts.lora_B) if path is not None)
        found = [parameter for path in named for parameter in _parameters_in(_found(self.layer, path))]
        if not found and parts.parameters is None:  # A and B are computed from other parameters
            found = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]
        yield from found

    def delta(self) -> LowRank | Tensor | None:
        if is_set(self.layer, "disable_adapters"):
            return None
        device, parts = self.weight.device, self.parts
        if parts.delta is not None:
            with torch.no_grad():
                return self._checked(parts.delta)
        assert parts.lora_A is not None
        assert parts.lora_B is not None
        scaling = _found(self.layer, parts.scaling) if isinstance(parts.scaling, str) else parts.scaling
        left = factor_of(_found(self.layer, parts.lora_B), device).flatten(1)
        right = factor_of(_found(self.layer, parts.lora_A), device).flatten(1)
        return self.low_rank(left, right, float(scaling.detach() if isinstance(scaling, Tensor) else scaling))

    def _checked(self, delta: str | Delta) -> LowRank | Tensor | None:
        made = _found(self.layer, delta) if isinstance(delta, str) else delta(self.layer)
        if made is None:
            return None
        if isinstance(made, tuple) and len(made) == 2:
            left, right = (values_of(factor, self.weight.device).flatten(1) for factor in made)
            return self.low_rank(left, right, 1.0)
        if not isinstance(made, Tensor):
            raise UnsupportedAdapterError(
                f"{self._called}: delta gave {type(made).__name__}; it must give a tensor of the weight's "
                "shape, a pair (B, A), or None while the adapter is off"
            )
        if made.shape != self.weight.shape:
            raise UnsupportedAdapterError(
                f"{self._called}: delta gave a tensor of shape {tuple(made.shape)}, but the weight is stored "
                f"as {tuple(self.weight.shape)}"
            )
        return values_of(made, self.weight.device)


def register(
    module: nn.Module,
    *,
    lora_A: str | None = None,
    lora_B: str | None = None,
    weight: str = "weight",
    scaling: str | float = 1.0,
    transposed: bool = False,
    delta: str | Delta | None = None,
    parameters: Sequence[str] | None = None,
) -> nn.Module:
    """Describes a hand-written LoRA module, so that :class:`FlatLoRAOptimizer` perturbs it.

    The parts are named by attribute path and looked up at each step, so the module may be
    moved, cast, copied or pickled afterwards. A path may lead through modules, properties, methods
    (which are called without arguments), keys, list items and objects that are no modules.

    When the optimizer is built, the module is tried on a small input, if possible: the adapter must change
    the output as its product would, merged into the weight.

    Args:
        module: Computes ``x @ (weight + scaling * B @ A).T``, in any way.
        lora_A: Path of A, shape ``(r, n)`` (or its convolution kernel).
        lora_B: Path of B, shape ``(m, r)``.
        weight: Path of the frozen weight, shape ``(m, n)``, or of the layer that keeps it in packed form.
        scaling: A number, or the path of one.
        transposed: Whether the weight is stored ``(n, m)``.
        delta: What the adapter adds to the weight, instead of A, B and scaling: the path of a method, or a
            function of the module. It returns a tensor of the weight's stored shape, or a pair ``(B, A)`` of
            the shapes above, or None while the adapter is off. To pickle the module, pickle must find the
            function by its name.
        parameters: Paths of the adapter's parameters, or of modules and lists that hold them. By default
            A and B, or the module's trainable parameters if A and B are computed.

    Returns:
        ``module``, so that the call can wrap its construction.

    Raises:
        AttributeError: A path does not exist.
        TypeError: A path leads to something that is not a tensor, or for ``scaling`` not a number; neither A
            and B nor ``delta`` is given, or both are.
        ValueError: The product does not have the weight's shape.

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
    if (delta is None) != (lora_A is not None and lora_B is not None) or (delta and (lora_A or lora_B)):
        raise TypeError("give either lora_A and lora_B, or delta")
    if delta is not None and not isinstance(delta, str) and not callable(delta):
        raise TypeError(f"delta must be the path of a method or a function of the module, got {delta!r:.80}")
    if isinstance(parameters, str):
        raise TypeError("parameters must be a list of paths")
    parts = Registration(
        weight, lora_A, lora_B, scaling, transposed, delta, None if parameters is None else tuple(parameters)
    )
    owner, attribute = _owner_of(module, weight)
    for path in (path for path in (lora_A, lora_B) if path is not None):
        if not isinstance(_found(module, path), Tensor):
            raise TypeError(f"{path!r} of {type(module).__name__} is not a tensor; name the parameter itself")
    value = _found(module, scaling) if isinstance(scaling, str) else scaling
    if not isinstance(value, (int, float, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1):
        raise TypeError(f"scaling must be a single number or the path of one, got {value!r:.80}")
    for path in parts.parameters or ():
        if not any(True for _ in _parameters_in(_found(module, path))):
            raise TypeError(f"{path!r} of {type(module).__name__} has no parameters")
    stored = getattr(owner, attribute, None)
    if isinstance(stored, Tensor) and stored.ndim < 2:
        raise ValueError(f"{weight!r} of {type(module).__name__} has one dim: it is no matrix")
    try:
        target = HandWrittenLoRA.described("", module, parts)
    except UnsupportedAdapterError:
        pass  # perhaps it is not quantized yet; the optimizer checks again
    else:
        try:
            target.delta()
        except UnsupportedAdapterError as error:
            raise ValueError(str(error)) from None
    module.flatlora_registration = parts  # type: ignore[assignment]
    return module


def _owner_of(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds the weight at this path, and the weight's name in it."""
    value = find(module, path)
    if isinstance(value, nn.Module):
        return value, "weight"
    outer, _, attribute = path.rpartition(".")
    owner = find(module, outer) if outer else module
    if not isinstance(value, Tensor) or not isinstance(owner, nn.Module):
        raise TypeError(
            f"{path!r} of {type(module).__name__} is not a tensor that a module holds; name the frozen "
            "weight itself, or the layer that keeps it in packed form"
        )
    return owner, attribute


def _found(module: nn.Module, path: str) -> Any:
    """The value at a path. A method is called, and gives its result."""
    value = find(module, path)
    if not callable(value) or isinstance(value, (Tensor, nn.Module)):
        return value
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return value  # it needs arguments
    return value()


def _parameters_in(value: Any) -> Iterator[nn.Parameter]:
    if isinstance(value, nn.Parameter):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.parameters()
    elif isinstance(value, dict):
        yield from _parameters_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _parameters_in(each)
