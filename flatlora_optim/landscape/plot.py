"""Drawing what was measured. Needs matplotlib (the ``plot`` extra).

A band is a 95 % interval of the mean: over models or directions if there are several, else over the
draws of the noise. Distances and sigma are relative to the norm of each row of the
weights, losses are in the unit of the loss function. All is legible at half size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from .results import ExpectedLoss, Slice1D, Slice2D

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCREASE = "increase of the loss"
_T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
"""Student's t for 95 %, two-sided, with 1, 2, 3, … degrees of freedom."""


def plot_expected_loss(
    estimates: Iterable[ExpectedLoss] | Mapping[str, Iterable[ExpectedLoss]], ax: Axes | None = None
) -> Axes:
    """Draws ``E L(W + eps) - L(W)`` over sigma, for one method or for several by their names.

    Args:
        estimates: For each method, one at each sigma of its curve, or several from several models, such as
            those of several seeds.

    Example:
        >>> from flatlora_optim.landscape import expected_loss
        >>> sigmas = (0.1, 0.2, 0.4)
        >>> loss_fn = lambda model: model(x).square().mean()
        >>> ax = plot_expected_loss(expected_loss(model, loss_fn, sigma=s) for s in sigmas)
    """
    ax = ax or _new_axes()[0]
    named = estimates if isinstance(estimates, Mapping) else {"": estimates}
    for label, several in named.items():
        by_sigma: dict[float, list[ExpectedLoss]] = {}
        for estimate in several:
            by_sigma.setdefault(estimate.sigma, []).append(estimate)
        sigmas = sorted(by_sigma)
        bands = [_over_models(by_sigma[sigma]) for sigma in sigmas]
        _curve(ax, sigmas, [mean for mean, _ in bands], [half for _, half in bands], label, marker="o")
    ax.set(xlabel=r"$\sigma$, relative to the norm of each row", ylabel=r"$E\,L(W + \varepsilon) - L(W)$")
    return _finished(ax, any(named))


def plot_slice_1d(
    slices: Slice1D | Sequence[Slice1D] | Mapping[str, Slice1D | Sequence[Slice1D]],
    ax: Axes | None = None,
    *,
    sigma: float | None = None,
) -> Axes:
    """Draws how much the loss rises along random directions, for one model or several by their names.

    Args:
        slices: For each model one, or several along different directions (``seed``) with the same
            coordinates. Of several, the mean and its band are drawn.
        sigma: Marks the distance of noise of this strength.
    """
    ax = ax or _new_axes()[0]
    named = slices if isinstance(slices, Mapping) else {"": slices}
    for label, several in named.items():
        curves = [several] if isinstance(several, Slice1D) else list(several)
        rises = torch.stack([curve.losses - curve.at_minimum for curve in curves])
        mean, half = rises.mean(0).tolist(), [_half_interval(column) for column in rises.T]
        _curve(ax, curves[0].coordinates.tolist(), mean, half, label)
    if sigma is not None:
        for side in (-sigma, sigma):
            ax.axvline(side, color="gray", linestyle=":", linewidth=1.5)
        ax.text(
            sigma,
            0.98,
            r"$\pm\sigma$ ",
            transform=ax.get_xaxis_transform(),
            ha="right",
            va="top",
            fontsize=12,
        )
    ax.set(xlabel="distance, relative to the norm of each row", ylabel=INCREASE)
    return _finished(ax, any(named))


@overload
def plot_slice_2d(planes: Slice2D, axes: Axes | None = None, *, levels: int = 8) -> Axes: ...
@overload
def plot_slice_2d(
    planes: Mapping[str, Slice2D], axes: Sequence[Axes] | None = None, *, levels: int = 8
) -> list[Axes]: ...
def plot_slice_2d(
    planes: Slice2D | Mapping[str, Slice2D],
    axes: Axes | Sequence[Axes] | None = None,
    *,
    levels: int = 8,
) -> Axes | list[Axes]:
    """Draws how much the loss rises on a plane, with contour lines.

    Args:
        planes: Of one model, or of several by their names. Several are drawn side by side, with the same
            levels and colours.
        axes: As many as there are planes.
        levels: How many steps of 1, 2, 5, 10, … up to the largest rise.

    Returns:
        The axes, a list of them for several planes.
    """
    named = {"": planes} if isinstance(planes, Slice2D) else dict(planes)
    if axes is None:
        axes = _new_axes(len(named))
    panels = list(axes) if isinstance(axes, Sequence) else [axes]
    if len(panels) != len(named):
        raise ValueError(f"{len(named)} planes need as many axes, got {len(panels)}")
    from matplotlib.colors import BoundaryNorm

    rises = {label: (plane.losses - plane.at_minimum).T for label, plane in named.items()}
    steps = _levels(
        min(float(z.min()) for z in rises.values()), max(float(z.max()) for z in rises.values()), levels
    )
    for panel, (label, plane) in zip(panels, named.items(), strict=True):
        at, z = plane.coordinates.numpy(), rises[label].numpy()
        # Rows of `losses` belong to the first direction, which is drawn along x.
        filled = panel.contourf(at, at, z, levels=steps, norm=BoundaryNorm(steps, 256))
        panel.clabel(panel.contour(at, at, z, levels=steps, colors="white", linewidths=1), fontsize=10)
        panel.plot(0, 0, "+", color="white", markersize=10)
        panel.set(title=label, xlabel="direction 1", ylabel="direction 2", aspect="equal")
        _finished(panel, False)
    bar = panels[0].figure.colorbar(filled, ax=panels)
    bar.set_label(INCREASE, fontsize=13)
    return panels[0] if isinstance(planes, Slice2D) else panels


def _levels(least: float, most: float, count: int) -> list[float]:
    """Steps of 1, 2, 5, 10, …, which show both flat and steep models."""
    power = math.floor(math.log10(most)) if most > 0 else 0
    round_numbers = (m * 10.0**k for k in range(power, power - count, -1) for m in (5, 2, 1))
    between = [x for x in round_numbers if max(least, 0.0) < x < most][:count]
    return [min(least, 0.0), *reversed(between), most if most > 0 else 1.0]


def _over_models(estimates: Sequence[ExpectedLoss]) -> tuple[float, float]:
    """The mean increase, and half its interval."""
    if len(estimates) == 1:
        (estimate,) = estimates
        return estimate.increase, _half_interval(estimate.samples - estimate.at_minimum)
    increases = torch.tensor([estimate.increase for estimate in estimates], device="cpu")
    return float(increases.mean()), _half_interval(increases)


def _half_interval(values: Tensor) -> float:
    count = len(values)
    if count < 2:
        return 0.0
    t = _T_95[count - 2] if count - 2 < len(_T_95) else 1.96 + 2.5 / (count - 1)
    return t * float(values.std()) / math.sqrt(count)


def _curve(
    ax: Axes, x: Sequence[float], mean: Sequence[float], half: Sequence[float], label: str, marker: str = ""
) -> None:
    (line,) = ax.plot(x, mean, marker=marker, label=label, linewidth=2)
    if any(half):
        low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)


def _finished(ax: Axes, legend: bool) -> Axes:
    for part in (ax.xaxis.label, ax.yaxis.label, ax.title):
        part.set_fontsize(13)
    ax.tick_params(labelsize=12)
    if legend:
        ax.legend(fontsize=12)
    return ax


def _new_axes(count: int = 1) -> list[Axes]:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'flatlora-optim[plot]'") from error
    axes = pyplot.subplots(1, count, figsize=(4.8 * count, 3.8), squeeze=False, layout="constrained")[1]
    return list(axes[0])
