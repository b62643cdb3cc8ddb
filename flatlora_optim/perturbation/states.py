"""The frozen weights and the noise on them.

They are in one of three states:

    clean ──perturb──▶ perturbed ──restore──▶ clean
                         │    ▲
                    (a clean observer)
                         ▼    │
                       suspended
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ..kernels import kernels_of
from ..kernels.part import read, refuse_capture
from ..noise import Noise, NoiseKey, NoiseSource, drop_scales
from ..targets import DenseWeight, Target, sharding
from ..targets.scales import RowNorms, merged_norms, row_scales
from ..targets.sharding import local_part
from .base import Perturbation, apply_all, forget_changed, remove_all, take_checksums
from .in_place import change_noticed
from .low_rank import LowRankPerturbation
from .virtual import VirtualPerturbation


class NoisyWeights:
    """The state machine around the perturbations of one model.

    Args:
        model: Its FSDP2 modules are resharded before noise comes or goes.
        perturbations: One for each frozen weight.
    """

    def __init__(self, model: nn.Module, perturbations: Sequence[Perturbation]) -> None:
        self.model = model
        self.perturbations = perturbations
        self.norms = [RowNorms(perturbation.target) for perturbation in perturbations]
        for target in self.targets:
            # Builds native code now: which noise there is must not depend on the memory that is free later.
            kernels_of(target.weight.device)
        self.is_perturbed = False
        """Whether the current step has noise, even if it is suspended right now."""
        self.seconds = 0.0
        """Seconds spent on noise so far."""
        self._noises: Sequence[Noise | None] = ()
        self._noisy: set[int] = set()
        self._suspension: ExitStack | None = None
        self._clean_versions: list[int] = []

    @property
    def targets(self) -> list[Target]:
        return [perturbation.target for perturbation in self.perturbations]

    def attached(self) -> list[int]:
        """Which targets are still in the model: PEFT's ``unload`` takes the adapters away."""
        modules: set[nn.Module] = set()
        waiting = [self.model]
        while waiting:  # several times as fast as `modules()`
            module = waiting.pop()
            if module not in modules:
                modules.add(module)
                waiting += [child for child in module._modules.values() if child is not None]
        return [
            i
            for i, target in enumerate(self.targets)
            if any(sharing.layer in modules for sharing in target.sharing)
        ]

    def description(self) -> str:
        """Which sources and kernels make the noise: with others, the same seed gives another run."""
        sources = {_name_of(perturbation.source) for perturbation in self.perturbations}
        kernels = {kernels_of(target.weight.device).name for target in self.targets}
        return f"{' and '.join(sorted(sources))}, made by {', '.join(sorted(kernels))}"

    def kept_norms(self) -> Tensor | None:
        """The kept row norms of quantized weights, in one tensor; None if there are none. Without them, a
        resumed run would read norms at other steps."""
        if all(norms.kept is None for norms in self.norms):
            return None
        return torch.cat([norms.kept_or_unknown().cpu() for norms in self._kept_by()])

    def keep_norms(self, values: Tensor | None) -> None:
        """Puts back what ``kept_norms`` gave. Norms of other weights are read again."""
        sizes = [norms.kept_size for norms in self._kept_by()]
        fits = values is not None and values.numel() == sum(sizes)
        parts = values.split(sizes) if fits and values is not None else [None] * len(sizes)
        for norms, part in zip(self._kept_by(), parts, strict=True):
            norms.kept = None if part is None else part.to(norms.target.weight.device, copy=True)

    def _kept_by(self) -> list[RowNorms]:
        return [norms for norms in self.norms if not isinstance(norms.target.weight, DenseWeight)]

    @property
    def is_suspended(self) -> bool:
        return self._suspension is not None

    @torch.no_grad()
    def draw(self, key: NoiseKey, sigmas: Sequence[float]) -> list[Noise | None]:
        """One noise for each weight: None for sigma 0, without an active adapter, or while merged.

        Raises:
            RuntimeError: Layers that shared a weight don't any more, or a CUDA graph is captured.
        """
        # A merged layer trains nothing, and its weight is W' already.
        targets, attached = self.targets, self.attached()
        chosen = [i for i in attached if sigmas[i] > 0 and not targets[i].merged]
        for device in {targets[i].weight.device for i in chosen}:
            refuse_capture(device)  # norms would be recorded, not computed, and the noise kept
        for i in chosen:
            targets[i].check_ties()
        norms = merged_norms([self.norms[i] for i in chosen])
        active = [(i, norm) for i, norm in zip(chosen, norms, strict=True) if norm is not None]
        columns = [targets[i].weight.columns for i, _ in active]
        scales = row_scales([norm for _, norm in active], [sigmas[i] for i, _ in active], columns)
        noises: list[Noise | None] = [None] * len(sigmas)
        for (i, _), scale in zip(active, scales, strict=True):
            noises[i] = Noise.on(targets[i], self.perturbations[i].source, key, scale)
        for perturbation, noise in zip(self.perturbations, noises, strict=True):
            if noise is None:
                perturbation.skip()
        return noises

    def perturb(self, noises: Sequence[Noise | None]) -> None:
        """From clean to perturbed. Takes everything back on an exception.

        Args:
            noises: One for each weight; None leaves it as it is.
        """
        self._noises = noises
        pairs = zip(self.targets, noises, strict=True)
        self._noisy = {id(target) for target, noise in pairs if noise is not None}
        self._put_on(ExitStack())

    def restore(self) -> None:
        """From any state to clean. An interrupt delays this, but doesn't prevent it.

        Raises:
            WeightChangedError: Somebody else wrote a weight while it carried noise.
        """
        # Dropped, not closed: a graph built on the noise must not run backward without it.
        self._suspension = None
        try:
            self._remove()
        except BaseException:
            # The interrupt may have come before anything was removed. Removing twice does no harm.
            self._remove()
            raise

    def suspend(self) -> object:
        """To clean weights, until ``resume`` brings the same noise back.

        Returns:
            A token for ``resume``.
        """
        guard = ExitStack()
        was_perturbed = self.is_perturbed
        if was_perturbed:
            for perturbation in self.perturbations:
                if (tensor := perturbation.written()) is not None:
                    # The bits will be the same again: graphs that saved the weight stay valid.
                    guard.enter_context(_unsafe_preserve_version_counter(tensor))
            self.restore()
        self._clean_versions = self._versions()
        self.is_perturbed, self._suspension = was_perturbed, guard
        return guard

    def resume(self, suspension: object = None) -> None:
        """To the state before ``suspend``, or to clean if the weights were restored meanwhile.

        Args:
            suspension: The only one to end; without it, any.
        """
        if suspension not in (None, self._suspension):
            return  # an interrupted `clean()` block is garbage-collected while another one is open
        guard, self._suspension = self._suspension, None
        if guard is None or not self.is_perturbed:
            return
        if any(target.merged for target in self.targets):
            # An adapter was merged meanwhile: no noise until it is unmerged. Earlier graphs must fail.
            guard.pop_all()
            self.restore()
            return
        if self._versions() != self._clean_versions:
            # New weights were loaded meanwhile: backward passes through the old ones must fail.
            guard.pop_all()
        self._put_on(guard)

    def is_noisy(self, target: Target) -> bool:
        """Whether the target has noise in the current step."""
        return self.is_perturbed and id(target) in self._noisy

    def check_resolution(self, noises: Sequence[Noise | None], strength: float) -> None:
        """Warns if 16-bit weights would round away most of ``strength`` times the noise."""
        shares: dict[torch.dtype, list[float]] = {}
        for perturbation, noise in zip(self.perturbations, noises, strict=True):
            weight = perturbation.target.weight
            if noise is None or (isinstance(perturbation, LowRankPerturbation) and weight.kind != "experts"):
                continue  # it is not added to the weight
            if isinstance(weight, DenseWeight) and weight.tensor.element_size() == 2:
                share = noise.share_lost(local_part(weight.tensor), strength)
                shares.setdefault(weight.tensor.dtype, []).append(share)
        for dtype, values in shares.items():
            if (lost := sum(values) / len(values)) > 0.5:
                warnings.warn(
                    f"sigma is so small that {dtype} rounds the noise away in {lost:.0%} of the weights' "
                    "elements, even at the schedule's peak. Take a larger sigma, or float32",
                    stacklevel=2,
                )

    def noise_norm(self, noises: Sequence[Noise | None]) -> float:
        """The expected Frobenius norm over all weights. Waits once for each device."""
        squared = 0.0
        present = [(noise, t.weight.columns) for noise, t in zip(noises, self.targets, strict=False) if noise]
        for device in {noise.scales.device for noise, _ in present}:
            there = [(noise.scales, columns) for noise, columns in present if noise.scales.device == device]
            norms = read(torch.stack(torch._foreach_norm([scales for scales, _ in there])))
            squared += sum(norm**2 * columns for norm, (_, columns) in zip(norms, there, strict=True))
        return math.sqrt(squared)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that in-place noise is written to."""
        for perturbation in self.perturbations:
            if not isinstance(perturbation, VirtualPerturbation):
                yield perturbation.target.weight.tensor  # type: ignore[attr-defined]

    def _put_on(self, versions: ExitStack) -> None:
        sharding.reshard_all(self.model)
        # Set before it is true, so that an interrupt right after finds something to restore.
        self.is_perturbed = True
        try:
            with self.timed():
                # A merged layer trains nothing, and unmerging it would look like somebody else's write.
                pairs = zip(self.targets, self._noises, strict=True)
                apply_all(self.perturbations, [None if target.merged else noise for target, noise in pairs])
                low_rank = (p for p in self.perturbations if isinstance(p, LowRankPerturbation))
                drop_scales([noise for p in low_rank if (noise := p.held()) is not None])
            versions.close()
            take_checksums(self.perturbations)
        except BaseException:
            self.restore()
            raise

    @contextmanager
    def timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start

    def _remove(self) -> None:
        if not self.is_perturbed:
            return
        sharding.reshard_all(self.model)
        with self.timed():
            changed = forget_changed(self.perturbations)
            remove_all(self.perturbations)
            self.is_perturbed = False
        if changed:
            raise change_noticed(changed)

    def _versions(self) -> list[int]:
        weights = (target.weight for target in self.targets)
        return [weight.version for weight in weights if isinstance(weight, DenseWeight)]


def _name_of(source: NoiseSource) -> str:
    kind = type(source)
    return kind.__name__ if kind.__repr__ is object.__repr__ else repr(source)
