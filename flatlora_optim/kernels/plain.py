"""The kernels in plain torch operations: for any device, dtype and layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..parallel import rows_at_once, scratch
from .journal import Journal

if TYPE_CHECKING:
    from ..noise import Noise

name = "torch operations"
blocks_at_once = 1  # what is made in between stays in a core's own cache

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns, so that NaNs and signed zeros compare as what they are."""
    return tensor.view(_BITS[tensor.element_size()])


def rounded_sum(weight: Tensor, eps: Tensor, alpha: int = 1) -> Tensor:
    """``weight + alpha * eps``, added in float32 or wider and rounded once, in scratch memory.

    The sum of a finite float16 weight is kept finite: noise alone never overflows a layer.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = scratch(f"sum {alpha}", weight.shape, dtype, weight.device).copy_(weight)
    total.add_(eps.view(weight.shape), alpha=alpha)
    if weight.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        total = torch.where(weight.isfinite(), total.clamp(-largest, largest), total)
    if weight.dtype == dtype:
        return total
    return scratch(f"rounded {alpha}", weight.shape, weight.dtype, weight.device).copy_(total)


def takes(noise: Noise, part: Tensor) -> bool:
    return True


def fill(out: Tensor, seed: int) -> Tensor:
    generator = torch.Generator(device=out.device)
    generator.manual_seed(seed)
    return out.normal_(generator=generator)


def perturb(
    part: Tensor, noise: Noise, lo: int, hi: int, *, journal: bool, note: Callable[[Journal | None], object]
) -> None:
    eps = noise.block(lo, hi)
    perturbed = rounded_sum(part, eps)
    record = None
    if journal:
        record = Journal.of(bits(part.contiguous()), bits(rounded_sum(perturbed, eps, alpha=-1)))
    _write(part, perturbed, lambda: note(record))


def restore(
    part: Tensor, noise: Noise, lo: int, hi: int, *, journal: Journal | None, note: Callable[[], object]
) -> None:
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


def norm_increase(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    out = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)
    for rows in row_chunks(matrix):
        part = matrix[rows]
        if part.dtype != torch.float32:
            part = scratch("values", part.shape, torch.float32, part.device).copy_(part)
        out[rows] = increase_of_projected(torch.mm(part, right.T), left[rows], right)
    return out


def increase_of_projected(projected: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``norm_increase`` of a matrix whose product with ``right.T`` is known."""
    return ((2 * projected + left @ (right @ right.T)) * left).sum(1)


def row_chunks(matrix: Tensor) -> list[slice]:
    """Cuts a matrix into as many rows as are worked on at a time."""
    size = rows_at_once(matrix.shape[1], matrix.device.type)
    return [slice(lo, lo + size) for lo in range(0, len(matrix), size)]
