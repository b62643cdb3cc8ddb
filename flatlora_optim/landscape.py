"""How flat a minimum is, in the full weight space that Flat-LoRA looks at.

All functions take ``model`` and ``loss_fn``, a function of the model that returns the scalar
loss on whatever data it holds, and look at the frozen weights that carry an adapter: those that
:class:`FlatLoRAOptimizer` perturbs, dense and quantized, by the same noise and the same exact
restore. Weights, gradients, training mode and torch's random state are afterwards what they were,
also after an exception, and an optimizer that is attached to the model does not notice.

The model is measured in eval mode. Each evaluation starts from the same random state, so a
``loss_fn`` that draws its data at random draws the same data every time. Weights in float16 and
bfloat16 work, but resolve only strong noise: curvature is best measured in float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import hooks
from .checkpoint import check_sigma
from .noise import GaussianNoise, Noise, NoiseKey, NoiseSource
from .perturbation import VirtualPerturbation, choose_perturbation, remove_all
from .scales import RowNorms, row_scales
from .targets import Target, find_targets
from .weights import DenseWeight

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LossFn = Callable[[nn.Module], Tensor]
Vector = list[Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """The mean of random samples, and how far it may be off."""

    samples: Tensor
    """Shape ``(samples,)``, float64."""

    @property
    def mean(self) -> float:
        return float(self.samples.mean())

    @property
    def standard_error(self) -> float:
        """NaN for a single sample."""
        return float(self.samples.std()) / math.sqrt(len(self.samples))

    def __repr__(self) -> str:
        return f"{self.mean:.6g} ± {self.standard_error:.2g} ({len(self.samples)} samples)"


@dataclass(frozen=True, repr=False)
class ExpectedLoss(Estimate):
    """``E L(W + eps)``, and the loss at W."""

    at_minimum: float

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


@dataclass(frozen=True)
class Slice1D:
    """``losses[i]`` at ``W + coordinates[i] * d``."""

    coordinates: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Slice2D:
    """``losses[i, j]`` at ``W + coordinates[i] * d1 + coordinates[j] * d2``."""

    coordinates: Tensor
    losses: Tensor


# ---------------------------------------------------------------------- measuring


def expected_loss(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    sigma: float,
    samples: int = 16,
    seed: int = 0,
    noise: NoiseSource | None = None,
    progress: bool = True,
) -> ExpectedLoss:
    """The objective of Flat-LoRA: the mean loss over noise on the full weights.

    Sample k has the noise that an optimizer with the same ``seed`` puts on at step k.

    Args:
        sigma: Noise strength relative to the norm of each row.
        noise: A source of other noise than independent Gaussian.
    """
    sigma = check_sigma(sigma)
    _check_count("samples", samples)
    with _measuring(model, loss_fn) as at:
        scales = [
            row_scales(norms, sigma, t.weight.columns) for t, norms in zip(at.targets, at.norms, strict=True)
        ]
        losses = [
            at.loss(at.noises(NoiseKey(seed, k), scales, noise))
            for k in _progress(range(samples), "expected loss", progress)
        ]
        return ExpectedLoss(torch.tensor(losses, dtype=torch.float64), at.at_minimum)


def slice_1d(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    radius: float = 0.5,
    points: int = 21,
    seed: int = 0,
    progress: bool = True,
) -> Slice1D:
    """The loss along a random direction that is filter-normalized (Li et al., 2018).

    Each row of the direction has the norm of the merged weight's row, so the coordinate is the
    relative distance from W, comparable with sigma and between models.

    Args:
        radius: The slice runs from ``-radius`` to ``radius``.
        points: An odd number includes W itself.
    """
    coordinates = _coordinates(radius, points)
    with _measuring(model, loss_fn) as at:
        direction = at.direction(seed, 0)
        losses = [
            at.loss(at.along([(a, direction)])) for a in _progress(coordinates.tolist(), "slice", progress)
        ]
    return Slice1D(coordinates, torch.tensor(losses, dtype=torch.float64))


def slice_2d(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    radius: float = 0.5,
    points: int = 11,
    seed: int = 0,
    progress: bool = True,
) -> Slice2D:
    """The loss on a plane of two random filter-normalized directions; see :func:`slice_1d`.

    The first of them is the direction of ``slice_1d`` with the same seed.
    """
    coordinates = _coordinates(radius, points)
    with _measuring(model, loss_fn) as at:
        d1, d2 = at.direction(seed, 0), at.direction(seed, 1)
        grid = [(a, b) for a in coordinates.tolist() for b in coordinates.tolist()]
        losses = [at.loss(at.along([(a, d1), (b, d2)])) for a, b in _progress(grid, "slice", progress)]
    return Slice2D(coordinates, torch.tensor(losses, dtype=torch.float64).view(points, points))


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    samples: int = 16,
    seed: int = 0,
    method: Literal["auto", "autograd", "differences"] = "auto",
    step: float = 0.03,
    progress: bool = True,
) -> Estimate:
    """Hutchinson's estimate of the trace of the Hessian in the full weights: mean of ``v'Hv``.

    Args:
        method: ``"autograd"`` differentiates twice: dense weights only, and memory for a
            vector of their size and the graph of the gradient. ``"differences"`` takes second
            differences of the loss, which works for quantized weights too and needs no
            gradients, but inherits the rounding of the loss. ``"auto"`` is the first where all
            weights are dense.
        step: How far the differences go, relative to the root mean square of the weights.
    """
    if method not in ("auto", "autograd", "differences"):
        raise ValueError(f"method must be 'auto', 'autograd' or 'differences', got {method!r}")
    _check_count("samples", samples)
    with _measuring(model, loss_fn) as at:
        if method == "auto":
            method = "autograd" if at.is_dense() else "differences"
        hessian = at.hessian() if method == "autograd" else None
        values = []
        for k in _progress(range(samples), "Hessian trace", progress):
            key = NoiseKey(seed, k)
            values.append(hessian.curvature(at.vector(key)) if hessian else at.difference(key, step))
    return Estimate(torch.tensor(values, dtype=torch.float64))


def top_eigenvalue(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian in the full weights, by power iteration.

    Differentiates twice, so all weights must be dense; for quantized weights see
    :func:`hessian_trace`.

    Args:
        iterations: Hessian-vector products at most.
        tolerance: Stops when the eigenvalue changes by less than this, relatively.
    """
    _check_count("iterations", iterations)
    with _measuring(model, loss_fn) as at:
        hessian = at.hessian()
        start = at.vector(NoiseKey(seed, 0))
        top = _power_iteration(hessian.times, start, iterations, tolerance, progress)
        if top.value < 0 and top.iterations < iterations:
            # The most negative one dominates. Shifted by it, the largest dominates.
            shift, left = top.value, iterations - top.iterations

            def shifted(v: Vector) -> Vector:
                return [hv - shift * x for hv, x in zip(hessian.times(v), v, strict=True)]

            other = _power_iteration(shifted, start, left, tolerance, progress)
            top = Eigenvalue(other.value + shift, top.iterations + other.iterations, other.converged)
    if not top.converged:
        warnings.warn(f"no convergence to {tolerance} in {iterations} iterations", stacklevel=2)
    return top


