"""Noise in the forward: the layer computes with W + eps and W is never written.

For weights that can't take small noise in place (bitsandbytes NF4, FP4, int8 and any other
quantizer), and for dense weights that must not be written. eps is made again in forward, in
backward and in recomputation; nothing of the weight's size is saved for backward.

A forward that we know exactly is computed with W + eps in place of W. Any other one runs as it is, and the
noise comes on top: ``x eps^T`` for a linear layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from ..kernels.part import Part, refuse_capture
from ..kernels.uncompiled import uncompiled
from ..noise import Noise, NoiseSource
from ..targets import DenseWeight, FrozenWeight, Target, UnsupportedAdapterError
from ..targets.sharding import is_sharded
from ..targets.weights import has_foreign_forward
from .base import Perturbation

Forward = Callable[..., Tensor]
Make = Callable[[torch.dtype], Tensor]
"""Computes ``W + eps``, or eps, in some dtype."""
Compute = Callable[[Any, FrozenWeight, Noise, Tensor], Tensor]
"""From owner, weight, noise and input: the output of a layer, or what the noise adds to it."""
Factors = tuple[Tensor | None, Tensor | None]
"""The two factors of low-rank noise, or None."""


class VirtualPerturbation(Perturbation):
    """Replaces the forward of the frozen layer while noise is on.

    Raises:
        UnsupportedAdapterError: We don't know the layer's forward well enough to put noise into it.
    """

    mode = "virtual"

    def __init__(self, target: Target, source: NoiseSource) -> None:
        super().__init__(target, source)
        self._noise: Noise | None = None
        self._in_forward: set[int] = set()
        """The threads whose call of the layer has gone through our forward."""
        self._handles: list[RemovableHandle] = []
        self.was_seen = False
        self._after: dict[nn.Module, Callable[..., Tensor]] = {}
        self.is_called_by_users = False
        """Whether noise may come after the module's call has begun and looked up the forward to run."""
        # Made once, so that a compiled model meets the same functions at every step.
        self._forwards = {each.computes: self._forward(each) for each in target.sharing}

    def _forward(self, target: Target) -> Forward:
        module, weight = target.computes, self.target.weight
        if weight.kind == "experts":
            raise UnsupportedAdapterError(
                "PEFT computes this weight in each forward; perturb it in place, or by noise of low rank"
            )
        if isinstance(weight, DenseWeight) and is_sharded(weight.tensor):
            raise UnsupportedAdapterError("sharded weights can only be perturbed in place")
        instead = known_forward(target)
        on_top = _ON_TOP[operation_of(target)]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            before = module.__dict__.get("flatlora_forward", (None,))[0]
            own = before or MethodType(type(module).forward, module)
            if (noise := self._noise) is None:  # called from a forward that was put around ours
                clean: Tensor = own(*args, **kwargs)
                return clean
            refuse_capture(self.target.weight.device)
            self.was_seen = True
            if self.is_called_by_users:
                self._enter()
            x = first_of(args, kwargs)
            if instead is not None and getattr(own, "__func__", None) is type(module).forward:
                return instead(target.owner, weight, noise, x)
            return with_noise(x, own(*args, **kwargs))

        def with_noise(x: Tensor, output: Tensor) -> Tensor:
            assert self._noise is not None
            x = x.to(output.dtype) if x.is_floating_point() else x
            with _no_autocast(output):
                return output + on_top(target.owner, weight, self._noise, x).to(output.dtype)

        self._after[module] = uncompiled(self._call_after(with_noise))
        # Tracing would bake one step's noise into the graph.
        return uncompiled(forward)

    @uncompiled
    def _enter(self) -> None:
        self._in_forward.add(threading.get_ident())

    def _call_after(self, with_noise: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        """A hook for a module's call that had looked up its forward before the noise came."""

        def after(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            thread = threading.get_ident()
            if thread in self._in_forward or self._noise is None:
                self._in_forward.discard(thread)
                return output
            refuse_capture(self.target.weight.device)
            self.was_seen = True
            return with_noise(first_of(args, kwargs), output)

        return after

    def apply(self, noise: Noise) -> Sequence[Part]:
        if any("flatlora_forward" in module.__dict__ for module in self._forwards):
            raise self.already_noisy()
        self._noise = noise
        self._in_forward.clear()
        for module, forward in self._forwards.items():
            _replace_forward(module, forward)
            if self.is_called_by_users and (after := self._after.get(module)) is not None:
                self._handles.append(module.register_forward_hook(after, with_kwargs=True))
        return ()

    def forget(self) -> None:
        for module, forward in self._forwards.items():
            _put_forward_back(module, forward)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._noise = None


def first_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


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


def known_forward(target: Target) -> Compute | None:
    """What computes the layer's output with noise, if we know its class's forward exactly."""
    owner, weight = target.owner, target.weight
    if target.computes is not owner:
        return None
    forward = type(owner).forward
    if weight.kind in ("bnb-4bit", "bnb-8bit"):
        known = {"Linear4bit.forward": bnb_4bit, "Linear8bitLt.forward": _bnb_8bit}
        return known.get(forward.__qualname__) if forward.__module__.startswith("bitsandbytes.") else None
    if not isinstance(weight, DenseWeight):
        return None
    if forward is nn.Linear.forward or forward.__qualname__ == "Conv1D.forward":
        return dense_linear
    if forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward):
        return _dense_convolution
    return _dense_embedding if forward is nn.Embedding.forward else None


def operation_of(target: Target) -> str:
    """What the layer does with its weight. The noise does the same, on top of the output.

    Raises:
        UnsupportedAdapterError: The output may not be linear in the weight.
    """
    owner = target.owner
    has_adapter = target.layer is target.computes or has_foreign_forward(owner)
    if isinstance(target.weight, DenseWeight) and not has_adapter and known_forward(target) is None:
        raise UnsupportedAdapterError(
            f"virtual mode does not know the forward of this {type(owner).__name__}; perturb it in place"
        )
    if hasattr(owner, "_conv_forward"):
        return "convolution"
    return "embedding" if isinstance(owner, nn.Embedding) else "product"


class _NoisyWeight:
    """``W + eps``, or W, computed at each call."""

    def __init__(self, weight: FrozenWeight, noise: Noise | None) -> None:
        self._weight, self._noise, self._versions = weight, noise, weight.versions()

    def __call__(self, dtype: torch.dtype) -> Tensor:
        weight = self._weight
        if weight.versions() != self._versions:
            raise RuntimeError(
                f"a frozen weight needed for gradient computation (of shape {tuple(weight.shape)}, in "
                f"{type(weight.layer).__name__}) has been modified by an inplace operation, or replaced, "
                "between forward and backward"
            )
        return weight.dense(dtype) if self._noise is None else self._noise.added_to(weight, dtype)


class _NoiseAlone:
    """``eps`` in the shape of the weight, computed at each call."""

    def __init__(self, weight: FrozenWeight, noise: Noise) -> None:
        self._weight, self._noise = weight, noise

    def __call__(self, dtype: torch.dtype) -> Tensor:
        weight = self._weight
        return self._noise.add_to(torch.zeros(weight.shape, dtype=dtype, device=weight.device))


class _Linear(torch.autograd.Function):
    """``F.linear(x, weight + left @ right, bias)``.

    Thin products are added in place to the large one's result, in forward and in backward. Autograd would
    write them to other memory first, which costs as much as the products themselves.

    Args:
        weight: A matrix, or a function that makes it again in each pass.
        left, right: The factors of low-rank noise, if there is any.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor | Make,
        is_transposed: bool,
        left: Tensor | None,
        right: Tensor | None,
    ) -> Tensor:
        ctx.make, ctx.dtype, ctx.is_transposed = weight, x.dtype, is_transposed
        if isinstance(weight, Tensor):
            ctx.make, matrix = None, weight
            ctx.save_for_backward(left, right, weight)
        else:
            matrix = weight(x.dtype)
            ctx.save_for_backward(left, right)
        y = F.linear(x, matrix.T if is_transposed else matrix, bias)
        return y if left is None or right is None else _add_product(y, x, right.T, left.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, *saved = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            matrix = ctx.make(ctx.dtype) if ctx.make else saved[0]
            with _no_autocast(grad):
                grad_x = grad @ (matrix.T if ctx.is_transposed else matrix)
                if left is not None:
                    grad_x = _add_product(grad_x, grad, left, right)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, None, None, None, None


def _add_product(y: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``y += x @ first @ second``, in place."""
    y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]) @ first, second)
    return y


