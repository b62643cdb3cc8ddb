"""Steps of the same adapters that a living FlatLoRAOptimizer would not see.

Its noise would neither come nor go: one fixed noise for the whole run, kept at the end.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .diagnostics import Adapters
from .wrapper import OptimizerWrapper, changes_nothing


class Watched(Protocol):
    """What is asked of the optimizers whose adapters nobody else may step."""

    base: Any
    _steps_base: bool
    _adapters: Adapters

    @property
    def expects_steps(self) -> bool: ...


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
_handle: RemovableHandle | None = None


class Watch:
    """Ends the watch over one optimizer."""

    def __init__(self, optimizer: Watched) -> None:
        self._optimizer = weakref.ref(optimizer)

    def remove(self) -> None:
        global _handle
        optimizer = self._optimizer()
        if optimizer is not None:
            _watched.discard(optimizer)
        if not list(_watched) and _handle is not None:
            _handle.remove()
            _handle = None


def watch(optimizer: Watched) -> Watch:
    """From now on, a step of its adapters by another optimizer is an error."""
    global _handle
    _watched.add(optimizer)
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_check)
    return Watch(optimizer)


def _check(stepping: Optimizer, args: Any, kwargs: Any) -> None:
    if any(isinstance(each, OptimizerWrapper) for each in _nested(stepping)):
        return
    parameters = None
    for reference in [weakref.ref(optimizer) for optimizer in _watched]:
        optimizer = reference()
        if optimizer is None or optimizer._steps_base:
            continue
        if stepping is not optimizer.base:
            if not optimizer.expects_steps:
                continue
            if parameters is None:
                parameters = {id(p) for group in stepping.param_groups for p in group["params"]}
            if parameters.isdisjoint(optimizer._adapters.ids()):
                continue
        if changes_nothing(stepping.param_groups):
            continue
        is_base = stepping is optimizer.base
        del optimizer
        gc.collect()
        if reference() is None:
            continue  # it was forgotten, in a reference cycle, so that nobody could close it
        who = (
            "the base optimizer was stepped by itself"
            if is_base
            else f"{type(stepping).__name__} steps adapters that belong to a FlatLoRAOptimizer"
        )
        raise RuntimeError(
            f"{who}, so that noise would neither come nor go: one and the same for the whole run. Give the "
            "loop, trainer or GradScaler the FlatLoRAOptimizer, or call its close() first"
        )


def _nested(optimizer: Any) -> Iterator[Any]:
    """The optimizer, and what it wraps."""
    for _ in range(8):
        yield optimizer
        inside = getattr(optimizer, "__dict__", {})
        optimizer = inside.get("optimizer") or inside.get("_optimizer")
        if optimizer is None:
            return
