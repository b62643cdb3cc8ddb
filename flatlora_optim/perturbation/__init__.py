"""Two ways to make a layer compute with W + eps: writing the weight, or noise in the forward."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch

from .. import kernels
from ..adapters import Target
from ..noise import Noise
from ..weights import UnsupportedAdapterError
from .base import Perturbation
from .in_place import RESTORE_MODES, InPlace, WeightChangedError, change_noticed, clean_copy
from .virtual import VirtualPerturbation

__all__ = [
    "RESTORE_MODES",
    "Perturbation",
    "VirtualPerturbation",
    "WeightChangedError",
    "apply_all",
    "change_noticed",
    "choose_perturbation",
    "clean_copy",
    "forget_changed",
    "remove_all",
]


def choose_perturbation(target: Target, mode: str, restore: str) -> Perturbation:
    """How the target is perturbed.

    Raises:
        UnsupportedAdapterError: It can't be, in this mode.
    """
    if getattr(target.owner, "max_norm", None) is not None:
        raise UnsupportedAdapterError("its forward renormalizes the weight itself (`max_norm`)")
    if mode == "virtual" or (mode == "auto" and target.weight.kind != "dense"):
        return VirtualPerturbation(target)
    if target.weight.kind != "dense":
        raise UnsupportedAdapterError(
            f"its weight is {target.weight.kind} and can't be written in place; use mode='auto' or 'virtual'"
        )
    tensor = target.weight.tensor  # type: ignore[attr-defined]
    if 0 in tensor.stride() and tensor.numel() > 0:
        raise UnsupportedAdapterError("its elements share memory; give each its own (`clone()`)")
    return InPlace(target, restore)


@torch.no_grad()
def apply_all(perturbations: Sequence[Perturbation], noises: Sequence[Noise | None]) -> None:
    """Applies each noise, if there is one, to its target. ``remove_all`` takes back also a part."""
    pairs = zip(perturbations, noises, strict=True)
    kernels.perturb([part for p, noise in pairs if noise is not None for part in p.apply(noise)])


def forget_changed(perturbations: Sequence[Perturbation]) -> list[Perturbation]:
    """Leaves weights that somebody else has written to them, and returns whose they are."""
    answers = [perturbation.changed() for perturbation in perturbations]
    changed = [perturbation for perturbation, answer in zip(perturbations, answers, strict=True) if answer]
    for perturbation in changed:
        perturbation.forget()
    return changed


def remove_all(perturbations: Sequence[Perturbation]) -> None:
    """Removes every one, also when an exception (Ctrl-C, say) arrives in between."""
    try:
        _remove(perturbations)
    except BaseException:
        # Removing twice does no harm, and one that can't be removed must not keep the others.
        for perturbation in perturbations:
            with suppress(Exception):
                _remove([perturbation])
        raise


@torch.no_grad()
def _remove(perturbations: Sequence[Perturbation]) -> None:
    kernels.restore([part for perturbation in perturbations for part in perturbation.remove()])
    for perturbation in perturbations:
        perturbation.forget()
