"""Finds what is perturbed: the frozen weights of a model that have an adapter."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from .attributes import innermost_base_layer
from .hand_written import HandWrittenLoRA
from .libraries import LIBRARIES, check_keras
from .networks import Network, check_network
from .peft import PeftAdditive, PeftLoRA, PeftParameter, unknown_method
from .sharding import check_engine
from .target import Target
from .weights import DenseWeight, UnsupportedAdapterError

T = TypeVar("T", bound=Target)

_TARGET_TYPES: list[type[Target]] = [
    HandWrittenLoRA,
    PeftParameter,
    PeftLoRA,
    PeftAdditive,
    *LIBRARIES,
    Network,
]
"""Tried in order on each module."""


@dataclass
class Discovery:
    """The targets of a model, and why other adapter layers are left out."""

    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason, by the name of the layer."""

    unrecognized: dict[str, str] = field(default_factory=dict)
    """The reason for modules that look like LoRA and are of no known type, by their names."""

    def report(self) -> str:
        every = {**self.skipped, **self.unrecognized}
        return "\n".join(f"  {name}: {reason}" for name, reason in every.items())


def find_targets(model: nn.Module, accept: Callable[[Target], str | None] = lambda target: None) -> Discovery:
    """Finds each frozen weight with an adapter on it.

    Args:
        model: Any module that contains adapter layers, or is one.
        accept: Returns None to take a target, or why not.

    Raises:
        ValueError: A base weight is trainable or on the meta device, a registration is wrong, or
            the model is wrapped by an engine that hides its weights (FSDP1, ZeRO-3, Keras).
    """
    check_engine(model)
    check_keras(model)
    found = Discovery()
    by_weight: dict[Hashable, Target] = {}
    # All adapted weights are counted, wanted or not: two optimizers of one model must not share numbers.
    first_blocks: dict[Hashable, int] = {}
    block = 0
    for name, module in model.named_modules():
        try:
            target = _match(name, module)
        except UnsupportedAdapterError as error:
            found.skipped[name] = str(error)
            continue
        attention = _merged_attention(name, model)
        if target is not None and attention is not None:
            found.skipped[name] = f"PEFT merges it in each forward of the attention layer {attention}"
            continue
        if target is not None:
            weight = target.weight.identity()
            if weight not in first_blocks:
                first_blocks[weight] = block
                block += target.weight.grid().blocks
            target.first_block = first_blocks[weight]
        reason = unknown_method(module) if target is None else accept(target)
        if reason is not None:
            found.skipped[name] = reason
        if target is None or reason is not None:
            continue
        _check(target)
        first = by_weight.setdefault(weight, target)
        if first is target:
            found.targets.append(target)
        elif first.weight.row_dim == target.weight.row_dim:
            first.tied.append(target)
        else:
            found.skipped[name] = (
                f"it shares its weight with {first.name}, which is stored the other way round"
            )
    if not found.targets and not found.skipped:
        check_network(model)
    _check_overlap(found.targets)
    return found


def register_target_type(target_type: type[T]) -> type[T]:
    """Makes :func:`find_targets` recognize another type of adapter layer. Usable as a decorator.

    The type that was registered last is tried first, on each module.

    Args:
        target_type: A subclass of :class:`.Target` with ``match``, ``adapter_parameters`` and ``delta``.

    Raises:
        TypeError: ``target_type`` is no subclass of ``Target``.
    """
    if not (isinstance(target_type, type) and issubclass(target_type, Target)):
        raise TypeError(f"a target type must be a subclass of Target, got {target_type!r}")
    if target_type not in _TARGET_TYPES:
        _TARGET_TYPES.insert(0, target_type)
    return target_type


def why_inactive(target: Target) -> str | None:
    """For ``find_targets``: accepts targets with an active adapter."""
    return None if any(True for _ in target.adapter_parameters()) else "none of its adapters is active"


def _match(name: str, module: nn.Module) -> Target | None:
    for target_type in _TARGET_TYPES:
        target = target_type.match(name, module)
        if target is not None:
            return target
    return None


def _merged_attention(name: str, model: nn.Module) -> str | None:
    """The name of the adapted ``nn.MultiheadAttention`` that the module is a part of."""
    path = name.split(".")
    outer = [".".join(path[:end]) for end, part in enumerate(path) if part == "base_layer"]
    return next(
        (
            layer
            for layer in outer
            if hasattr(innermost_base_layer(model.get_submodule(layer)), "in_proj_weight")
        ),
        None,
    )


def _check_overlap(targets: list[Target]) -> None:
    """Raises ValueError if two weights share a part of their memory."""
    weights = [(target.name, target.weight) for target in targets]
    places = [(weight.memory(), name, weight) for name, weight in weights if isinstance(weight, DenseWeight)]
    places.sort(key=lambda place: (str(place[0][0]), *place[0][1:]))
    for i, ((device, _, end), name, weight) in enumerate(places):
        for (other_device, start, _), other_name, other in places[i + 1 :]:
            if device != other_device or start >= end:
                break
            if weight.overlaps(other):
                raise ValueError(
                    f"the weights of {name} and {other_name} share a part of their memory, and noise on "
                    "one of them would be on the other; give each memory of its own (`clone()`)"
                )


def _check(target: Target) -> None:
    name = target.name or type(target.layer).__name__
    if target.weight.device.type == "meta":
        raise ValueError(
            f"{name}: its weight is on the meta device; load the model's weights before "
            "building the optimizer"
        )
    if isinstance(target.weight, DenseWeight):
        if target.weight.tensor.requires_grad:
            raise ValueError(
                f"{name}: its base weight is trainable. Flat-LoRA perturbs frozen weights only: "
                "call `requires_grad_(False)` on it, or leave it without an adapter"
            )
        if target.weight.tensor.is_inference():
            raise ValueError(
                f"{name}: its weight was made under `torch.inference_mode()` and can't be "
                "changed safely; load the model outside of it"
            )
