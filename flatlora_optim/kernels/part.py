"""Some rows of a frozen weight, while noise comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .grid import Grid
from .threads import for_each

P = TypeVar("P", bound="Part")


class Key(Protocol):
    """What the numbers of one optimizer step depend on."""

    @property
    def words(self) -> tuple[int, int, int, int]:
        """The key of Philox, and two words of its counter, each of 32 bits."""
        ...

    def block_seed(self, block: int, bits: int) -> int:
        """A seed of this many bits, for generators that take one number."""
        ...


class Keep(Enum):
    """What is kept to bring the clean rows back."""

    NOTHING = "nothing"
    """The noise is subtracted, which rounds."""
    JOURNAL = "journal"
    """The elements that the subtraction will miss."""
    COPY = "copy"
    """The rows themselves."""


class Recipe(Protocol):
    """What kernels ask of a weight's noise, which is a :class:`flatlora_optim.noise.Noise`."""

    grid: Grid
    scales: Tensor
    row_dim: int

    @property
    def key(self) -> Key: ...
    @property
    def can_be_fused(self) -> bool: ...
    @property
    def is_seeded(self) -> bool: ...
    @property
    def is_in_memory(self) -> bool: ...
    def blocks(self, lo: int, hi: int) -> tuple[range, int]: ...
    def places(self, numbers: Sequence[int]) -> tuple[Tensor, list[int]]: ...
    def block(self, lo: int, hi: int) -> Tensor: ...
    def scales_of(self, lo: int, hi: int) -> Tensor: ...


class Packed(NamedTuple):
    """A weight in 4 bits, as bitsandbytes stores it: ``values[code] * scale``, row by row.

    A scale is a number, or itself ``outer_values[code] * outer_scale + offset``, each operation rounded to
    float32.

    Args:
        shape: Of the weight; fewer than 2**31 elements.
        codes: Two in each byte, the first in the upper bits.
        values: 16 numbers.
        scales: One for each ``size`` elements: a number, or a code of 8 bits.
        size: Elements that have a scale in common.
        outer: ``outer_values``, ``outer_scale`` (one for each ``outer_size`` scales) and ``offset``.
        outer_size: Scales that have a scale in common; 0 if they are numbers.
    """

    shape: torch.Size
    codes: Tensor
    values: Tensor
    scales: Tensor
    size: int
    outer: tuple[Tensor, ...] = ()
    outer_size: int = 0

    @property
    def device(self) -> torch.device:
        return self.codes.device


def read(tensor: Tensor) -> list[Any]:
    """The tensor's values. Waits for the device, as nothing else in the package does at each step."""
    values: list[Any] = tensor.tolist()
    return values


def is_captured(device: torch.device) -> bool:
    """Whether a CUDA graph records what is launched."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph records what is launched."""
    if is_captured(device):
        raise RuntimeError(
            "noise can't come or go while a CUDA graph is captured: each replay would repeat the noise of "
            "one step. Capture forward and backward alone, of weights that are perturbed in place or by "
            "low-rank noise, with `auto=False`, and replay the graph inside of `with optimizer.perturbed():`"
        )


class Part:
    """Local rows ``[lo, hi)`` of a weight, and the noise for them.

    Whatever interrupts its methods, a part knows whether its rows carry the noise. Each module of
    kernels has its own subclass.

    Args:
        rows: A view of the rows.
        noise: The weight's noise.
        lo, hi: Where the rows are in the local part of the weight.
        keep: What brings the rows back.
        copy: Memory for the rows, with ``Keep.COPY``.
        packed: Where the weight is, if ``rows`` is only memory for ``W + eps``.
    """

    def __init__(
        self,
        rows: Tensor,
        noise: Recipe,
        lo: int,
        hi: int,
        keep: Keep,
        copy: Tensor | None = None,
        packed: Packed | None = None,
    ) -> None:
        self.rows, self.noise, self.lo, self.hi = rows, noise, lo, hi
        self.keep, self.copy, self.packed = keep, copy, packed
        self._storage = rows.untyped_storage()  # kept alive, even if the tensor gets another
        self._prepare()

    def _prepare(self) -> None:
        """For what a subclass needs further."""

    is_perturbed = False
    """Whether the rows carry the noise right now."""

    memory: Any = None
    """What stays allocated between steps, for as long as somebody holds it."""

    _journal: Any = None

    @property
    def nbytes(self) -> int:
        """Memory that the journal takes."""
        return 0 if self._journal is None else int(self._journal.nbytes)

    def clean(self, copy: Tensor) -> None:
        """Removes the noise from a copy of the perturbed rows. The rows keep it."""
        raise NotImplementedError

    def forget(self) -> None:
        """Gives up the rows without writing them."""
        self.is_perturbed, self._journal = False, None

    @classmethod
    def perturb_all(cls: type[P], parts: Sequence[P]) -> None:
        """``rows += eps`` in each part."""
        raise NotImplementedError

    @classmethod
    def restore_all(cls: type[P], parts: Sequence[P]) -> None:
        """Brings back the rows of those parts that are perturbed."""
        raise NotImplementedError

    @classmethod
    def add_all(cls: type[P], parts: Sequence[P]) -> None:
        """``perturb_all`` for parts that will not be restored."""
        cls.perturb_all(parts)


def visit(work: Callable[[P], None], parts: Sequence[P]) -> None:
    """Calls ``work`` for each part, on the CPU from several threads."""
    for_each(work, [part for part in parts if part.rows.device.type == "cpu"])
    for part in parts:
        if part.rows.device.type != "cpu":
            work(part)
