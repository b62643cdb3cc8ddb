"""A check of what was said about a layer: its adapter must do what the weight would do that had it merged."""

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
    """How far the layer's forward is from ``x (W + dW)^T``; None if it agrees, or can't be tried.

    The adapter is given two sets of random values, and the change of the output is compared with that by
    ``dW``. All is as it was afterwards, bit for bit.
    """
    parameters = list(dict.fromkeys(target.adapter_parameters()))
    weight = target.weight
    stored = weight.tensor if isinstance(weight, DenseWeight) else None
    known = [*parameters] if stored is None else [*parameters, stored]
    if not parameters or any(is_sharded(p) or p.is_meta or p.is_inference() for p in known):
        return None
    if target.merged or not all(p.is_floating_point() for p in parameters):
        return None
    forward, owner = target.layer.forward, target.owner
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
            merged = (weight.tensor.float() + added).to(weight.tensor.dtype)
            with _reparametrize_module(owner, {weight.name: nn.Parameter(merged, requires_grad=False)}):
                expected = forward(x) - other
            if not expected.any():  # the layer has its weight by another way, as Keras' do
                with _written(weight.tensor, merged):
                    expected = forward(x) - other
        elif x.is_floating_point() and not _are_close(doubled - forward(x + x), 2 * (output - other), other):
            return None  # no linear layer, but one that has it inside
        else:
            expected = _product(owner, x, added, weight.row_dim)
    tolerance = _TOLERANCE
    if expected.any():
        # Each output is a sum of many rounded products.
        tolerance += (1 + weight.columns**0.5 / 4) * _rounding(expected, other)
    if isinstance(weight, DenseWeight):
        tolerance += _rounding(added, weight.tensor)
    if tolerance > 0.5:
        return None  # rounding would hide it
    actual, expected = _widened(output - other).flatten(), _widened(expected).flatten()
    if actual.shape != expected.shape or not (actual.isfinite().all() and expected.isfinite().all()):
        return None
    return _difference(actual, expected, tolerance)


def _rounding(change: Tensor, whole: Tensor) -> float:
    """What rounding of the whole may do to a change of it, relative to the change."""
    size = _widened(change).norm().clamp(1e-30)
    return 4 * torch.finfo(whole.dtype).eps * float(_widened(whole).norm() / size)


def _widened(tensor: Tensor) -> Tensor:
    """In float32 at least; some devices know nothing wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


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
            f"on a small input, the adapter adds {factor:.4g} times what scaling, lora_A and lora_B (or "
            "delta) say: check the scaling"
        )
    return (
        f"on a small input, the adapter changes the output by {float(actual.norm()):.4g}, and a weight that "
        f"had it merged by {size:.4g}; the two differ by {error:.4g}. Check which weight is meant, lora_A "
        "and lora_B (shapes (r, n) and (m, r)) or delta, and `transposed`"
    )


def _inputs(target: Target) -> Iterator[Tensor]:
    """Small inputs that the layer may take."""
    owner: Any = target.owner
    weight = target.weight
    generator = torch.Generator().manual_seed(0)
    dtype = next((p.dtype for p in target.adapter_parameters()), torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(weight.device, dtype)

    if isinstance(owner, nn.Embedding):
        yield torch.arange(min(4, weight.shape[0]), device=weight.device)
    elif hasattr(owner, "_conv_forward"):
        yield random(1, owner.in_channels, *(2 * d * (k - 1) + 1 for k, d in _kernel(owner)))
    else:
        yield random(2, weight.columns)
        yield random(1, 2, weight.columns)


def _kernel(convolution: Any) -> Iterator[tuple[int, int]]:
    return zip(convolution.kernel_size, convolution.dilation, strict=True)


def _first_that_runs(
    forward: Callable[[Tensor], Any], inputs: Iterator[Tensor]
) -> tuple[Tensor | None, Tensor | None]:
    for x in inputs:
        try:
            output = forward(x)
        except Exception:  # it takes something else, which can't be guessed
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
        values = torch.randn(parameter.shape, generator=generator)
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
