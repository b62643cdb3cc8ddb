"""The interface of all perturbations."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..adapters import Target
from ..noise import Noise


class Perturbation:
    """Puts noise on one target and takes it away again.

    ``apply`` and ``remove`` may be interrupted anywhere by an exception. ``remove`` then takes
    away whatever ``apply`` had put on, and may be called again until it returns.
    """

    mode = ""
    """How the target is perturbed, as shown by ``print(optimizer)``."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def apply(self, noise: Noise) -> None:
        """Makes the target compute with ``W + eps``."""
        raise NotImplementedError

    def remove(self) -> None:
        """Brings ``W`` back. Does nothing when nothing is applied."""
        raise NotImplementedError

    def written(self) -> Tensor | None:
        """The tensor whose values ``apply`` changed, if any."""
        return None

    def clean_copy(self) -> Tensor | None:
        """A copy of ``W`` as it was before ``apply``, if ``written`` holds something else."""
        return None

    def seal(self) -> None:
        """Takes note of the perturbed weight, for ``changed`` to compare with."""

    def abandon(self) -> None:
        """Forgets the noise without writing anything: the weight now belongs to somebody else."""

    def changed(self) -> Callable[[], bool]:
        """Starts the check whether somebody else wrote the weight since ``seal``.

        On an accelerator the answer is only fetched when the returned function is called, so
        that many targets can be checked at the price of one synchronization.
        """
        return lambda: False

    def nbytes(self) -> int:
        """Memory held to be able to restore, in bytes."""
        return 0
