"""Seeded Gaussian noise that can be made again, block by block, in any order.

A weight's noise is cut into blocks of whole rows. Each block has its own generator, seeded by
(seed, step, replica, block number), so blocks can be made by any thread, for any shard of the
weight, and give the same numbers. The global generators are never touched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .kernels import kernels_for, kernels_of
from .kernels.plain import rounded_sum
from .parallel import for_each, rows_at_once, scratch

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
        """A 32-bit seed for one block.

        torch's CPU generator keeps only 32 bits of a seed, so hashed seeds would collide within
        a step on large models. A keyed permutation of the block number cannot.
        """
        key = _mix64(_mix64(_mix64(self.seed & _MASK64) ^ self.step) ^ self.replica)
        return _mix32(_mix32((block ^ key) & _MASK32) ^ (key >> 32))


class NoiseSource(Protocol):
    """Where standard-normal numbers come from."""

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
        return kernels_of(out.device).fill(out, key.block_seed(number))


class Grid(NamedTuple):
    """How a weight is cut into blocks of whole rows along dim 0.

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

    def recipe(self, lo: int, hi: int) -> tuple[Tensor, list[int], int]:
        """What kernels need to make ``eps`` of local rows ``[lo, hi)``.

        Returns:
            The scales of the rows, the seeds of the blocks that hold them, and the place of the
            first element in the first block.
        """
        numbers, skip = self._place(lo, hi)
        seeds = [self.key.block_seed(number) for number in numbers]
        return self._scales(lo, hi), seeds, skip * self.grid.row_size

    def standard_blocks(self, lo: int, hi: int) -> list[Tensor]:
        """``z`` of the whole blocks that hold local rows ``[lo, hi)``, maybe in scratch memory.

        Each is 2-D, contiguous and float32.
        """
        numbers, _ = self._place(lo, hi)
        memory = self._memory(numbers).split(self.grid.rows_per_block)
        return [self.source.block(self.key, *item) for item in zip(numbers, memory, strict=True)]

    def block(self, lo: int, hi: int) -> Tensor:
        """``eps`` of local rows ``[lo, hi)`` within one block, 2-D float32, in scratch memory."""
        numbers, skip = self._place(lo, hi)
        out = self._memory(numbers)
        ours = slice(skip, skip + hi - lo), self.grid.columns
        scales = self._scales(lo, hi)
        z = self.source.block(self.key, numbers[0], out)
        return torch.mul(z[ours], scales[:, None] if self.row_dim == 0 else scales, out=out[ours])

    def _place(self, lo: int, hi: int) -> tuple[range, int]:
        """The numbers of the blocks that hold the local rows, and the first row's place there."""
        grid, size = self.grid, self.grid.rows_per_block
        first, skip = divmod(lo + grid.first_row, size)
        end = -(-(hi + grid.first_row) // size)
        return range(grid.first_block + first, grid.first_block + end), skip

    def _memory(self, numbers: range) -> Tensor:
        """For whole blocks."""
        grid = self.grid
        bounds = ((number - grid.first_block) * grid.rows_per_block for number in (numbers[0], numbers.stop))
        first, end = (min(row, grid.rows) for row in bounds)
        return scratch("z", (end - first, grid.row_size), torch.float32, self.scales.device)

    def _scales(self, lo: int, hi: int) -> Tensor:
        if self.row_dim == 0:
            return self.scales[self.grid.first_row + lo : self.grid.first_row + hi]
        return self.scales[self.grid.columns]

    def parts(self, local_rows: int, blocks_at_once: int) -> list[tuple[int, int]]:
        """Cuts local rows into spans of at most so many blocks, but leaves something to each thread."""
        share = self.grid.blocks // torch.get_num_threads()
        return self.grid.spans(local_rows, max(1, min(blocks_at_once, share)))

    def for_each_part(self, visit: Callable[[int, int], object], parts: list[tuple[int, int]]) -> None:
        """Calls ``visit(lo, hi)`` for each span; on the CPU from several threads."""

        def work(part: tuple[int, int]) -> None:
            visit(*part)

        if self.scales.device.type == "cpu":
            for_each(work, parts)
        else:
            for part in parts:
                work(part)

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
        kernels = kernels_for(self, weight)

        def add(lo: int, hi: int) -> None:
            kernels.perturb(weight[lo:hi], self, lo, hi, journal=False, note=lambda journal: None)

        self.for_each_part(add, self.parts(weight.shape[0], kernels.blocks_at_once))
        return weight
