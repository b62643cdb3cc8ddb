"""Noise in the forward: the layer computes with dequant(W) + eps and W is never written.

For weights that can't take small noise in place (bitsandbytes NF4, FP4, int8 and any other
quantizer), and for dense weights that must not be written. eps is regenerated in forward, in
backward and in recomputation; nothing of the weight's size is saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..kernels.part import Part
from ..kernels.uncompiled import uncompiled
from ..noise import Noise
from ..targets import FrozenWeight, Target, UnsupportedAdapterError
from ..targets.sharding import is_sharded
from ..targets.weights import own_forward
from .base import Perturbation

Forward = Callable[[Tensor], Tensor]


class VirtualPerturbation(Perturbation):
    """Replaces the forward of the frozen layer while noise is on.

    Raises:
        UnsupportedAdapterError: The layer's forward is not known well enough to be replaced.
    """

    mode = "virtual"

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self._noise: Noise | None = None
        self.was_seen = False
        # Made once, so that a compiled model meets the same functions at every step.
        self._forwards = [
            self._forward(owner, _noisy_forward(owner, target.weight)) for owner in target.owners
        ]

    def _forward(self, owner: nn.Module, noisy: Callable[..., Tensor]) -> Forward:
        def forward(x: Tensor) -> Tensor:
            self.was_seen = True
            return noisy(owner, self.target.weight, self._noise, x)

        # Tracing would bake one step's noise into the graph.
        return uncompiled(forward)

    def apply(self, noise: Noise) -> Sequence[Part]:
        if any("flatlora_forward" in owner.__dict__ for owner in self.target.owners):
            raise self.already_noisy()
        self._noise = noise
        for owner, forward in zip(self.target.owners, self._forwards, strict=True):
            _replace_forward(owner, forward)
        return ()

    def forget(self) -> None:
        for owner, forward in zip(self.target.owners, self._forwards, strict=True):
            _put_forward_back(owner, forward)
        self._noise = None


def _replace_forward(owner: nn.Module, forward: Forward) -> None:
    # accelerate's hooks move `forward` to `_old_forward` and call it after placing the weights.
    name = "_old_forward" if "_old_forward" in owner.__dict__ else "forward"
    owner.__dict__["flatlora_forward"] = owner.__dict__.get(name), forward
    owner.__dict__[name] = forward


def _put_forward_back(owner: nn.Module, forward: Forward) -> None:
    before, ours = owner.__dict__.get("flatlora_forward", (None, None))
    if ours is not forward:
        return
    # Such a hook may have come or gone in the meantime.
    if owner.__dict__.get("_old_forward") is forward:
        owner.__dict__["_old_forward"] = before or MethodType(type(owner).forward, owner)
    elif owner.__dict__.get("forward") is forward and before is None:
        del owner.__dict__["forward"]  # the class's own
    elif owner.__dict__.get("forward") is forward:
        owner.__dict__["forward"] = before
    del owner.__dict__["flatlora_forward"]


def _noisy_forward(owner: nn.Module, weight: FrozenWeight) -> Callable[..., Tensor]:
    """How a layer of this type computes with noise."""
    if weight.kind == "bnb-4bit" and isinstance(owner, nn.Linear):
        return _bnb_4bit
    if weight.kind == "bnb-8bit" and isinstance(owner, nn.Linear):
        return _bnb_8bit
    if weight.kind == "opaque":
        return _opaque
    if is_sharded(owner.weight):
        raise UnsupportedAdapterError("sharded weights can only be perturbed in place")
    if type(owner) is nn.Linear or type(owner).__name__ == "Conv1D":
        return _dense_linear
    if type(owner) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return _dense_convolution
    if type(owner) is nn.Embedding:
        return _dense_embedding
    raise UnsupportedAdapterError(
        f"virtual mode does not know the forward of this {type(owner).__name__}; perturb it in place"
    )


class _Linear(torch.autograd.Function):
    """``F.linear(x, W + eps, bias)`` whose backward makes ``W + eps`` anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: FrozenWeight, noise: Noise) -> Tensor:
        ctx.weight, ctx.noise, ctx.dtype = weight, noise, x.dtype
        matrix = noise.add_to(weight.dense(x.dtype))
        return F.linear(x, matrix.T if weight.row_dim else matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = ctx.noise.add_to(ctx.weight.dense(ctx.dtype))
            with _no_autocast(grad):
                grad_x = grad @ (matrix.T if ctx.weight.row_dim else matrix)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None


class _NoiseOnly(torch.autograd.Function):
    """``x @ eps.T``, one block of rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, noise: Noise, dtype: torch.dtype) -> Tensor:
        ctx.noise, ctx.dtype, ctx.x_dtype = noise, dtype, x.dtype
        rows = len(noise.scales)
        x = x.to(dtype)
        out = x.new_empty(*x.shape[:-1], rows)
        for lo, hi in noise.grid.spans(rows):
            out[..., lo:hi] = x @ noise.block(lo, hi).to(dtype).T
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, columns = len(ctx.noise.scales), ctx.noise.grid.row_size
        total = grad.new_zeros(*grad.shape[:-1], columns)
        with _no_autocast(grad):
            for lo, hi in ctx.noise.grid.spans(rows):
                total += grad[..., lo:hi] @ ctx.noise.block(lo, hi).to(grad.dtype)
        return total.to(ctx.x_dtype), None, None


class _ByItsOwnForward(torch.autograd.Function):
    """A layer that is linear in x, at ``W + eps``: its backward is that of the layer at x = 0."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, compute: Callable[[Tensor, Tensor], Tensor], weight: FrozenWeight, noise: Noise
    ) -> Tensor:
        ctx.compute, ctx.weight, ctx.noise = compute, weight, noise
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return compute(x, noise.add_to(weight.dense(x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        with torch.enable_grad(), _no_autocast(grad):
            x = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device, requires_grad=True)
            matrix = ctx.noise.add_to(ctx.weight.dense(ctx.dtype))
            (grad_x,) = torch.autograd.grad(ctx.compute(x, matrix), x, grad)
        return grad_x, None, None, None


def _dense_linear(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _linear(x, owner.bias, weight, noise)


def _linear(x: Tensor, bias: Tensor | None, weight: FrozenWeight, noise: Noise) -> Tensor:
    out: Tensor = _Linear.apply(*_as_autocast(x, bias), weight, noise)
    return out


def _as_autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # As autocast is about to, so that the weight is made in that dtype at once.
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _dense_convolution(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    def compute(x: Tensor, matrix: Tensor) -> Tensor:
        out: Tensor = owner._conv_forward(x, matrix, None)
        return out

    x, bias = _as_autocast(x, owner.bias)
    out: Tensor = _ByItsOwnForward.apply(x, compute, weight, noise)
    return out if bias is None else out + bias.view(-1, *[1] * (len(weight.shape) - 2))


def _dense_embedding(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    with torch.no_grad():
        matrix = noise.add_to(weight.dense(owner.weight.dtype))
        return F.embedding(x, matrix, owner.padding_idx)


def _bnb_4bit(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    if not owner.compute_type_is_set:
        owner.set_compute_type(x)
        owner.compute_type_is_set = True
    dtype = x.dtype if owner.compute_dtype is None else owner.compute_dtype
    bias = None if owner.bias is None else owner.bias.to(dtype)
    # bitsandbytes' own kernels compute in `compute_dtype` whatever autocast says.
    with _no_autocast(x):
        out: Tensor = _Linear.apply(x.to(dtype), bias, weight, noise)
    return out.to(x.dtype)


def _bnb_8bit(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _linear(x, None if owner.bias is None else owner.bias.to(x.dtype), weight, noise)


def _opaque(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    clean = own_forward(owner)(x)
    with _no_autocast(x):
        eps: Tensor = _NoiseOnly.apply(x, noise, clean.dtype)
    return clean + eps
