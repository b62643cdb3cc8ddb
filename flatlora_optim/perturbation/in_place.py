"""Writing the noise into the weight: W += eps, later W -= eps, to the bit.

All arithmetic is float32 from the same stream, rounded once to the weight's dtype. ``exact``
journals the few elements that the subtraction would miss, ``snapshot`` keeps a copy of the
weight, ``subtract`` (the paper's way) lets them drift.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adapters import Target
from ..kernels import kernels_for
from ..kernels.plain import bits
from ..noise import Noise
from ..parallel import lasting_empty
from ..sharding import like, local_part
from ..weights import DenseWeight
from .base import Perturbation

_PROBES = 64


class WeightChangedError(RuntimeError):
    """A frozen weight was written by somebody else while it carried noise."""


class _InPlace(Perturbation):
    """What the in-place modes share: the tensor written, and proof that only we wrote it."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        assert isinstance(target.weight, DenseWeight)
        self._weight = target.weight
        self._tensor: Tensor | None = None
        self._seal: tuple[int, int, Tensor] | None = None

    def written(self) -> Tensor | None:
        return self._tensor

    def _sealed(self, tensor: Tensor) -> tuple[int, int, Tensor]:
        """Version, address and a few elements: a merge through ``.data`` changes only the last."""
        local = local_part(tensor)
        stride = max(1, local.numel() // _PROBES)
        probes = local.reshape(-1)[::stride] if local.is_contiguous() else local[:, 0]
        return tensor._version, local.data_ptr(), probes[:_PROBES].clone()

    def changed(self) -> Callable[[], bool]:
        if self._tensor is None or self._seal is None:
            return lambda: False
        version, address, probes = self._seal
        # A merge of a B that is still zero changes no element, but means to.
        if self._weight.tensor is not self._tensor or self.target.merged:
            return lambda: True
        version_now, address_now, probes_now = self._sealed(self._tensor)
        if (version_now, address_now) != (version, address) or probes_now.dtype != probes.dtype:
            return lambda: True
        same = (bits(probes_now) == bits(probes)).all()
        return lambda: not bool(same)

    def seal(self) -> None:
        if self._tensor is not None:
            self._seal = self._sealed(self._tensor)

    def abandon(self) -> None:
        self._tensor = self._seal = None


class Snapshot(_InPlace):
    """Keeps a copy of the weight. Fastest, and costs the weight's size in memory."""

    mode = "in place, snapshot"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._copy: Tensor | None = None

    @torch.no_grad()
    def apply(self, noise: Noise) -> None:
        tensor = self._weight.tensor
        local = local_part(tensor)
        if self._copy is None or self._copy.shape != local.shape or self._copy.dtype != local.dtype:
            # Kept between steps: faulting in fresh pages costs more than the copy.
            self._copy = lasting_empty(local.shape, local.dtype, local.device)
        self._copy.copy_(local)
        self._tensor = tensor
        noise.add_to(local)

    @torch.no_grad()
    def remove(self) -> None:
        if self._tensor is None:
            return
        assert self._copy is not None
        self._seal = None
        local_part(self._tensor).copy_(self._copy)
        self.abandon()

    def clean_copy(self) -> Tensor | None:
        if self._tensor is None or self._copy is None:
            return None
        return like(self._tensor, self._copy.clone())

    def nbytes(self) -> int:
        return 0 if self._copy is None else self._copy.numel() * self._copy.element_size()


class Subtract(_InPlace):
    """Generates the noise again and subtracts it. No memory, but low bits drift."""

    mode = "in place, subtract"
    journals = False

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._noise: Noise | None = None
        self._perturbed: dict[int, int] = {}
        """First and last row of each part that carries noise right now."""
        self._journals: dict[int, Any] = {}

    @torch.no_grad()
    def apply(self, noise: Noise) -> None:
        tensor = self._weight.tensor
        local = local_part(tensor)
        self._noise, self._tensor = noise, tensor
        kernels = kernels_for(noise, local)

        def add(lo: int, hi: int) -> None:
            def note(journal: Any) -> None:
                self._journals[lo] = journal
                self._perturbed[lo] = hi

            kernels.perturb(local[lo:hi], noise, lo, hi, journal=self.journals, note=note)

        noise.for_each_part(add, noise.parts(local.shape[0], kernels.blocks_at_once))

    @torch.no_grad()
    def remove(self) -> None:
        if self._tensor is None or self._noise is None:
            return
        # From here on the weight differs from what was sealed because of us.
        self._seal = None
        self._subtract_from(local_part(self._tensor), lambda lo: self._perturbed.pop(lo, None))
        self.abandon()

    def abandon(self) -> None:
        super().abandon()
        self._noise = None
        self._perturbed, self._journals = {}, {}

    @torch.no_grad()
    def clean_copy(self) -> Tensor | None:
        if self._tensor is None or self._noise is None:
            return None
        copy = local_part(self._tensor).clone()
        self._subtract_from(copy, lambda lo: None)
        return like(self._tensor, copy)

    def nbytes(self) -> int:
        return sum(journal.nbytes for journal in self._journals.values() if journal is not None)

    def _subtract_from(self, local: Tensor, note: Callable[[int], object]) -> None:
        assert self._noise is not None
        noise, kernels = self._noise, kernels_for(self._noise, local)

        def subtract(lo: int, hi: int) -> None:
            journal = self._journals[lo]
            kernels.restore(local[lo:hi], noise, lo, hi, journal=journal, note=lambda: note(lo))

        noise.for_each_part(subtract, list(self._perturbed.items()))


class Exact(Subtract):
    """Subtract, plus a journal of the elements it misses: bit-identical in every dtype."""

    mode = "in place, exact"
    journals = True


RESTORE_MODES: dict[str, type[_InPlace]] = {
    "exact": Exact,
    "snapshot": Snapshot,
    "subtract": Subtract,
}
