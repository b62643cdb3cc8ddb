"""Making, adding and taking away noise, and the norms that it needs, in three implementations.

=============  ======================================================================
``triton``     for CUDA; ``jit`` is the code that is compiled for it
``native``     for CPUs with a C compiler; ``build`` compiles and loads its C sources
``plain``      torch operations, for everything else; ``journal``: which elements a subtraction misses
``part``       some rows of a weight while noise comes and goes: the interface of all three
``checksums``  whether somebody else writes to weights
``grid``       how a weight is cut into blocks
``threads``    work on several threads, and memory that is used again
=============  ======================================================================

``uncompiled`` keeps functions out of ``torch.compile``, here and above.

Each implementation has its own generator of standard-normal numbers. Given the same numbers and scales,
all add and take away the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from . import native, plain
from .part import Keep, Key, Packed, Part, Recipe, refuse_capture
from .plain import Product
from .threads import interprets_triton

# Earlier releases, which belong to torch 2.4 and 2.5, can't compile the kernels.
_OLDEST_TRITON = (3, 2)
_OLDEST_GPU = (7, 0)


class Kernels(Protocol):
    """What each of the three modules offers."""

    name: str
    blocks_at_once: int
    """How many blocks go into one part."""
    Part: type[Part]

    def takes(self, noise: Recipe, weight: Tensor) -> bool:
        """Whether the parts can work on this noise and this weight."""
        ...

    def fill(self, out: Tensor, key: Key, block: int) -> Tensor:
        """Overwrites contiguous float32 memory with the standard-normal numbers of a block."""
        ...

    def checksums(self, weights: Sequence[Tensor]) -> Tensor | list[int]:
        """One number for each weight, all on one device. It changes if any of 64 elements does."""
        ...

    def squared_norms(self, products: Sequence[Product]) -> list[Tensor]:
        """``||(W + scaling * left @ right)[i]||^2`` of each, shape ``(m,)``, float32.

        The weights are on one device and are read once. Native code and Triton round both factors to
        bfloat16.
        """
        ...


def parts_of(
    weight: Tensor, noise: Recipe, keep: Keep = Keep.NOTHING, copy: Tensor | None = None
) -> list[Part]:
    """Cuts a weight, or its local part, for the fastest kernels that take it and its noise.

    Args:
        copy: Memory of the weight's shape, for ``Keep.COPY``.
    """
    kernels = kernels_for(noise, weight)
    spans = noise.grid.spans(weight.shape[0], kernels.blocks_at_once)
    if len(spans) == 1:  # views of all of it would only cost time, and small weights are many
        return [kernels.Part(weight, noise, *spans[0], keep, copy)]
    return [
        kernels.Part(weight[lo:hi], noise, lo, hi, keep, None if copy is None else copy[lo:hi])
        for lo, hi in spans
    ]


def perturb(parts: Iterable[Part]) -> None:
    """Puts one step's noise on parts of any weights. After an exception, some of them may carry it."""
    for kind, some in _by_kind(parts).items():
        kind.perturb_all(some)


def restore(parts: Iterable[Part]) -> None:
    """Brings back those that are perturbed. After an exception, some of them may still be."""
    for kind, some in _by_kind(part for part in parts if part.is_perturbed).items():
        kind.restore_all(some)


def add(parts: Iterable[Part]) -> None:
    """Like ``perturb``, for parts that will not be restored."""
    for kind, some in _by_kind(parts).items():
        kind.add_all(some)


def fill_factors(factors: Sequence[tuple[Tensor, Tensor, Recipe]]) -> None:
    """Overwrites pairs of contiguous tensors with the factors of seeded low-rank noise, those of a device and
    dtype in one launch. ``has_triton`` must hold for them."""
    if factors:
        from . import triton

        triton.fill_factors(factors)


def sum_of(packed: Packed, noise: Recipe, dtype: torch.dtype) -> Tensor | None:
    """``W + eps`` in one launch, rounded to ``dtype`` as W and again as the sum. None if Triton's kernels,
    which alone read packed weights, don't take the noise."""
    kernels, out = kernels_of(packed.device), torch.empty(packed.shape, dtype=dtype, device=packed.device)
    if not kernels.takes(noise, out):
        return None
    add([kernels.Part(out, noise, 0, len(out), Keep.NOTHING, packed=packed)])
    return out


def unpacked(packed: Packed, dtype: torch.dtype) -> Tensor:
    """W, as Triton's kernels see it."""
    from . import triton

    return triton.unpacked(packed, dtype)


def _by_kind(parts: Iterable[Part]) -> dict[type[Part], list[Part]]:
    kinds: dict[type[Part], list[Part]] = {}
    for part in parts:
        kinds.setdefault(type(part), []).append(part)
    for device in {part.rows.device for some in kinds.values() for part in some}:
        refuse_capture(device)
    return kinds


@functools.cache
def kernels_of(device: torch.device) -> Kernels:
    """The fastest kernels that run on the device."""
    if has_triton(device):
        from . import triton

        return cast(Kernels, triton)
    return cast(Kernels, native if device.type == "cpu" and native.is_available() else plain)


def kernels_for(noise: Recipe, weight: Tensor) -> Kernels:
    """The fastest kernels that take this noise and this weight, or its local part."""
    kernels = kernels_of(weight.device)
    return kernels if kernels.takes(noise, weight) else cast(Kernels, plain)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on the device."""
    # Triton's interpreter reads memory by its address, which works on the CPU only.
    if device.type != ("cpu" if interprets_triton() else "cuda"):
        return False
    if importlib.util.find_spec("triton") is None or os.environ.get("FLATLORA_TRITON") == "0":
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= _OLDEST_TRITON
