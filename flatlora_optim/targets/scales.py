"""Row scales: how strong the noise is in each output neuron.

``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)`` with ``W' = W + s * B @ A`` (Flat-LoRA, section
3.2). W' is never made as a whole: one pass over W adds the product to a few rows and columns at a time. If
the weight is not transposed, native kernels round A and s B to bfloat16 for it.

A quantized W that no kernel reads as it is must be dequantized for that pass, which uses

``||W'[i]||^2 = ||W[i]||^2 + 2 <B[i], (W A^T)[i]> + B[i] (A A^T) B[i]^T``

with s folded into B; the first term is constant and kept. The result is kept, too, while s B A stays near its
old value: as ``| ||W'[i]|| - ||W'old[i]|| | <= ||(W' - W'old)[i]||``, the norms are off by no more
than the adapter has moved, in the root mean square over the rows. A sketch measures how far that is:
``P.T @ (s B A) @ Q``, with Gaussian P and Q of 8 columns. If ``s B A`` moves by D, each element of the sketch
moves by a number whose expected square is ``||D||^2`` (Frobenius).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..kernels import kernels_of
from ..kernels.part import read
from ..kernels.plain import Product
from .sharding import Cut, in_a_group, parts_at_once, sums_over_parts
from .target import LowRank, Target

_ELEMENTS_AT_ONCE = 1 << 24
_TOLERANCE = 0.01
"""How far an adapter may move, relative to W', before a quantized weight's norms are read again."""
_SKETCH = 8


class RowNorms:
    """The norms of the merged weight's rows, for one target.

    For a quantized weight, holds ``||W[i]||^2`` (m numbers) until the weight changes.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.kept: Tensor | None = None
        """For a quantized weight: ``||W'[i]||^2`` as last read, and the adapter's sketch then, flat."""
        self._base: Tensor | None = None
        self._fingerprint: tuple[Any, ...] | None = None

    def base_squared(self) -> Tensor:
        """``||W[i]||^2``, shape ``(m,)``."""
        fingerprint = self.target.weight.fingerprint()
        if self._base is None or self._fingerprint != fingerprint:
            if self._base is not None:
                self.kept = None
            with torch.no_grad():
                self._base = self.target.weight.row_norms_squared()
            self._fingerprint = fingerprint
        return self._base

    @property
    def kept_size(self) -> int:
        return self.target.weight.rows + _SKETCH**2

    def kept_or_unknown(self) -> Tensor:
        """``kept``, or NaNs, which no sketch is near."""
        if self.kept is not None:
            return self.kept
        return torch.full((self.kept_size,), math.nan, dtype=torch.float32, device="cpu")


