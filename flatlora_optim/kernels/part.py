"""Some rows of a frozen weight, while noise comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Protocol, TypeVar

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
        """For generators that take a seed of so many bits."""
        ...


class Keep(Enum):
    """What is kept of the clean rows, so that they can come back."""

    NOTHING = "nothing"
    """The noise is subtracted, which rounds."""
    JOURNAL = "journal"
    """What the subtraction will miss."""
    COPY = "copy"
    """All of them."""


class Recipe(Protocol):
    """What kernels ask of a weight's noise. It is :class:`flatlora_optim.noise.Noise`, which is built on
    them."""

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


def read(tensor: Tensor) -> list[Any]:
    """Waits for the device, and has its answer: nothing else in the package does so at each step."""
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
    kernels has its own kind of part.

    Args:
        rows: A view of the rows.
        noise: The weight's noise.
        lo, hi: Their place in the local part of the weight.
        keep: What brings them back.
        copy: Memory for them, if ``keep`` says so.
    """

    def __init__(
        self, rows: Tensor, noise: Recipe, lo: int, hi: int, keep: Keep, copy: Tensor | None = None
    ) -> None:
        self.rows, self.noise, self.lo, self.hi = rows, noise, lo, hi
        self.keep, self.copy = keep, copy
        self._storage = rows.untyped_storage()  # stays, even if the tensor is given another

    is_perturbed = False
    """Whether the rows carry the noise right now."""

    memory: Any = None
    """What is kept between steps, by whoever holds it."""

    _journal: Any = None

    @property
    def nbytes(self) -> int:
        """Memory that the journal takes."""
        return 0 if self._journal is None else int(self._journal.nbytes)

    def perturb(self) -> None:
        """``rows += eps``."""
        raise NotImplementedError

    def restore(self) -> None:
        """Brings the rows back, if they are perturbed."""
        raise NotImplementedError

    def clean(self, copy: Tensor) -> None:
        """Brings a copy of the perturbed rows back, and leaves the rows as they are."""
        raise NotImplementedError

    def forget(self) -> None:
        """Leaves the rows as they are: they belong to somebody else now."""
        self.is_perturbed, self._journal = False, None

    @classmethod
    def perturb_all(cls: type[P], parts: Sequence[P]) -> None:
        """Perturbs parts of this kind, on the CPU several at once."""
        visit(cls.perturb, parts)

    @classmethod
    def restore_all(cls: type[P], parts: Sequence[P]) -> None:
        """Restores parts of this kind, on the CPU several at once."""
        visit(cls.restore, parts)

    @classmethod
    def add_all(cls: type[P], parts: Sequence[P]) -> None:
        """Perturbs parts of this kind that will not be restored."""
        cls.perturb_all(parts)


def visit(work: Callable[[P], None], parts: Sequence[P]) -> None:
    """Calls ``work`` for each part, on the CPU from several threads."""
    for_each(work, [part for part in parts if part.rows.device.type == "cpu"])
    for part in parts:
        if part.rows.device.type != "cpu":
            work(part)
