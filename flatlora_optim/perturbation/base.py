"""The interface of all perturbations, and many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .. import kernels
from ..kernels.part import Part
from ..noise import Noise
from ..targets import Target


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

    def leave_merged(self) -> bool:
        """Subtracts the noise from a weight that meanwhile has an adapter merged into it, and tells so.

        Returns:
            Whether that is what happened to it.
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


@torch.no_grad()
def apply_all(perturbations: Sequence[Perturbation], noises: Sequence[Noise | None]) -> None:
    """Applies each noise, if there is one, to its target. ``remove_all`` takes back also a part."""
    pairs = zip(perturbations, noises, strict=True)
    kernels.perturb([part for p, noise in pairs if noise is not None for part in p.apply(noise)])


def forget_changed(perturbations: Sequence[Perturbation]) -> list[Perturbation]:
    """Leaves weights that somebody else has written to them, and returns whose they are.

    From a weight that an adapter was merged into, the noise is subtracted: nothing else is lost of it.
    """
    answers = [perturbation.changed() for perturbation in perturbations]
    changed = [perturbation for perturbation, answer in zip(perturbations, answers, strict=True) if answer]
    left = []
    for perturbation in changed:
        if not perturbation.leave_merged():
            left.append(perturbation)
        perturbation.forget()
    return left


def remove_all(perturbations: Sequence[Perturbation]) -> None:
    """Removes every one, also when an exception (Ctrl-C, say) arrives in between."""
    try:
        _remove(perturbations)
    except BaseException:
        # Removing twice does no harm, and one that can't be removed must not keep the others.
        for perturbation in perturbations:
            with suppress(Exception):
                _remove([perturbation])
        raise


@torch.no_grad()
def _remove(perturbations: Sequence[Perturbation]) -> None:
    kernels.restore([part for perturbation in perturbations for part in perturbation.remove()])
    for perturbation in perturbations:
        perturbation.forget()
