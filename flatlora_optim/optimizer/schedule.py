"""How the noise strength grows over training: sigma_t = sigma * schedule(t).

Source: Flat-LoRA (arXiv 2409.14396), section 3.3: the strength rises along a half cosine from 0,
where the adapter is still far from any minimum, to sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]
"""Maps the number of finished optimizer steps to a factor on ``sigma``."""


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return progress


_OF_PROGRESS: dict[str, Callable[[float], float]] = {"cosine": _cosine, "linear": _linear}
NAMES = (*_OF_PROGRESS, "constant")


def needs_total_steps(schedule: str | Schedule) -> bool:
    """Whether the schedule is defined relative to the length of the run."""
    return isinstance(schedule, str) and schedule in _OF_PROGRESS


def factor(schedule: str | Schedule, step: int, total_steps: int | None) -> float:
    """The factor on ``sigma`` at optimizer step ``step`` (0-based).

    Args:
        schedule: ``"cosine"`` (the paper's), ``"linear"``, ``"constant"``, or a callable of the step.
        step: Optimizer steps finished so far.
        total_steps: Length of the run in optimizer steps; past it the last value is kept.
            Only ``"cosine"`` and ``"linear"`` read it.

    Raises:
        ValueError: A callable returned a value that is negative or not finite.
        RuntimeError: ``total_steps`` is needed and None.
    """
    if not isinstance(schedule, str):
        value = float(schedule(step))
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(
                f"the schedule returned {value!r} at step {step}; "
                "it must return a finite factor >= 0 that multiplies sigma"
            )
        return value
    if schedule == "constant":
        return 1.0
    if total_steps is None:
        raise RuntimeError(
            f"the {schedule!r} schedule needs the length of the run: set `optimizer.total_steps` "
            "to the number of optimizer steps before the first forward (FlatLoRACallback does so in the "
            "transformers Trainer)"
        )
    return _OF_PROGRESS[schedule](min(step, total_steps) / total_steps)
