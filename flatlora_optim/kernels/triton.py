"""Triton kernels: one pass over the weight each for norms, perturb (with journal) and restore.

The noise is counter-based Philox (Salmon et al. 2011): an element's number depends on the
block's seed and the element's place in it, so nothing of the weight's size is ever stored. The
module imports Triton; ask :func:`flatlora_optim.kernels.has_triton` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import part, plain
from .journal import narrowed
from .part import Keep, Key, Recipe
from .plain import Product

name = "Triton"
blocks_at_once = 1

_LARGEST_RANK = 64
"""The kernel keeps a rank's sums in registers: beyond, it takes minutes to compile, and spills."""

TILE = 1024
"""Elements per program. A position within a tile fits the 16 bits that the journal has for it."""


# Seeds and offsets are new numbers at each call: no variant is to be compiled for their divisors.
_jit = triton.jit(do_not_specialize=["seed", "offset"])


@triton.jit
def _rounded_sum(w, eps, dtype: tl.constexpr):
    """``round(w + eps)``; a finite float16 weight stays finite."""
    total = w.to(tl.float32) + eps
    if dtype == tl.float16:
        finite = tl.abs(w.to(tl.float32)) <= 65504.0
        clamped = tl.minimum(tl.maximum(total, -65504.0), 65504.0)
        total = tl.where(finite, clamped, total)
    if dtype == tl.bfloat16:
        return _round_to_bfloat16(total)
    return total.to(dtype)


