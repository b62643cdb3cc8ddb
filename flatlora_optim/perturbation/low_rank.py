"""Low-rank noise in the forward: ``y + ((x @ V) @ U.T) * s / sqrt(r)``, whatever computes ``y``.

Plain torch operations on two thin tensors, whose memory stays the same from step to step. So the layer's
own forward runs, whatever it is; autograd, ``torch.compile`` and CUDA graphs see nothing new at a step; and
no tensor of the weight's size is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.part import Part, refuse_capture
from ..kernels.threads import lasting_empty
from ..kernels.uncompiled import at_tracing, uncompiled
from ..noise import FactoredNoise, Noise, NoiseSource
from ..targets import FrozenWeight, Target
from ..targets.sharding import is_sharded
from ..targets.weights import compute_dtype
from .virtual import Forward, VirtualPerturbation, bnb_4bit, first_of, operation_of

Add = Callable[[Any, FrozenWeight, Tensor, Tensor, Tensor, Tensor], Tensor]
"""``y + x @ eps.T`` or the like, from owner, weight, y, x, left and right. The last two have y's dtype."""

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class LowRankPerturbation(VirtualPerturbation):
    """Adds ``x @ (left @ right).T`` to the output of the frozen layer while noise is on.

    Raises:
        UnsupportedAdapterError: We don't know what the layer's forward does with its weight.
    """

    mode = "virtual, low rank"

    def __init__(self, target: Target, source: NoiseSource) -> None:
        self.left = self.right = torch.empty(0)
        self._held: Callable[[], Noise | None] = lambda: None
        super().__init__(target, source)

    def _forward(self, target: Target) -> Forward:
        module, owner, weight = target.computes, target.owner, self.target.weight
        add = _ADDED[operation_of(target)]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            y = _own(module, weight, args, kwargs)
            if self._noise is None:  # called from a forward that was put around ours
                return y
            self._see()
            return with_noise(first_of(args, kwargs), y)

        def with_noise(x: Tensor, y: Tensor) -> Tensor:
            left, right = self.left, self.right
            if left.dtype != y.dtype:
                left, right = left.to(y.dtype), right.to(y.dtype)
            if is_sharded(y):
                left, right = _replicated(left, y), _replicated(right, y)
            if torch.is_autocast_enabled(y.device.type):  # the layer has chosen the dtype
                with torch.autocast(y.device.type, enabled=False):
                    return add(owner, weight, y, x, left, right)
            return add(owner, weight, y, x, left, right)

        self._after[module] = uncompiled(self._call_after(with_noise))
        return forward

    @at_tracing
    def _see(self) -> None:
        self.was_seen = self._was_in_forward = True

    def apply(self, noise: Noise) -> Sequence[Part]:
        assert isinstance(noise, FactoredNoise)
        if self._held() is not noise:  # the same one comes back after an evaluation
            self._held = lambda: None
            self._fill(noise.factors())
            self._held = weakref.ref(noise)
        return super().apply(noise)

    def skip(self) -> None:
        self._held = lambda: None
        self.left.zero_()

    def _fill(self, factors: tuple[Tensor, Tensor]) -> None:
        """Writes the factors to the tensors that compiled and captured forwards read."""
        left, right = factors
        refuse_capture(left.device)  # a forward may be captured, but this must run at each step
        dtype = compute_dtype(self.target.owner)
        if (self.left.shape, self.left.dtype, self.left.device) != (left.shape, dtype, left.device):
            self.left = lasting_empty(left.shape, dtype, left.device)
            self.right = lasting_empty(right.shape, dtype, right.device)
        self.left.copy_(left)
        self.right.copy_(right)


def _own(module: nn.Module, weight: FrozenWeight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The layer's output without noise. (torch.compile can't trace `own_forward`.)"""
    state = getattr(weight.layer.weight, "quant_state", None) if weight.kind == "bnb-4bit" else None
    if getattr(state, "packing_format_for_cpu", False) and isinstance(module, nn.Linear):
        # After an evaluation has repacked the weight, bitsandbytes' own forward has no gradients.
        return bnb_4bit(module, weight, None, *args, **kwargs)
    replaced = module.__dict__.get("flatlora_forward", (None,))[0]
    y: Tensor = replaced(*args, **kwargs) if replaced else type(module).forward(module, *args, **kwargs)
    return y


def _linear(owner: Any, weight: FrozenWeight, y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    thin = F.linear(x.to(y.dtype), right)
    if is_sharded(y):
        return y + F.linear(thin, left)
    # One pass over the output.
    return torch.addmm(y.reshape(-1, y.shape[-1]), thin.reshape(-1, thin.shape[-1]), left.T).view(y.shape)


def _convolution(
    owner: Any, weight: FrozenWeight, y: Tensor, x: Tensor, left: Tensor, right: Tensor
) -> Tensor:
    kernel = weight.shape
    ones = [1] * (len(kernel) - 2)
    kernels = right.view(-1, *kernel[1:]).repeat(owner.groups, 1, *ones)
    thin = owner._conv_forward(x.to(y.dtype), kernels, None)
    return y + _CONVOLUTIONS[len(kernel)](thin, left.view(*left.shape, *ones), groups=owner.groups)


def _embedding(owner: Any, weight: FrozenWeight, y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if weight.row_dim:  # tokens count as inputs
        return y + F.linear(F.embedding(x, right.T), left)
    return y + F.embedding(x, left) @ right


_ADDED: dict[str, Add] = {"product": _linear, "convolution": _convolution, "embedding": _embedding}


def _replicated(factor: Tensor, y: Any) -> Tensor:
    """The factor as a DTensor, whole on each process of y's mesh."""
    from torch.distributed.tensor import DTensor, Replicate

    places = [Replicate()] * y.device_mesh.ndim
    return cast(Tensor, DTensor.from_local(factor, y.device_mesh, places, run_check=False))