class _ByItsOwnForward(torch.autograd.Function):
    """A layer that is linear in x, with another weight: its backward is the layer's own at x = 0."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        compute: Callable[[Tensor, Tensor], Tensor],
        make: Make,
    ) -> Tensor:
        ctx.compute, ctx.make = compute, make
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return compute(x, make(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        with torch.enable_grad(), _no_autocast(grad):
            x = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad.device, requires_grad=True)
            (grad_x,) = torch.autograd.grad(ctx.compute(x, ctx.make(ctx.dtype)), x, grad)
        return grad_x, None, None


def dense_linear(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _linear(x, owner.bias, weight, noise)


def _linear(
    x: Tensor,
    bias: Tensor | None,
    weight: FrozenWeight,
    noise: Noise | None,
    factors: Factors = (None, None),
) -> Tensor:
    x, bias = _as_autocast(x, bias)
    out: Tensor = _Linear.apply(x, bias, _NoisyWeight(weight, noise), weight.row_dim == 1, *factors)
    return out


def noisy_linear(x: Tensor, bias: Tensor | None, weight: DenseWeight, factors: Factors) -> Tensor:
    """``F.linear(x, W + left @ right, bias)``, all of one dtype."""
    out: Tensor = _Linear.apply(x, bias, weight.tensor, weight.row_dim == 1, *factors)
    return out


def _multiplied_noise(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    out: Tensor = _Linear.apply(x, None, _NoiseAlone(weight, noise), weight.row_dim == 1, None, None)
    return out


def _as_autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # Autocast would cast them next. So the weight is made in the right dtype at once.
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, bias
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _no_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _dense_convolution(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    x, bias = _as_autocast(x, owner.bias)
    out = _convolved(owner, x, _NoisyWeight(weight, noise))
    return out if bias is None else out + bias.view(-1, *[1] * (len(weight.shape) - 2))


def _convolved_noise(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _convolved(owner, x, _NoiseAlone(weight, noise))


def _convolved(owner: Any, x: Tensor, make: Make) -> Tensor:
    def compute(x: Tensor, matrix: Tensor) -> Tensor:
        out: Tensor = owner._conv_forward(x, matrix, None)
        return out

    result: Tensor = _ByItsOwnForward.apply(x, compute, make)
    return result


def _dense_embedding(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    with torch.no_grad():
        matrix = noise.add_to(weight.dense(owner.weight.dtype))
        return F.embedding(x, matrix, owner.padding_idx)


def _embedded_noise(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    with torch.no_grad():
        return F.embedding(x, _NoiseAlone(weight, noise)(torch.float32))


def bnb_4bit(
    owner: Any, weight: FrozenWeight, noise: Noise | None, x: Tensor, factors: Factors = (None, None)
) -> Tensor:
    if not owner.compute_type_is_set:
        owner.set_compute_type(x)
        owner.compute_type_is_set = True
    dtype = x.dtype if owner.compute_dtype is None else owner.compute_dtype
    bias = None if owner.bias is None else owner.bias.to(dtype)
    left, right = (None if factor is None else factor.to(dtype) for factor in factors)
    # bitsandbytes' own kernels compute in `compute_dtype`, whatever autocast says.
    with _no_autocast(x):
        out = _linear(x.to(dtype), bias, weight, noise, (left, right))
    return out.to(x.dtype)


def _bnb_8bit(owner: Any, weight: FrozenWeight, noise: Noise, x: Tensor) -> Tensor:
    return _linear(x, None if owner.bias is None else owner.bias.to(x.dtype), weight, noise)


_ON_TOP: dict[str, Compute] = {
    "product": _multiplied_noise,
    "convolution": _convolved_noise,
    "embedding": _embedded_noise,
}
