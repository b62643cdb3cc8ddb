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

from .. import kernels
from .gaussian import GaussianNoise
from .noise import Noise


class FactoredNoise(Noise):
    """The noise of one weight as a product of two factors. Any block of it can be made, too."""

    source: LowRankNoise

    @property
    def can_be_fused(self) -> bool:
        return False  # kernels know element-wise noise only

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """``(m, r)`` and ``(r, n)``. m counts output neurons, also if the weight is stored transposed; then n
        counts the inputs of all experts, one after the other."""
        rows, columns = self._sizes
        experts = self.grid.rows // self.grid.group if self.grid.group else 1
        return torch.Size((rows * experts, self.source.rank)), torch.Size((self.source.rank, columns))

    @property
    def _sizes(self) -> tuple[int, int]:
        sizes = self.grid.rows, self.grid.row_size
        return sizes if self.row_dim == 0 else sizes[::-1]

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """``left`` and ``right`` with ``eps = left @ right``, float32. They are for the whole weight, also if
        it is sharded."""
        left, right = self._drawn()
        if self.grid.group:
            left = left.repeat(self.grid.rows // self.grid.group, 1)
        return left * (self.scales / math.sqrt(self.source.rank))[:, None], right

    def _drawn(self) -> tuple[Tensor, Tensor]:
        """U and V.T. All their numbers come from the seed of the weight's first block."""
        rank, (rows, columns) = self.source.rank, self._sizes
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


@torch.no_grad()
def fill_factors(noises: Sequence[tuple[FactoredNoise, Tensor, Tensor]]) -> None:
    """Writes the factors of each noise to the two tensors that come with it, rounded to their dtype."""
    at_once = []
    for noise, left, right in noises:
        assert noise.scales.shape == left.shape[:1]  # else the scales have been dropped
        is_seeded = type(noise.source) is LowRankNoise  # a subclass may make other numbers
        is_known = is_seeded and not noise.grid.group and left.dtype.itemsize in (2, 4)
        if is_known and kernels.has_triton(left.device):
            at_once.append((left, right, noise))
            continue
        for place, factor in zip((left, right), noise.factors(), strict=True):
            place.copy_(factor)
    kernels.fill_factors(at_once)


def drop_scales(noises: Sequence[FactoredNoise]) -> None:
    """Drops the scales but for their norm, which loggers ask for: the factors contain them."""
    if noises:
        for noise, norm in zip(noises, torch._foreach_norm([n.scales for n in noises]), strict=True):
            noise.scales = norm


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
