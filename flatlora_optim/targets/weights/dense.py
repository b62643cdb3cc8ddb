"""Weights that are ordinary floating-point parameters, whole or sharded."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ...kernels.grid import Grid
from ...kernels.plain import Product
from ..sharding import Cut, cuts, is_sharded, local_part, place_of
from .base import Delta, FrozenWeight


class DenseWeight(FrozenWeight):
    """An ordinary floating-point parameter, which may be written in place."""

    kind = "dense"

    def __init__(self, layer: nn.Module, row_dim: int = 0, name: str = "weight") -> None:
        super().__init__(layer, row_dim)
        self.name = name

    @property
    def tensor(self) -> Tensor:
        # nn.Module's own lookup is slow, and this is called often.
        tensor: Tensor | None = self.layer._parameters.get(self.name)
        return getattr(self.layer, self.name) if tensor is None else tensor

    @property
    def version(self) -> int:
        """Changes with each write that autograd counts."""
        return self.tensor._version

    @property
    def shape(self) -> torch.Size:
        return self.tensor.shape

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def is_whole(self) -> bool:
        """Whether this process holds the whole weight."""
        return not is_sharded(self.tensor)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.detach().to(dtype, copy=True)

    def slices(self) -> Iterator[tuple[int, int, Tensor]]:
        local, grid = local_part(self.tensor), self.grid()
        for lo, hi in grid.spans(local.shape[0]):
            yield grid.first_row + lo, grid.first_row + hi, local[lo:hi].float().flatten(1)

    def product(self, deltas: Sequence[Delta]) -> Product:
        (left, right, scaling), *more = deltas
        return Product(local_part(self.tensor), left, right, scaling, self.row_dim, tuple(more))

    def cuts(self) -> tuple[Cut, Cut]:
        first, second = cuts(self.tensor)
        return (second, first) if self.row_dim else (first, second)

    def grid(self, first_block: int = 0) -> Grid:
        grid = super().grid(first_block)
        if self.is_whole:
            return grid
        rows, columns = cuts(self.tensor)
        return grid._replace(first_row=rows.here.start or 0, columns=columns.here)

    def overlaps(self, other: DenseWeight) -> bool:
        """Whether both contain the same element. Views that only interleave don't."""
        mine, others = local_part(self.tensor), local_part(other.tensor)
        first = min(mine.data_ptr(), others.data_ptr())
        end, unit = max(self.memory()[2], other.memory()[2]), mine.element_size()
        if others.element_size() != unit:
            return True
        taken = torch.zeros((end - first) // unit, dtype=torch.bool, device="cpu")
        for each in (mine, others):
            elements = taken.as_strided(each.shape, each.stride(), (each.data_ptr() - first) // unit)
            if elements.any():
                return True
            elements.fill_(True)
        return False

    def identity(self) -> Hashable:
        # By memory: `load_state_dict(assign=True)` gives tied layers parameters of their own.
        place, local = place_of(self.tensor), local_part(self.tensor)
        return (place, local.shape, local.stride()) if place is not None else id(self.tensor)

    def memory(self) -> tuple[torch.device, int, int]:
        """The local part's device, first byte, and first byte after it."""
        local = local_part(self.tensor)
        last = sum((size - 1) * stride for size, stride in zip(local.shape, local.stride(), strict=True))
        numel = last + 1 if local.numel() else 0
        return local.device, local.data_ptr(), local.data_ptr() + numel * local.element_size()

    def tensors(self) -> Iterator[Tensor]:
        yield self.tensor
