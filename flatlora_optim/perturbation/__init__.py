"""Two ways to make a layer compute with W + eps: writing the weight, or noise in the forward."""

from .base import Perturbation
from .in_place import RESTORE_MODES, WeightChangedError
from .virtual import VirtualPerturbation

__all__ = ["RESTORE_MODES", "Perturbation", "VirtualPerturbation", "WeightChangedError"]
