"""Measuring: expected loss, slices of the loss, curvature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from ..noise import NoiseKey, NoiseSource, noise_source
from ..optimizer.checks import check_choice, check_seed, check_sigma
from ..targets.scales import row_scales
from .results import Eigenvalue, Estimate, ExpectedLoss, Slice1D, Slice2D
from .surroundings import LossFn, Vector, dot, measuring

T = TypeVar("T")


def expected_loss(
    model: nn.Module,
    loss_fn: LossFn,
    *,
    sigma: float,
    samples: int = 16,
    seed: int = 0,
    noise: str | NoiseSource | None = None,
    progress: bool = True,
) -> ExpectedLoss:
    """The objective of Flat-LoRA: the mean loss over noise on the full weights.

    Sample k has the noise of step k of an optimizer with the same ``seed``.

    Args:
        sigma: Noise strength relative to the norm of each row.
        noise: As in the optimizer.

    Example:
        >>> around = expected_loss(model, lambda model: model(x).square().mean(), sigma=0.5, samples=64)
        >>> around.increase > 3 * around.standard_error
        True
    """
    sigma, seed, source = check_sigma(sigma), check_seed(seed), None if noise is None else noise_source(noise)
    _check_count("samples", samples)
    with measuring(model, loss_fn) as at:
        columns = [target.weight.columns for target in at.targets]
        scales = row_scales(at.norms, [sigma] * len(columns), columns)
        sources = at.sources_of_optimizer(source)
        losses = [
            at.loss(at.noises(NoiseKey(seed, k), scales, sources))
            for k in _progress(range(samples), "expected loss", progress)
        ]
        return ExpectedLoss(torch.tensor(losses, dtype=torch.float64, device="cpu"), at.at_minimum, sigma)


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
    coordinates, seed = _coordinates(radius, points), check_seed(seed)
    with measuring(model, loss_fn) as at:
        direction = at.direction(seed, 0)
        losses = [
            at.loss(at.along([(a, direction)])) for a in _progress(coordinates.tolist(), "slice", progress)
        ]
        losses_along = torch.tensor(losses, dtype=torch.float64, device="cpu")
        return Slice1D(coordinates, losses_along, at.at_minimum)


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
    coordinates, seed = _coordinates(radius, points), check_seed(seed)
    with measuring(model, loss_fn) as at:
        d1, d2 = at.direction(seed, 0), at.direction(seed, 1)
        grid = [(a, b) for a in coordinates.tolist() for b in coordinates.tolist()]
        losses = [at.loss(at.along([(a, d1), (b, d2)])) for a, b in _progress(grid, "slice", progress)]
        plane = torch.tensor(losses, dtype=torch.float64, device="cpu").view(points, points)
        return Slice2D(coordinates, plane, at.at_minimum)


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
            differences of the loss. It works for quantized weights, too, and needs no gradients, but
            suffers from the rounding of the loss. ``"auto"`` is ``"autograd"`` if all weights are dense
            and none has DoRA, whose norm PEFT detaches from autograd.
        step: The step of the differences, relative to the root mean square of the weights.
    """
    check_choice("method", method, ("auto", "autograd", "differences"))
    seed = check_seed(seed)
    _check_count("samples", samples)
    _check_length("step", step)
    with measuring(model, loss_fn) as at:
        if method == "auto":
            method = "differences" if at.why_no_hessian() else "autograd"
        hessian = at.hessian() if method == "autograd" else None
        values = []
        for k in _progress(range(samples), "Hessian trace", progress):
            key = NoiseKey(seed, k)
            values.append(hessian.curvature(at.vector(key)) if hessian else at.difference(key, step))
    return Estimate(torch.tensor(values, dtype=torch.float64, device="cpu"))


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
        iterations: The largest number of Hessian-vector products.
        tolerance: Stops when ``|Hv - value * v|`` is below this, relative to the value.
    """
    seed = check_seed(seed)
    _check_count("iterations", iterations)
    _check_length("tolerance", tolerance)
    with measuring(model, loss_fn) as at:
        hessian = at.hessian()
        start = at.vector(NoiseKey(seed, 0))
        top = _power_iteration(hessian.times, start, iterations, tolerance, progress)
        if top.value < 0 and top.iterations < iterations:
            # The most negative eigenvalue dominates. After a shift by it, the largest does.
            shift, left = top.value, iterations - top.iterations

            def shifted(v: Vector) -> Vector:
                return [hv - shift * x for hv, x in zip(hessian.times(v), v, strict=True)]

            other = _power_iteration(shifted, start, left, tolerance, progress, shift)
            top = replace(other, iterations=top.iterations + other.iterations)
    if not top.converged:
        warnings.warn(f"no convergence to {tolerance} in {iterations} iterations", stacklevel=2)
    return top


def _power_iteration(
    times: Callable[[Vector], Vector],
    v: Vector,
    iterations: int,
    tolerance: float,
    progress: bool,
    shift: float = 0.0,
) -> Eigenvalue:
    """The eigenvalue of largest magnitude of the matrix in ``times``, plus ``shift``."""
    v, value = _normalized(v), math.nan
    for i in _progress(range(1, iterations + 1), "top eigenvalue", progress):
        product = times(v)
        value = dot(v, product)
        # The quotient alone may stall far from any eigenvalue, if two of them compete.
        residual = [hv - value * x for hv, x in zip(product, v, strict=True)]
        if math.sqrt(dot(residual, residual)) <= tolerance * abs(value + shift):
            return Eigenvalue(value + shift, i, True)
        v = _normalized(product)
    return Eigenvalue(value + shift, iterations, False)


def _normalized(v: Vector) -> Vector:
    norm = math.sqrt(dot(v, v))
    return [x / norm for x in v] if norm > 0 else v


def _coordinates(radius: float, points: int) -> Tensor:
    _check_length("radius", radius)
    _check_count("points", points, least=2)
    coordinates = torch.linspace(-radius, radius, points, dtype=torch.float64, device="cpu")
    # linspace may miss 0 by rounding.
    return torch.where(coordinates.abs() < radius * 1e-9, 0.0, coordinates)


def _check_length(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and > 0, got {value!r}")


def _check_count(name: str, value: object, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")


def _progress(items: Sequence[T], description: str, show: bool) -> Iterable[T]:
    if not show:
        return items
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return items
    bar: Iterable[T] = tqdm(items, desc=description, leave=False)
    return bar