def _power_iteration(
    times: Callable[[Vector], Vector], v: Vector, iterations: int, tolerance: float, progress: bool
) -> Eigenvalue:
    v, value = _normalized(v), math.inf
    for i in _progress(range(1, iterations + 1), "top eigenvalue", progress):
        product = times(v)
        previous, value = value, _dot(v, product)
        if abs(value - previous) <= tolerance * abs(value):
            return Eigenvalue(value, i, True)
        v = _normalized(product)
    return Eigenvalue(value, iterations, False)


# ---------------------------------------------------------------------- plotting


def plot_slice_1d(slices: Slice1D | Mapping[str, Slice1D], ax: Axes | None = None) -> Axes:
    """Draws one slice, or several with their labels. Needs the ``plot`` extra."""
    ax = ax or _new_axes()
    named = {"": slices} if isinstance(slices, Slice1D) else slices
    for label, curve in named.items():
        ax.plot(curve.coordinates.numpy(), curve.losses.numpy(), label=label)
    ax.set(xlabel="relative distance along the direction", ylabel="loss")
    if any(named):
        ax.legend()
    return ax


def plot_slice_2d(plane: Slice2D, ax: Axes | None = None, *, levels: int = 20) -> Axes:
    """Draws contours of the loss. Needs the ``plot`` extra."""
    ax = ax or _new_axes()
    coordinates = plane.coordinates.numpy()
    # Rows of `losses` belong to the first direction, which is drawn along x.
    contours = ax.contourf(coordinates, coordinates, plane.losses.T.numpy(), levels=levels)
    ax.figure.colorbar(contours, ax=ax, label="loss")
    ax.plot(0, 0, "+", color="white")
    ax.set(xlabel="direction 1", ylabel="direction 2", aspect="equal")
    return ax


