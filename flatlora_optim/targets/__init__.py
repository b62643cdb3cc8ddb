"""What is perturbed: frozen weights, the adapters on them, and how strong the noise is in each row.

==================  ===========================================================================
``discovery``       which modules of a model carry an adapter, and why others are left out
``target``          one frozen weight with its adapter: the interface of all adapter types
``peft``            PEFT's adapters
``hand_written``    modules described by :func:`.register`
``libraries``       layers of loralib, LitGPT, torchtune, AdapterHub and Keras
``networks``        adapters outside the model that replace forwards: kohya's, LyCORIS
``probe``           runs a layer on a small input, to check its description
``weights``         reading a frozen weight: dense, experts, quantized, opaque
``sharding``        weights of which each process holds a part
``scales``          the paper's row scales ``sigma_t * ||W'[i, :]|| / sqrt(n)``
``unrecognized``    layers that look like LoRA, but are of no known type
``attributes``      looking up modules' attributes by name
==================  ===========================================================================
"""

from .discovery import Discovery, find_targets, register_target_type, why_inactive
from .hand_written import register
from .target import LowRank, Target, names_of
from .unrecognized import unrecognized
from .weights import DenseWeight, FrozenWeight, UnsupportedAdapterError, read_weight

__all__ = [
    "DenseWeight",
    "Discovery",
    "FrozenWeight",
    "LowRank",
    "Target",
    "UnsupportedAdapterError",
    "find_targets",
    "names_of",
    "read_weight",
    "register",
    "register_target_type",
    "unrecognized",
    "why_inactive",
]
