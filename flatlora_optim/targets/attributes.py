"""Looking up modules' attributes by name."""

from __future__ import annotations

from typing import Any

from torch import nn


def innermost_base_layer(module: nn.Module) -> nn.Module:
    """The module inside of one or more nested adapter layers."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def find(start: object, path: str) -> Any:
    """The value at a path of attributes. Parts of it may be keys, or positions in a list.

    Raises:
        AttributeError: There is nothing at this path.
    """
    value: Any = start
    for part in path.split("."):
        value = _step(value, part)
    return value


def _step(value: Any, part: str) -> Any:
    if hasattr(value, part):
        return getattr(value, part)
    try:
        return value[int(part) if part.isdecimal() and not hasattr(value, "keys") else part]
    except (TypeError, KeyError, IndexError):
        return getattr(value, part)  # raises the usual AttributeError


def is_set(module: nn.Module, name: str) -> bool:
    """Whether the module has a flag of this name that is true."""
    # Called at each step, and nn.Module's AttributeError takes microseconds.
    is_there = name in module.__dict__ or name in module._buffers or hasattr(type(module), name)
    value = getattr(module, name) if is_there else False
    return bool(value) and not callable(value)  # it may be a method


def has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)
