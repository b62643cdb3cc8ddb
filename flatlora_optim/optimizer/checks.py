"""Checks of the numbers and names in options and checkpoints."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable

from .schedule import NAMES


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    choices = list(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_sigma(value: object) -> float:
    """Raises ValueError or TypeError unless ``value`` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"sigma must be a number, got {value!r}")
    sigma = float(value)
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"sigma must be finite and >= 0 (0.05 is usual for LLMs), got {value!r}")
    return sigma


def check_seed(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"seed must be an int, got {value!r}")
    return int(value)


def check_step(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"the step counter must be an int >= 0, got {value!r}")
    return value


def check_total_steps(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"total_steps must be an int, a number of optimizer steps (round up), got {value!r}")
    if value < 1:
        raise ValueError(f"total_steps must be at least 1, got {value}")
    return int(value)


def check_schedule(value: object) -> None:
    if not callable(value) and value not in NAMES:
        raise ValueError(
            f"schedule must be one of {', '.join(map(repr, NAMES))} or a callable of the step, got {value!r}"
        )
