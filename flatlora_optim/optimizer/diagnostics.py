"""Warnings about missing noise."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from ..noise import Noise
from ..perturbation import Perturbation
from ..targets import Target, names_of, sharding
from .forwards import Forwards
from .param_groups import SIGMA

_NO_NOISE = "so this was a plain LoRA step. "
_OTHERWISE = (
    "Call the model that was passed to FlatLoRAOptimizer, in train() mode and with gradients enabled, or "
    "use step(closure) or `with optimizer.perturbed():`"
)
CLOSED = (
    "this step had no noise: the FlatLoRAOptimizer was closed, by close() or by a newer one for the same "
    "adapters. Use that one, or build another"
)
NO_FORWARD = f"optimizer.step() came without a perturbed forward since the last step, {_NO_NOISE}{_OTHERWISE}"
IN_EVAL = (
    f"the forwards of this step were in eval() mode, {_NO_NOISE}Call train() on the model, or build "
    'FlatLoRAOptimizer(..., auto="grad"), for which every forward with gradients sees noise'
)
IN_TRANSFORM = (
    f"the forwards of this step were inside of torch.func (functional_call, grad, vmap), {_NO_NOISE}"
    "Noise can't come in there: use `with optimizer.perturbed():` around it"
)
UNSEEN = (
    "the adapters learn without noise, because the frozen layer's own forward never ran. Probably a fused "
    "kernel reads its weight: switch that kernel off, or perturb a dense weight in place"
)
LATE = (
    "the adapters learn without noise, because they became active after the first forward of the step. "
    "Switch adapters between steps"
)
PAST_THE_END = (
    "training goes on after total_steps={}, with the noise at its peak. It counts optimizer steps: "
    "epochs * ceil(batches / accumulation)"
)
REPLACED = (
    "the model's adapters are not those in the optimizer, so this step would train nothing: something has "
    "replaced their tensors, as PEFT does when it loads a checkpoint over adapters of another dtype. "
    "Build the base optimizer and the FlatLoRAOptimizer after that"
)


class Adapters:
    """The adapters' parameters that the optimizer was built for.

    Args:
        optimized: The ids of the parameters in the base optimizer.
    """

    def __init__(self, targets: Iterable[Target], optimized: set[int]) -> None:
        self._known = {
            target: [weakref.ref(p) for p in _adapters_of([target]).values() if id(p) in optimized]
            for target in targets
        }

    def ids(self) -> set[int]:
        """The ids of those parameters that still exist."""
        return {
            id(p) for known in self._known.values() for reference in known if (p := reference()) is not None
        }

    def replaced(
        self, model: nn.Module, targets: Iterable[Target], groups: Sequence[dict[str, Any]]
    ) -> list[Target]:
        """The targets whose adapters learn, but are not those that the optimizer was built for."""
        # Accelerate puts FSDP2's parameters into the groups; DeepSpeed, parameters of its own.
        known = self.ids() | {id(p) for group in groups for p in group["params"]}
        now = {target: {id(p) for p in target.all_parameters() if p.requires_grad} for target in targets}
        if all(ids <= known for ids in now.values()):
            return []  # as at almost each step, and without a walk through the model
        present = {id(parameter) for parameter in model.parameters()}
        found = []
        for target, ids in now.items():
            before = {id(p) for reference in self._known[target] if (p := reference()) is not None}
            if ids & present and before.isdisjoint(present) and known.isdisjoint(ids & present):
                found.append(target)
        return found


def _adapters_of(targets: Iterable[Target]) -> dict[int, Tensor]:
    """The parameters of all adapters, active or not, by their ids."""
    targets = list(targets)
    layers = (sharing.layer for target in targets for sharing in target.sharing)
    inside = {id(p): p for layer in layers for p in layer.parameters()}
    return inside | {id(p): p for target in targets for p in target.all_parameters()}


def complaint_of_step(
    noises: Sequence[Noise | None],
    perturbations: Sequence[Perturbation],
    sigmas: Callable[[], Sequence[float]],
    forwards: Forwards,
) -> tuple[str, str] | None:
    """Which layers had no noise in the step that ends now, and why. None if all had.

    Args:
        noises: The noise of each perturbation. Empty if none was drawn.
        sigmas: Returns the peak sigma of each.
    """
    if not any(noises):
        reason = NO_FORWARD
        if forwards.in_eval:
            reason = IN_EVAL
        elif forwards.in_transform:
            reason = IN_TRANSFORM
        return "", reason
    if unseen := _unseen(noises, perturbations):
        return f"{names_of(unseen)}: ", UNSEEN
    if None not in noises:
        return None
    targets = (perturbation.target for perturbation in perturbations)
    late = [
        target
        for target, noise, sigma in zip(targets, noises, sigmas(), strict=True)
        if noise is None and sigma > 0 and not target.merged and target.has_gradient()
    ]
    return (f"{names_of(late)}: ", LATE) if late else None


def _unseen(noises: Sequence[Noise | None], perturbations: Sequence[Perturbation]) -> list[Target]:
    """The targets that have a gradient, but whose noise nothing computed with."""
    noisy = [each for each, noise in zip(perturbations, noises, strict=True) if noise is not None]
    if sharding.in_a_group() and any(each.was_seen for each in noisy):
        return []  # a layer that did not run here may have the gradient of other processes
    return [each.target for each in noisy if not each.was_seen and each.target.has_gradient()]


def coverage(targets: Sequence[Target], parameters: Sequence[Tensor]) -> str:
    """How many of the trained matrices belong to an adapter of a perturbed weight."""
    covered = _adapters_of(targets)
    trained = [p for p in parameters if p.ndim > 1 and p.requires_grad]
    noisy = sum(id(p) in covered for p in trained)
    return f"noise for {noisy} of {len(trained)} trained matrices ({noisy / max(1, len(trained)):.0%})"


def complaints_of_build(
    model: nn.Module, targets: Sequence[Target], groups: Sequence[dict[str, Any]], own_sigma: Sequence[bool]
) -> Iterator[str]:
    """Warnings about adapters and settings that a new optimizer will leave without noise.

    Args:
        groups: The base optimizer's.
        own_sigma: Whether each group had a sigma of its own, which is neither 0 nor the optimizer's.
    """
    parameters = [p for group in groups for p in group["params"]]
    covered = _adapters_of(targets)
    own = covered.keys() | {id(p) for p in model.parameters()}
    pairs = list(_foreign_pairs(own, parameters))
    if len(pairs) > 1:  # a single pair may be a bottleneck layer
        shapes = ", ".join(f"{tuple(a.shape)} and {tuple(b.shape)}" for a, b in pairs[:2])
        yield (
            f"base trains {len(pairs)} pairs of matrices that look like LoRA ({shapes}"
            f"{' …' if pairs[2:] else ''}), but belong to no module of `model`, so they learn without noise: "
            f"{coverage(targets, parameters)}. If another model is trained, too, pass both: "
            "FlatLoRAOptimizer(base, [unet, text_encoder], ...)"
        )
    for number, (group, is_own) in enumerate(zip(groups, own_sigma, strict=True)):
        if is_own and not any(id(p) in covered for p in group["params"]):
            yield (
                f"param group {number} has sigma={group[SIGMA]}, but none of its {len(group['params'])} "
                "parameters belongs to a perturbed adapter. Look at the names in "
                "model.named_parameters() that the group was picked by"
            )


def _foreign_pairs(own: set[int], parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Neighbours of shapes ``(r, n)`` and ``(m, r)``, of low rank, that don't belong to the model.

    (Two matrices of a head are no neighbours: there is a bias between them.)
    """
    for a, b in pairwise(p for p in parameters if id(p) not in own):
        if a.ndim == b.ndim == 2:
            rank = a.shape[0]
            if b.shape[1] == rank and 2 * rank <= min(a.shape[1], b.shape[0]):
                yield a, b
