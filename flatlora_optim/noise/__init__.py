"""What the noise is: ``eps[i, j] = scale[i] * z[i, j]`` with seeded ``z ~ N(0, 1)``.

============  =======================================================================
``key``       what a step's numbers depend on: seed, step, replica; seeds of blocks
``gaussian``  the interface of sources of ``z``, and the paper's independent Gaussians
``low_rank``  products of two thin matrices of such numbers
``table``     numbers read from a shared table
``sources``   sources by their names
``noise``     the noise of one weight: a recipe that makes any block of it again
============  =======================================================================
"""

from .gaussian import GaussianNoise, NoiseSource
from .key import NoiseKey
from .low_rank import FactoredNoise, LowRankNoise, let_go
from .noise import Noise
from .sources import noise_source
from .table import NoiseTable

__all__ = [
    "FactoredNoise",
    "GaussianNoise",
    "LowRankNoise",
    "Noise",
    "NoiseKey",
    "NoiseSource",
    "NoiseTable",
    "let_go",
    "noise_source",
]
