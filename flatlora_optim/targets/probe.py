"""Checks a description: the adapter must change the output as the merged weight would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn.utils.stateless import _reparametrize_module

from .sharding import is_sharded
from .target import Target
from .weights import DenseWeight

_TOLERANCE = 0.02


@torch.no_grad()
def complaint_of(target: Target) -> str | None:
    """How the layer's forward differs from ``x (W + dW)^T``. None if it agrees, or can't be tried.

    The adapter gets two sets of random values. The output must change as ``dW`` says. Afterwards all is as
    it was, bit for bit.
    """
    parameters = list(dict.fromkeys(target.adapter_parameters()))
    weight = target.weight
    stored = weight.tensor if isinstance(weight, DenseWeight) else None
    known = [*parameters] if stored is None else [*parameters, stored]
    if not parameters or any(is_sharded(p) or p.is_meta or p.is_inference() for p in known):
        return None
    if target.merged or not all(p.is_floating_point() for p in parameters):
        return None
    forward, owner, tolerance = target.layer.forward, target.owner, _TOLERANCE
    with _undisturbed(target, parameters):
        _randomize(parameters, 1)
        first = target.delta()
        x, output = _first_that_runs(forward, _inputs(target))
        if x is None or output is None or first is None:
            return None
        added = target.as_stored(first)
        doubled = forward(x + x) if x.is_floating_point() else output
        _randomize(parameters, 2)
        second = target.delta()
        other = forward(x)
        if second is None or not torch.equal(other, forward(x)):  # some dropout is on still
            return None
        added = added - target.as_stored(second)
        if isinstance(weight, DenseWeight):
            tolerance += _rounding(added, weight.tensor)
            merged = added.add_(weight.tensor).to(weight.tensor.dtype)  # in place: it may be large
            with _reparametrize_module(owner, {weight.name: nn.Parameter(merged, requires_grad=False)}):
                expected = forward(x) - other
            if not expected.any():  # the layer reads its weight in another way, as Keras does
                with _written(weight.tensor, merged):
                    expected = forward(x) - other
        elif x.is_floating_point() and not _are_close(doubled - forward(x + x), 2 * (output - other), other):
            return None  # not a linear layer itself: it only contains one
        else:
            expected = _product(owner, x, added, weight.row_dim)
    if expected.any():
        # Each output is a sum of many rounded products.
        tolerance += (1 + weight.columns**0.5 / 4) * _rounding(expected, other)
    if not tolerance <= 0.5:  # nor is it if norms overflowed
        return None  # rounding would hide it
    actual, expected = (output - other).cpu().double().flatten(), expected.cpu().double().flatten()
    if actual.shape != expected.shape or not (actual.isfinite().all() and expected.isfinite().all()):
        return None
    return _difference(actual, expected, tolerance)


def _rounding(change: Tensor, whole: Tensor) -> float:
    """How much rounding of the whole may distort a change of it, relative to the change."""
    return 4 * torch.finfo(whole.dtype).eps * _norm(whole) / max(_norm(change), 1e-30)


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)))


def _are_close(one: Tensor, other: Tensor, whole: Tensor) -> bool:
    return float((one - other).norm()) <= (_TOLERANCE + _rounding(other, whole)) * float(other.norm())


def _difference(actual: Tensor, expected: Tensor, tolerance: float) -> str | None:
    size = float(expected.norm())
    error = float((actual - expected).norm())
    if error <= tolerance * max(size, 1e-30):
        return None
    factor = float(actual @ expected) / max(size**2, 1e-30)
    if float((actual - factor * expected).norm()) <= tolerance * abs(factor) * size:
        return (
            f"on a small input, the adapter adds {factor:.4g} times scaling * lora_B @ lora_A (or delta): "
            "check the scaling"
        )
    return (
        f"on a small input, the adapter changes the output by {float(actual.norm()):.4g}, but merged into "
        f"the weight by {size:.4g}; the two differ by {error:.4g}. Check `weight`, lora_A and lora_B (shapes "
        "(r, n) and (m, r)) or delta, and `transposed`"
    )


def _inputs(target: Target) -> Iterator[Tensor]:
    """Small inputs that the layer may accept."""
    owner: Any = target.owner
    weight = target.weight
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in target.adapter_parameters()), torch.float32)

    def random(*shape: int) -> Tensor:
        numbers = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        return numbers.to(weight.device, dtype)

    if isinstance(owner, nn.Embedding):
        yield torch.arange(min(4, weight.shape[0]), device=weight.device)
    elif hasattr(owner, "_conv_forward"):
        yield random(1, owner.in_channels, *(2 * d * (k - 1) + 1 for k, d in _kernel(owner)))
    else:
        yield random(1, 2, weight.columns)
        yield random(2, weight.columns)


def _kernel(convolution: Any) -> Iterator[tuple[int, int]]:
    return zip(convolution.kernel_size, convolution.dilation, strict=True)


def _first_that_runs(
    forward: Callable[[Tensor], Any], inputs: Iterator[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    for x in inputs:
        try:
            output = forward(x)
        except Exception:  # the layer wants another input, and we can't guess which
            continue
        if isinstance(output, Tensor) and output.is_floating_point():
            return x, output
    return None, None


def _product(owner: Any, x: Tensor, matrix: Tensor, row_dim: int) -> Tensor:
    if isinstance(owner, nn.Embedding):
        return F.embedding(x, matrix)
    matrix = matrix.to(x.dtype)
    if hasattr(owner, "_conv_forward"):
        out: Tensor = owner._conv_forward(x, matrix, None)
        return out
    return F.linear(x, matrix.T if row_dim else matrix)


def _randomize(parameters: Sequence[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
        parameter.copy_(values / max(1, parameter.shape[-1] if parameter.ndim else 1) ** 0.5)


@contextmanager
def _written(tensor: Tensor, values: Tensor) -> Iterator[None]:
    """A block in which the tensor holds other values."""
    before = tensor.clone()
    with _unsafe_preserve_version_counter(tensor):
        try:
            tensor.copy_(values)
            yield
        finally:
            tensor.copy_(before)


@contextmanager
def _undisturbed(target: Target, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """A block without dropout, after which parameters, modes and generators are as they were."""
    modules = [
        (module, module.training)
        for module in {*target.layer.modules(), *target.owner.modules()}
        # In eval mode, bitsandbytes repacks a 4-bit weight for a CPU kernel of its own.
        if getattr(module._parameters.get("weight"), "quant_state", None) is None
    ]
    saved = [parameter.detach().clone() for parameter in parameters]
    device = target.weight.device
    with ExitStack() as undo:
        undo.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        undo.enter_context(torch.autocast(device.type, enabled=False))
        for parameter in parameters:
            undo.enter_context(_unsafe_preserve_version_counter(parameter))
        try:
            for module, _ in modules:
                module.training = False  # not `eval()`, in which some layers merge
            yield
        finally:
            for module, training in modules:
                module.training = training
            for parameter, values in zip(parameters, saved, strict=True):
                parameter.copy_(values)
