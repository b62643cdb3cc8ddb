"""Low-rank noise in the forward: ``y + ((x @ V) @ U.T) * s / sqrt(r)``, whatever computes ``y``.

Plain torch operations on two thin tensors, whose memory stays the same from step to step. So the layer's
own forward runs, whatever it is; autograd, ``torch.compile`` and CUDA graphs see nothing new at a step; and
no tensor of the weight's size is made. Linear layers, of which there are most, write each output once where
autograd alone follows (``_at_once``).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ..kernels.part import Keep, Part
from ..kernels.threads import lasting_empty
from ..kernels.uncompiled import at_tracing, uncompiled
from ..noise import FactoredNoise, Noise, NoiseSource, fill_factors
from ..targets import DenseWeight, FrozenWeight, Target
from ..targets.sharding import is_sharded
from ..targets.weights import ExpertsWeight, compute_dtype, own_forward
from .virtual import (
    Forward,
    VirtualPerturbation,
    bnb_4bit,
    dense_linear,
    first_of,
    known_forward,
    noisy_linear,
    operation_of,
)

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
        self.left = self.right = torch.empty(0, device="cpu")
        self.held: Callable[[], FactoredNoise | None] = lambda: None
        """The noise that the factors are of, while it lives."""
        super().__init__(target, source)

    def _forward(self, target: Target) -> Forward:
        module, owner, weight = target.computes, target.owner, self.target.weight
        add, known = _ADDED[operation_of(target)], known_forward(target)

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if self._noise is None:  # called from a forward that was put around ours
                return _own(module, weight, args, kwargs)
            self._see()
            if self.is_called_by_users:
                self._enter()
            x, y = first_of(args, kwargs), None
            if known in (dense_linear, bnb_4bit) and _is_alone(module, x):
                y = _at_once(owner, weight, x, self.left, self.right)
            return with_noise(x, _own(module, weight, args, kwargs)) if y is None else y

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
        self.was_seen = True

    def apply(self, noise: Noise) -> Sequence[Part]:
        assert isinstance(noise, FactoredNoise)
        super().apply(noise)
        if self.held() is noise:  # the same one comes back after an evaluation
            return ()
        self.held = lambda: None
        self._reserve(noise)
        return [_Factors(self, noise)]

    def skip(self) -> None:
        self.held = lambda: None
        self.left.zero_()

    def _reserve(self, noise: FactoredNoise) -> None:
        """Memory for the factors, which compiled and captured forwards read: the same at each step."""
        weight, device = self.target.weight, noise.scales.device
        dtype = weight.tensor.dtype if isinstance(weight, DenseWeight) else compute_dtype(self.target.owner)
        left, right = noise.shapes
        if (self.left.shape, self.left.dtype, self.left.device) != (left, dtype, device):
            self.left, self.right = (lasting_empty(shape, dtype, device) for shape in (left, right))


class _Factors(Part):
    """The factors of a layer's noise, which are made for many layers at once."""

    noise: FactoredNoise

    def __init__(self, perturbation: LowRankPerturbation, noise: FactoredNoise) -> None:
        super().__init__(perturbation.left, noise, 0, len(perturbation.left), Keep.NOTHING)
        self._perturbation = perturbation

    @classmethod
    def perturb_all(cls, parts: Sequence[_Factors]) -> None:  # type: ignore[override]
        fill_factors([(part.noise, part._perturbation.left, part._perturbation.right) for part in parts])
        for part in parts:
            part._perturbation.held = weakref.ref(part.noise)


class LowRankExperts(LowRankPerturbation):
    """Adds the product to ``W + delta``, which PEFT computes in each forward: for all experts at once, and in
    place."""

    def _forward(self, target: Target) -> Forward:
        module, weight = target.computes, self.target.weight
        assert isinstance(weight, ExpertsWeight)

        def forward(*args: Any, **kwargs: Any) -> Any:
            own = own_forward(module)
            if self._noise is None:
                return own(*args, **kwargs)
            self._see()
            with _parametrized(weight, _Sum(weight.parameter, *self._factors())):
                return own(*args, **kwargs)

        return forward

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors for each expert's matrix as it is stored."""
        weight, rank = self.target.weight, len(self.right)
        assert isinstance(weight, ExpertsWeight)
        left = self.left.view(weight.experts, -1, rank)
        right = self.right.view(rank, -1, weight.columns).transpose(0, 1).expand(weight.experts, -1, -1)
        return (right.mT, left.mT) if weight.row_dim else (left, right)


class _Sum(nn.Module):
    """A parametrization that adds a product to each matrix, in place if PEFT has just computed it."""

    def __init__(self, original: Tensor, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self._factors = first, second
        self._original = (original,)  # in a tuple, as it is no parameter of this module

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            if weight is self._original[0] or _results_are_kept():
                matrices = weight.view(-1, *weight.shape[-2:])
                return torch.baddbmm(matrices, *self._factors).view_as(weight)
            if weight.ndim == 3:  # the backward pass of a view would copy the gradient
                return weight.baddbmm_(*self._factors)
            return weight.addmm_(*(factor[0] for factor in self._factors))


@contextmanager
def _parametrized(weight: FrozenWeight, parametrization: nn.Module) -> Iterator[None]:
    """A block in which the parameter goes through one more parametrization."""
    assert isinstance(weight, ExpertsWeight)
    owner, name = weight.layer, weight.name
    parametrize.register_parametrization(owner, name, parametrization, unsafe=True)
    try:
        with parametrize.cached():
            yield
    finally:
        chain = owner.parametrizations[name]
        if len(chain) > 1:
            del chain[-1]
        else:
            parametrize.remove_parametrizations(owner, name, leave_parametrized=False)


def _is_alone(module: nn.Module, x: Tensor) -> bool:
    """Whether the layer's forward is its own, and only autograd records it: ``torch.func``, forward-mode
    derivatives and the compiler need plain operations."""
    return not (
        torch.compiler.is_compiling()
        or module.__dict__.get("flatlora_forward", (None,))[0]
        or torch._C._functorch.peek_interpreter_stack() is not None
        or unpack_dual(x).tangent is not None
        or _results_are_kept()
    )


def _results_are_kept() -> bool:
    """Whether selective checkpointing keeps what single operations return: it must not be written again."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return False
    return any(
        type(mode).__module__ == "torch.utils.checkpoint" for mode in _get_current_dispatch_mode_stack()
    )


def _at_once(owner: Any, weight: FrozenWeight, x: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    """The output of a linear layer with noise. None if x, W and the noise don't have the same dtype."""
    if not isinstance(weight, DenseWeight):
        return bnb_4bit(owner, weight, None, x, (left, right))
    tensor = weight.tensor
    if not (x.dtype == tensor.dtype == left.dtype) or tensor.requires_grad or is_sharded(tensor):
        return None
    if torch.is_autocast_enabled(x.device.type):
        return None
    return noisy_linear(x, owner.bias, weight, (left, right))


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
    if is_sharded(y) or y.is_nested:
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
