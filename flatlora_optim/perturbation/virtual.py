"""Noise in the forward: the layer computes with dequant(W) + eps and W is never written.

For weights that can't take small noise in place (bitsandbytes NF4, FP4, int8 and any other
quantizer), and for dense weights that must not be written. eps is regenerated in forward, in
backward and in recomputation; nothing of the weight's size is saved for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..noise import Noise
from ..targets import Target, UnsupportedAdapterError
from ..weights import FrozenWeight
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
        self._forwards = [_noisy_forward(owner, target.weight) for owner in target.owners]

    def apply(self, noise: Noise) -> None:
        for owner, noisy in zip(self.target.owners, self._forwards, strict=True):
            _replace_forward(owner, _uncompiled(noisy, owner, self.target.weight, noise))

    def remove(self) -> None:
        for owner in self.target.owners:
            _put_forward_back(owner)

    abandon = remove


def _uncompiled(
    noisy: Callable[..., Tensor], owner: nn.Module, weight: FrozenWeight, noise: Noise
) -> Forward:
    def forward(x: Tensor) -> Tensor:
        return noisy(owner, weight, noise, x)

    # Tracing would bake one step's noise into the graph.
    uncompiled: Any = torch.compiler.disable(forward)
    uncompiled.flatlora = True
    return cast(Forward, uncompiled)


def _forward_name(owner: nn.Module) -> str:
    # accelerate's hooks move `forward` to `_old_forward` and call it after placing the weights.
    return "_old_forward" if "_old_forward" in owner.__dict__ else "forward"


def _replace_forward(owner: nn.Module, forward: Forward) -> None:
    name = _forward_name(owner)
    if not getattr(owner.__dict__.get(name), "flatlora", False):
        owner.__dict__["flatlora_forward"] = owner.__dict__.get(name)
    owner.__dict__[name] = forward


def _put_forward_back(owner: nn.Module) -> None:
    name = _forward_name(owner)
    if not getattr(owner.__dict__.get(name), "flatlora", False):
        return
    before = owner.__dict__.get("flatlora_forward")
    if before is None:
        del owner.__dict__[name]
    else:
        owner.__dict__[name] = before
    owner.__dict__.pop("flatlora_forward", None)


def _noisy_forward(owner: nn.Module, weight: FrozenWeight) -> Callable[..., Tensor]:
    """How a layer of this type computes with noise."""
    if weight.kind == "bnb-4bit":
        return _bnb_4bit
    if weight.kind == "bnb-8bit":
        return _bnb_8bit
    if weight.kind == "opaque":
        return _opaque
    if type(owner) is nn.Linear or type(owner).__name__ == "Conv1D":
        return _dense_linear
    if type(owner) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return _dense_convolution
    if type(owner) is nn.Embedding:
        return _dense_embedding
    raise UnsupportedAdapterError(
        f"virtual mode does not know the forward of {type(owner).__name__}; perturb it in place"
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
            matrix = ctx.noise.add_to(ctx.weight.dense(ctx.dtype)).to(grad.dtype)
            grad_x = (grad @ (matrix.T if ctx.weight.row_dim else matrix)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_bias, None, None


class _NoiseOnly(torch.autograd.Function):
    """``x @ eps.T`` one wave of rows at a time."""

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
        total: Tensor | None = None
        for lo, hi in ctx.noise.grid.spans(len(ctx.noise.scales)):
            term = grad[..., lo:hi] @ ctx.noise.block(lo, hi).to(grad.dtype)
            total = term if total is None else total.add_(term)
        assert total is not None
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
        with torch.enable_grad():
            x = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device, requires_grad=True)
            matrix = ctx.noise.add_to(ctx.weight.dense(ctx.dtype))
            (grad_x,) = torch.autograd.grad(ctx.compute(x, matrix), x, grad)
        return grad_x, None, None, None


def _dense_linear(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _linear(x, owner.bias, weight, noise)


def _linear(x: Tensor, bias: Tensor | None, weight: FrozenWeight, noise: Noise) -> Tensor:
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # Cast here, as autocast would, so that the weight is made in that dtype at once.
        dtype = torch.get_autocast_dtype(device)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _Linear.apply(x, bias, weight, noise)
    return out


def _dense_convolution(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    def compute(x: Tensor, matrix: Tensor) -> Tensor:
        out: Tensor = owner._conv_forward(x, matrix, None)
        return out

    out: Tensor = _ByItsOwnForward.apply(x, compute, weight, noise)
    if owner.bias is not None:
        out = out + owner.bias.view(-1, *[1] * (len(weight.shape) - 2))
    return out


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
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _Linear.apply(x.to(dtype), bias, weight, noise)
    return out.to(x.dtype)


def _bnb_8bit(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _linear(x, None if owner.bias is None else owner.bias.to(x.dtype), weight, noise)


def _opaque(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    clean: Tensor = type(owner).forward(owner, x)
    with torch.autocast(x.device.type, enabled=False) if x.is_floating_point() else nullcontext():
        eps: Tensor = _NoiseOnly.apply(x, noise, clean.dtype)
    return clean + eps
