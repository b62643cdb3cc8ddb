"""Weights that can be read but not written, above all quantized ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import has_triton, unpacked
from ...kernels.part import Packed
from ...kernels.plain import Product
from ..sharding import is_sharded
from .base import Delta, FrozenWeight, fingerprint_of

_values: dict[tuple[Any, ...], Tensor | None] = {}
"""The 16 numbers of each layout; None if bitsandbytes reads it in another way than kernels do."""


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
        self._seen: tuple[Any, ...] | None = None
        """What the last answer of ``packed`` was for, and next the 16 numbers that it had."""
        self._numbers: Tensor | None = None

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
        if is_sharded(packed):
            raise ValueError(
                "a 4-bit weight was sharded after this optimizer was built, so that it can't be read: use "
                "DDP, or shard a model that is not quantized"
            )
        if getattr(state, "packing_format_for_cpu", False):
            packed = self._unpack(packed, state)
        state.dtype = dtype  # dequantize straight into it, as bitsandbytes' forward does
        values: Tensor = self._functional.dequantize_4bit(packed, state)
        return values

    def _unpack(self, packed: Tensor, state: Any) -> Tensor:
        """Undoes the layout that an evaluation on a CPU with AVX512-BF16 gives the weight.

        bitsandbytes' own inverse restores the codes, but not always ``absmax``.
        """
        state.original_nested = False
        packed, _ = self._functional._convert_weight_packed_for_cpu_inverse(packed, state)
        state.absmax = state.absmax.T.reshape(-1).float()
        return packed

    def packed(self) -> Packed | None:
        if not has_triton(self.device):
            return None
        state = self._quant_state()
        outer = (state.state2.code, state.state2.absmax, state.offset) if state.nested else ()
        sizes = state.blocksize, state.state2.blocksize if state.nested else 0
        packed = Packed(self.shape, self.layer.weight, state.code, state.absmax, sizes[0], outer, sizes[1])
        layout = state.quant_type, getattr(state, "packing_format_for_cpu", False), packed.shape, sizes
        seen = layout, fingerprint_of((packed.codes, state.code, state.absmax, *outer))
        if seen != self._seen:  # the checks take long for what each forward and backward asks
            self._numbers = self._numbers_of(packed, *layout[:2])
            self._seen = seen
        return None if self._numbers is None else packed._replace(values=self._numbers)

    def _numbers_of(self, packed: Packed, quant_type: str, is_repacked: bool) -> Tensor | None:
        """``values``, if the tensors are as releases up to 0.50 store them."""
        shape, codes = packed.shape, packed.codes
        numbers = packed.values, *(packed.outer or [packed.scales])
        is_known = (
            quant_type in ("nf4", "fp4")
            and len(shape) == 2
            and not is_repacked
            and not is_sharded(codes)
            and codes.nbytes == (shape.numel() + 1) // 2
            and shape.numel() < 1 << 31
            and packed.scales.dtype == (torch.uint8 if packed.outer else torch.float32)
            and all(each.dtype == torch.float32 for each in numbers)
            and all(each.is_contiguous() for each in (codes, packed.scales, *numbers))
            and all(each.device == codes.device for each in (packed.scales, *numbers))
        )
        if not is_known:
            return None
        layout = packed.device, shape, quant_type, packed.size, packed.outer_size
        if layout not in _values:  # waits once
            _values[layout] = packed.values if self._begins_as(packed) else None
        return _values[layout]

    @torch.no_grad()
    def _begins_as(self, packed: Packed) -> bool:
        """Whether the kernels see in the first rows what bitsandbytes does."""
        state, columns = copy.copy(self._quant_state()), self.shape[1]
        rows = min(self.shape[0], max(1, (1 << 16) // columns))
        state.shape, state.dtype = torch.Size((rows, columns)), torch.float32
        codes = packed.codes.data.view(-1).view(torch.uint8)[: (rows * columns + 1) // 2, None]
        state.absmax = packed.scales[: -(-rows * columns // packed.size)]
        expected: Tensor = self._functional.dequantize_4bit(codes, state)
        return torch.equal(unpacked(packed._replace(shape=state.shape), torch.float32), expected)

    def product(self, deltas: Sequence[Delta]) -> Product | None:
        packed, ((left, right, scaling), *more) = self.packed(), deltas
        return packed and Product(packed.codes, left, right, scaling, 0, tuple(more), packed)

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        return self._slices_of(self.dense(self._quant_state().dtype))

    def fingerprint(self) -> tuple[Any, ...]:
        return *super().fingerprint(), *fingerprint_of([self._quant_state().absmax])


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

    def fingerprint(self) -> tuple[Any, ...]:
        return *super().fingerprint(), *fingerprint_of([self._parts()[1]])

    @staticmethod
    def _dequantized(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        # The operations of MatMul8bitLt.backward, so that gradients are the same to the bit.
        values = codes.to(dtype, copy=True)
        return values.mul_(scales.unsqueeze(1).mul(1.0 / 127.0))


class _UnwritableWeight(FrozenWeight):
    """A weight in whatever tensors its layer keeps it."""

    _shape: torch.Size

    @property
    def shape(self) -> torch.Size:
        return self._shape

    @property
    def device(self) -> torch.device:
        return next((tensor.device for tensor in self.tensors()), torch.device("cpu"))

    def tensors(self) -> Iterator[Tensor]:
        return frozen_tensors(self.layer)

    def identity(self) -> Hashable:
        weight = getattr(self.layer, "weight", None)
        return id(weight) if isinstance(weight, nn.Parameter) else id(self.layer)


class ReadOnlyWeight(_UnwritableWeight):
    """A weight whose values can be read, but not written: torchao, HQQ, float8, weights that are computed
    from others."""

    kind = "read-only"

    def __init__(self, layer: nn.Module, row_dim: int, read: Callable[[nn.Module], Tensor]) -> None:
        super().__init__(layer, row_dim)
        self._read = read
        self._shape = self._values().shape

    def _values(self) -> Tensor:
        with torch.no_grad():
            return self._read(self.layer).detach()

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self._values().to(dtype, copy=True)

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        return self._slices_of(self._values())


def reader_of(owner: nn.Module, name: str) -> Callable[[nn.Module], Tensor] | None:
    """A reader for weights that can be read but not written. None if they can't be read."""
    weight = getattr(owner, name, None)
    if isinstance(weight, Tensor):
        kind = type(weight)
        if hasattr(kind, "get_original_weight"):  # torchao's NF4, which torchtune uses
            return lambda owner: getattr(owner, name).get_original_weight()
        if getattr(kind, "dequantize", Tensor.dequantize) is not Tensor.dequantize:
            return lambda owner: getattr(owner, name).dequantize()
        is_scaled = any("scale" in other for other in (*owner._parameters, *owner._buffers))
        if (
            kind in (Tensor, nn.Parameter)
            and weight.is_floating_point()
            and weight.ndim > 1
            and not is_scaled
        ):
            return lambda owner: getattr(owner, name).float()
    elif callable(getattr(owner, "dequantize", None)):
        return lambda owner: owner.dequantize()  # type: ignore[operator]
    return None


