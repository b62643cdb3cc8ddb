"""Seeded Gaussian noise that can be made again, block by block, in any order.

A weight's noise is cut into blocks of whole rows. Each block has its own generator, seeded by
(seed, step, replica, block number), so blocks can be made by any thread, for any shard of the
weight, and give the same numbers. The global generators are never touched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import kernels
from .kernels.plain import rounded_sum
from .parallel import rows_at_once, scratch

_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def _mix64(x: int) -> int:
    """A bijection of 64-bit integers whose output bits each depend on all input bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    """The same for 32-bit integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


class NoiseKey(NamedTuple):
    """What the noise of one optimizer step depends on."""

    seed: int
    step: int
    replica: int = 0

    def block_seed(self, block: int) -> int:
        """A 32-bit seed for one block."""
        return self.block_seeds([block])[0]

    def block_seeds(self, blocks: Iterable[int]) -> list[int]:
        """A 32-bit seed for each block.

        torch's CPU generator keeps only 32 bits of a seed, so hashed seeds would collide within
        a step on large models. A keyed permutation of the block number cannot.
        """
        key = _hash(self)
        return [_mix32(_mix32((block ^ key) & _MASK32) ^ (key >> 32)) for block in blocks]


@functools.lru_cache(maxsize=8)  # a step has one key, for many weights
def _hash(key: NoiseKey) -> int:
    return _mix64(_mix64(_mix64(key.seed & _MASK64) ^ key.step) ^ key.replica)


class NoiseSource(Protocol):
    """Where standard-normal numbers come from.

    Native and Triton kernels know the sources of this package; the noise of others is added by torch
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
        return kernels.kernels_of(out.device).fill(out, key.block_seed(number))


class Grid(NamedTuple):
    """How a weight is cut into blocks of whole rows along dim 0.

    Rows are those of memory here, along dim 0: of a transposed weight, its inputs.

    Args:
        rows: Size of the whole (unsharded) weight along dim 0.
        row_size: Elements in one such row.
        device_type: Blocks are larger on accelerators.
        first_block: Number of the weight's first block among all blocks of the model.
        first_row: Where the local part of a sharded weight starts in the whole one.
        columns: Which elements of each row the local part holds.
    """

    rows: int
    row_size: int
    device_type: str
    first_block: int = 0
    first_row: int = 0
    columns: slice = slice(None)

    @property
    def rows_per_block(self) -> int:
        return rows_at_once(self.row_size, self.device_type)

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    def spans(self, local_rows: int, blocks: int = 1) -> list[tuple[int, int]]:
        """Cuts local rows ``[0, local_rows)`` at the whole weight's block boundaries.

        Args:
            blocks: How many blocks to leave together.
        """
        spans, lo, rows = [], 0, blocks * self.rows_per_block
        while lo < local_rows:
            hi = min(local_rows, ((lo + self.first_row) // rows + 1) * rows - self.first_row)
            spans.append((lo, hi))
            lo = hi
        return spans


class Noise:
    """The noise of one weight at one step: a recipe of a key and row scales, not the numbers.

    ``eps[i, j] = scale[i] * z[i, j]`` with ``z ~ N(0, 1)`` (Flat-LoRA, equation 8, where
    ``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)``).

    Args:
        source: Generates ``z``.
        key: Seed, step and replica.
        grid: How the weight is cut into blocks.
        scales: Shape ``(m,)`` also if the weight is sharded, float32, on the weight's device.
        row_dim: The weight's dim that ``scales`` runs along: 0, or 1 for transposed storage.
    """

    def __init__(
        self, source: NoiseSource, key: NoiseKey, grid: Grid, scales: Tensor, row_dim: int = 0
    ) -> None:
        self.source = source
        self.key = key
        self.grid = grid
        self.scales = scales
        self.row_dim = row_dim

    @property
    def can_be_fused(self) -> bool:
        """Whether ``scale * z`` of whole rows is all there is to the noise, so that kernels can make
        it while they add it."""
        return self.grid.columns == slice(None)

    @property
    def is_seeded(self) -> bool:
        """Whether kernels can make a block's numbers too, from its seed."""
        return type(self.source) is GaussianNoise  # a subclass may make other numbers

    @property
    def is_in_memory(self) -> bool:
        """Whether kernels find the numbers in memory, as ``places`` tells them."""
        return "_is_in_memory" in vars(type(self.source))  # a subclass may make other numbers

    def blocks(self, lo: int, hi: int) -> tuple[range, int]:
        """The numbers of the blocks that hold local rows ``[lo, hi)``, and where these begin in the first."""
        numbers, skip = self._place(lo, hi)
        return numbers, skip * self.grid.row_size

    def places(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """A table that has the numbers of these blocks, flat and float32, and where each begins."""
        sizes = [self._rows_of(number) * self.grid.row_size for number in numbers]
        table, starts = self.source.places(self.key, numbers, sizes, self.scales.device)  # type: ignore[attr-defined]
        return table, starts

    def block(self, lo: int, hi: int) -> Tensor:
        """``eps`` of local rows ``[lo, hi)`` within one block, 2-D float32, in scratch memory."""
        (number, *_), skip = self._place(lo, hi)
        shape = self._rows_of(number), self.grid.row_size
        out = scratch("z", shape, torch.float32, self.scales.device)
        ours = slice(skip, skip + hi - lo), self.grid.columns
        scales = self.scales_of(lo, hi)
        z = self.source.block(self.key, number, out)
        return torch.mul(z[ours], scales[:, None] if self.row_dim == 0 else scales, out=out[ours])

    def _place(self, lo: int, hi: int) -> tuple[range, int]:
        """The numbers of the blocks that hold the local rows, and the first row's place there."""
        grid, size = self.grid, self.grid.rows_per_block
        first, skip = divmod(lo + grid.first_row, size)
        end = -(-(hi + grid.first_row) // size)
        return range(grid.first_block + first, grid.first_block + end), skip

    def _rows_of(self, number: int) -> int:
        """How many rows the block has."""
        size = self.grid.rows_per_block
        return min(size, self.grid.rows - (number - self.grid.first_block) * size)

    def scales_of(self, lo: int, hi: int) -> Tensor:
        """Of local rows ``[lo, hi)``, or of the local columns where the scales run along them."""
        if self.row_dim == 0:
            if hi - lo == self.scales.shape[0]:
                return self.scales  # small weights are many, and a view takes a microsecond
            return self.scales[self.grid.first_row + lo : self.grid.first_row + hi]
        return self.scales[self.grid.columns]

    @torch.no_grad()
    def share_lost(self, weight: Tensor, strength: float) -> float:
        """The share of elements that ``strength`` times the noise leaves as they are, in one block.

        The sum is rounded to the weight's dtype, and small noise away with it.
        """
        spans = self.grid.spans(weight.shape[0])
        if not spans:
            return 0.0  # this process holds no row
        lo, hi = spans[0]
        part = weight[lo:hi]
        eps = self.block(lo, hi).mul_(strength).view(part.shape)
        is_noisy = eps != 0
        stays = (rounded_sum(part, eps) == part) & is_noisy
        return float(stays.sum() / is_noisy.sum().clamp(min=1))

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> Tensor:
        """Adds the noise in place, in float32, rounding once to the weight's dtype."""
        kernels.perturb(kernels.parts_of(weight, self))
        return weight
