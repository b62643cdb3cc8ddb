"""The interface of all frozen weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.grid import Grid
from ...kernels.part import Packed
from ...kernels.plain import Product
from ..sharding import Cut

Delta = tuple[Tensor, Tensor, float]
"""``left``, ``right`` and ``scaling`` of a low-rank product, shapes ``(rows, r)`` and ``(r, columns)``."""


class UnsupportedAdapterError(ValueError):
    """Why an adapter layer is not perturbed. The optimizer reports it once."""


class FrozenWeight:
    """A weight matrix of ``rows`` output neurons by ``columns`` inputs.

    ``shape`` is the stored shape. With ``row_dim`` 1 the storage is transposed (GPT-2's
    ``Conv1D``): dim 0 is the input.
    """

    kind = ""

    def __init__(self, layer: nn.Module, row_dim: int = 0) -> None:
        self.layer: Any = layer
        self.row_dim = row_dim

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def rows(self) -> int:
        return self.shape[self.row_dim]

    @property
    def columns(self) -> int:
        shape = self.shape
        return shape.numel() // max(1, shape[self.row_dim])

    def grid(self, first_block: int = 0) -> Grid:
        shape = self.shape
        return Grid(shape[0], shape[1:].numel(), self.device.type, first_block)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A new tensor with the weight's values, in the stored shape."""
        raise NotImplementedError

    def packed(self) -> Packed | None:
        """How the weight is stored in 4 bits, if there are kernels that read that as it is meant."""
        return None

    def product(self, deltas: Sequence[Delta]) -> Product | None:
        """``W + deltas`` of the local part, for kernels that read many weights; None if they can't.

        Args:
            deltas: With those rows and columns that ``cuts`` has here.
        """
        return None

    def cuts(self) -> tuple[Cut, Cut]:
        """How rows (output neurons) and columns (inputs) are shared out."""
        return Cut(), Cut()

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields ``(lo, hi, values)``: float32 rows ``[lo, hi)`` along dim 0 of the whole weight.

        For a sharded weight, only rows of the local part, and ``values`` has only the elements
        ``grid().columns`` of each.
        """
        raise NotImplementedError

    def row_norms_squared(self) -> Tensor:
        """``||W[i, :]||^2``, shape ``(rows,)``. This and all below are of the local part alone."""
        return self._row_sums(lambda lo, hi, values: values.square())

    def project(self, right: Tensor) -> Tensor:
        """``W @ right.T`` for ``right`` of shape ``(r, columns)``: shape ``(rows, r)``.

        For quantized weights, which are whole and not transposed.
        """
        out = torch.empty(self.rows, right.shape[0], dtype=torch.float32, device=self.device)
        for lo, hi, values in self.slices():
            torch.mm(values, right.T, out=out[lo:hi])
        return out

    def norm_increase(self, left: Tensor, right: Tensor, scaling: float) -> Tensor:
        """``||(W + scaling * left @ right)[i, :]||^2 - ||W[i, :]||^2``, shape ``(rows,)``."""
        left, right = left.float() * scaling, right.float()
        return ((2 * self.project(right) + left @ (right @ right.T)) * left).sum(1)

    def squared_norms_with(self, delta: Tensor) -> Tensor:
        """``||(W + delta)[i, :]||^2`` for ``delta`` of the stored shape: shape ``(rows,)``."""
        columns = self.grid().columns
        return self._row_sums(lambda lo, hi, values: (values + delta[lo:hi].flatten(1)[:, columns]).square())

    def _row_sums(self, terms: Callable[[int, int, Tensor], Tensor]) -> Tensor:
        """Sums ``terms(lo, hi, values)`` of all slices, for each output neuron."""
        total = torch.zeros(self.rows, dtype=torch.float32, device=self.device)
        columns = self.grid().columns
        for lo, hi, values in self.slices():
            if self.row_dim == 0:
                total[lo:hi] = terms(lo, hi, values).sum(1)
            else:
                total[columns] += terms(lo, hi, values).sum(0)
        return total

    def identity(self) -> Hashable:
        """The same for layers that share the weight."""
        return id(self.layer.weight)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the weight's values depend on."""
        yield self.layer.weight

    def versions(self) -> tuple[Any, ...]:
        """Changes with each write that autograd counts, and if a tensor is replaced."""
        return tuple((_Itself(tensor), _version(tensor)) for tensor in self.tensors())

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes whenever the weight may have changed. Then cached norms are dropped."""
        return fingerprint_of(self.tensors())

    def _slices_of(self, values: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """``slices`` of values that were read all at once."""
        for lo, hi in self.grid().spans(self.shape[0]):
            yield lo, hi, values[lo:hi].float().flatten(1)


def fingerprint_of(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    return tuple((_Itself(tensor), _address(tensor), _version(tensor)) for tensor in tensors)


class _Itself:
    """Identifies a tensor. Unlike an ``id``, it is never used again for another tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self._reference = weakref.ref(tensor)  # the same object as long as the tensor lives

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and self._reference is other._reference

    __hash__ = None  # type: ignore[assignment]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass without memory of its own
        return 0
