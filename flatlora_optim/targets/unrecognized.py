"""Layers that look like LoRA and that no target type recognizes, to be named in a warning."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from itertools import permutations

from torch import nn

from .target import Target

_NAMES = re.compile(r"lora|loha|lokr|hada|vera_|low_?rank", re.IGNORECASE)


def unrecognized(
    model: nn.Module, targets: Iterable[Target], skipped: Iterable[str], trained: Container[int]
) -> dict[str, str]:
    """Modules whose trained parameters belong to no target, but are named like an adapter's, or have the
    shapes of A and B beside a frozen weight.

    Args:
        skipped: Names of layers that the user has been warned about.
        trained: The ids of the parameters in the optimizer.

    Returns:
        The reason, by the name of the module.
    """
    layers = [sharing for target in targets for sharing in target.sharing]
    known = {id(p) for layer in layers for p in layer.adapter_parameters()}
    # A known layer may train more, such as DoRA's magnitudes.
    named = tuple(f"{name}." if name else "" for name in (*skipped, *(layer.name for layer in layers)))
    left = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) in trained and id(parameter) not in known and not name.startswith(named)
    }
    found: dict[str, str] = {}
    for name in left:
        path = name.split(".")
        first = next((i for i, part in enumerate(path) if _NAMES.search(part)), None)
        if first is not None:
            _add(found, ".".join(path[:first]), f"{'.'.join(path[first:])} is named like an adapter's")
    # Innermost modules first: the smallest module that holds all three is the layer.
    modules = sorted(model.named_modules(), key=lambda pair: -pair[0].count("."))
    for name, module in modules:
        prefix = f"{name}." if name else ""
        if any(key.startswith(prefix) for key in found if key) or name in found:
            continue
        factors = [p for p in _near(module) if any(p is q for q in left.values())]
        frozen = [p for p in _near(module) if not p.requires_grad and p.ndim >= 2]
        if (shapes := _product(factors, frozen)) is not None:
            _add(
                found, name, "its trained parameters have the shapes of {} and {}, beside {}".format(*shapes)
            )
    return found


def _add(found: dict[str, str], name: str, what: str) -> None:
    found.setdefault(
        name,
        f"{what}, but it is no layer that we know; if it is LoRA, describe it by `flatlora_optim.register`",
    )


def _near(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a module and its children."""
    for near in (module, *module.children()):
        yield from near.parameters(recurse=False)


def _product(factors: list[nn.Parameter], frozen: list[nn.Parameter]) -> tuple[str, str, str] | None:
    """The shapes of A and B among the factors, and of a frozen weight whose rows their product fits."""
    matrices = [factor for factor in factors if factor.ndim == 2]
    for weight in frozen:
        rows, columns = weight.shape[0], weight.shape[1:].numel()
        for a, b in permutations(matrices, 2):
            for rank, inputs in (a.shape, a.shape[::-1]):
                outputs = b.numel() // rank if rank in b.shape else 0
                if inputs == columns and rank < min(rows, columns) and 0 < outputs <= rows:
                    return tuple(f"{tuple(p.shape)}" for p in (a, b, weight))  # type: ignore[return-value]
    return None
