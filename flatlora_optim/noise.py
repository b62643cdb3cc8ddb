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
from .parallel import for_each, scratch

# Elements per block. On the CPU a block stays in a core's own cache while it is generated, added
# and journaled; an accelerator wants few, large kernels instead.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 22

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
        size = _CPU_BLOCK if self.device_type == "cpu" else _DEVICE_BLOCK
        return max(1, size // max(1, self.row_size))

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    def spans(self, local_rows: int) -> list[tuple[int, int]]:
        """Cuts local rows ``[0, local_rows)`` at the block boundaries of the whole weight."""
        spans, lo = [], 0
        while lo < local_rows:
            block = (lo + self.first_row) // self.rows_per_block
            hi = min(local_rows, (block + 1) * self.rows_per_block - self.first_row)
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

    def recipe(self, lo: int, hi: int) -> tuple[Tensor, int, int]:
        """The scales of one span of local rows, its block's seed, and its first element's place."""
        number, skip = self._place(lo)
        return self._scales(lo, hi), self.key.block_seed(number), skip * self.grid.row_size

    def standard_block(self, lo: int) -> Tensor:
        """``z`` of the whole block that holds the local row, 2-D float32, maybe in scratch memory."""
        return self.source.block(self.key, self._place(lo)[0], self._memory(lo))

    def block(self, lo: int, hi: int) -> Tensor:
        """``eps`` of one span of local rows, 2-D float32, in scratch memory."""
        (number, skip), out = self._place(lo), self._memory(lo)
        ours = slice(skip, skip + hi - lo), self.grid.columns
        scales = self._scales(lo, hi)
        z = self.source.block(self.key, number, out)
        return torch.mul(z[ours], scales[:, None] if self.row_dim == 0 else scales, out=out[ours])

    def _place(self, lo: int) -> tuple[int, int]:
        """The number of the block that holds a local row, and the row's place in it."""
        number, skip = divmod(lo + self.grid.first_row, self.grid.rows_per_block)
        return self.grid.first_block + number, skip

    def _memory(self, lo: int) -> Tensor:
        """For the whole block that holds a local row."""
        grid = self.grid
        first = (self._place(lo)[0] - grid.first_block) * grid.rows_per_block
        shape = min(grid.rows_per_block, grid.rows - first), grid.row_size
        return scratch("z", shape, torch.float32, self.scales.device)

    def _scales(self, lo: int, hi: int) -> Tensor:
        if self.row_dim == 0:
            return self.scales[self.grid.first_row + lo : self.grid.first_row + hi]
        return self.scales[self.grid.columns]

    def for_each_block(self, visit: Callable[[int, int], object], spans: list[tuple[int, int]]) -> None:
        """Calls ``visit(lo, hi)`` for each span; on the CPU from several threads."""

        def work(span: tuple[int, int]) -> None:
            visit(*span)

        if self.scales.device.type == "cpu":
            for_each(work, spans)
        else:
            for span in spans:
                work(span)

    @torch.no_grad()
    def share_lost(self, weight: Tensor, strength: float = 1.0) -> float:
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

        self.for_each_block(add, self.grid.spans(weight.shape[0]))
        return weight
