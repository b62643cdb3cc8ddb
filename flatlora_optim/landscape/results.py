"""The results of measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Estimate:
    """The mean of random samples, and its standard error."""

    samples: Tensor
    """Shape ``(samples,)``, float64."""

    @property
    def mean(self) -> float:
        """The estimate itself."""
        return float(self.samples.mean())

    @property
    def standard_error(self) -> float:
        """NaN for a single sample."""
        count = len(self.samples)
        return float(self.samples.std()) / math.sqrt(count) if count > 1 else math.nan

    def __repr__(self) -> str:
        return f"{self.mean:.6g} ± {self.standard_error:.2g} ({len(self.samples)} samples)"


@dataclass(frozen=True, eq=False, repr=False)
class ExpectedLoss(Estimate):
    """``E L(W + eps)``, and the loss at W."""

    at_minimum: float
    """The loss at W, whether it is a minimum or not."""
    sigma: float
    """The strength of the noise."""

    @property
    def increase(self) -> float:
        """``E L(W + eps) - L(W)``; its standard error is that of the mean."""
        return self.mean - self.at_minimum


@dataclass(frozen=True)
class Eigenvalue:
    """The result of a power iteration."""

    value: float
    iterations: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Slice1D:
    """``losses[i]`` is the loss at ``W + coordinates[i] * d``, ``at_minimum`` the loss at W."""

    coordinates: Tensor
    losses: Tensor
    at_minimum: float


@dataclass(frozen=True, eq=False)
class Slice2D:
    """``losses[i, j]`` is the loss at ``W + coordinates[i] * d1 + coordinates[j] * d2``, ``at_minimum`` the
    loss at W."""

    coordinates: Tensor
    losses: Tensor
    at_minimum: float
