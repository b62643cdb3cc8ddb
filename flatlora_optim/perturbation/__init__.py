"""Two ways to make a layer compute with W + eps: writing the weight, or noise in the forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

import torch

from ..adapters import Target
from ..noise import Noise
from ..parallel import for_each
from ..weights import UnsupportedAdapterError
from .base import Perturbation
from .in_place import RESTORE_MODES, WeightChangedError
from .virtual import VirtualPerturbation

__all__ = [
    "RESTORE_MODES",
    "Perturbation",
    "VirtualPerturbation",
    "WeightChangedError",
    "apply_all",
    "choose_perturbation",
    "for_each_weight",
    "remove_all",
]

T = TypeVar("T")


def choose_perturbation(target: Target, mode: str, restore: str) -> Perturbation:
    """
    Raises:
        UnsupportedAdapterError: The target can't be perturbed in this mode.
    """
    if mode == "virtual" or (mode == "auto" and target.weight.kind != "dense"):
        return VirtualPerturbation(target)
    if target.weight.kind != "dense":
        raise UnsupportedAdapterError(
            f"its weight is {target.weight.kind} and can't be written in place; use mode='auto' or 'virtual'"
        )
    return RESTORE_MODES[restore](target)


def apply_all(perturbations: Sequence[Perturbation], noises: Sequence[Noise | None]) -> None:
    """Applies each noise, if there is one, to its target. ``remove_all`` takes back also a part."""

    def apply(pair: tuple[Perturbation, Noise | None]) -> None:
        perturbation, noise = pair
        if noise is not None:
            perturbation.apply(noise)

    for_each_weight(apply, list(zip(perturbations, noises, strict=True)), perturbations)


def remove_all(perturbations: Sequence[Perturbation]) -> None:
    """Removes every one, also when an exception (Ctrl-C, say) arrives in between."""
    try:
        for_each_weight(lambda perturbation: perturbation.remove(), perturbations, perturbations)
    except BaseException:
        # Removing twice does no harm, and one that can't be removed must not keep the others.
        for perturbation in perturbations:
            with suppress(Exception):
                perturbation.remove()
        raise


def for_each_weight(
    work: Callable[[T], object], items: Sequence[T], perturbations: Sequence[Perturbation]
) -> None:
    """Calls ``work`` once per item, each of which belongs to one of the perturbations.

    Many small weights share the threads out among them; few large ones use all, one by one. The
    parts of sharded weights talk to other processes, which has to happen in the same order there.
    """
    weights = [perturbation.target.weight for perturbation in perturbations]
    can_share = all(weight.device.type == "cpu" and weight.is_whole for weight in weights)
    if can_share and len(items) >= 4 * torch.get_num_threads():
        for_each(work, items)
    else:
        for item in items:
            work(item)