@torch.no_grad()
def merged_norms(rows: Sequence[RowNorms]) -> list[Tensor | None]:
    """``||W'[i]||`` of each target, shape ``(m,)``, float32. None if no adapter is active.

    Many weights are read at once, because few are large enough to keep all threads busy.
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
    squared: dict[int, Tensor] = {}
    at_once: dict[int, Product] = {}
    kept: dict[int, LowRank] = {}
    for i, (each, terms) in enumerate(zip(rows, _terms(rows), strict=True)):
        target = each.target
        products = [term for term in terms if isinstance(term, LowRank)]
        product = target.weight.product(products) if terms and len(products) == len(terms) else None
        if product is not None:
            at_once[i], each.kept = product, None  # a checkpoint may have come with norms
        elif isinstance(delta := target.summed(terms), LowRank):
            kept[i] = delta
        elif delta is not None:
            squared[i] = target.weight.squared_norms_with(delta)
    squared |= zip(at_once, _read(list(at_once.values())), strict=True)
    if in_a_group():
        weights = [rows[i].target.weight for i in squared]
        tensors = [getattr(weight, "tensor", None) for weight in weights]
        cut = [(weight.rows, weight.cuts()[0]) for weight in weights]
        squared = dict(zip(squared, sums_over_parts(list(squared.values()), tensors, cut), strict=True))
    squared |= zip(kept, _kept_or_read([rows[i] for i in kept], list(kept.values())), strict=True)
    return [squared.get(i) for i in range(len(rows))]


def _terms(rows: Sequence[RowNorms]) -> list[list[LowRank | Tensor]]:
    """What adapters add to each weight; of products, what the local part of a sharded weight needs."""
    terms = [each.target.all_terms() for each in rows]
    if not in_a_group():
        return terms
    wanted: list[tuple[Tensor, int, Cut]] = []
    for each, some in zip(rows, terms, strict=True):
        products = [term for term in some if isinstance(term, LowRank)]
        cuts = each.target.weight.cuts() if len(products) == len(some) else (Cut(), Cut())
        for term in products:
            wanted += (term.left, 0, cuts[0]), (term.right, 1, cuts[1])
    parts = iter(parts_at_once(wanted))

    def here(term: LowRank | Tensor) -> LowRank | Tensor:
        return LowRank(next(parts), next(parts), term.scaling) if isinstance(term, LowRank) else term

    return [list(map(here, some)) for some in terms]


def _read(products: Sequence[Product]) -> list[Tensor]:
    """``||W'[i]||^2`` of the local parts, by one pass over each weight."""
    partial: list[Tensor] = []
    for device, some in groupby(products, lambda product: product.weight.device):
        partial += kernels_of(device).squared_norms(list(some))
    return partial


def _kept_or_read(rows: Sequence[RowNorms], deltas: Sequence[LowRank]) -> list[Tensor]:
    """``||W'[i]||^2`` of quantized weights, by a pass over those whose adapter has moved by more than the
    tolerance."""
    sketches = [_sketch(delta) for delta in deltas]
    for i, near in enumerate(_are_near(rows, sketches)):
        if not near:
            squared = rows[i].base_squared() + rows[i].target.weight.norm_increase(*deltas[i])
            rows[i].kept = torch.cat([squared, sketches[i]])
    return [each.kept[: -(_SKETCH**2)].clone() for each in rows if each.kept is not None]


def _are_near(rows: Sequence[RowNorms], sketches: Sequence[Tensor]) -> list[bool]:
    """Whether each adapter is within the tolerance of its value when the norms were read."""
    for each in rows:
        each.base_squared()  # forgets the kept norms if the weight has changed
    kept = [each.kept for each in rows]
    known = [each for each in kept if each is not None]
    if not known:
        return [False] * len(rows)
    old = [each[-(_SKETCH**2) :] for each in known]
    new = [sketch for sketch, each in zip(sketches, kept, strict=True) if each is not None]
    moved = torch._foreach_norm(torch._foreach_sub(new, old))
    squared = torch._foreach_norm([each[: -(_SKETCH**2)] for each in known], 1)
    most = torch._foreach_mul(torch._foreach_sqrt(squared), _SKETCH * _TOLERANCE)
    device = moved[0].device
    answers = iter(read(torch.stack([each.to(device) for each in torch._foreach_div(moved, most)])))
    return [each is not None and next(answers) <= 1 for each in kept]


def _sketch(delta: LowRank) -> Tensor:
    left = _projection(delta.left.shape[0], delta.left.device).T @ delta.left.float()
    right = delta.right.float() @ _projection(delta.right.shape[1], delta.right.device)
    return (left @ right).mul_(delta.scaling).flatten()


@functools.lru_cache(maxsize=64)
def _projection(size: int, device: torch.device) -> Tensor:
    """Gaussian numbers, shape ``(size, 8)``, that are the same in each run."""
    generator = torch.Generator().manual_seed(size)
    numbers = torch.randn(size, _SKETCH, generator=generator, dtype=torch.float32, device="cpu")
    return numbers.to(device)


def _batches(rows: Sequence[RowNorms]) -> Iterator[Sequence[RowNorms]]:
    """Runs of weights whose adapters take little memory in float32. (Kernels of accelerators need no such
    copy.)"""
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
