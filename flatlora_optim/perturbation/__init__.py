"""Two ways to make a layer compute with W + eps: writing the weight, or noise in the forward."""

from __future__ import annotations

from collections.abc import Iterable

from ..targets import Target, UnsupportedAdapterError
from .base import Perturbation
from .in_place import RESTORE_MODES, WeightChangedError
from .virtual import VirtualPerturbation

__all__ = [
    "RESTORE_MODES",
    "Perturbation",
    "VirtualPerturbation",
    "WeightChangedError",
    "choose_perturbation",
    "remove_all",
]


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


def remove_all(perturbations: Iterable[Perturbation]) -> None:
    """Removes every one, also when an exception (Ctrl-C, say) arrives in between."""
    interruption: BaseException | None = None
    for perturbation in perturbations:
        try:
            perturbation.remove()
        except BaseException as error:
            interruption = interruption or error
            perturbation.remove()
    if interruption is not None:
        raise interruption
