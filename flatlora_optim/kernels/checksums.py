"""Checksums of a few elements of each weight: they change if somebody else writes to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import kernels_of
from .part import read


class Checksums:
    """The checksums of some weights at the time of construction.

    Args:
        weights: On whatever devices.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = weights
        self._before = {
            device: (which, _checksums(weights, which))
            for device, which in self._by_device(range(len(weights)))
        }

    def changed(self, which: Iterable[int]) -> set[int]:
        """Which of these weights are no longer what they were. Waits once for each device."""
        return {i for device, some in self._by_device(which) for i in self._changed_on(device, some)}

    def _changed_on(self, device: torch.device, which: list[int]) -> Iterable[int]:
        known, before = self._before[device]
        now = _checksums(self._weights, which)
        if len(which) < len(known):
            places = [known.index(i) for i in which]
            before = before[places] if isinstance(before, Tensor) else [before[place] for place in places]
        if isinstance(before, Tensor) and isinstance(now, Tensor):
            differ = read(before != now)
        else:
            differ = [a != b for a, b in zip(before, now, strict=True)]
        return [i for i, differs in zip(which, differ, strict=True) if differs]

    def _by_device(self, which: Iterable[int]) -> Iterable[tuple[torch.device, list[int]]]:
        found: dict[torch.device, list[int]] = {}
        for i in which:
            found.setdefault(self._weights[i].device, []).append(i)
        return found.items()


def _checksums(weights: Sequence[Tensor], which: list[int]) -> Tensor | list[int]:
    some = [weights[i] for i in which]
    return kernels_of(some[0].device).checksums(some)
