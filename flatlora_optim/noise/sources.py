"""The sources of noise by their names."""

from __future__ import annotations

from collections.abc import Callable

from .gaussian import GaussianNoise, NoiseSource
from .low_rank import LowRankNoise
from .table import NoiseTable

NOISE_SOURCES: dict[str, Callable[[], NoiseSource]] = {
    "gaussian": GaussianNoise,
    "table": NoiseTable,
    "low_rank": LowRankNoise,
}
"""A new source of noise is one class and one entry here."""


def noise_source(noise: str | NoiseSource) -> NoiseSource:
    """The source of this name, or ``noise`` if it is one.

    Raises:
        TypeError, ValueError: It is neither.
    """
    names = ", ".join(map(repr, NOISE_SOURCES))
    if isinstance(noise, str):
        if noise not in NOISE_SOURCES:
            raise ValueError(f"noise must be one of {names}, got {noise!r}")
        return NOISE_SOURCES[noise]()
    if isinstance(noise, type) or not callable(getattr(noise, "block", None)):
        raise TypeError(f"noise must be one of {names}, or an object with NoiseSource's block, got {noise!r}")
    return noise
