"""What the noise is: ``eps[i, j] = scale[i] * z[i, j]`` with seeded ``z ~ N(0, 1)``.

============  =======================================================================
``key``       what a step's numbers depend on: seed, step, replica; and the seeds of blocks
``gaussian``  the interface of sources of ``z``, and the paper's independent Gaussians
``low_rank``  products of two thin Gaussian matrices
``table``     numbers read from a shared table
``noise``     the noise of one weight: a recipe that makes any block of it again
============  =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from .gaussian import GaussianNoise, NoiseSource
from .key import NoiseKey
from .low_rank import FactoredNoise, LowRankNoise, drop_scales, fill_factors
from .noise import Noise
from .table import NoiseTable

__all__ = [
    "FactoredNoise",
    "GaussianNoise",
    "LowRankNoise",
    "Noise",
    "NoiseKey",
    "NoiseSource",
    "NoiseTable",
    "drop_scales",
    "fill_factors",
    "noise_source",
]

_SOURCES: dict[str, Callable[[], NoiseSource]] = {
    "gaussian": GaussianNoise,
    "table": NoiseTable,
    "low_rank": LowRankNoise,
}


def noise_source(noise: str | NoiseSource) -> NoiseSource:
    """The source with this name, or ``noise`` itself if it is one.

    Raises:
        TypeError, ValueError: It is neither.
    """
    names = ", ".join(map(repr, _SOURCES))
    if isinstance(noise, str):
        if noise not in _SOURCES:
            raise ValueError(f"noise must be one of {names}, got {noise!r}")
        return _SOURCES[noise]()
    if isinstance(noise, type) or not callable(getattr(noise, "block", None)):
        raise TypeError(f"noise must be one of {names}, or an object with NoiseSource's block, got {noise!r}")
    return noise
