"""Reading frozen weights, however they are stored.

Row scales and virtual perturbation need a weight's values in float32, a few rows at a time.
Quantized layers are recognized by their attributes, so a quantizer is only imported if the model has one
of its layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..sharding import is_sharded, local_part
from .base import FrozenWeight, UnsupportedAdapterError
from .dense import DenseWeight
from .experts import ExpertsWeight
from .quantized import (
    Bnb4bitWeight,
    Bnb8bitWeight,
    OpaqueWeight,
    ReadOnlyWeight,
    compute_dtype,
    own_forward,
    reader_of,
)

__all__ = [
    "DenseWeight",
    "ExpertsWeight",
    "FrozenWeight",
    "UnsupportedAdapterError",
    "compute_dtype",
    "has_foreign_forward",
    "is_plain",
    "own_forward",
    "read_weight",
]

_DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_weight(owner: nn.Module, layer: nn.Module, row_dim: int, name: str = "weight") -> FrozenWeight:
    """Chooses how the frozen weight of ``owner`` is read."""
    weight = getattr(owner, name, None)
    if isinstance(weight, Tensor) and weight.is_complex():
        raise UnsupportedAdapterError("its weight is complex")
    if is_sharded(weight) or (is_plain(weight) and not _is_computed(owner, name)):
        if not is_plain(local_part(weight)) or getattr(owner, "quant_state", None) is not None:
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
    read = reader_of(owner, name)
    if read is not None:
        return ReadOnlyWeight(owner, row_dim, read)
    if owner is layer or has_foreign_forward(owner):
        raise UnsupportedAdapterError(
            f"the weight of {type(owner).__name__} can only be read through its forward, which contains the "
            "adapter, too; keep the frozen layer as a submodule (`self.base_layer`) of the adapter's"
        )
    rows = getattr(layer, "out_features", None) or getattr(owner, "out_features", None)
    columns = getattr(layer, "in_features", None) or getattr(owner, "in_features", None)
    if not (isinstance(rows, int) and isinstance(columns, int)) or hasattr(owner, "kernel_size"):
        raise UnsupportedAdapterError(
            f"the weight of {type(owner).__name__} can't be read, and it is no linear layer whose "
            "in_features and out_features are known"
        )
    return OpaqueWeight(owner, (rows, columns))


def has_foreign_forward(owner: nn.Module) -> bool:
    """Whether another module's forward has replaced the layer's own, as kohya's networks do."""
    forward = getattr(owner, "_old_forward", None) or own_forward(owner)
    module = getattr(forward, "__self__", owner)
    return module is not owner and isinstance(module, nn.Module)


def _is_computed(owner: nn.Module, name: str) -> bool:
    """Whether the weight is computed at each access, or before each forward (pruning, the old
    ``weight_norm``), so that writes to it are lost."""
    made_by_hook = any(f"{name}{suffix}" in owner._parameters for suffix in ("_orig", "_g"))
    return made_by_hook or getattr(owner, name) is not getattr(owner, name)


def is_plain(weight: object) -> bool:
    """Whether in-place arithmetic on the tensor changes its values: no packed or wrapped data."""
    return (
        type(weight) in (nn.Parameter, Tensor)
        and isinstance(weight, Tensor)
        and weight.dtype in _DENSE_DTYPES
        and weight.ndim >= 2
    )
