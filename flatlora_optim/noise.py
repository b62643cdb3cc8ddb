"""Seeded Gaussian noise that can be made again, block by block, in any order.

A weight's noise is cut into blocks of whole rows. Each block has its own generator, seeded by
(seed, step, replica, block number), so blocks can be made by any thread, for any shard of the
weight, and give the same numbers. The global generators are never touched.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# On the CPU a wave of blocks stays in the last-level cache while it is generated, added and
# journaled. An accelerator wants few, large kernels instead.
_CPU_BLOCK, _CPU_BLOCKS_PER_WAVE = 1 << 16, 16
_DEVICE_BLOCK, _DEVICE_BLOCKS_PER_WAVE = 1 << 22, 1

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

    def fill(self, blocks: Sequence[Tensor], key: NoiseKey, first_block: int) -> None:
        """Overwrite ``blocks[i]`` (contiguous, float32) with the noise of block ``first_block + i``."""
        ...


class GaussianNoise:
    """Independent Gaussian noise for every element and step (the paper's)."""

    def fill(self, blocks: Sequence[Tensor], key: NoiseKey, first_block: int) -> None:
        def fill_one(i: int) -> None:
            generator = torch.Generator(device=blocks[i].device)
            generator.manual_seed(key.block_seed(first_block + i))
            blocks[i].normal_(generator=generator)

        if len(blocks) > 1 and blocks[0].device.type == "cpu" and torch.get_num_threads() > 1:
            # normal_ runs on one thread and releases the GIL.
            list(_thread_pool().map(fill_one, range(len(blocks))))
        else:
            for i in range(len(blocks)):
                fill_one(i)


_POOL: ThreadPoolExecutor | None = None


def _thread_pool() -> ThreadPoolExecutor:
    global _POOL
    if _POOL is None:
        _POOL = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="flatlora-noise")
    return _POOL


def _forget_pool() -> None:
    global _POOL
    _POOL = None


if hasattr(os, "register_at_fork"):
    # Threads do not survive a fork; a child that inherited the executor would wait for ever.
    os.register_at_fork(after_in_child=_forget_pool)


@dataclass(frozen=True)
class Grid:
    """How a weight's rows along dim 0 are cut into blocks and waves of blocks.

    Args:
        rows: Size of the whole (unsharded) weight along dim 0.
        row_size: Elements in one such row.
        device_type: Blocks are larger on accelerators.
        first_block: Number of the weight's first block among all blocks of the model.
        first_row: Where the local shard starts in the whole weight.
    """

    rows: int
    row_size: int
    device_type: str
    first_block: int = 0
    first_row: int = 0

    @property
    def rows_per_block(self) -> int:
        size = _CPU_BLOCK if self.device_type == "cpu" else _DEVICE_BLOCK
        return max(1, size // max(1, self.row_size))

    @property
    def rows_per_wave(self) -> int:
        per_wave = _CPU_BLOCKS_PER_WAVE if self.device_type == "cpu" else _DEVICE_BLOCKS_PER_WAVE
        return self.rows_per_block * per_wave

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.rows_per_block)

    def waves(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Cuts local rows ``[start, stop)`` at the wave boundaries of the whole weight."""
        while start < stop:
            wave = (start + self.first_row) // self.rows_per_wave
            end = min(stop, (wave + 1) * self.rows_per_wave - self.first_row)
            yield start, end
            start = end


class Noise:
    """The noise of one weight at one step: a recipe of a key and row scales, not the numbers.

    ``eps[i, j] = scale[i] * z[i, j]`` with ``z ~ N(0, 1)`` (Flat-LoRA, equation 8, where
    ``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)``).

    Args:
        source: Generates ``z``.
        key: Seed, step and replica.
        grid: How the weight is cut into blocks.
        scales: Shape ``(m,)``, float32, on the weight's device.
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

    def waves(self, start: int, stop: int) -> Iterator[tuple[int, int, Tensor]]:
        """Yields ``(lo, hi, eps)`` over the local rows: ``eps`` is float32 ``(hi - lo, row_size)``.

        ``eps`` is a buffer that the next iteration overwrites.
        """
        grid = self.grid
        rows_per_block = grid.rows_per_block
        buffer = torch.empty(
            min(grid.rows_per_wave, _round_up(grid.rows, rows_per_block)),
            grid.row_size,
            dtype=torch.float32,
            device=self.scales.device,
        )
        for lo, hi in grid.waves(start, stop):
            first = (lo + grid.first_row) // rows_per_block
            last = (hi - 1 + grid.first_row) // rows_per_block
            blocks = buffer[: (last - first + 1) * rows_per_block].split(rows_per_block)
            self.source.fill(blocks, self.key, grid.first_block + first)
            skip = lo + grid.first_row - first * rows_per_block
            eps = buffer[skip : skip + hi - lo]
            if self.row_dim == 0:
                eps.mul_(self.scales[lo:hi, None])
            else:
                eps.mul_(self.scales[None, :])
            yield lo, hi, eps

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> Tensor:
        """Adds the noise in place, in float32, rounding once to the weight's dtype."""
        for lo, hi, eps in self.waves(0, weight.shape[0]):
            part = weight[lo:hi]
            part.copy_(rounded_sum(part, eps.view(part.shape)))
        return weight


def rounded_sum(weight: Tensor, eps: Tensor) -> Tensor:
    """``weight + eps``, added in float32 or wider and rounded once: new, contiguous.

    The sum of a finite float16 weight is kept finite: noise alone never overflows a layer.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = torch.empty(weight.shape, dtype=dtype, device=weight.device).copy_(weight).add_(eps)
    if weight.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        total = torch.where(weight.isfinite(), total.clamp(-largest, largest), total)
    return total.to(weight.dtype)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
