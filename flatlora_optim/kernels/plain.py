"""The kernels in plain torch operations: for any device, dtype and layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import part
from .journal import Journal
from .part import Keep, Key, Packed, Recipe, visit
from .threads import rows_at_once, scratch

name = "torch operations"
blocks_at_once = 1  # so that intermediate results stay in a core's own cache


class Product(NamedTuple):
    """A weight and a low-rank product ``scaling * left @ right`` on top of it, of shapes ``(m, r)`` and
    ``(r, n)``; of experts, which lie below each other in the weight, with one more dim in front.

    With ``row_dim`` 1, the weight is stored transposed. All three may have any floating dtype.
    ``more`` has further products for the same weight: ``left``, ``right`` and ``scaling`` of each. If the
    weight is ``packed``, for Triton alone, its codes stand in its place.
    """

    weight: Tensor
    left: Tensor
    right: Tensor
    scaling: float = 1.0
    row_dim: int = 0
    more: tuple[tuple[Tensor, Tensor, float], ...] = ()
    packed: Packed | None = None

    @property
    def terms(self) -> tuple[tuple[Tensor, Tensor, float], ...]:
        return (self[1:4], *self.more)

    @property
    def experts(self) -> int:
        return self.left.shape[0] if self.left.ndim == 3 else 1

    @property
    def rows(self) -> int:
        """The rows of all experts together."""
        return self.experts * self.left.shape[-2]

    @property
    def columns(self) -> int:
        return self.right.shape[-1]

    def matrices(self) -> list[Product]:
        """One for each expert, or itself, with a single product on top."""
        if self.left.ndim == 2 and not self.more:
            return [self]
        left = torch.cat([left.float() * scaling for left, _, scaling in self.terms], -1)
        right = torch.cat([right.float() for _, right, _ in self.terms], -2)
        if left.ndim == 2:
            return [Product(self.weight, left, right, 1.0, self.row_dim)]
        weights = self.weight.view(self.experts, -1, self.weight.shape[-1])
        return [Product(*each, 1.0, self.row_dim) for each in zip(weights, left, right, strict=True)]

    def matrix(self) -> Tensor:
        """The weight, of shape ``(m, n)``."""
        matrix = self.weight.flatten(1)
        return matrix.T if self.row_dim else matrix

    def factors(self) -> tuple[Tensor, Tensor]:
        """Scaled ``left``, and ``right``, float32."""
        left = self.left.float()
        return left if self.scaling == 1.0 else left * self.scaling, self.right.float()


SAMPLES = 64
"""Elements of a weight that go into its checksum."""

_NAN = {
    torch.float16: 0x7E00,
    torch.bfloat16: 0x7FC0,
    torch.float32: 0x7FC00000,
    torch.float64: 0x7FF8000000000000,
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bit patterns: unlike values, NaNs and signed zeros compare exactly."""
    return tensor.view(_BITS[tensor.element_size()])


