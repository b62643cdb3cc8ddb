"""What a step tells of noise that was not there: nothing is silently done without."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..targets import Target, sharding
from .param_groups import SIGMA

_CLOSED = (
    "this step had no noise: the FlatLoRAOptimizer was closed, by close() or by a newer one for the same "
    "adapters. Use that one, or build another"
)
_NO_NOISE = (
    "optimizer.step() came without a perturbed forward since the last step, so this was a plain LoRA "
    "step. Call the model that was passed to FlatLoRAOptimizer, in train() mode and with gradients "
    "enabled, or use step(closure) or `with optimizer.perturbed():`"
)
_UNSEEN = (
    "the adapters learn without noise, because the frozen layer's own forward never ran, as when a fused "
    "kernel reads its weight. Switch that kernel off, or perturb a dense weight in place"
)
_LATE = (
    "the adapters learn without noise, because they became active after the first forward of the step. "
    "Switch adapters between steps"
)


def complaint_of(optimizer: Any) -> tuple[str, str] | None:
    """The layers that the step that ends now left without noise, and why; None if all is well."""
    noises = optimizer._noises or ()
    if not optimizer._finalizer.alive:
        return "", _CLOSED
    if not any(noises):
        sigma = max((group[SIGMA] for group in optimizer.param_groups), default=0.0)
        return ("", _NO_NOISE) if sigma > 0 and sigma * optimizer._factor > 0 else None
    if unseen := _unseen(optimizer):
        return _names(unseen), _UNSEEN
    if None in noises and (late := _late(optimizer)):
        return _names(late), _LATE
    return None


def _unseen(optimizer: Any) -> list[Target]:
    """The targets that have learned, but whose noise was never looked at."""
    pairs = zip(optimizer._weights.perturbations, optimizer._noises or (), strict=True)
    noisy = [perturbation for perturbation, noise in pairs if noise is not None]
    if sharding.in_a_group() and any(perturbation.was_seen for perturbation in noisy):
        return []  # the gradient of a layer that did not run here may be that of others
    return [each.target for each in noisy if not each.was_seen and each.target.has_gradient()]


def _late(optimizer: Any) -> list[Target]:
    """The targets that have learned, but were not there yet when the noise was drawn."""
    pairs = zip(optimizer.targets, optimizer._noises or (), strict=True)
    without = [target for target, noise in pairs if noise is None and not target.merged]
    sigmas = zip(without, optimizer._sigmas(without), strict=True)
    return [target for target, sigma in sigmas if sigma > 0 and target.has_gradient()]


def _names(targets: Iterable[Target]) -> str:
    names = [target.name for target in targets]
    return f"{', '.join(names[:3])}{' …' if names[3:] else ''}: "
