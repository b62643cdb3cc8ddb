"""What a param group carries for us, and the check of state before it is loaded.

Step, seed, sigma and schedule live in the param groups, so every checkpoint format that carries an
optimizer's ``param_groups`` carries them too.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from . import schedules
from .schedules import Schedule

_PREFIX = "flatlora_"
STEP = _PREFIX + "step"
SEED = _PREFIX + "seed"
TOTAL_STEPS = _PREFIX + "total_steps"
SCHEDULE = _PREFIX + "schedule"
NOISE = _PREFIX + "noise"
"""What made the noise. In states only, not in the groups of an optimizer."""
SIGMA = "sigma"
_SHARED = STEP, SEED, TOTAL_STEPS, SCHEDULE  # by all groups
KEYS = (SIGMA, *_SHARED)

_SHAPED_LIKE_THE_PARAMETER = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "sum",
    "state1",
    "state2",
)
"""What most optimizers keep for each element. No optimizer checks it by itself."""

CUSTOM_SCHEDULE = "custom"
"""Stands for a callable, which no checkpoint can carry."""


def initial_state(
    groups: list[dict[str, Any]],
    *,
    sigma: float,
    seed: int,
    total_steps: int | str | None,
    schedule: str | Schedule,
) -> dict[str, Any]:
    """What each param group carries at the start of a run.

    Args:
        groups: The base optimizer's, some of which may have a sigma of their own.

    Raises:
        TypeError, ValueError: A value is of another type or out of range, the schedule lacks
            ``total_steps``, or the groups carry another run's state.
    """
    check_schedule(schedule)
    deferred = total_steps == "deferred"
    total = None if deferred else check_total_steps(total_steps)
    if total is None and not deferred and schedules.needs_total_steps(schedule):
        raise ValueError(
            f"the {schedule!r} schedule needs `total_steps`, the number of optimizer steps of "
            "the run; pass it, or schedule='constant'"
        )
    for group in groups:
        check_sigma(group.get(SIGMA, sigma))
        if STEP in group:
            raise ValueError(
                "the param groups of base carry the state of another FlatLoRAOptimizer, which would "
                "silently replace these options: make a new base optimizer, and load a checkpoint "
                "by `FlatLoRAOptimizer.load_state_dict`"
            )
    return {
        SIGMA: check_sigma(sigma),
        STEP: 0,
        SEED: check_seed(seed),
        TOTAL_STEPS: total,
        SCHEDULE: schedule if isinstance(schedule, str) else CUSTOM_SCHEDULE,
    }


def fill_groups(groups: list[dict[str, Any]], initial: dict[str, Any]) -> None:
    """Gives groups that came from elsewhere (a plain checkpoint, the base) what is missing."""
    for group in groups:
        for key in KEYS:
            if key not in group:
                group[key] = initial[key] if key == SIGMA else groups[0].get(key, initial[key])
        group[SIGMA] = check_sigma(group[SIGMA])  # a plain number, for it travels in checkpoints


def complete_groups(
    groups: list[dict[str, Any]], before: list[dict[str, Any]], options: Iterable[str]
) -> None:
    """Gives groups that were just loaded what a plain checkpoint does not know.

    Raises:
        ValueError: They lack an option of the base optimizer, whose own code has not added it.
    """
    for group, known in zip(groups, before, strict=True):
        missing = [key for key in options if key in known and key not in group]
        if missing:
            raise ValueError(f"a param group of the checkpoint lacks {', '.join(map(repr, missing))}")
        for key in KEYS:
            group.setdefault(key, known[key])


def take_state(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Takes from the groups what an optimizer under way has put there, and returns it."""
    return [{key: group.pop(key) for key in KEYS if key in group and key != SIGMA} for group in groups]


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
    if not callable(value) and value not in schedules.NAMES:
        raise ValueError(
            f"schedule must be one of {', '.join(map(repr, schedules.NAMES))} "
            f"or a callable of the step, got {value!r}"
        )


