"""The loss of a model around its frozen weights: at W + eps, and the Hessian at W."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..noise import GaussianNoise, Noise, NoiseKey, NoiseSource
from ..optimizer import hooks
from ..perturbation import VirtualPerturbation, apply_all, choose_perturbation, remove_all
from ..targets import DenseWeight, Target, find_targets, why_inactive
from ..targets.scales import RowNorms, merged_norms
from ..targets.sharding import fsdp_modules, is_sharded

LossFn = Callable[[nn.Module], Tensor]
Vector = list[Tensor]
"""One tensor for each dense weight."""


class Surroundings:
    """The loss of a model around its present weights."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, targets: list[Target], undo: ExitStack) -> None:
        self._model, self._loss_fn, self._undo = model, loss_fn, undo
        self.targets = targets
        self.norms = _all_merged_norms(targets)
        """The norms of the merged weight's rows, shape ``(m,)``, of each target."""
        self._perturbations = [
            choose_perturbation(target, "auto", "exact", GaussianNoise()) for target in targets
        ]
        self._cuda = {t.weight.device.index for t in targets if t.weight.device.type == "cuda"}
        self._no_noise = self.noises(NoiseKey(0, 0), [torch.zeros_like(norms) for norms in self.norms])

    def noises(
        self, key: NoiseKey, scales: Sequence[Tensor], sources: Sequence[NoiseSource] | None = None
    ) -> list[Noise]:
        """The noise of each target. By default, the sources are the paper's."""
        sources = sources or [GaussianNoise()] * len(self.targets)
        return [
            Noise.on(target, source, key, scale)
            for target, source, scale in zip(self.targets, sources, scales, strict=True)
        ]

    def sources_of_optimizer(self, source: NoiseSource | None) -> list[NoiseSource]:
        """Which source an optimizer with this option uses for each target."""
        return [choose_perturbation(target, "auto", "exact", source).source for target in self.targets]

    def signs(self, key: NoiseKey, scale: float) -> list[Noise]:
        """``scale`` or ``-scale`` in each element."""
        scales = [torch.full_like(norms, scale) for norms in self.norms]
        return self.noises(key, scales, [_Signs()] * len(scales))

    def direction(self, seed: int, number: int) -> list[Noise]:
        """Gaussian noise whose rows have the norms of the merged weight's rows."""
        key = NoiseKey(seed, number)
        raw = self.noises(key, [torch.ones_like(norms) for norms in self.norms])
        ratios = [norms / _row_norms(noise) for norms, noise in zip(self.norms, raw, strict=True)]
        return self.noises(key, [torch.nan_to_num(ratio, nan=0.0, posinf=0.0) for ratio in ratios])

    def vector(self, key: NoiseKey) -> Vector:
        """A random sign in each element of the dense weights."""
        zeros = (torch.zeros_like(w, requires_grad=False) for w in _dense_tensors(self.targets))
        return [noise.add_to(zero) for noise, zero in zip(self.signs(key, 1.0), zeros, strict=True)]

    def along(self, terms: Sequence[tuple[float, list[Noise]]]) -> list[Noise] | None:
        """The sum of ``a * direction``. None if that is W itself."""
        present = [[_scaled(noise, a) for noise in direction] for a, direction in terms if a != 0]
        if len(present) < 2:
            return present[0] if present else None
        return [_Sum(parts) for parts in zip(*present, strict=True)]

    def loss(self, noises: list[Noise] | None) -> float:
        """The loss at W + eps, or at W."""
        with torch.no_grad(), self._noise_on(noises):
            return float(self.evaluate())

    def evaluate(self) -> Tensor:
        with torch.random.fork_rng(self._cuda):
            loss = self._loss_fn(self._model)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return the loss as a scalar tensor, got {what}")
        return loss

    @contextmanager
    def _noise_on(self, noises: list[Noise] | None) -> Iterator[None]:
        # At W, quantized layers compute with zero noise: bitsandbytes' own kernels may have another
        # precision, which would look like an effect of the noise.
        chosen: Sequence[Noise | None] = noises or [
            zero if isinstance(perturbation, VirtualPerturbation) else None
            for perturbation, zero in zip(self._perturbations, self._no_noise, strict=True)
        ]
        try:
            apply_all(self._perturbations, chosen)
            yield
        finally:
            remove_all(self._perturbations)

    def difference(self, key: NoiseKey, step: float) -> float:
        """``v'Hv`` for random signs v, by second differences."""
        squared = sum(float(norms.cpu().double().square().sum()) for norms in self.norms)
        h = step * math.sqrt(squared / sum(t.weight.shape.numel() for t in self.targets))
        plus, minus = self.loss(self.signs(key, h)), self.loss(self.signs(key, -h))
        return (plus + minus - 2 * self.at_minimum) / h**2

    @cached_property
    def at_minimum(self) -> float:
        return self.loss(None)

    def why_no_hessian(self) -> str | None:
        """Why autograd can't differentiate the loss twice, or would give a wrong result."""
        for target in self.targets:
            if target.weight.kind == "experts":
                return f"{target.name} computes its weight in each forward"
            if target.weight.kind != "dense":
                return (
                    f"the weight of {target.name} is {target.weight.kind}: quantized weights can't be "
                    "differentiated twice"
                )
            if any(_has_dora(sharing) for sharing in target.sharing):
                return f"{target.name} has DoRA, whose norm of the weight PEFT detaches from autograd"
        return None

    def hessian(self) -> Hessian:
        """The Hessian at W.

        Raises:
            ValueError: Autograd can't differentiate the loss twice.
        """
        if reason := self.why_no_hessian():
            raise ValueError(f"{reason}. hessian_trace(method='differences') works for it")
        weights = _dense_tensors(self.targets)
        for weight in weights:
            self._undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_()
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return Hessian(self.evaluate(), weights)


