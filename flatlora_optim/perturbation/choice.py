"""Which adapters of a model an optimizer perturbs, and how."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType

from torch import nn

from ..noise import GaussianNoise, LowRankNoise, NoiseSource
from ..targets import (
    DenseWeight,
    Discovery,
    Target,
    UnsupportedAdapterError,
    find_targets,
    unrecognized,
    why_inactive,
)
from .base import Perturbation
from .in_place import InPlace
from .low_rank import LowRankExperts, LowRankPerturbation
from .virtual import VirtualPerturbation


def choose_perturbations(
    model: nn.Module, optimized: set[int], mode: str, restore: str, source: NoiseSource | None
) -> tuple[list[Perturbation], Discovery]:
    """How each target is perturbed, and why other adapters are not.

    Args:
        optimized: The ids of the parameters in the base optimizer.

    Raises:
        ValueError: There is no target, or one can't be perturbed in the mode that was asked for.
    """
    found = find_targets(model, lambda target: _why_not_optimized(target, optimized))
    perturbations = []
    for target in found.targets:
        try:
            perturbation = choose_perturbation(target, mode, restore, source)
            if isinstance(perturbation, VirtualPerturbation):
                _check_fused(model, target)
                perturbation.is_called_by_users = _is_called_by_users(model, target)
            for sharing in target.sharing:
                sharing.check()
            perturbations.append(perturbation)
        except UnsupportedAdapterError as reason:
            if mode != "auto":
                raise ValueError(f"{target.name}: {reason}") from None
            found.skipped[target.name] = str(reason)
    found.unrecognized = unrecognized(model, found.targets, found.skipped, optimized)
    if not perturbations:
        left_out = found.report()
        skipped = f"\nFound, but not usable:\n{left_out}" if left_out else ""
        raise ValueError(
            f"no LoRA module to perturb in {type(model).__name__}. Looked for PEFT layers (`base_layer` with "
            "`lora_A`/`lora_B` of an active adapter), loralib-style layers (`weight`, `lora_A`, `lora_B`, "
            "`scaling`) and modules described by `flatlora_optim.register`, whose adapter parameters are in "
            "the base optimizer. Pass what get_peft_model returned, and build the base from its parameters."
            f"{skipped}"
        )
    return perturbations, found


def _is_called_by_users(model: nn.Module, target: Target) -> bool:
    """Whether only the user can call the layer: no module around it has a forward."""
    path = target.name.split(".") if target.name else []
    above = [model.get_submodule(".".join(path[:end])) for end in range(len(path))]
    return all(type(module).forward is nn.Module.forward for module in above)


def _check_fused(model: nn.Module, target: Target) -> None:
    """Raises UnsupportedAdapterError if a fused kernel computes without the layer's forward.

    unsloth and Axolotl put such kernels into attention and MLP modules, and into single layers: as their
    forwards, or as functions that the forward calls (``apply_qkv``, ``apply_o``).
    """
    parent, _, own = target.name.rpartition(".")
    layers = {target.name: target.layer, parent: model.get_submodule(parent)}
    for owner, module in layers.items():
        for place, function in module.__dict__.items():
            while isinstance(function, (MethodType, partial)):
                function = function.__func__ if isinstance(function, MethodType) else function.func
            if not (isinstance(function, FunctionType) and "apply_lora" in function.__qualname__):
                continue
            reads_output = place.startswith("apply_o")  # the projection after attention, not those before it
            if not place.startswith("apply_") or reads_output == own.startswith("o"):
                raise UnsupportedAdapterError(
                    f"a fused kernel ({function.__name__}) of {owner} reads its weight without calling its "
                    "forward, where the noise is; switch that kernel off"
                )


def _why_not_optimized(target: Target, optimized: set[int]) -> str | None:
    reason = why_inactive(target)
    if reason is None and not any(id(p) in optimized for p in target.adapter_parameters()):
        reason = "its adapter's parameters are not in the optimizer"
    return reason


def choose_perturbation(
    target: Target, mode: str, restore: str, source: NoiseSource | None = None
) -> Perturbation:
    """How the target is perturbed.

    Args:
        source: By default, low-rank noise in the forward, and the paper's in place.

    Raises:
        UnsupportedAdapterError: It can't be perturbed in this mode.
    """
    if getattr(target.owner, "max_norm", None) is not None:
        raise UnsupportedAdapterError("its forward renormalizes the weight itself (`max_norm`)")
    weight = target.weight
    # A layer that merges by itself must never do so into a weight with noise.
    can_be_written = isinstance(weight, DenseWeight) and not target.merges_by_itself
    if mode == "virtual" or (mode == "auto" and (not can_be_written or isinstance(source, LowRankNoise))):
        try:
            return _in_forward(target, source or LowRankNoise())
        except UnsupportedAdapterError:
            if mode == "virtual" or not can_be_written:
                raise
    if not isinstance(weight, DenseWeight):
        raise UnsupportedAdapterError(
            f"its weight is {weight.kind} and can't be written in place; use mode='auto' or 'virtual'"
        )
    tensor = weight.tensor
    if 0 in tensor.stride() and tensor.numel() > 0:
        raise UnsupportedAdapterError("its elements share memory; give each its own (`clone()`)")
    return InPlace(target, restore, source or GaussianNoise())


def _in_forward(target: Target, source: NoiseSource) -> Perturbation:
    if isinstance(source, LowRankNoise):
        kind = LowRankExperts if target.weight.kind == "experts" else LowRankPerturbation
        return kind(target, source)
    return VirtualPerturbation(target, source)