def _new_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flatlora-optim[plot]'") from error
    return pyplot.subplots()[1]


# ---------------------------------------------------------------------- the model at W + eps


class _Surroundings:
    """The loss of a model around its present weights."""

    def __init__(self, model: nn.Module, loss_fn: LossFn, targets: list[Target], undo: ExitStack) -> None:
        self._model, self._loss_fn, self._undo = model, loss_fn, undo
        self.targets = targets
        self.norms = [_merged_norms(target) for target in targets]
        """The norms of the merged weight's rows, shape ``(m,)``, of each target."""
        self._perturbations = [choose_perturbation(target, "auto", "exact") for target in targets]
        self._cuda = {t.weight.device.index for t in targets if t.weight.device.type == "cuda"}
        self._no_noise = self.noises(NoiseKey(0, 0), [torch.zeros_like(norms) for norms in self.norms])

    def noises(
        self, key: NoiseKey, scales: Sequence[Tensor], source: NoiseSource | None = None
    ) -> list[Noise]:
        return [
            Noise(source or GaussianNoise(), key, t.weight.grid(t.first_block), scale, t.weight.row_dim)
            for t, scale in zip(self.targets, scales, strict=True)
        ]

    def signs(self, key: NoiseKey, scale: float) -> list[Noise]:
        """``scale`` or ``-scale`` in each element."""
        return self.noises(key, [torch.full_like(norms, scale) for norms in self.norms], _Signs())

    def direction(self, seed: int, number: int) -> list[Noise]:
        """Gaussian noise whose rows have exactly the norms of the merged weight's rows."""
        key = NoiseKey(seed, number)
        raw = self.noises(key, [torch.ones_like(norms) for norms in self.norms])
        ratios = [norms / _row_norms(noise) for norms, noise in zip(self.norms, raw, strict=True)]
        return self.noises(key, [torch.nan_to_num(ratio, nan=0.0, posinf=0.0) for ratio in ratios])

    def vector(self, key: NoiseKey) -> Vector:
        """A random sign in each element of the dense weights."""
        zeros = (torch.zeros_like(w, requires_grad=False) for w in _dense_tensors(self.targets))
        return [noise.add_to(zero) for noise, zero in zip(self.signs(key, 1.0), zeros, strict=True)]

    def along(self, terms: Sequence[tuple[float, list[Noise]]]) -> list[Noise] | None:
        """``sum of a * direction``; None is W itself."""
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
        try:
            for perturbation, noise in zip(self._perturbations, noises or self._no_noise, strict=True):
                # Quantized layers compute at W as they do at W + eps: bitsandbytes' own kernels
                # may have another precision, which would look like an effect of the noise.
                if noises or isinstance(perturbation, VirtualPerturbation):
                    perturbation.apply(noise)
            yield
        finally:
            remove_all(self._perturbations)

    def difference(self, key: NoiseKey, step: float) -> float:
        """``v'Hv`` of random signs v, by second differences."""
        squared = sum(float(norms.double().square().sum()) for norms in self.norms)
        h = step * math.sqrt(squared / sum(t.weight.shape.numel() for t in self.targets))
        plus, minus = self.loss(self.signs(key, h)), self.loss(self.signs(key, -h))
        return (plus + minus - 2 * self.at_minimum) / h**2

    @cached_property
    def at_minimum(self) -> float:
        return self.loss(None)

    def is_dense(self) -> bool:
        return all(target.weight.kind == "dense" for target in self.targets)

    def hessian(self) -> _Hessian:
        for target in self.targets:
            if target.weight.kind != "dense":
                raise ValueError(
                    f"the weight of {target.name} is {target.weight.kind}: quantized weights can't be "
                    "differentiated twice. hessian_trace(method='differences') works for them"
                )
        weights = _dense_tensors(self.targets)
        for weight in weights:
            self._undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_()
        # Fused attention has no second derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return _Hessian(self.evaluate(), weights)


