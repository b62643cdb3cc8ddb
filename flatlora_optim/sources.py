"""The sources of noise by their names."""

from __future__ import annotations

from collections.abc import Callable

from .checkpoint import check_choice
from .noise import GaussianNoise, NoiseSource
from .table import NoiseTable

NOISE_SOURCES: dict[str, Callable[[], NoiseSource]] = {"gaussian": GaussianNoise, "table": NoiseTable}
"""A new source of noise is one class and one entry here."""


def noise_source(noise: str | NoiseSource) -> NoiseSource:
    """The source of this name, or ``noise`` if it is one.

    Raises:
        TypeError, ValueError: It is neither.
    """
    if isinstance(noise, str):
        check_choice("noise", noise, NOISE_SOURCES)
        return NOISE_SOURCES[noise]()
    if isinstance(noise, type) or not callable(getattr(noise, "block", None)):
        names = ", ".join(map(repr, NOISE_SOURCES))
        raise TypeError(f"noise must be one of {names}, or an object with NoiseSource's block, got {noise!r}")
    return noise