def rounded_sum(weight: Tensor, eps: Tensor, alpha: int = 1) -> Tensor:
    """``weight + alpha * eps``, added in float32 or wider and rounded once, in scratch memory.

    The sum of a finite float16 weight stays finite: noise alone never overflows a layer. All NaNs become the
    same one, since what a conversion makes of a NaN depends on whether it was vectorized.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = scratch(f"sum {alpha}", weight.shape, dtype, weight.device).copy_(weight)
    total.add_(eps.view(weight.shape), alpha=alpha)
    if weight.dtype == torch.float16:
        largest = torch.finfo(torch.float16).max
        total = torch.where(weight.isfinite(), total.clamp(-largest, largest), total)
    if weight.dtype != dtype:
        total = scratch(f"rounded {alpha}", weight.shape, weight.dtype, weight.device).copy_(total)
    bits(total).masked_fill_(total.isnan(), _NAN[weight.dtype])
    return total


def takes(noise: Recipe, weight: Tensor) -> bool:
    return True


def fill(out: Tensor, key: Key, block: int) -> Tensor:
    generator = torch.Generator(device=out.device)
    # The CPU's generator keeps 32 bits of a seed, others keep 64.
    generator.manual_seed(key.block_seed(block, 32 if out.device.type == "cpu" else 64))
    return out.normal_(generator=generator)


def checksums(weights: Sequence[Tensor]) -> Tensor | list[int]:
    return torch.stack([checksum(weight) for weight in weights])


def checksum(weight: Tensor) -> Tensor:
    """A number that changes if any of ``SAMPLES`` elements does."""
    stride = max(1, weight.numel() // SAMPLES)
    some = weight.reshape(-1)[::stride] if weight.is_contiguous() else weight.flatten(1)[:, 0]
    values = bits(some[:SAMPLES].clone()).to(torch.int64)
    mixed = values * 0x1E3779B97F4A7C15  # odd, and so a bijection of 64 bits
    mixed = (mixed ^ (mixed >> 32)) + torch.arange(len(values), device=weight.device)
    mixed = mixed * 0x3F58476D1CE4E5B9
    return (mixed ^ (mixed >> 29)).sum()


class Part(part.Part):
    """Perturbed and restored block by block, on the CPU by several threads."""

    _journal: Journal | None = None

    def _prepare(self) -> None:
        self.rows = self.rows.detach()  # stays on this memory, even if the tensor gets another

    @classmethod
    def perturb_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        visit(cls.perturb, parts)

    @classmethod
    def restore_all(cls, parts: Sequence[Part]) -> None:  # type: ignore[override]
        visit(cls.restore, parts)

    def perturb(self) -> None:
        eps = self.noise.block(self.lo, self.hi)
        perturbed = rounded_sum(self.rows, eps)
        if self.copy is not None:
            self.copy.copy_(self.rows)
        if self.keep is Keep.JOURNAL:
            back = rounded_sum(perturbed, eps, alpha=-1)
            self._journal = Journal.of(bits(self.rows.contiguous()), bits(back))
        self._write(perturbed, True)

    def restore(self) -> None:
        if self.is_perturbed:
            self._write(self._clean(self.rows), False)
            self.forget()

    def clean(self, copy: Tensor) -> None:
        copy.copy_(self._clean(copy))

    def _clean(self, rows: Tensor) -> Tensor:
        if self.copy is not None:
            return self.copy
        restored = rounded_sum(rows, self.noise.block(self.lo, self.hi), alpha=-1)
        if self._journal is not None:
            self._journal.correct(bits(restored).view(-1))
        return restored

    def _write(self, values: Tensor, is_perturbed: bool) -> None:
        """Writes the rows and the flag, which agree also after an exception in between."""
        try:
            self.rows.copy_(values)
            self.is_perturbed = is_perturbed
        except BaseException:
            if torch.equal(bits(self.rows.contiguous()), bits(values)):
                self.is_perturbed = is_perturbed
            raise


def squared_norms(products: Sequence[Product]) -> list[Tensor]:
    return [torch.cat([squared_norms_of(each) for each in product.matrices()]) for product in products]


def squared_norms_of(product: Product) -> Tensor:
    """``||(W + scaling * left @ right)[i]||^2``, shape ``(m,)``, float32, of one matrix."""
    matrix, (left, right) = product.matrix(), product.factors()
    out = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)
    for rows in row_chunks(matrix):
        values = scratch("values", matrix[rows].shape, torch.float32, matrix.device)
        # Not `addmm`: after a moment without memory, its last bits may be others.
        torch.mm(left[rows], right, out=values)
        out[rows] = values.add_(matrix[rows]).square_().sum(1)
    return out


def row_chunks(matrix: Tensor) -> list[slice]:
    """Cuts a matrix into runs of rows to work on one at a time."""
    size = rows_at_once(matrix.shape[1], matrix.device.type)
    return [slice(lo, lo + size) for lo in range(0, len(matrix), size)]
