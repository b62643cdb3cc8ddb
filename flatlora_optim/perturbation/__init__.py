"""How the noise gets into a layer, and the states that the frozen weights are in.

============  =====================================================================
``states``    the state machine: clean, perturbed, suspended
``choice``    which adapters of a model are perturbed, and in which of two ways
``in_place``  writing the weight: ``W += eps``, later ``W -= eps``, to the bit
``virtual``   noise in the forward: the weight is never written
``low_rank``  the same for noise of low rank, at the cost of two thin products
``base``      the interface of all three
============  =====================================================================
"""

from .base import Perturbation, apply_all, forget_changed, remove_all
from .choice import choose_perturbation, choose_perturbations
from .in_place import RESTORE_MODES, WeightChangedError, change_noticed, clean_copy
from .low_rank import LowRankPerturbation
from .states import NoisyWeights
from .virtual import VirtualPerturbation

__all__ = [
    "RESTORE_MODES",
    "LowRankPerturbation",
    "NoisyWeights",
    "Perturbation",
    "VirtualPerturbation",
    "WeightChangedError",
    "apply_all",
    "change_noticed",
    "choose_perturbation",
    "choose_perturbations",
    "clean_copy",
    "forget_changed",
    "remove_all",
]
