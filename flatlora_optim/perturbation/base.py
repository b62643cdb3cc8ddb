"""The interface of all perturbations, and many of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from .. import kernels
from ..kernels.checksums import Checksums
from ..kernels.part import Part
from ..noise import Noise, NoiseSource
from ..targets import Target
from ..targets.sharding import local_part


class Perturbation:
    """Puts noise on one target and takes it away again.

    ``apply`` and ``remove`` don't write the weight themselves: they return the parts to perturb, or to
    restore, so that the caller can write many weights at once. An exception may interrupt anything
    anywhere. ``remove`` and ``forget`` then end what had begun, and may be called again until they return.
    """

    mode = ""
    """How the target is perturbed, as shown by ``print(optimizer)``."""

    was_seen = True
    """Whether anything has ever computed with the noise, as far as one can see."""

    def __init__(self, target: Target, source: NoiseSource) -> None:
        self.target = target
        self.source = source
        """What the noise is made from."""

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
        """Ends the perturbation without writing anything. Does nothing if none is applied."""
        raise NotImplementedError

    def skip(self) -> None:
        """Called in place of ``apply`` before a step without noise."""

    def written(self) -> Tensor | None:
        """The tensor whose values ``apply`` changed, if any."""
        return None

    def clean_copy(self) -> Tensor | None:
        """A copy of ``W`` as it was before ``apply``, if ``written`` holds something else."""
        return None

    def keep_checksum(self, checksums: Checksums, number: int) -> None:
        """Notes that the perturbed weight's checksum is the one of this number, for ``changed``."""

    def kept_checksum(self) -> tuple[Checksums, int] | None:
        """What ``keep_checksum`` was given, if the weight was written."""
        return None

    def changed(self) -> bool:
        """Whether somebody else replaced or wrote the weight since ``keep_checksum``, as far as one can see
        without reading it."""
        return False

    def leave_merged(self) -> bool:
        """Subtracts the noise, with a warning, if an adapter was merged into the weight meanwhile.

        Returns:
            Whether that was so.
        """
        return False

    def already_noisy(self) -> RuntimeError:
        return RuntimeError(
            f"{self.target.name}: its weight carries noise already. If it is another FlatLoRAOptimizer's, "
            "let its step end first, by `step()` or `restore()`; if the weight was tied to another layer's "
            "after this optimizer was built, build a new one"
        )

    def nbytes(self) -> int:
        """Bytes held in order to restore the weight."""
        return 0


@torch.no_grad()
def apply_all(perturbations: Sequence[Perturbation], noises: Sequence[Noise | None]) -> None:
    """Applies each noise, if there is one, to its target. ``remove_all`` undoes it, also if an exception
    came in between."""
    pairs = zip(perturbations, noises, strict=True)
    kernels.perturb([part for p, noise in pairs if noise is not None for part in p.apply(noise)])


@torch.no_grad()
def take_checksums(perturbations: Sequence[Perturbation]) -> None:
    """From here on, a write to the perturbed weights by anybody else is noticed."""
    tensors = [(p, tensor) for p in perturbations if (tensor := p.written()) is not None]
    checksums = Checksums([local_part(tensor) for _, tensor in tensors])
    for number, (perturbation, _) in enumerate(tensors):
        perturbation.keep_checksum(checksums, number)


@torch.no_grad()
def changed_among(perturbations: Sequence[Perturbation]) -> list[Perturbation]:
    """Those whose weights somebody else has written. Waits once for each device."""
    changed = {i for i, perturbation in enumerate(perturbations) if perturbation.changed()}
    kept: dict[Checksums, dict[int, int]] = {}
    for i, perturbation in enumerate(perturbations):
        if i not in changed and (checksum := perturbation.kept_checksum()) is not None:
            kept.setdefault(checksum[0], {})[checksum[1]] = i
    for checksums, numbers in kept.items():
        changed.update(numbers[number] for number in checksums.changed(numbers))
    return [perturbations[i] for i in sorted(changed)]


def forget_changed(perturbations: Sequence[Perturbation]) -> list[Perturbation]:
    """Gives up weights that somebody else has written, and returns their perturbations.

    If an adapter was merged into the weight meanwhile, only the noise is subtracted and the merge is kept.
    """
    left = []
    for perturbation in changed_among(perturbations):
        if not perturbation.leave_merged():
            left.append(perturbation)
        perturbation.forget()
    return left


def remove_all(perturbations: Sequence[Perturbation]) -> None:
    """Removes each of them, also if an exception such as Ctrl-C comes in between."""
    try:
        _remove(perturbations)
    except BaseException:
        # Removing twice does no harm, and one that can't be removed must not stop the others.
        for perturbation in perturbations:
            with suppress(Exception):
                _remove([perturbation])
        raise


@torch.no_grad()
def _remove(perturbations: Sequence[Perturbation]) -> None:
    kernels.restore([part for perturbation in perturbations for part in perturbation.remove()])
    for perturbation in perturbations:
        perturbation.forget()
