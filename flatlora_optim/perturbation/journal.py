"""What ``round(round(W + eps) - eps)`` gets wrong, written down.

The subtraction misses W only where the sum moved into a coarser binade: 4.6 % of the elements
of a bf16 weight at sigma = 0.05, 7.1 % in fp32. Their positions and bits are the side
information without which no exact inverse exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEGMENT = 1 << 16


class Journal:
    """Positions and values of single elements, in 2 bytes plus the element's own size each.

    Positions are sorted, so their upper bits are kept once per segment of 65,536 elements.
    """

    def __init__(self, positions: Tensor, values: Tensor, numel: int) -> None:
        """
        Args:
            positions: Ascending int64 indices below ``numel``.
            values: The elements at these positions, in any dtype.
        """
        bounds = torch.arange(0, numel + _SEGMENT, _SEGMENT, device=positions.device)
        self._starts = torch.searchsorted(positions, bounds)
        # uint16 has few kernels; wrapping into int16 keeps the same bits.
        self._low = positions.to(torch.int16)
        self._values = values

    def write_back(self, flat: Tensor) -> None:
        """Puts the recorded elements into the flat tensor they were taken from."""
        counts = self._starts.diff()
        segments = torch.arange(len(counts), device=flat.device).repeat_interleave(
            counts, output_size=len(self._low)
        )
        positions = (self._low.to(torch.int64) & (_SEGMENT - 1)) + segments * _SEGMENT
        flat[positions] = self._values

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._starts, self._low, self._values))