class OpaqueWeight(_UnwritableWeight):
    """Any other frozen linear layer, of which we know only its forward.

    ``W`` is read by sending rows of the identity matrix through the layer.
    """

    kind = "opaque"

    def __init__(self, layer: nn.Module, shape: tuple[int, int]) -> None:
        super().__init__(layer)
        self._shape = torch.Size(shape)

    @torch.no_grad()
    def _apply(self, x: Tensor) -> Tensor:
        """``x @ W.T``, without the bias."""
        forward = own_forward(self.layer)
        x = x.to(compute_dtype(self.layer))
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
        return self._apply(right.clone()).T  # the adapter's own memory, which the forward might write


def frozen_tensors(layer: nn.Module) -> Iterator[Tensor]:
    """All tensors that a quantizer may have stored a weight in."""
    for module in layer.modules():
        known: list[Any] = []
        for value in vars(module).values():  # parameters and buffers are among them, in dicts
            known += value.values() if isinstance(value, dict) else [value]
        for tensor in known:
            if isinstance(tensor, Tensor) and not tensor.requires_grad:
                yield from _inner_tensors(tensor)


def _inner_tensors(tensor: Any) -> Iterator[Tensor]:
    """The tensor, and those inside of it if it is a wrapper subclass."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else ()
    yield tensor
    for name in names:
        yield from _inner_tensors(getattr(tensor, name))


def own_forward(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer's forward without noise."""
    if "flatlora_forward" in layer.__dict__:
        replaced: Callable[[Tensor], Tensor] | None = layer.__dict__["flatlora_forward"][0]
        return replaced or MethodType(type(layer).forward, layer)
    return layer.forward


def compute_dtype(layer: nn.Module) -> torch.dtype:
    for holder in (layer, getattr(layer, "weight", None)):
        for name in ("compute_dtype", "dtype"):
            dtype = getattr(holder, name, None)
            if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    bias = getattr(layer, "bias", None)
    return bias.dtype if isinstance(bias, Tensor) else torch.get_default_dtype()
