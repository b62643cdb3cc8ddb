"""What the callbacks share."""

from __future__ import annotations

import inspect
from typing import Any

from ..optimizer import FlatLoRAOptimizer
from ..optimizer.param_groups import initial_state

_NAMES = inspect.signature(FlatLoRAOptimizer).parameters.keys() - {"base", "model", "total_steps"}


def checked_options(**options: Any) -> dict[str, Any]:
    """Checks options now that a ``FlatLoRAOptimizer`` will get only when training begins.

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
    """What callbacks log: sigma and the noise norm of the current step."""
    values = optimizer.metrics()
    return {f"flatlora/{name}": values[name] for name in ("sigma", "noise_norm")}