class _Hessian:
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
        return _dot(v, self.times(v))


class _Signs:
    """Random signs: among all noise they estimate a trace with the least variance."""

    def block(self, key: NoiseKey, number: int, out: Tensor) -> Tensor:
        return GaussianNoise().block(key, number, out).sign_()


class _Sum(Noise):
    """The sum of several noises on one weight."""

    def __init__(self, parts: Sequence[Noise]) -> None:
        first = parts[0]
        super().__init__(first.source, first.key, first.grid, first.scales, first.row_dim)
        self._parts = parts

    def block(self, lo: int, hi: int) -> Tensor:
        total = self._parts[0].block(lo, hi).clone()
        for part in self._parts[1:]:
            total += part.block(lo, hi)
        return total


@contextmanager
def _measuring(model: nn.Module, loss_fn: LossFn) -> Iterator[_Surroundings]:
    """The model in eval mode, undisturbed by an attached optimizer; all is put back afterwards."""
    found = find_targets(model)
    targets = [target for target in found.targets if any(True for _ in target.adapter_parameters())]
    if not targets:
        raise ValueError(f"no active LoRA adapter found in {type(model).__name__}\n{found.report()}".rstrip())
    for target in targets:
        if target.merged:
            raise ValueError(f"the adapter of {target.name} is merged into its weight: unmerge it first")
    with ExitStack() as undo:
        for optimizer in hooks.attached_optimizers(model):
            undo.enter_context(optimizer.clean())
        undo.enter_context(_eval_mode(model))
        for tensor in _dense_tensors(targets):
            # The bits will be the same again: pending graphs and cached norms stay valid.
            undo.enter_context(_unsafe_preserve_version_counter(tensor))
        yield _Surroundings(model, loss_fn, targets, undo)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    for module, _ in before:
        # In eval mode, bitsandbytes repacks a 4-bit weight for a CPU kernel of its own.
        module.training = getattr(getattr(module, "weight", None), "quant_state", None) is not None
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _dense_tensors(targets: Iterable[Target]) -> Vector:
    return [target.weight.tensor for target in targets if isinstance(target.weight, DenseWeight)]


def _merged_norms(target: Target) -> Tensor:
    delta = target.delta()
    assert delta is not None
    return RowNorms(target).merged(delta)


def _row_norms(noise: Noise) -> Tensor:
    squared = torch.zeros_like(noise.scales)
    for lo, hi in noise.grid.spans(noise.grid.rows):
        values = noise.block(lo, hi).square()
        if noise.row_dim == 0:
            squared[lo:hi] = values.sum(1)
        else:
            squared += values.sum(0)
    return squared.sqrt()


def _scaled(noise: Noise, factor: float) -> Noise:
    return Noise(noise.source, noise.key, noise.grid, noise.scales * factor, noise.row_dim)


def _dot(a: Vector, b: Vector) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _normalized(v: Vector) -> Vector:
    norm = math.sqrt(_dot(v, v))
    return [x / norm for x in v] if norm > 0 else v


def _coordinates(radius: float, points: int) -> Tensor:
    if not (math.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be finite and > 0, got {radius!r}")
    _check_count("points", points)
    coordinates = torch.linspace(-radius, radius, points, dtype=torch.float64)
    # linspace may miss 0 by rounding.
    return torch.where(coordinates.abs() < radius * 1e-9, 0.0, coordinates)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an int >= 1, got {value!r}")


def _progress(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    if not show:
        return items
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=description, leave=False)
    return bar
