"""Row scales: how strong the noise is in each output neuron.

``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)`` with ``W' = W + s * B @ A`` (Flat-LoRA, section
3.2). W' itself is never made:

``||W'[i]||^2 = ||W[i]||^2 + 2 <B[i], (W A^T)[i]> + B[i] (A A^T) B[i]^T``

with s folded into B. The first term is constant and kept; the rest costs one pass over W. Native
kernels round A and s B to bfloat16 for it, where the weight is not transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .target import LowRank, Target
from .weights import FrozenWeight

_ELEMENTS_AT_ONCE = 1 << 24


class RowNorms:
    """The norms of the merged weight's rows, for one target.

    Holds ``||W[i]||^2`` (m numbers) for as long as the frozen weight stays what it was.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._base: Tensor | None = None
        self._fingerprint: tuple[Any, ...] | None = None

    def base_squared(self) -> Tensor:
        """``||W[i]||^2``, shape ``(m,)``; of a sharded weight, what the local part adds to it."""
        fingerprint = self.target.weight.fingerprint()
        if self._base is None or self._fingerprint != fingerprint:
            with torch.no_grad():
                self._base = self.target.weight.row_norms_squared()
            self._fingerprint = fingerprint
        return self._base

    def forget_if_changed(self) -> None:
        """To be called before the weight is written: afterwards it can't be told any more."""
        if self._fingerprint != self.target.weight.fingerprint():
            self._fingerprint = None

    def rewritten(self) -> None:
        """The weight was written, but with the bits it had: what is known of it stays true."""
        if self._fingerprint is not None:
            self._fingerprint = self.target.weight.fingerprint()

    def squared_with(self, delta: Tensor) -> Tensor:
        """``||W'[i]||^2``, where W' is by so much more than W. Of the stored shape."""
        weight = self.target.weight
        products = delta.flatten(1).square().sum(1 if weight.row_dim == 0 else 0)
        partial = self.base_squared() + 2 * weight.row_dots(delta)
        return weight.sum_over_parts(partial) + products


@torch.no_grad()
def merged_norms(rows: Sequence[RowNorms]) -> list[Tensor | None]:
    """``||W'[i]||`` of each target, shape ``(m,)``, float32; None where no adapter is active.

    Many weights are read at once, since few are large enough to keep all threads busy.
    """
    norms: list[Tensor | None] = []
    with ExitStack() as stack:
        for device in {each.target.weight.device.type for each in rows}:
            # The forward that brought us here may run under autocast; norms need float32.
            stack.enter_context(torch.autocast(device, enabled=False))
        for some in _batches(rows):
            squared = _squared_norms(some)
            known = [each for each in squared if each is not None]
            if known:
                # Rounding can leave a vanishing row slightly below zero.
                torch._foreach_clamp_min_(known, 0)
                torch._foreach_sqrt_(known)
            norms += squared
    return norms


def _squared_norms(rows: Sequence[RowNorms]) -> list[Tensor | None]:
    squared: list[Tensor | None] = [None] * len(rows)
    low_rank: dict[type[FrozenWeight], list[tuple[int, LowRank]]] = {}
    for i, each in enumerate(rows):
        delta = each.target.whole_delta()
        if isinstance(delta, LowRank):
            low_rank.setdefault(type(each.target.weight), []).append((i, delta))
        elif delta is not None:
            squared[i] = each.squared_with(delta)
    for kind, found in low_rank.items():
        indices, deltas = zip(*found, strict=True)
        weights = [rows[i].target.weight for i in indices]
        partial = kind.norm_increases(weights, deltas)
        torch._foreach_add_(partial, [rows[i].base_squared() for i in indices])
        for i, weight, local in zip(indices, weights, partial, strict=True):
            squared[i] = weight.sum_over_parts(local)
    return squared


def _batches(rows: Sequence[RowNorms]) -> Iterator[Sequence[RowNorms]]:
    """Runs of weights small enough that the adapters' values in float32 don't count: only the kernels of
    accelerators read them as they are."""
    first = elements = 0
    for end, each in enumerate(rows, start=1):
        if each.target.weight.device.type == "cpu":
            elements += each.target.weight.shape.numel()
        if elements >= _ELEMENTS_AT_ONCE or end == len(rows):
            yield rows[first:end]
            first, elements = end, 0


def row_scales(norms: Sequence[Tensor], sigmas: Sequence[float], columns: Sequence[int]) -> list[Tensor]:
    """The standard deviation of the noise in each row of each weight, shape ``(m,)``.

    A row whose norm is not finite (an adapter that has diverged) gets no noise: the model's own
    output shows the damage, and noise on top would only hide where it came from.
    """
    if not norms:
        return []
    factors = [sigma / math.sqrt(max(1, n)) for sigma, n in zip(sigmas, columns, strict=True)]
    scales = torch._foreach_mul(list(norms), factors)
    if len({each.device for each in scales}) > 1:
        return [each.nan_to_num_(nan=0.0, posinf=0.0) for each in scales]
    flat = torch.cat(list(scales)).nan_to_num_(nan=0.0, posinf=0.0)
    return list(flat.split([len(each) for each in scales]))
