"""The interface of all perturbations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..adapters import Target
from ..kernels.part import Part
from ..noise import Noise


class Perturbation:
    """Puts noise on one target and takes it away again.

    What is written into the weight itself is left to the caller, who can then write many weights
    at once: ``apply`` and ``remove`` return the parts that are to be perturbed, or restored.
    Anything may be interrupted anywhere by an exception. ``remove`` and ``forget`` then end
    whatever had begun, and may be called again until they return.
    """

    mode = ""
    """How the target is perturbed, as shown by ``print(optimizer)``."""

    was_seen = True
    """Whether anything has ever computed with the noise, as far as that can be told."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def apply(self, noise: Noise) -> Sequence[Part]:
        """Makes the target compute with ``W + eps`` as soon as the parts are perturbed.

        Raises:
            RuntimeError: The weight carries the noise of another perturbation.
        """
        raise NotImplementedError

    def remove(self) -> Sequence[Part]:
        """Makes it compute with ``W`` as soon as the parts are restored; ``forget`` comes next."""
        return ()

    def forget(self) -> None:
        """Ends the perturbation without writing anything. Does nothing when nothing is applied."""
        raise NotImplementedError

    def written(self) -> Tensor | None:
        """The tensor whose values ``apply`` changed, if any."""
        return None

    def clean_copy(self) -> Tensor | None:
        """A copy of ``W`` as it was before ``apply``, if ``written`` holds something else."""
        return None

    def seal(self) -> None:
        """Takes note of the perturbed weight, for ``changed`` to compare with."""

    def changed(self) -> bool | Tensor:
        """Whether somebody else wrote the weight since ``seal``.

        On an accelerator the answer stays there, so that many targets can be checked at the price of
        one synchronization.
        """
        return False

    def already_noisy(self) -> RuntimeError:
        return RuntimeError(
            f"{self.target.name}: its weight carries noise already. If it is another FlatLoRAOptimizer's, "
            "let its step end first, by `step()` or `restore()`; if the weight was tied to another layer's "
            "after this optimizer was built, build a new one"
        )

    def nbytes(self) -> int:
        """Memory held to be able to restore, in bytes."""
        return 0
