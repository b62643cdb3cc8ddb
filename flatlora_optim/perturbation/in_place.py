"""Noise that is written into the weight: W += eps, later W -= eps, to the bit.

All arithmetic is in float32 or wider, with the same numbers, and rounded once to the weight's dtype.
``exact`` journals the few elements that the subtraction would miss, ``snapshot`` keeps a copy of the
weight, and ``subtract`` (the paper's way) lets them drift.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..kernels import parts_of
from ..kernels.checksums import Checksums
from ..kernels.part import Keep, Part, visit
from ..kernels.threads import lasting_empty
from ..noise import Noise, NoiseSource
from ..targets import DenseWeight, Target, names_of
from ..targets.sharding import like, local_part, place_of
from .base import Perturbation, changed_among

RESTORE_MODES = {"exact": Keep.JOURNAL, "snapshot": Keep.COPY, "subtract": Keep.NOTHING}


_applied_at: WeakValueDictionary[object, InPlace] = WeakValueDictionary()
"""The perturbation whose noise is on the weight at a place in memory, whichever tensor shows it."""


class WeightChangedError(RuntimeError):
    """A frozen weight was written by somebody else while it carried noise."""


class InPlace(Perturbation):
    """Noise in a dense weight itself.

    Args:
        target: Its frozen weight must be dense.
        restore: A key of ``RESTORE_MODES``.
    """

    def __init__(self, target: Target, restore: str, source: NoiseSource) -> None:
        super().__init__(target, source)
        assert isinstance(target.weight, DenseWeight)
        self.mode = f"in place, {restore}"
        self._keep = RESTORE_MODES[restore]
        self._weight = target.weight
        self._tensor: Tensor | None = None
        self._place: object = None
        self._noise: Noise | None = None
        self._parts: Sequence[Part] = ()
        self._copy: Tensor | None = None
        self._checksum: tuple[int, Checksums, int] | None = None
        self._memory: Any = None

    def apply(self, noise: Noise) -> Sequence[Part]:
        tensor = self._weight.tensor
        place = place_of(tensor)
        if _applied_at.get(place, self) is not self:
            raise self.already_noisy()
        self._tensor, self._place, self._noise = tensor, place, noise
        if place is not None:
            _applied_at[place] = self
        local = local_part(tensor)
        if self._keep is Keep.COPY:
            self._reserve_copy(local)
        self._parts = parts_of(local, noise, self._keep, self._copy)
        return self._parts

    def remove(self) -> Sequence[Part]:
        # From here on we write the weight ourselves.
        self._checksum = None
        return self._parts

    def forget(self) -> None:
        for part in self._parts:
            if part.is_perturbed:
                part.forget()
        if _applied_at.get(self._place) is self:
            del _applied_at[self._place]
        self._tensor = self._noise = self._checksum = None
        self._parts = ()

    def written(self) -> Tensor | None:
        return self._tensor

    @torch.no_grad()
    def clean_copy(self) -> Tensor | None:
        if self._tensor is None:
            return None
        copy = local_part(self._tensor).clone()
        visit(lambda part: part.clean(copy[part.lo : part.hi]), [p for p in self._parts if p.is_perturbed])
        return like(self._tensor, copy)

    def nbytes(self) -> int:
        copied = 0 if self._copy is None else self._copy.numel() * self._copy.element_size()
        return copied + sum(part.nbytes for part in self._parts)

    def keep_checksum(self, checksums: Checksums, number: int) -> None:
        if self._tensor is not None:
            # A merge through `.data` changes elements, but not the version.
            self._checksum = self._weight.version, checksums, number
        self._memory = self._parts[0].memory if self._parts else None

    def kept_checksum(self) -> tuple[Checksums, int] | None:
        return None if self._checksum is None else self._checksum[1:]

    def changed(self) -> bool:
        if self._tensor is None or self._checksum is None:
            return False
        tensor = getattr(self._weight, "tensor", None)
        # Merging a B that is still zero changes no element, but it is a merge.
        if tensor is None or place_of(tensor) != self._place or self.target.merged:
            return True
        return self._weight.version != self._checksum[0]

    @torch.no_grad()
    def leave_merged(self) -> bool:
        tensor = getattr(self._weight, "tensor", None)
        shape = None if self._tensor is None else self._tensor.shape
        is_sum = self.target.merged and self.target.merges_a_sum
        if self._noise is None or not is_sum or tensor is None or tensor.shape != shape:
            return False
        self._noise.negated().add_to(local_part(tensor))
        warnings.warn(
            f"{self.target.name}: an adapter was merged into the weight while it carried noise. The noise "
            "was subtracted again, which rounds once more; call `optimizer.restore()` before a merge",
            stacklevel=2,
        )
        return True

    def _reserve_copy(self, local: Tensor) -> None:
        known = self._copy
        if known is None or (known.shape, known.dtype, known.device) != (
            local.shape,
            local.dtype,
            local.device,
        ):
            # Kept between steps: fresh memory costs more than the copy.
            self._copy = lasting_empty(local.shape, local.dtype, local.device)


def change_noticed(changed: Sequence[Perturbation]) -> WeightChangedError:
    """The error for weights that somebody else has written."""
    names = names_of(perturbation.target for perturbation in changed)
    return WeightChangedError(
        f"the frozen weight of {names} was written while it carried "
        "noise (merged, loaded or moved in the middle of a step?). It was left as it is, noise included: "
        "load it again, and change weights only after `optimizer.restore()` or `optimizer.step()`"
    )


def clean_copy(tensor: Tensor) -> Tensor | None:
    """A copy of the tensor without noise; None if it carries none.

    Raises:
        WeightChangedError: Somebody else wrote it meanwhile.
    """
    perturbation = _applied_at.get(place_of(tensor))
    if perturbation is None:  # perhaps `to()` has moved it meanwhile
        others = (reference() for reference in _applied_at.valuerefs())
        perturbation = next((each for each in others if each is not None and each.written() is tensor), None)
    written = None if perturbation is None else perturbation.written()
    if perturbation is None or written is None or not _same_elements(written, tensor):
        return None
    if changed_among([perturbation]):
        if perturbation.leave_merged():
            perturbation.forget()
            return None
        raise change_noticed([perturbation])
    copy = perturbation.clean_copy()
    return copy if copy is None or copy.shape == tensor.shape else copy.view(tensor.shape)


def _same_elements(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors in the same memory have the same elements, perhaps in another shape."""
    are_contiguous = one.is_contiguous() and other.is_contiguous()
    return one.shape == other.shape or (are_contiguous and one.numel() == other.numel())
