"""Making, adding and taking away noise, and the norms that it needs, in three ways that do the same.

===========  ========================================================================
``triton``   for CUDA; ``jit`` is the code that is compiled for it
``native``   for CPUs with a C compiler; ``build`` compiles and loads its C sources
``plain``    torch operations, for everything else; ``journal`` is what they write down
``part``     some rows of a weight while noise comes and goes: what each of them offers
``seal``     whether somebody else writes to weights
``grid``     how a weight is cut into blocks
``threads``  work on several threads
===========  ========================================================================

``uncompiled`` keeps functions from being compiled, here and above.

Each makes standard-normal numbers of its own; with the same numbers and scales, all of them add and
take away the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from . import native, plain
from .part import Keep, Key, Part, Recipe, refuse_capture
from .plain import Product
from .threads import interprets_triton

# Earlier releases, which belong to torch 2.4 and 2.5, can't compile the kernels.
_OLDEST_TRITON = (3, 2)
_OLDEST_GPU = (7, 0)


class Kernels(Protocol):
    """What each of the three modules offers."""

    name: str
    blocks_at_once: int
    """How many blocks to make one part of."""
    Part: type[Part]

    def takes(self, noise: Recipe, weight: Tensor) -> bool:
        """Whether the parts know noise and weights of this kind."""
        ...

    def fill(self, out: Tensor, key: Key, block: int) -> Tensor:
        """Overwrites contiguous float32 memory with the standard-normal numbers of a block."""
        ...

    def probes(self, weights: Sequence[Tensor]) -> Tensor | list[int]:
        """A number for each weight on one device, which changes with any of a few elements."""
        ...

    def squared_norms(self, products: Sequence[Product]) -> list[Tensor]:
        """``||(W + scaling * left @ right)[i]||^2`` of each, shape ``(m,)``, float32.

        The weights are on one device. Each takes one pass over it. Native code and Triton round both
        factors to bfloat16 for it.
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
    """Puts the noise of one step on parts of any weights. On an exception, some of them may carry it."""
    for kind, some in _by_kind(parts).items():
        kind.perturb_all(some)


def restore(parts: Iterable[Part]) -> None:
    """Brings back those that are perturbed. On an exception, some of them may still be."""
    for kind, some in _by_kind(part for part in parts if part.is_perturbed).items():
        kind.restore_all(some)


def add(parts: Iterable[Part]) -> None:
    """Like ``perturb``, for parts that will not be restored."""
    for kind, some in _by_kind(parts).items():
        kind.add_all(some)


def _by_kind(parts: Iterable[Part]) -> dict[type[Part], list[Part]]:
    kinds: dict[type[Part], list[Part]] = {}
    for part in parts:
        kinds.setdefault(type(part), []).append(part)
    for device in {part.rows.device for some in kinds.values() for part in some}:
        refuse_capture(device)
    return kinds


@functools.cache
def kernels_of(device: torch.device) -> Kernels:
    """The fastest that run on the device."""
    if has_triton(device):
        from . import triton

        return cast(Kernels, triton)
    return cast(Kernels, native if device.type == "cpu" and native.is_available() else plain)


def kernels_for(noise: Recipe, weight: Tensor) -> Kernels:
    """The fastest that take this noise and this weight, or its local part."""
    kernels = kernels_of(weight.device)
    return kernels if kernels.takes(noise, weight) else cast(Kernels, plain)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on the device."""
    # The interpreter has the addresses of tensors, which only those of the CPU let it follow.
    if device.type != ("cpu" if interprets_triton() else "cuda"):
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= _OLDEST_TRITON
