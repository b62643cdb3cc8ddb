"""Row scales: how strong the noise is in each output neuron.

``scale[i] = sigma_t * ||W'[i, :]|| / sqrt(n)`` with ``W' = W + s * B @ A`` (Flat-LoRA, section
3.2). W' itself is never made:

``||W'[i]||^2 = ||W[i]||^2 + 2 <B[i], (W A^T)[i]> + B[i] (A A^T) B[i]^T``

with s folded into B. The first term is constant and kept; the rest costs one pass over W.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .adapters import LowRank, Target


class RowNorms:
    """The norms of the merged weight's rows, for one target.

    Holds ``||W[i]||^2`` (m numbers) for as long as the frozen weight stays what it was.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self._base: Tensor | None = None
        self._of: tuple[Any, ...] | None = None

    @torch.no_grad()
    def base_squared(self) -> Tensor:
        """``||W[i]||^2``, shape ``(m,)``; of a sharded weight, what the local part adds to it."""
        fingerprint = self.target.weight.fingerprint()
        if self._base is None or self._of != fingerprint:
            self._base = self.target.weight.row_norms_squared()
            self._of = fingerprint
        return self._base

    def forget_if_changed(self) -> None:
        """To be called before the weight is written: afterwards it can't be told any more."""
        if self._of != self.target.weight.fingerprint():
            self._of = None

    def rewritten(self) -> None:
        """The weight was written, but with the bits it had: what is known of it stays true."""
        if self._of is not None:
            self._of = self.target.weight.fingerprint()

    @torch.no_grad()
    def merged(self) -> Tensor | None:
        """``||W'[i]||``, shape ``(m,)``, float32; None when no adapter is active."""
        # The forward that brought us here may run under autocast; norms need float32.
        with torch.autocast(self.target.weight.device.type, enabled=False):
            delta = self.target.delta()
            return None if delta is None else self._with(delta)

    def _with(self, delta: LowRank | Tensor) -> Tensor:
        weight = self.target.weight
        base = self.base_squared()
        if isinstance(delta, LowRank):
            left, right = delta
            squared = weight.sum_over_parts(base + weight.norm_increase(left, right))
        else:
            products = delta.flatten(1).square().sum(1 if weight.row_dim == 0 else 0)
            squared = weight.sum_over_parts(base + 2 * weight.row_dots(delta)) + products
        # Rounding can leave a vanishing row slightly below zero.
        return squared.clamp_(min=0).sqrt_()


def row_scales(norms: Tensor, sigma: float, columns: int) -> Tensor:
    """The standard deviation of the noise in each row, shape ``(m,)``.

    A row whose norm is not finite (an adapter that has diverged) gets no noise: the model's own
    output shows the damage, and noise on top would only hide where it came from.
    """
    return torch.nan_to_num(norms * (sigma / math.sqrt(max(1, columns))), nan=0.0, posinf=0.0)
