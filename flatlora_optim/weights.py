"""Reading frozen weights, however they are stored.

Row scales and virtual perturbation need a weight's values in float32, a few rows at a time.
Quantized layers are recognized by the shape of their objects, so no quantizer is imported
before a layer of its own has been seen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .kernels import kernels_of
from .kernels.plain import Product, increase_of_projected
from .noise import Grid
from .sharding import is_sharded, local_part, region, sum_over_parts

W = TypeVar("W", bound="FrozenWeight")

Factors = tuple[Tensor, Tensor]
"""``left`` and ``right`` of a low-rank product, shapes ``(rows, r)`` and ``(r, columns)``, float32."""

DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class UnsupportedAdapterError(Exception):
    """Why an adapter layer is left unperturbed; reported once by the optimizer."""


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
    def is_whole(self) -> bool:
        """Whether this process holds all of it."""
        return True

    @property
    def rows(self) -> int:
        return self.shape[self.row_dim]

    @property
    def columns(self) -> int:
        return self.shape.numel() // max(1, self.rows)

    def grid(self, first_block: int = 0) -> Grid:
        return Grid(self.shape[0], self.shape[1:].numel(), self.device.type, first_block)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """A new tensor with the weight's values. Shape ``shape``."""
        raise NotImplementedError

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yields ``(lo, hi, values)``: float32 rows ``[lo, hi)`` along dim 0 of the whole weight.

        Of a sharded weight, only what this process holds: then ``values`` has the elements
        ``grid().columns`` of these rows.
        """
        raise NotImplementedError

    def row_norms_squared(self) -> Tensor:
        """``||W[i, :]||^2``, shape ``(rows,)``; here and below, of the local part alone."""
        columns = self.grid().columns
        total = torch.zeros(self.rows, dtype=torch.float32, device=self.device)
        for lo, hi, values in self.slices():
            if self.row_dim == 0:
                total[lo:hi] = values.square().sum(1)
            else:
                total[columns] += values.square().sum(0)
        return total

    def project(self, right: Tensor) -> Tensor:
        """``W @ right.T`` for ``right`` of shape ``(r, columns)``: shape ``(rows, r)``.

        For quantized weights, which are whole and not transposed.
        """
        out = torch.empty(self.rows, right.shape[0], dtype=torch.float32, device=self.device)
        for lo, hi, values in self.slices():
            torch.mm(values, right.T, out=out[lo:hi])
        return out

    @classmethod
    def norm_increases(cls: type[W], weights: Sequence[W], factors: Sequence[Factors]) -> list[Tensor]:
        """``||(W + left @ right)[i, :]||^2 - ||W[i, :]||^2`` of weights of this kind, shape ``(rows,)``."""
        return [
            increase_of_projected(weight.project(right), left, right)
            for weight, (left, right) in zip(weights, factors, strict=True)
        ]

    def row_dots(self, other: Tensor) -> Tensor:
        """``<W[i, :], other[i, :]>`` for ``other`` of the stored shape: shape ``(rows,)``."""
        columns = self.grid().columns
        total = torch.zeros(self.rows, dtype=torch.float32, device=self.device)
        for lo, hi, values in self.slices():
            products = values * other[lo:hi].flatten(1)[:, columns]
            if self.row_dim == 0:
                total[lo:hi] = products.sum(1)
            else:
                total[columns] += products.sum(0)
        return total

    def sum_over_parts(self, partial: Tensor) -> Tensor:
        """What the parts of a sharded weight add up to. Called by all processes in the same order."""
        return partial

    def identity(self) -> object:
        """The object that layers with a tied weight have in common."""
        return self.layer.weight

    def fingerprint(self) -> tuple[Any, ...]:
        """Changes whenever the weight may have changed, so that cached norms can be dropped."""
        tensor = self.layer.weight
        return id(tensor), tensor.data_ptr(), tensor._version


class DenseWeight(FrozenWeight):
    """An ordinary floating-point parameter, which may be written in place."""

    kind = "dense"

    def __init__(self, layer: nn.Module, row_dim: int = 0, name: str = "weight") -> None:
        super().__init__(layer, row_dim)
        self.name = name

    @property
    def tensor(self) -> Tensor:
        # nn.Module's own lookup is slow, and this is asked for again and again.
        tensor: Tensor | None = self.layer._parameters.get(self.name)
        return getattr(self.layer, self.name) if tensor is None else tensor

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def is_whole(self) -> bool:
        return not is_sharded(self.tensor)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.detach().to(dtype, copy=True)

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        local, grid = local_part(self.tensor), self.grid()
        for lo, hi in grid.spans(local.shape[0]):
            yield grid.first_row + lo, grid.first_row + hi, local[lo:hi].float().flatten(1)

    @classmethod
    def norm_increases(  # type: ignore[override]
        cls, weights: Sequence[DenseWeight], factors: Sequence[Factors]
    ) -> list[Tensor]:
        increases: list[Tensor] = []
        for device, some in groupby(zip(weights, factors, strict=True), lambda pair: pair[0].device):
            pairs = list(some)
            products = [weight._product(*each) for weight, each in pairs]
            local = kernels_of(device).norm_increases(products)
            increases += [weight._of_all_rows(part) for (weight, _), part in zip(pairs, local, strict=True)]
        return increases

    def _product(self, left: Tensor, right: Tensor) -> Product:
        local = local_part(self.tensor).flatten(1)
        if not self.is_whole:
            rows, columns = self._region()
            left, right = left[rows], right[:, columns]
        return local.T if self.row_dim else local, left, right

    def _of_all_rows(self, values: Tensor) -> Tensor:
        """Values for the rows of the local part, with zeros for the other rows."""
        if len(values) == self.rows:
            return values
        out = torch.zeros(self.rows, dtype=torch.float32, device=self.device)
        out[self._region()[0]] = values
        return out

    def _region(self) -> tuple[slice, slice]:
        """Which rows (output neurons) and columns (inputs) the local part holds."""
        grid = self.grid()
        dims = slice(grid.first_row, grid.first_row + local_part(self.tensor).shape[0]), grid.columns
        rows, columns = reversed(dims) if self.row_dim else dims
        return rows, columns

    def grid(self, first_block: int = 0) -> Grid:
        grid = super().grid(first_block)
        if self.is_whole:
            return grid
        first_row, columns = region(self.tensor)
        return grid._replace(first_row=first_row, columns=columns)

    def sum_over_parts(self, partial: Tensor) -> Tensor:
        return sum_over_parts(partial, self.tensor)

    def identity(self) -> object:
        return self.tensor

    def fingerprint(self) -> tuple[Any, ...]:
        tensor = self.tensor
        local = local_part(tensor) if is_sharded(tensor) else tensor
        return id(tensor), local.data_ptr(), tensor._version


class Bnb4bitWeight(FrozenWeight):
    """bitsandbytes NF4 or FP4 (``Linear4bit``)."""

    kind = "bnb-4bit"

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        try:
            import bitsandbytes.functional as functional
        except ImportError as error:
            raise ImportError(
                f"{type(layer).__name__} has a 4-bit weight of bitsandbytes, which can't be imported: "
                "pip install 'flatlora-optim[qlora]'"
            ) from error
        self._functional = functional

    def _quant_state(self) -> Any:
        state = getattr(self.layer.weight, "quant_state", None)
        return state if state is not None else self.layer.quant_state

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self._quant_state().shape)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.layer.weight.device
        return device

    def dense(self, dtype: torch.dtype) -> Tensor:
        packed, state = self.layer.weight.data, copy.copy(self._quant_state())
        if getattr(state, "packing_format_for_cpu", False):
            packed = self._unpack(packed, state)
        state.dtype = dtype  # dequantized into it at once, as bitsandbytes' forward does
        values: Tensor = self._functional.dequantize_4bit(packed, state)
        return values

    def _unpack(self, packed: Tensor, state: Any) -> Tensor:
        """Undoes the layout that an evaluation on a CPU with AVX512-BF16 gives the weight.

        bitsandbytes' own inverse does so for the codes, but not always for ``absmax``.
        """
        state.original_nested = False
        packed, _ = self._functional._convert_weight_packed_for_cpu_inverse(packed, state)
        state.absmax = state.absmax.T.reshape(-1).float()
        return packed

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        values = self.dense(self._quant_state().dtype)
        for lo, hi in self.grid().spans(self.shape[0]):
            yield lo, hi, values[lo:hi].float()


class Bnb8bitWeight(FrozenWeight):
    """bitsandbytes LLM.int8 (``Linear8bitLt``)."""

    kind = "bnb-8bit"

    def _parts(self) -> tuple[Tensor, Tensor]:
        """Codes, shape (m, n), int8, and their row scales, shape (m,)."""
        state, weight = self.layer.state, self.layer.weight
        codes = next(c for c in (state.CB, getattr(weight, "CB", None), weight.data) if c is not None)
        scales = next(s for s in (state.SCB, getattr(weight, "SCB", None)) if s is not None)
        return codes, scales

    @property
    def shape(self) -> torch.Size:
        return self._parts()[0].shape

    @property
    def device(self) -> torch.device:
        return self._parts()[0].device

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._dequantized(*self._parts(), dtype)

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        codes, scales = self._parts()
        for lo, hi in self.grid().spans(self.shape[0]):
            yield lo, hi, self._dequantized(codes[lo:hi], scales[lo:hi], torch.float32)

    @staticmethod
    def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        # The very operations of MatMul8bitLt.backward, so that its gradient is met to the bit.
        values = codes.to(dtype, copy=True)
        return values.mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


class OpaqueWeight(FrozenWeight):
    """Any other frozen linear layer: all that is known of it is a working forward.

    ``W`` is read by sending rows of the identity matrix through the layer.
    """

    kind = "opaque"

    def __init__(self, layer: nn.Module, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(layer)
        self._shape = torch.Size(shape)
        self._device = device
        self._dtype = _compute_dtype(layer)

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        return self._device

    @torch.no_grad()
    def _apply(self, x: Tensor) -> Tensor:
        """``x @ W.T``, without the bias."""
        forward = own_forward(self.layer)
        x = x.to(self._dtype)
        output: Tensor = forward(x) - forward(torch.zeros_like(x[:1]))
        return output.float()

    def row_norms_squared(self) -> Tensor:
        total = torch.zeros(self.rows, dtype=torch.float32, device=self.device)
        for lo in range(0, self.columns, 128):
            basis = torch.zeros(min(128, self.columns - lo), self.columns, device=self.device)
            basis.diagonal(lo).fill_(1.0)
            total += self._apply(basis).square().sum(0)
        return total

    def project(self, right: Tensor) -> Tensor:
        return self._apply(right).T

    def row_dots(self, other: Tensor) -> Tensor:
        raise NotImplementedError("row_dots needs a weight that can be dequantized")

    def identity(self) -> object:
        return self.layer

    def fingerprint(self) -> tuple[Any, ...]:
        return (id(self.layer),)


def own_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward that the layer has when there is no noise."""
    if "flatlora_forward" in layer.__dict__:
        replaced: Callable[[Tensor], Tensor] | None = layer.__dict__["flatlora_forward"]
        return replaced or MethodType(type(layer).forward, layer)
    return layer.forward


