"""The experts of a mixture: many matrices in one 3-D parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import kernels_of
from ...kernels.grid import Grid
from ...kernels.plain import Product
from .base import Delta, fingerprint_of
from .dense import DenseWeight


class ExpertsWeight(DenseWeight):
    """All experts' matrices, stacked into one of shape ``(experts * outputs, inputs)``.

    PEFT's ``target_parameters`` put an adapter on them by a parametrization in each forward. It moves the
    parameter's version counter, so a few elements show writes instead. Between forwards the parameter is in
    its usual place.

    Args:
        layer: Holds the parameter, of shape ``(experts, outputs, inputs)``, or ``(outputs, inputs)``.
        name: The parameter's name.
        is_transposed: Whether each expert is stored ``(inputs, outputs)``.
    """

    kind = "experts"

    def __init__(self, layer: nn.Module, name: str, is_transposed: bool) -> None:
        super().__init__(layer, int(is_transposed), name)

    @property
    def parameter(self) -> Tensor:
        if "parametrizations" in self.layer._modules and self.name in self.layer.parametrizations:
            original: Tensor = self.layer.parametrizations[self.name].original
            return original
        return super().tensor

    @property
    def experts(self) -> int:
        parameter = self.parameter
        return parameter.shape[0] if parameter.ndim == 3 else 1

    @property
    def tensor(self) -> Tensor:
        parameter = self.parameter
        return parameter.view(-1, parameter.shape[-1])

    @property
    def version(self) -> int:
        return 0

    @property
    def rows(self) -> int:
        return self.experts * self.parameter.shape[-1] if self.row_dim else self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[0] // self.experts if self.row_dim else self.shape[1]

    def grid(self, first_block: int = 0) -> Grid:
        grid = super().grid(first_block)
        return grid._replace(group=self.parameter.shape[-2]) if self.row_dim else grid

    @classmethod
    def norm_increases(  # type: ignore[override]
        cls, weights: Sequence[ExpertsWeight], deltas: Sequence[Delta]
    ) -> list[Tensor]:
        """The factors have a leading dim of experts."""
        increases = []
        for weight, (left, right, scaling) in zip(weights, deltas, strict=True):
            matrices = weight.tensor.detach().view(weight.experts, -1, weight.shape[1])
            products = [
                Product(*each, scaling, weight.row_dim) for each in zip(matrices, left, right, strict=True)
            ]
            increases.append(torch.cat(kernels_of(weight.device).norm_increases(products)))
        return increases

    def _row_sums(self, terms: Callable[[int, int, Tensor], Tensor]) -> Tensor:
        if not self.row_dim:
            return super()._row_sums(terms)
        inputs = self.grid().group
        total = torch.zeros(self.experts, self.shape[1], dtype=torch.float32, device=self.device)
        for lo, hi, values in self.slices():
            total[lo // inputs] += terms(lo, hi, values).sum(0)
        return total.flatten()

    def fingerprint(self) -> tuple[Any, ...]:
        parameter = self.parameter
        (itself, address, _), *_ = fingerprint_of([parameter])
        values = parameter.detach().view(-1)[:: max(1, parameter.numel() // 64)]
        return itself, address, values.float().tolist()
