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

    @property
    def words(self) -> tuple[int, int, int, int]:
        """The key of Philox, made from the seed, and the two words of its counter for step and replica.

        The other two words are the block's number and the place in the block. So no two blocks of a run
        share numbers, in up to 2**32 steps.
        """
        key = _hash(self.seed)
        return key & _MASK32, key >> 32, self.step & _MASK32, self.replica & _MASK32

    def block_seed(self, block: int, bits: int = 32) -> int:
        """A seed of this many bits for one block, for generators that take one number."""
        return self.block_seeds([block], bits)[0]

    def block_seeds(self, blocks: Iterable[int], bits: int = 32) -> list[int]:
        """A seed of 32 or 64 bits for each block.

        Seeds of 64 bits differ between all blocks of a run; seeds of 32 bits, which are all that torch's
        CPU generator keeps, between all blocks of a step. A hash that is no permutation would collide
        within a step of a large model.
        """
        if bits == 64:
            run = _hash(self.seed, self.replica)
            return [_mix64(run ^ (self.step << 32 & _MASK64) ^ block) for block in blocks]
        key = _hash(self.seed, self.step, self.replica)
        return [_mix32(_mix32((block ^ key) & _MASK32) ^ (key >> 32)) for block in blocks]


@functools.lru_cache(maxsize=8)  # a step has one key, for many weights
def _hash(first: int, *others: int) -> int:
    mixed = _mix64(first & _MASK64)
    for other in others:
        mixed = _mix64(mixed ^ other)
    return mixed