@triton.jit
def _round_to_bfloat16(x):
    """To the nearest, ties to even, as torch does; Triton's interpreter would truncate."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Rounding could carry a NaN into an infinity.
    nearest = tl.where(x == x, rounded, (bits >> 16) | 0x40)
    return nearest.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _noise(scales, place, row_size, seed, offset, mask, ROW_DIM: tl.constexpr):
    """``scale * z`` of the elements at ``place`` of a block whose first counter is ``offset``."""
    if ROW_DIM == 0:
        row = place // row_size
    else:
        row = place % row_size
    scale = tl.load(scales + row, mask=mask, other=0.0)
    return tl.randn(seed, offset + place) * scale


@_jit
def fill_kernel(out, numel, seed, TILE: tl.constexpr):
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + place, tl.randn(seed, place), mask=place < numel)


@_jit
def perturb_kernel(
    weight,
    scales,
    low,
    corrections,
    starts,
    counts,
    total,
    done,
    numel,
    row_size,
    seed,
    offset,
    ROW_DIM: tl.constexpr,
    JOURNAL: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < numel
    w = tl.load(weight + place, mask=mask, other=0.0)
    eps = _noise(scales, place, row_size, seed, offset, mask, ROW_DIM)
    perturbed = _rounded_sum(w, eps, w.dtype)
    if JOURNAL:
        back = _rounded_sum(perturbed, -eps, w.dtype)
        correction = w.to(BITS, bitcast=True) - back.to(BITS, bitcast=True)
        missed = ((correction != 0) & mask).to(tl.int32)
        count = tl.sum(missed, 0)
        start = tl.atomic_add(total, count)
        slot = start + tl.cumsum(missed, 0) - 1
        tl.store(low + slot, tl.arange(0, TILE).to(tl.int16), mask=missed != 0)
        tl.store(corrections + slot, correction, mask=missed != 0)
        tl.store(starts + tile, start)
        tl.store(counts + tile, count)
    tl.store(weight + place, perturbed, mask=mask)
    tl.store(done, 1)


@_jit
def restore_kernel(
    weight,
    scales,
    low,
    corrections,
    starts,
    counts,
    done,
    numel,
    row_size,
    seed,
    offset,
    ROW_DIM: tl.constexpr,
    JOURNAL: tl.constexpr,
    BITS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    place = tile * TILE + tl.arange(0, TILE)
    mask = place < numel
    w = tl.load(weight + place, mask=mask, other=0.0)
    eps = _noise(scales, place, row_size, seed, offset, mask, ROW_DIM)
    tl.store(weight + place, _rounded_sum(w, -eps, w.dtype), mask=mask)
    if JOURNAL:
        # The elements to correct have just been stored by other threads of this program.
        tl.debug_barrier()
        entry = tl.arange(0, TILE)
        recorded = entry < tl.load(counts + tile)
        slot = tl.load(starts + tile) + entry
        position = tile * TILE + tl.load(low + slot, mask=recorded, other=0).to(tl.int32)
        missed = tl.load(weight + position, mask=recorded, other=0.0).to(BITS, bitcast=True)
        right = missed + tl.load(corrections + slot, mask=recorded, other=0).to(BITS)
        tl.store(weight + position, right.to(w.dtype, bitcast=True), mask=recorded)
    tl.store(done, 1)


@triton.jit
def cross_kernel(
    weight,
    left,
    right,
    out,
    rows,
    columns,
    row_stride,
    column_stride,
    rank,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``out[i] = <left[i, :], (W @ right.T)[i, :]>``: the cross term of the merged row norms."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    r = tl.arange(0, RANK)
    product = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        w = tl.load(
            weight + row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride,
            mask=(row[:, None] < rows) & (column[None, :] < columns),
            other=0.0,
        )
        a = tl.load(
            right + r[None, :] * columns + column[:, None],
            mask=(r[None, :] < rank) & (column[:, None] < columns),
            other=0.0,
        )
        product += tl.dot(w.to(tl.float32), a, input_precision="ieee")
    b = tl.load(
        left + row[:, None] * rank + r[None, :], mask=(row[:, None] < rows) & (r[None, :] < rank), other=0.0
    )
    tl.store(out + row, tl.sum(product * b, 1), mask=row < rows)


class TileJournal:
    """The journal of ``perturb_kernel``: positions within tiles, in the order the tiles finished."""

    def __init__(self, weight: Tensor) -> None:
        numel, device = weight.numel(), weight.device
        self.low = torch.empty(numel, dtype=torch.int16, device=device)
        self.corrections = torch.empty(numel, dtype=_INTEGERS[weight.element_size()], device=device)
        self.starts = torch.empty(triton.cdiv(numel, TILE), dtype=torch.int32, device=device)
        self.counts = torch.empty_like(self.starts)
        self.total = torch.zeros(1, dtype=torch.int32, device=device)

    def trim(self) -> None:
        """Gives back the memory that was reserved for the worst case."""
        used = int(self.total)
        self.low = self.low[:used].clone()
        self.corrections = narrowed(self.corrections[:used]).clone()

    @property
    def nbytes(self) -> int:
        parts = (self.low, self.corrections, self.starts, self.counts, self.total)
        return sum(t.numel() * t.element_size() for t in parts)


def takes(noise: Recipe, weight: Tensor) -> bool:
    is_known = noise.can_be_fused and noise.is_seeded
    return is_known and weight.is_contiguous() and weight.dtype != torch.float64


def fill(out: Tensor, key: Key, block: int) -> Tensor:
    with _on(out):
        fill_kernel[_tiles(out)](out, out.numel(), key.block_seed(block, 64), TILE=TILE)
    return out


probes = plain.probes


class Part(part.Part):
    _journal: TileJournal | None = None

    def perturb(self) -> None:
        if self.copy is not None:
            self.copy.copy_(self.rows)
        if self.keep is Keep.JOURNAL:
            self._journal = TileJournal(self.rows)
        totals = [getattr(self._journal, "total", self.rows)]
        self._write(lambda done: self._launch(perturb_kernel, self.rows, totals, done), True)
        if self._journal is not None:
            self._journal.trim()

    def restore(self) -> None:
        if self.is_perturbed:
            self._write(lambda done: self._restore(self.rows, done), False)
            self.forget()

    def clean(self, copy: Tensor) -> None:
        self._restore(copy, torch.empty(1, dtype=torch.int32, device=copy.device))

    def _restore(self, rows: Tensor, done: Tensor) -> None:
        if self.copy is None:
            self._launch(restore_kernel, rows, [], done)
        else:
            rows.copy_(self.copy)
            done.fill_(1)

    def _launch(self, kernel: Any, rows: Tensor, totals: list[Tensor], done: Tensor) -> None:
        noise = self.noise
        (number,), offset = noise.blocks(self.lo, self.hi)
        names = "low", "corrections", "starts", "counts"
        with _on(rows):
            kernel[_tiles(rows)](
                rows,
                noise.scales_of(self.lo, self.hi),
                *(getattr(self._journal, name, rows) for name in names),
                *totals,
                done,
                rows.numel(),
                rows[0].numel(),
                noise.key.block_seed(number, 64),
                offset,
                ROW_DIM=noise.row_dim,
                JOURNAL=self._journal is not None,
                BITS=_BITS[rows.element_size()],
                TILE=TILE,
                **_EXACT,
            )

    def _write(self, launch: Callable[[Tensor], None], is_perturbed: bool) -> None:
        """Launches what writes the rows and takes note of it, whatever interrupts us."""
        done = torch.zeros(1, dtype=torch.int32, device=self.rows.device)
        try:
            launch(done)
            self.is_perturbed = is_perturbed
        except BaseException:
            if int(done):
                self.is_perturbed = is_perturbed
            raise


def norm_increases(products: Sequence[Product]) -> list[Tensor]:
    return [_norm_increase(*product) for product in products]


def _norm_increase(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if len(right) > _LARGEST_RANK:
        return plain.norm_increase(matrix, left, right)
    rows, columns = matrix.shape
    out = torch.empty(rows, dtype=torch.float32, device=matrix.device)
    rank = right.shape[0]
    padded = max(16, triton.next_power_of_2(rank))
    with _on(matrix):
        cross_kernel[(triton.cdiv(rows, 64),)](
            matrix,
            left.contiguous(),
            right.contiguous(),
            out,
            rows,
            columns,
            matrix.stride(0),
            matrix.stride(1),
            rank,
            RANK=padded,
            ROWS=64,
            COLUMNS=64,
        )
    return 2 * out + ((left @ (right @ right.T)) * left).sum(1)


# Contracting `z * scale + w` into one rounding would make the restore miss other elements than
# the journal has.
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}

_BITS = {2: tl.int16, 4: tl.int32}
_INTEGERS = {2: torch.int16, 4: torch.int32}


def _tiles(tensor: Tensor) -> tuple[int]:
    return (triton.cdiv(tensor.numel(), TILE),)


def _on(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(tensor)