def _compute_dtype(layer: nn.Module) -> torch.dtype:
    for holder in (layer, getattr(layer, "weight", None)):
        for name in ("compute_dtype", "dtype"):
            dtype = getattr(holder, name, None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
                return dtype
    bias = getattr(layer, "bias", None)
    return bias.dtype if isinstance(bias, Tensor) else torch.get_default_dtype()


def read_weight(owner: nn.Module, layer: nn.Module, row_dim: int, name: str = "weight") -> FrozenWeight:
    """Chooses how the frozen weight of ``owner`` is read."""
    weight = getattr(owner, name, None)
    # A parametrized weight is computed anew at each look: what is written to it is lost.
    if is_sharded(weight) or (_is_plain(weight) and weight is getattr(owner, name)):
        if not _is_plain(local_part(weight)):
            raise UnsupportedAdapterError("its weight is both quantized and sharded")
        return DenseWeight(owner, row_dim, name)
    if name != "weight":
        raise UnsupportedAdapterError(f"its {name!r} is no floating-point matrix that can be written")
    if type(weight).__name__ == "Params4bit":
        if all(getattr(holder, "quant_state", None) is None for holder in (weight, owner)):
            raise UnsupportedAdapterError("not quantized yet: move the model to its device first")
        return Bnb4bitWeight(owner)
    state: Any = getattr(owner, "state", None)
    if type(weight).__name__ == "Int8Params" and state is not None:
        if state.has_fp16_weights:
            raise UnsupportedAdapterError("quantizes a float16 weight in each forward (`has_fp16_weights`)")
        if all(getattr(holder, "SCB", None) is None for holder in (weight, state)):
            raise UnsupportedAdapterError("not quantized yet: move the model to its device first")
        return Bnb8bitWeight(owner)
    rows = getattr(layer, "out_features", None) or getattr(owner, "out_features", None)
    columns = getattr(layer, "in_features", None) or getattr(owner, "in_features", None)
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise UnsupportedAdapterError(
            f"the weight of {type(owner).__name__} can't be read and its in_features and "
            "out_features are unknown"
        )
    tensors: tuple[Tensor, ...] = (*owner.parameters(), *owner.buffers())
    device = next((t.device for t in tensors), torch.device("cpu"))
    return OpaqueWeight(owner, (rows, columns), device)


def _is_plain(weight: object) -> bool:
    """Whether in-place arithmetic on the tensor means what it says (no packed or wrapped data)."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        and isinstance(weight, Tensor)
        and weight.dtype in DENSE_DTYPES
        and weight.ndim >= 2
    )
