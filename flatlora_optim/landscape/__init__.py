"""How flat a minimum is, in the full weight space that Flat-LoRA looks at.

All functions take ``model`` and ``loss_fn``, a function of the model that returns the scalar loss on some
data. They perturb the frozen weights that have an adapter, as :class:`.FlatLoRAOptimizer` does: dense and
quantized ones, by the same noise and the same exact restore. Afterwards, also after an exception, weights,
gradients, training mode and torch's random state are what they were. An optimizer that is attached to the
model does not notice.

The model is measured in eval mode. Each evaluation starts from the same random state, so a
``loss_fn`` that draws its data at random draws the same data each time. Weights in float16 and
bfloat16 work, but resolve only strong noise: measure curvature in float32.

``samples`` is the number of random draws, ``seed`` repeats them, and ``progress`` shows a bar if tqdm is
installed. All functions raise ValueError for a number that is out of range, a model without an active
adapter, with a merged one or with sharded weights, and TypeError if ``loss_fn`` returns no scalar tensor.

================  ==============================================================
``measure``       expected loss, slices of the loss, curvature
``results``       what they return
``plot``          drawing it
``surroundings``  the loss at ``W + eps``, and the Hessian at W
================  ==============================================================
"""

from .measure import expected_loss, hessian_trace, slice_1d, slice_2d, top_eigenvalue
from .plot import plot_expected_loss, plot_slice_1d, plot_slice_2d
from .results import Eigenvalue, Estimate, ExpectedLoss, Slice1D, Slice2D

__all__ = [
    "Eigenvalue",
    "Estimate",
    "ExpectedLoss",
    "Slice1D",
    "Slice2D",
    "expected_loss",
    "hessian_trace",
    "plot_expected_loss",
    "plot_slice_1d",
    "plot_slice_2d",
    "slice_1d",
    "slice_2d",
    "top_eigenvalue",
]
