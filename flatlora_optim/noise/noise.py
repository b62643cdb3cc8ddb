"""The noise of one weight: seeded Gaussians that can be made again, block by block, in any order.

A weight's noise is cut into blocks of whole rows. The numbers of a block depend on seed, step, replica and
block number alone, so any thread makes the same ones, for any shard of the weight. torch's global
generators are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..kernels.grid import Grid
from ..kernels.plain import rounded_sum
from ..kernels.threads import scratch
from ..targets import FrozenWeight, Target
from .gaussian import GaussianNoise, NoiseSource
from .key import NoiseKey


class Noise:
    """The noise of one weight at one step: a recipe of a key and row scales, not the numbers.

    ``eps[i, j] = scale[i] * z[i, j]`` with ``z ~ N(0, 1)`` (Flat-LoRA, equation 8, where
    ``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)``).

    Args:
        source: Generates ``z``.
        key: Seed, step and replica.
        grid: How the weight is cut into blocks.
        scales: Shape ``(m,)``, also if the weight is sharded; float32, on the weight's device.
        row_dim: The weight's dim that ``scales`` runs along: 0, or 1 if it is stored transposed.
    """

    def __init__(
        self, source: NoiseSource, key: NoiseKey, grid: Grid, scales: Tensor, row_dim: int = 0
    ) -> None:
        self.source = source
        self.key = key
        self.grid = grid
        self.scales = scales
        self.row_dim = row_dim

    @classmethod
    def on(cls, target: Target, source: NoiseSource, key: NoiseKey, scales: Tensor) -> Noise:
        """The noise of a target's weight, with these standard deviations of its rows."""
        kind: type[Noise] = getattr(source, "noise_type", cls)
        return kind(source, key, target.weight.grid(target.first_block), scales, target.weight.row_dim)

    def negated(self) -> Noise:
        """The same noise with the other sign."""
        return type(self)(self.source, self.key, self.grid, -self.scales, self.row_dim)

    @property
    def can_be_fused(self) -> bool:
        """Whether the noise is just ``scale * z`` in whole rows, so that kernels can make it while they add
        it."""
        return self.grid.columns == slice(None)

    @property
    def is_seeded(self) -> bool:
        """Whether kernels can make a block's numbers themselves, from its seed."""
        return type(self.source) is GaussianNoise  # a subclass may make other numbers

    @property
    def is_in_memory(self) -> bool:
        """Whether kernels find the numbers in memory, where ``places`` says."""
        return "_is_in_memory" in vars(type(self.source))  # a subclass may make other numbers

    def blocks(self, lo: int, hi: int) -> tuple[range, int]:
        """The numbers of the blocks that hold local rows ``[lo, hi)``, and where these begin in the first."""
        numbers, skip = self._place(lo, hi)
        return numbers, skip * self.grid.row_size

    def places(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]:
        """A table with the numbers of these blocks, flat and float32, and where each block begins."""
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
        z = self._numbers(number, out)
        return torch.mul(z[ours], scales[:, None] if self.row_dim == 0 else scales, out=out[ours])

    def _numbers(self, number: int, out: Tensor) -> Tensor:
        """``z`` of one block, in ``out`` or elsewhere."""
        return self.source.block(self.key, number, out)

    def _place(self, lo: int, hi: int) -> tuple[range, int]:
        """The numbers of the blocks that hold the local rows, and the first row's place in the first."""
        grid, size = self.grid, self.grid.rows_per_block
        first, skip = divmod(lo + grid.first_row, size)
        end = -(-(hi + grid.first_row) // size)
        return range(grid.first_block + first, grid.first_block + end), skip

    def _rows_of(self, number: int) -> int:
        """How many rows the block has."""
        size = self.grid.rows_per_block
        return min(size, self.grid.rows - (number - self.grid.first_block) * size)

    def scales_of(self, lo: int, hi: int) -> Tensor:
        """The scales of local rows ``[lo, hi)``, or of the local columns if scales run along these."""
        if self.row_dim == 0:
            if hi - lo == self.scales.shape[0]:
                return self.scales  # a view takes a microsecond, and there may be many small weights
            return self.scales[self.grid.first_row + lo : self.grid.first_row + hi]
        if self.grid.group:
            return self.scales.view(-1, self.grid.row_size)[lo // self.grid.group]
        return self.scales[self.grid.columns]

    @torch.no_grad()
    def share_lost(self, weight: Tensor, strength: float) -> float:
        """The share of one block's elements that rounding leaves unchanged, if the noise is multiplied by
        ``strength``."""
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
    def added_to(self, weight: FrozenWeight, dtype: torch.dtype) -> Tensor:
        """``W + eps`` in new memory."""
        packed = weight.packed()
        added = None if packed is None else kernels.sum_of(packed, self, dtype)
        return self.add_to(weight.dense(dtype)) if added is None else added

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> Tensor:
        """Adds the noise in place, in float32, rounding once to the weight's dtype."""
        kernels.add(kernels.parts_of(weight, self))
        return weight
