"""A table of Gaussians, read at seeded offsets, in place of fresh numbers.

Making a Gaussian costs several times as much as adding one. So evolution strategies
(Salimans et al. 2017, arXiv 1703.03864, section 2.3) draw a large table once and read each perturbation
from a random place in it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.threads import lasting_empty
from .gaussian import GaussianNoise
from .key import NoiseKey

_SEGMENTS = 64
_ALIGNMENT = 16
_BLOCKS = 4  # that a table must have room for
_STREAM = 0x7461626C65  # gives the table other numbers than GaussianNoise with the same seed


class NoiseTable:
    """Gaussian noise from a table that is renewed gradually.

    Each element is exactly Gaussian, and elements of one block are independent. Two blocks of a
    step may overlap in the table: with a table of S numbers, two blocks of b share some of them
    with probability about 2b / S, shifted against each other. Two steps read other places of a
    table of which each step renews a 64th, so steps that are 64 apart share nothing.

    Don't share a table: two optimizers would overwrite each other's numbers.

    Args:
        size: Numbers in the table, a multiple of 64, and at least four of the largest blocks. By
            default 2**22 (16 MiB, which stays in a last-level cache).
    """

    def __init__(self, size: int | None = None) -> None:
        if size is not None and (size <= 0 or size % _SEGMENTS):
            raise ValueError(f"the size of a noise table must be a positive multiple of 64, got {size}")
        self._size = size
        self._gaussian = GaussianNoise()
        self._lock = threading.RLock()  # an interrupt may keep it from being released
        self._tables: dict[torch.device, tuple[NoiseKey, Tensor]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self._size})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy fills a table of its own with the same numbers."""
        return type(self), (self._size,)

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        table, (start,) = self.places(key, [number], [out.numel()], out.device)
        return table[start : start + out.numel()].view(out.shape)

    _is_in_memory = True

    def places(
        self, key: NoiseKey, numbers: Iterable[int], sizes: Sequence[int], device: torch.device
    ) -> tuple[Tensor, list[int]]:
        """The table at this step, and where the blocks of these sizes begin in it.

        It stays valid until another step's numbers are asked for.
        """
        table = self._table(key, device)
        if _BLOCKS * max(sizes) > (length := table.numel()):
            raise ValueError(
                f"a noise table of {length} numbers is too small for blocks of {max(sizes)}; pass "
                f"noise=NoiseTable(size=...) with at least {_BLOCKS * max(sizes)}"
            )
        seeds = key.block_seeds(numbers)
        starts = [
            seed % ((length - size) // _ALIGNMENT + 1) * _ALIGNMENT
            for seed, size in zip(seeds, sizes, strict=True)
        ]
        return table, starts

    def check_device(self, device: torch.device) -> None:
        """Raises ValueError for weights that are not on the CPU."""
        if device.type != "cpu":
            raise ValueError(
                f"a noise table is for weights on the CPU: to read a number takes {device.type!r} as long as "
                "to make it. Use noise='gaussian'"
            )

    def _table(self, key: NoiseKey, device: torch.device) -> Tensor:
        """The table at this step, whichever step it was read at before."""
        self.check_device(device)
        known = self._tables.get(device)
        if known is not None and known[0] == key:
            return known[1]
        with self._lock:
            known = self._tables.get(device)
            if known is not None and known[0] == key:
                return known[1]
            if known is None:
                table = lasting_empty((self._size or 1 << 22,), torch.float32, device)
            else:
                table = known[1]
            self._tables.pop(device, None)
            if known is not None and known[0] == key._replace(step=key.step - 1):
                stale = [key.step % _SEGMENTS]
            else:
                stale = list(range(_SEGMENTS))
            for segment in stale:
                self._renew(table, segment, key)
            self._tables[device] = key, table
            return table

    def _renew(self, table: Tensor, segment: int, key: NoiseKey) -> None:
        renewed = key.step - (key.step - segment) % _SEGMENTS
        stream = NoiseKey(key.seed ^ _STREAM, renewed, key.replica)
        self._gaussian.block(stream, segment, table.view(_SEGMENTS, -1)[segment])