class Hessian:
    """Products with the Hessian, by double backward. Keeps the graph of the gradient."""

    def __init__(self, loss: Tensor, weights: Vector) -> None:
        self._weights = weights
        self._gradient = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)

    def times(self, v: Vector) -> Vector:
        pairs = [(g, x) for g, x in zip(self._gradient, v, strict=True) if g.requires_grad]
        if not pairs:  # the loss is linear
            return [torch.zeros_like(x) for x in v]
        gradient, vectors = zip(*pairs, strict=True)
        return list(
            torch.autograd.grad(gradient, self._weights, vectors, retain_graph=True, materialize_grads=True)
        )

    def curvature(self, v: Vector) -> float:
        """``v'Hv``"""
        return dot(v, self.times(v))


class _Signs:
    """Random signs, which estimate a trace with less variance than any other noise."""

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        return GaussianNoise().block(key, number, out).sign_()


class _Sum(Noise):
    """The sum of several noises on one weight."""

    def __init__(self, parts: Sequence[Noise]) -> None:
        first = parts[0]
        super().__init__(first.source, first.key, first.grid, first.scales, first.row_dim)
        self._parts = parts

    @property
    def can_be_fused(self) -> bool:
        return False  # kernels would add the first term only

    def block(self, lo: int, hi: int) -> Tensor:
        total = self._parts[0].block(lo, hi).clone()
        for part in self._parts[1:]:
            total += part.block(lo, hi)
        return total


@contextmanager
def measuring(model: nn.Module, loss_fn: LossFn) -> Iterator[Surroundings]:
    """A block with the model in eval mode and an attached optimizer's noise off. All is put back after it."""
    found = find_targets(model, why_inactive)
    targets = found.targets
    if not targets:
        raise ValueError(f"no active LoRA adapter found in {type(model).__name__}\n{found.report()}".rstrip())
    for target in targets:
        if target.merged:
            raise ValueError(f"the adapter of {target.name} is merged into its weight: unmerge it first")
    # Right after a forward, FSDP2's root module has its weights whole.
    if any(fsdp_modules(model)) or any(is_sharded(tensor) for tensor in _dense_tensors(targets)):
        raise ValueError("the weights are sharded: measure an unsharded copy of the model")
    with ExitStack() as undo:
        for optimizer in hooks.attached_optimizers(model):
            undo.enter_context(optimizer.clean())
        undo.enter_context(_eval_mode(model))
        for tensor in _dense_tensors(targets):
            # The bits will be the same again, so pending graphs and cached norms stay valid.
            undo.enter_context(_unsafe_preserve_version_counter(tensor))
        yield Surroundings(model, loss_fn, targets, undo)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in before:
        # In eval mode, bitsandbytes repacks a 4-bit weight for a CPU kernel of its own.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        module.training = getattr(weight, "quant_state", None) is not None
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _has_dora(target: Target) -> bool:
    magnitudes = getattr(target.layer, "lora_magnitude_vector", ())
    return any(adapter in magnitudes for adapter in getattr(target.layer, "active_adapters", ()))


def _dense_tensors(targets: Iterable[Target]) -> Vector:
    return [target.weight.tensor for target in targets if isinstance(target.weight, DenseWeight)]


def _all_merged_norms(targets: Sequence[Target]) -> list[Tensor]:
    norms = [each for each in merged_norms([RowNorms(target) for target in targets]) if each is not None]
    assert len(norms) == len(targets)
    return norms


def _row_norms(noise: Noise) -> Tensor:
    squared = torch.zeros_like(noise.scales)
    for lo, hi in noise.grid.spans(noise.grid.rows):
        values = noise.block(lo, hi).square()
        if noise.row_dim == 0:
            squared[lo:hi] = values.sum(1)
        elif noise.grid.group:
            squared.view(-1, noise.grid.row_size)[lo // noise.grid.group] += values.sum(0)
        else:
            squared += values.sum(0)
    return squared.sqrt()


def _scaled(noise: Noise, factor: float) -> Noise:
    return Noise(noise.source, noise.key, noise.grid, noise.scales * factor, noise.row_dim)


def dot(a: Vector, b: Vector) -> float:
    return sum(float((_widest(x) * _widest(y)).sum()) for x, y in zip(a, b, strict=True))


def _widest(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # MPS has no float64
