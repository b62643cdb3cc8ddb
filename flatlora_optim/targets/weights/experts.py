"""The experts of a mixture: many matrices in one 3-D parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.grid import Grid
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
        self._view: Tensor | None = None

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
        parameter, view = self.parameter, self._view
        if view is None or view.data_ptr() != parameter.data_ptr() or view.dtype != parameter.dtype:
            with torch.inference_mode(False):
                view = self._view = parameter.detach().view(-1, parameter.shape[-1])
        return view

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
