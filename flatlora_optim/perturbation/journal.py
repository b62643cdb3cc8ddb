"""What ``round(round(W + eps) - eps)`` gets wrong, written down.

The subtraction misses W only where the sum moved into a coarser binade: 4.6 % of the elements
of a bf16 weight at sigma = 0.05, 7.5 % in fp32. Their positions and by how many units in the
last place they are missed are the side information without which no exact inverse exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SEGMENT = 1 << 16


class Journal:
    """Positions and corrections of single elements, almost always 2 bytes each.

    Args:
        original: The bit patterns before the perturbation. Contiguous.
        restored: Those that the subtraction alone would bring back. Overwritten.
    """

    def __init__(self, original: Tensor, restored: Tensor) -> None:
        # Integers wrap around: any two bit patterns have a difference.
        missed = torch.sub(original, restored, out=restored).view(-1)
        positions = _where(missed.to(torch.bool))
        self._corrections = narrowed(missed.index_select(0, positions))
        # uint16 has few kernels; wrapping into int16 keeps the same bits.
        self._low = positions.to(torch.int16)
        # Positions ascend, so the upper bits are kept once per segment of 65,536 elements.
        self._starts: Tensor | None = None
        if missed.numel() > _SEGMENT:
            bounds = torch.arange(0, missed.numel() + _SEGMENT, _SEGMENT, device=missed.device)
            self._starts = torch.searchsorted(positions, bounds)

    def correct(self, flat: Tensor) -> None:
        """Corrects, in place, the flat bit patterns that a subtraction brought back."""
        positions = self._low.to(torch.int64).bitwise_and_(_SEGMENT - 1)
        if self._starts is not None:
            segments = torch.arange(len(self._starts) - 1, device=flat.device) * _SEGMENT
            positions += segments.repeat_interleave(self._starts.diff(), output_size=len(positions))
        flat[positions] = flat.index_select(0, positions) + self._corrections

    @property
    def nbytes(self) -> int:
        parts = (self._low, self._corrections, self._starts)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def narrowed(corrections: Tensor) -> Tensor:
    """The integers in 16 bits, if all of them fit."""
    if corrections.element_size() > 2 and corrections.numel():
        low, high = corrections.aminmax()
        if low >= -(1 << 15) and high < 1 << 15:
            return corrections.to(torch.int16)
    return corrections


def _numpy_is_there() -> bool:
    try:
        torch.empty(0, device="cpu").numpy()
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
