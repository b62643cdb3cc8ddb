"""Writing the noise into the weight: W += eps, later W -= eps, to the bit.

All arithmetic is float32 from the same stream, rounded once to the weight's dtype. ``exact``
journals the few elements that the subtraction would miss, ``snapshot`` keeps a copy of the
weight, ``subtract`` (the paper's way) lets them drift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters import Target
from ..kernels import kernels_of, parts_of
from ..kernels.part import Keep, Part, visit
from ..noise import Noise
from ..parallel import lasting_empty
from ..sharding import like, local_part
from ..weights import DenseWeight
from .base import Perturbation

RESTORE_MODES = {"exact": Keep.JOURNAL, "snapshot": Keep.COPY, "subtract": Keep.NOTHING}


class WeightChangedError(RuntimeError):
    """A frozen weight was written by somebody else while it carried noise."""


class InPlace(Perturbation):
    """
    Args:
        target: Whose frozen weight is dense.
        restore: A key of ``RESTORE_MODES``.
    """

    def __init__(self, target: Target, restore: str) -> None:
        super().__init__(target)
        assert isinstance(target.weight, DenseWeight)
        self.mode = f"in place, {restore}"
        self._keep = RESTORE_MODES[restore]
        self._weight = target.weight
        self._tensor: Tensor | None = None
        self._parts: Sequence[Part] = ()
        self._copy: Tensor | None = None
        self._seal: tuple[int, int, Any] | None = None

    def apply(self, noise: Noise) -> Sequence[Part]:
        tensor = self._weight.tensor
        if getattr(tensor, "flatlora_noise", self) is not self:
            raise self.already_noisy()
        self._tensor = tensor
        tensor.flatlora_noise = self  # type: ignore[attr-defined]
        local = local_part(self._tensor)
        if self._keep is Keep.COPY:
            self._reserve_copy(local)
        self._parts = parts_of(local, noise, self._keep, self._copy)
        return self._parts

    def remove(self) -> Sequence[Part]:
        # From here on the weight differs from what was sealed because of us.
        self._seal = None
        return self._parts

    def forget(self) -> None:
        for part in self._parts:
            if part.is_perturbed:
                part.forget()
        if self._tensor is not None and getattr(self._tensor, "flatlora_noise", None) is self:
            del self._tensor.flatlora_noise  # type: ignore[attr-defined]
        self._tensor = self._seal = None
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

    def seal(self) -> None:
        if self._tensor is not None:
            self._seal = self._sealed(self._tensor)

    def changed(self) -> bool | Tensor:
        if self._tensor is None or self._seal is None:
            return False
        tensor = getattr(self._weight, "tensor", None)
        # A merge of a B that is still zero changes no element, but means to.
        if tensor is None or tensor is not self._tensor or self.target.merged:
            return True
        version, address, probes = self._seal
        version_now, address_now, probes_now = self._sealed(tensor)
        if (version_now, address_now) != (version, address):
            return True
        differs: bool | Tensor = probes_now != probes
        return differs.any() if isinstance(differs, Tensor) else differs

    def _reserve_copy(self, local: Tensor) -> None:
        known = self._copy
        if known is None or (known.shape, known.dtype, known.device) != (
            local.shape,
            local.dtype,
            local.device,
        ):
            # Kept between steps: faulting in fresh pages costs more than the copy.
            self._copy = lasting_empty(local.shape, local.dtype, local.device)

    def _sealed(self, tensor: Tensor) -> tuple[int, int, Any]:
        """Version, address and a few elements: a merge through ``.data`` changes only the last."""
        local = local_part(tensor)
        return tensor._version, local.data_ptr(), kernels_of(local.device).probes(local)
