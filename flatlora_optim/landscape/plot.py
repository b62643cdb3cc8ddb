"""Drawing what was measured. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from .results import Slice1D, Slice2D

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
