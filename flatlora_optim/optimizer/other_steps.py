"""Steps of the same adapters by another optimizer, which would use one fixed noise for the whole run."""

from __future__ import annotations

import functools
import gc
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .hooks import Owner
from .wrapper import OptimizerWrapper, changes_nothing, nested


def watch(optimizer: Owner) -> RemovableHandle:
    """From now on, another optimizer's step of its adapters is an error."""
    reference = weakref.ref(optimizer)

    def check(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        if (who := _who_steps(stepping, reference())) is None:
            return
        gc.collect()
        if reference() is None:
            return  # it was garbage in a reference cycle, which nobody could close
        raise RuntimeError(
            f"{who}, so the noise would never change: every step would train on the same one. Give the "
            "loop, trainer or GradScaler the FlatLoRAOptimizer, or call its close() first"
        )

    _listen()
    handle = RemovableHandle(_checks)
    _checks[handle.id] = check
    return handle


_checks: OrderedDict[int, Callable[[Optimizer, Any, Any], None]] = OrderedDict()


@functools.cache
def _listen() -> None:
    """Registers one hook for all checks: a finalizer may remove a check while torch iterates over its hooks,
    which torch forbids."""
    register_optimizer_step_pre_hook(_check_all)


def _check_all(stepping: Optimizer, args: Any, kwargs: Any) -> None:
    for check in list(_checks.values()):
        check(stepping, args, kwargs)


def _who_steps(stepping: Optimizer, optimizer: Owner | None) -> str | None:
    """Whose step is a mistake. None if it is not."""
    if optimizer is None or optimizer._steps_base:
        return None
    if any(isinstance(each, OptimizerWrapper) for each in nested(stepping)):
        return None
    who = "the base optimizer was stepped by itself"
    if stepping is not optimizer.base:
        parameters = {id(p) for group in stepping.param_groups for p in group["params"]}
        if not optimizer.expects_steps or parameters.isdisjoint(optimizer._adapters.ids()):
            return None
        who = f"{type(stepping).__name__} steps adapters that belong to a FlatLoRAOptimizer"
    return None if changes_nothing(stepping.param_groups) else who
