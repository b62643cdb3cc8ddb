"""Noise of low rank: a product of two thin Gaussian matrices. It costs a layer two thin products.

``eps = diag(s) @ U @ V.T / sqrt(r)``, with U (m, r) and V (n, r) standard normal, has for each rank r the
covariance of the paper's noise: variance ``s[i]^2`` at each element, and no correlation between elements.
So the expected loss is the same to second order. An element is not Gaussian, though: its excess kurtosis
is 6 / r. (Low-rank perturbations stand for full Gaussian ones in evolution strategies, too: Sarkar et al.
2025, arXiv 2511.16652.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from .gaussian import GaussianNoise
from .noise import Noise


class FactoredNoise(Noise):
    """The noise of one weight as a product of two factors. Any block of it can be made, too."""

    source: LowRankNoise

    @property
    def can_be_fused(self) -> bool:
        return False  # kernels know element-wise noise only

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` with ``eps = left @ right``, shapes ``(m, r)`` and ``(r, n)``, float32.

        They are for the whole weight, also if it is sharded. m counts output neurons, also if it is stored
        transposed; then n counts the inputs of all experts, one after the other.
        """
        left, right = self._drawn()
        if self.grid.group:
            left = left.repeat(self.grid.rows // self.grid.group, 1)
        assert left.shape[0] == self.scales.shape[0]  # else the scales have been dropped
        return left * (self.scales / math.sqrt(self.source.rank))[:, None], right

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """U and V.T. All their numbers come from the seed of the weight's first block."""
        rank, sizes = self.source.rank, (self.grid.rows, self.grid.row_size)
        rows, columns = sizes if self.row_dim == 0 else sizes[::-1]
        numbers = torch.empty(rank * (rows + columns), dtype=torch.float32, device=self.scales.device)
        numbers = self.source.block(self.key, self.grid.first_block, numbers)
        left, right = numbers.split([rank * rows, rank * columns])
        return left.view(rows, rank), right.view(rank, columns)

    @cached_property
    def _stored(self) -> tuple[Tensor, Tensor]:
        """The factors of z, in the weight's stored shape."""
        left, right = self._drawn()
        left = left / math.sqrt(self.source.rank)
        return (left, right) if self.row_dim == 0 else (right.T, left.T)

    @torch.no_grad()
    def _numbers(self, number: int, out: Tensor) -> Tensor:
        left, right = self._stored
        first = (number - self.grid.first_block) * self.grid.rows_per_block
        return torch.mm(left[first : first + len(out)], right, out=out)


def drop_scales(noises: Sequence[FactoredNoise]) -> None:
    """Drops the scales but for their norm, which loggers ask for: the factors contain them."""
    if noises:
        for noise, norm in zip(noises, torch._foreach_norm([n.scales for n in noises]), strict=True):
            noise.scales = norm[None]


class LowRankNoise(GaussianNoise):
    """Noise of low rank, for as little as a few percent of a training step.

    It is added in the forward, so that no weight is ever written, unless the optimizer's mode is
    ``"in_place"``.

    Args:
        rank: The rank of the noise. 1 costs least and has the heaviest tails.
    """

    noise_type = FactoredNoise

    def __init__(self, rank: int = 2) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"the rank of the noise must be an int >= 1, got {rank!r}")
        self.rank = rank

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank})"
