"""Adding and subtracting the noise of one block in plain torch operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..noise import Noise, rounded_sum
from .journal import Journal

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns, so that NaNs and signed zeros compare as what they are."""
    return tensor.view(_BITS[tensor.element_size()])


def perturb(
    part: Tensor, noise: Noise, lo: int, hi: int, *, journal: bool, note: Callable[[Journal | None], object]
) -> None:
    """``part += eps`` for one block.

    Args:
        part: Local rows ``[lo, hi)`` of the weight.
        noise: The weight's noise.
        journal: Whether to record what the subtraction will miss.
        note: Called with the journal once the block is written, also if an exception follows.
    """
    eps = noise.block(lo, hi)
    perturbed = rounded_sum(part, eps)
    record = None
    if journal:
        record = Journal(bits(part.contiguous()), bits(rounded_sum(perturbed, eps, alpha=-1)))
    _write(part, perturbed, lambda: note(record))


def restore(
    part: Tensor, noise: Noise, lo: int, hi: int, *, journal: Journal | None, note: Callable[[], object]
) -> None:
    """Takes away what :func:`perturb` has put on."""
    restored = rounded_sum(part, noise.block(lo, hi), alpha=-1)
    if journal is not None:
        journal.correct(bits(restored).view(-1))
    _write(part, restored, note)


def _write(part: Tensor, values: Tensor, note: Callable[[], object]) -> None:
    """Writes a block and takes note of it; an exception in between leaves the two in agreement."""
    try:
        part.copy_(values)
        note()
    except BaseException:
        if torch.equal(bits(part.contiguous()), bits(values)):
            note()
        raise
