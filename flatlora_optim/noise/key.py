"""What the noise of one step depends on, and the seeds that follow from it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

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
