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

    Args:
        original: The elements before the perturbation. Contiguous.
        restored: What the subtraction alone would make of them, as bit patterns. Overwritten.
    """

    def __init__(self, original: Tensor, restored: Tensor) -> None:
        missed = restored.bitwise_xor_(original.view(restored.dtype)).view(-1)
        positions = _where(missed.to(torch.bool))
        self._values = original.view(-1).index_select(0, positions)
        # uint16 has few kernels; wrapping into int16 keeps the same bits.
        self._low = positions.to(torch.int16)
        # Positions ascend, so the upper bits are kept once per segment of 65,536 elements.
        self._starts: Tensor | None = None
        if missed.numel() > _SEGMENT:
            bounds = torch.arange(0, missed.numel() + _SEGMENT, _SEGMENT, device=missed.device)
            self._starts = torch.searchsorted(positions, bounds)

    def write_back(self, flat: Tensor) -> None:
        """Puts the recorded elements into the flat tensor they were taken from."""
        positions = self._low.to(torch.int64).bitwise_and_(_SEGMENT - 1)
        if self._starts is not None:
            segments = torch.arange(len(self._starts) - 1, device=flat.device) * _SEGMENT
            positions += segments.repeat_interleave(self._starts.diff(), output_size=len(positions))
        flat[positions] = self._values

    @property
    def nbytes(self) -> int:
        parts = (self._low, self._values, self._starts)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def _numpy_is_there() -> bool:
    try:
        torch.empty(0).numpy()
    except RuntimeError:
        return False
    return True


_HAS_NUMPY = _numpy_is_there()


def _where(mask: Tensor) -> Tensor:
    """Ascending positions of the true elements of a flat mask, int64."""
    if _HAS_NUMPY and mask.device.type == "cpu":
        # Where a few per cent are true, four times as fast as torch's own.
        return torch.from_numpy(mask.numpy().nonzero()[0])
    return mask.nonzero().view(-1)
