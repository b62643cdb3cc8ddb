"""Flat-LoRA for any base optimizer and any training loop (arXiv 2409.14396).

The packages, each of which imports only those before it:

================  ====================================================================
``kernels``       making, adding and taking away noise: in C, in Triton, in torch operations
``targets``       what is perturbed: frozen weights, the adapters on them, row scales
``noise``         what the noise is: seeded sources of numbers
``perturbation``  how it gets into a layer, and the states of the weights
``optimizer``     :class:`FlatLoRAOptimizer`
``landscape``     measuring flatness
``integrations``  helpers for trainers
================  ====================================================================
"""

from .noise import GaussianNoise, LowRankNoise, NoiseKey, NoiseSource, NoiseTable
from .optimizer import FlatLoRAOptimizer
from .perturbation import WeightChangedError
from .targets import Target, find_targets, register, register_target_type

__all__ = [
    "FlatLoRAOptimizer",
    "GaussianNoise",
    "LowRankNoise",
    "NoiseKey",
    "NoiseSource",
    "NoiseTable",
    "Target",
    "WeightChangedError",
    "find_targets",
    "register",
    "register_target_type",
]
__version__ = "0.2.0"