def check_state_dict(
    state_dict: object, groups: list[dict[str, Any]], options: Iterable[str], *, custom_schedule: bool
) -> None:
    """Checks a state dict against the optimizer's own groups, before anything is changed.

    Args:
        options: What a group says to the base optimizer: the keys of its ``defaults``.

    Raises:
        TypeError, ValueError: It is malformed, of another shape, or from another schedule.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"the optimizer state must be a dict, got {type(state_dict).__name__}")
    for key, kind in (("state", dict), ("param_groups", list)):
        if not isinstance(state_dict.get(key), kind):
            raise ValueError(f"the optimizer state has no {kind.__name__} under {key!r}")
    saved = state_dict["param_groups"]
    if len(saved) != len(groups):
        raise ValueError(f"the checkpoint has {len(saved)} param groups, the optimizer has {len(groups)}")
    parameters: dict[object, Tensor] = {}
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if not isinstance(theirs, dict) or not isinstance(theirs.get("params"), (list, tuple)):
            raise ValueError(f"param group {i} of the checkpoint is malformed")
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"param group {i} of the checkpoint has {len(theirs['params'])} parameters, "
                f"the optimizer's has {len(ours['params'])}: was another adapter trained?"
            )
        parameters.update(zip(theirs["params"], ours["params"], strict=True))
        _check_group(theirs, custom_schedule)
        _check_options({key: (theirs[key], ours[key]) for key in options if key in theirs and key in ours})
    if len(parameters) != sum(len(group["params"]) for group in groups):
        raise ValueError("the checkpoint names a parameter twice")
    for key in _SHARED:
        if any(group.get(key) != saved[0].get(key) for group in saved):
            raise ValueError(f"the checkpoint's param groups disagree on {key!r}")
    # PEFT's LoRA-FA keeps its state under names of modules.
    unknown = [key for key in state_dict["state"] if isinstance(key, int) and key not in parameters]
    if unknown:
        raise ValueError(f"the checkpoint has state for parameters in no group: {unknown[:3]}")
    for name, parameter in parameters.items():
        _check_shapes(state_dict["state"].get(name, {}), parameter)
    for group in saved:
        _check_entries([(state_dict["state"].get(name), parameters[name].ndim) for name in group["params"]])


def _entries(state: dict[str, Any]) -> list[str]:
    """What a parameter's state has of the known entries. SGD keeps None until there is momentum."""
    return [
        name
        for name in _SHAPED_LIKE_THE_PARAMETER
        if name in state and (name, state[name]) != ("momentum_buffer", None)
    ]


def _check_entries(states: list[tuple[Any, int]]) -> None:
    """Parameters of one group and kind keep the same; those that never had a gradient, nothing."""
    complete: dict[int, list[str]] = {}
    for state, dims in states:
        if state and _entries(state) != complete.setdefault(dims, _entries(state)):
            raise ValueError(
                f"the checkpoint is truncated: a parameter's state has {_entries(state)}, another's "
                f"{complete[dims]}"
            )


def _check_shapes(state: object, parameter: Tensor) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"the checkpoint's state of a parameter must be a dict, got {type(state).__name__}")
    if "step" in state:
        _check_options({"step": (state["step"], 0)})
    for name in _entries(state):
        saved = state[name]
        if not isinstance(saved, Tensor) or saved.is_complex() != parameter.is_complex():
            raise ValueError(
                f"the checkpoint's {name!r} must be a tensor like its parameter, got {saved!r:.50}"
            )
        # Of other dims it may be what this optimizer keeps: one number for each parameter, say.
        if saved.ndim == parameter.ndim and saved.shape != parameter.shape:
            raise ValueError(
                f"the checkpoint's {name!r} has shape {tuple(saved.shape)}, its parameter has "
                f"{tuple(parameter.shape)}: build the adapters with the rank they had then"
            )


def _check_options(pairs: dict[str, tuple[object, object]]) -> None:
    """Optimizers take any value from a checkpoint, and fail on it, or go wrong, at some later step."""
    for key, (theirs, ours) in pairs.items():
        # None or a bool may stand for each other: "decide by yourself", yes, no. Or None for a name.
        kinds = {_FLAG, "number", str} if ours is None else {_kind(ours)}
        if _kind(theirs) not in kinds and not (theirs is None and isinstance(ours, str)):
            raise ValueError(f"the checkpoint's {key!r} must be like {ours!r}, got {theirs!r:.60}")


_FLAG = "flag"


def _kind(value: object) -> object:
    if value is None or isinstance(value, bool):
        return _FLAG
    if isinstance(value, (list, tuple)):
        return tuple(_kind(item) for item in value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max:
        return "number"
    return type(value)


def _check_group(group: dict[str, Any], custom_schedule: bool) -> None:
    if SIGMA in group:
        check_sigma(group[SIGMA])
    if not any(key in group for key in KEYS if key != SIGMA):
        return  # A checkpoint of the base optimizer alone.
    missing = [key for key in KEYS if key not in group]
    if missing:
        raise ValueError(f"the checkpoint's Flat-LoRA state lacks {', '.join(missing)}")
    unknown = [key for key in group if str(key).startswith(_PREFIX) and key not in (*KEYS, NOISE)]
    if unknown:
        raise ValueError(f"the checkpoint is of another version of flatlora-optim: it has {unknown[0]!r}")
    check_step(group[STEP])
    check_seed(group[SEED])
    # None is a length that is still to come: Accelerate loads a fresh optimizer's own state.
    check_total_steps(group[TOTAL_STEPS])
    if not isinstance(group.get(NOISE, ""), str):
        raise TypeError(f"the checkpoint's noise must be described by a text, got {group[NOISE]!r:.60}")
    schedule = group[SCHEDULE]
    if schedule == CUSTOM_SCHEDULE:
        if not custom_schedule:
            raise ValueError(
                "the checkpoint was made with a callable schedule, which it can't carry: "
                "build the optimizer with the same callable as `schedule`"
            )
        return
    if not isinstance(schedule, str):
        raise TypeError(f"the checkpoint's schedule must be a name, got {schedule!r}")
    check_schedule(schedule)
    if custom_schedule:
        raise ValueError(
            f"the checkpoint was made with the schedule {schedule!r}, and the optimizer has a callable, "
            "which it would replace: build the optimizer with the schedule of the checkpoint"
        )
