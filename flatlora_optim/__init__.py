"""Flat-LoRA for any base optimizer and any training loop (arXiv 2409.14396)."""

from .adapters import register
from .noise import GaussianNoise, NoiseKey, NoiseSource
from .optimizer import FlatLoRAOptimizer
from .perturbation import WeightChangedError
from .table import NoiseTable
from .targets import find_targets

__all__ = [
    "FlatLoRAOptimizer",
    "GaussianNoise",
    "NoiseKey",
    "NoiseSource",
    "NoiseTable",
    "WeightChangedError",
    "find_targets",
    "register",
]
__version__ = "0.1.0"
