"""What the callbacks for all trainers share."""

from __future__ import annotations

import inspect
from typing import Any

from ..optimizer import FlatLoRAOptimizer
from ..optimizer.param_groups import initial_state

_NAMES = inspect.signature(FlatLoRAOptimizer).parameters.keys() - {"base", "model", "total_steps"}


def checked_options(**options: Any) -> dict[str, Any]:
    """Options of a ``FlatLoRAOptimizer`` that is only built later, when wrong ones would cost time.

    Raises:
        TypeError, ValueError: An option is unknown or out of range.
    """
    if unknown := options.keys() - _NAMES:
        raise TypeError(
            f"there is no option {', '.join(sorted(unknown))}; there are {', '.join(sorted(_NAMES))}"
        )
    seed, schedule = options.get("seed", 0), options.get("schedule", "cosine")
    initial_state([], sigma=options["sigma"], seed=seed, total_steps="deferred", schedule=schedule)
    return {**options, "total_steps": "deferred"}


def metrics_of(optimizer: FlatLoRAOptimizer) -> dict[str, float]:
    """What is logged: sigma and the noise norm of the step that is under way."""
    values = optimizer.metrics()
    return {f"flatlora/{name}": values[name] for name in ("sigma", "noise_norm")}
