"""Looking into modules by the names of their attributes."""

from __future__ import annotations

from typing import Any

from torch import nn


def innermost_base_layer(module: nn.Module) -> nn.Module:
    """The module under one or more nested adapter layers."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def find(start: object, path: str) -> Any:
    """What a path of attributes leads to; parts of it may be keys, or numbers in a list.

    Raises:
        AttributeError: It leads nowhere.
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
        return getattr(value, part)  # for its message


def is_set(module: nn.Module, name: str) -> bool:
    """Whether the module has a flag of this name that is true."""
    # Asked for at each step: the exception with which nn.Module answers for what it lacks takes microseconds.
    is_there = name in module.__dict__ or name in module._buffers or hasattr(type(module), name)
    value = getattr(module, name) if is_there else False
    return bool(value) and not callable(value)  # a method may have the name, too


def has(module: nn.Module, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)
