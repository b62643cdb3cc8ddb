"""What is perturbed: frozen weights, the adapters on them, and how strong the noise is in each row.

==================  ===========================================================================
``discovery``       which modules of a model carry an adapter, and why others are left out
``target``          one frozen weight with its adapter: the interface of all adapter types
``peft``            PEFT's adapters
``hand_written``    modules described by :func:`.register`, and loralib's
``weights``         reading a frozen weight: dense, quantized, opaque
``sharding``        weights of which each process holds a part
``scales``          the paper's row scales ``sigma_t * ||W'[i, :]|| / sqrt(n)``
``attributes``      looking into modules by the names of their attributes
==================  ===========================================================================
"""

from .discovery import Discovery, find_targets, register_target_type, why_inactive
from .hand_written import register
from .target import LowRank, Target
from .weights import DenseWeight, FrozenWeight, UnsupportedAdapterError, read_weight

__all__ = [
    "DenseWeight",
    "Discovery",
    "FrozenWeight",
    "LowRank",
    "Target",
    "UnsupportedAdapterError",
    "find_targets",
    "read_weight",
    "register",
    "register_target_type",
    "why_inactive",
]
