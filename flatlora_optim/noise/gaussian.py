"""Where standard-normal numbers come from: the interface, and the paper's independent Gaussians."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..kernels import kernels_of
from .key import NoiseKey


class NoiseSource(Protocol):
    """Where standard-normal numbers come from.

    Native and Triton kernels know this package's sources; noise from any other is added by torch
    operations.
    """

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        """The numbers of one block: the same for the same key and number, whoever asks.

        Called from several threads at once.

        Args:
            out: Contiguous float32 memory of the block's shape.

        Returns:
            ``out`` filled, or a tensor of its shape that the caller will not write to.
        """
        ...


class GaussianNoise:
    """Independent Gaussian noise for every element and step (the paper's)."""

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        return kernels_of(out.device).fill(out, key, number)
