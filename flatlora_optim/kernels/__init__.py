"""Making, adding and taking away the noise of a block, in three ways that do the same.

:mod:`.triton_kernels` for CUDA, :mod:`.native` for CPUs with a C compiler, :mod:`.plain` torch
operations for everything else. Each makes standard-normal numbers of its own; with the same
numbers, all of them compute the same bits.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from . import native, plain

if TYPE_CHECKING:
    from ..noise import Noise

# Earlier releases, which belong to torch 2.4 and 2.5, can't compile the kernels.
_OLDEST_TRITON = (3, 2)
_OLDEST_GPU = (7, 0)


class Kernels(Protocol):
    """What each of the three modules offers."""

    name: str
    blocks_at_once: int
    """How many blocks one call may be given."""

    def takes(self, noise: Noise, part: Tensor) -> bool:
        """Whether ``perturb`` and ``restore`` know noise and weights of this kind."""
        ...

    def fill(self, out: Tensor, seed: int) -> Tensor:
        """Overwrites contiguous float32 memory with the standard-normal numbers of a 32-bit seed."""
        ...

    def perturb(
        self,
        part: Tensor,
        noise: Noise,
        lo: int,
        hi: int,
        *,
        journal: bool,
        note: Callable[[Any], object],
    ) -> None:
        """``part += eps`` for the rows of one block, or of a few.

        Args:
            part: Local rows ``[lo, hi)`` of the weight.
            noise: The weight's noise.
            journal: Whether to record what the subtraction will miss.
            note: Called with the journal, or None, once the rows are written, also if an
                exception follows. If it was not called, they are as they were.
        """
        ...

    def restore(
        self, part: Tensor, noise: Noise, lo: int, hi: int, *, journal: Any, note: Callable[[], object]
    ) -> None:
        """Takes away what ``perturb`` has put on, and calls ``note`` in the same way."""
        ...

    def norm_increase(self, matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """``||(matrix + left @ right)[i]||^2 - ||matrix[i]||^2``, shape ``(m,)``, float32, in one pass.

        Args:
            matrix: Shape ``(m, n)``, of any strides and floating dtype.
            left, right: Shapes ``(m, r)`` and ``(r, n)``, float32.
        """
        ...


@functools.cache
def kernels_of(device: torch.device) -> Kernels:
    """The fastest that run on the device."""
    if has_triton(device):
        from . import triton_kernels

        return cast(Kernels, triton_kernels)
    return cast(Kernels, native if device.type == "cpu" and native.is_available() else plain)


def kernels_for(noise: Noise, weight: Tensor) -> Kernels:
    """The fastest that take this noise and this weight, or its local part."""
    kernels = kernels_of(weight.device)
    return kernels if kernels.takes(noise, weight) else cast(Kernels, plain)


@functools.cache
def has_triton(device: torch.device) -> bool:
    """Whether the Triton kernels run on the device."""
    if device.type != "cuda" and not os.environ.get("TRITON_INTERPRET"):
        return False
    if importlib.util.find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _OLDEST_GPU:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= _OLDEST_TRITON
