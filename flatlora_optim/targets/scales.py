"""Row scales: how strong the noise is in each output neuron.

``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)`` with ``W' = W + s * B @ A`` (Flat-LoRA, section
3.2). W' itself is never made:

``||W'[i]||^2 = ||W[i]||^2 + 2 <B[i], (W A^T)[i]> + B[i] (A A^T) B[i]^T``

with s folded into B. The first term is constant and kept; the rest costs one pass over W. Native
kernels round A and s B to bfloat16 for it, where the weight is not transposed.

A quantized W has to be dequantized for that pass. So its norms are kept for as long as s B A stays near
where it was: as ``| ||W'[i]|| - ||W'old[i]|| | <= ||(W' - W'old)[i]||``, the norms are off by no more than
the adapter has moved, in the root mean square over the rows. How far it has moved is told from a sketch,
``P.T @ (s B A) @ Q`` with Gaussian P and Q of 8 columns: each element of what the sketch moves by has the
squared Frobenius norm of what ``s B A`` moves by as its expected square.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .target import LowRank, Target
from .weights import DenseWeight, FrozenWeight

_ELEMENTS_AT_ONCE = 1 << 24
_TOLERANCE = 0.01
"""How far an adapter may move, relative to W', before the norms on a quantized weight are read anew."""
_SKETCH = 8


class RowNorms:
    """The norms of the merged weight's rows, for one target.

    Holds ``||W[i]||^2`` (m numbers) for as long as the frozen weight stays what it was.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.kept: Tensor | None = None
        """Of a quantized weight: ``||W'[i]||^2`` as they were last read, and that adapter's sketch, flat."""
        self._base: Tensor | None = None
        self._fingerprint: tuple[Any, ...] | None = None

    def base_squared(self) -> Tensor:
        """``||W[i]||^2``, shape ``(m,)``; of a sharded weight, what the local part adds to it."""
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
        """NaNs are near nothing."""
        return torch.full((self.kept_size,), math.nan) if self.kept is None else self.kept

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
        read = _read if issubclass(kind, DenseWeight) else _kept_or_read
        for i, norms in zip(indices, read(kind, [rows[i] for i in indices], deltas), strict=True):
            squared[i] = norms
    return squared


def _read(kind: type[FrozenWeight], rows: Sequence[RowNorms], deltas: Sequence[LowRank]) -> list[Tensor]:
    """``||W'[i]||^2`` of weights of one kind, by one pass over each."""
    weights = [each.target.weight for each in rows]
    partial = kind.norm_increases(weights, deltas)
    torch._foreach_add_(partial, [each.base_squared() for each in rows])
    return [weight.sum_over_parts(local) for weight, local in zip(weights, partial, strict=True)]


def _kept_or_read(
    kind: type[FrozenWeight], rows: Sequence[RowNorms], deltas: Sequence[LowRank]
) -> list[Tensor]:
    """The same, with a pass only over those whose adapter has moved by more than the tolerance."""
    sketches = [_sketch(delta) for delta in deltas]
    far = [i for i, near in enumerate(_are_near(rows, sketches)) if not near]
    if far:
        read = _read(kind, [rows[i] for i in far], [deltas[i] for i in far])
        for i, squared in zip(far, read, strict=True):
            rows[i].kept = torch.cat([squared, sketches[i]])
    return [each.kept[: -(_SKETCH**2)].clone() for each in rows if each.kept is not None]


def _are_near(rows: Sequence[RowNorms], sketches: Sequence[Tensor]) -> list[bool]:
    """Whether each adapter is within the tolerance of what it was when the norms were read."""
    for each in rows:
        each.base_squared()  # forgets what was kept of another weight
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
    ratios = torch.stack([each.to(device) for each in torch._foreach_div(moved, most)]).tolist()  # waits once
    answers = iter(ratios)
    return [each is not None and next(answers) <= 1 for each in kept]


def _sketch(delta: LowRank) -> Tensor:
    left = _projection(delta.left.shape[0], delta.left.device).T @ delta.left.float()
    right = delta.right.float() @ _projection(delta.right.shape[1], delta.right.device)
    return (left @ right).mul_(delta.scaling).flatten()


@functools.lru_cache(maxsize=64)
def _projection(size: int, device: torch.device) -> Tensor:
    """Gaussian numbers, shape ``(size, 8)``, that are the same in each run."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, _SKETCH, generator=generator).to(device)


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
