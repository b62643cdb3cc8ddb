"""What we keep in the param groups, and the check of a state before it is loaded.

Step, seed, sigma and schedule are in the param groups. So any checkpoint format that keeps an
optimizer's ``param_groups`` keeps them, too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .checks import check_schedule, check_seed, check_sigma, check_step, check_total_steps
from .schedule import Schedule, needs_total_steps

_PREFIX = "flatlora_"
STEP = _PREFIX + "step"
SEED = _PREFIX + "seed"
TOTAL_STEPS = _PREFIX + "total_steps"
SCHEDULE = _PREFIX + "schedule"
NOISE = _PREFIX + "noise"
"""What made the noise. Only in a state, not in an optimizer's groups."""
NORMS = _PREFIX + "norms"
"""Row norms that are kept from step to step, a tensor. Only in the first group of a state, if at all."""
NESTED = "flatlora"
"""The key for what we keep, in a state that has no ``param_groups`` at its top."""
SIGMA = "sigma"
_SHARED = STEP, SEED, TOTAL_STEPS, SCHEDULE  # by all groups
KEYS = (SIGMA, *_SHARED)

CUSTOM_SCHEDULE = "custom"
"""Stands for a callable, which no checkpoint can hold."""


def initial_state(
    groups: list[dict[str, Any]],
    *,
    sigma: float,
    seed: int,
    total_steps: int | str | None,
    schedule: str | Schedule,
) -> dict[str, Any]:
    """What we keep in each param group at the start of a run.

    Args:
        groups: The base optimizer's. Some may have a sigma of their own.

    Raises:
        TypeError, ValueError: A value has a wrong type or is out of range, the schedule needs
            ``total_steps``, or the groups hold another run's state.
    """
    check_schedule(schedule)
    deferred = total_steps == "deferred"
    total = None if deferred else check_total_steps(total_steps)
    if total is None and not deferred and needs_total_steps(schedule):
        raise ValueError(
            f"the {schedule!r} schedule needs `total_steps`, the number of optimizer steps of "
            "the run; pass it, or schedule='constant'"
        )
    for group in groups:
        check_sigma(group.get(SIGMA, sigma))
        if STEP in group:
            raise ValueError(
                "the param groups of base hold the state of another FlatLoRAOptimizer, which would "
                "silently replace these options: make a new base optimizer, and load a checkpoint "
                "by `FlatLoRAOptimizer.load_state_dict`; to continue from that state, use "
                "`FlatLoRAOptimizer.adopt`"
            )
    return {
        SIGMA: check_sigma(sigma),
        STEP: 0,
        SEED: check_seed(seed),
        TOTAL_STEPS: total,
        SCHEDULE: schedule if isinstance(schedule, str) else CUSTOM_SCHEDULE,
    }


def fill_groups(groups: list[dict[str, Any]], initial: dict[str, Any]) -> None:
    """Adds what is missing to groups that came from elsewhere (the base, a plain checkpoint)."""
    for group in groups:
        for key in KEYS:
            if key not in group:
                group[key] = initial[key] if key == SIGMA else groups[0].get(key, initial[key])
        group[SIGMA] = check_sigma(group[SIGMA])  # a plain number, which any checkpoint can hold


def complete_groups(
    groups: list[dict[str, Any]], before: list[dict[str, Any]], options: Iterable[str]
) -> None:
    """Adds what a plain checkpoint lacks to groups that were just loaded.

    Raises:
        ValueError: They lack an option of the base optimizer, which has not added it by itself.
    """
    for group, known in zip(groups, before, strict=True):
        missing = [key for key in options if key in known and key not in group]
        if missing:
            raise ValueError(f"a param group of the checkpoint lacks {', '.join(map(repr, missing))}")
        for key in KEYS:
            group.setdefault(key, known[key])


def take_state(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Removes from the groups what an optimizer or its checkpoint has put there, and returns it.

    If nothing has, a group's sigma is the user's, and stays.
    """
    keys = [*_SHARED, NOISE, NORMS]
    if any(STEP in group for group in groups):
        keys.append(SIGMA)
    return [{key: group.pop(key) for key in keys if key in group} for group in groups]


def put_state(groups: list[dict[str, Any]], state: list[dict[str, Any]]) -> None:
    """Puts back what :func:`take_state` took."""
    for group, values in zip(groups, state, strict=True):
        group.update(values)


def check_loaded(groups: list[dict[str, Any]], custom_schedule: bool) -> None:
    """Checks what we keep in the groups of a checkpoint.

    Raises:
        TypeError, ValueError: It is malformed, or from another schedule.
    """
    for group in groups:
        _check_group(group, custom_schedule)
    for key in _SHARED:
        if any(group.get(key) != groups[0].get(key) for group in groups):
            raise ValueError(f"the checkpoint's param groups disagree on {key!r}")


def check_state_dict(state_dict: object, groups: list[dict[str, Any]], custom_schedule: bool) -> None:
    """Checks a state dict against the optimizer's own groups, before anything is changed.

    What the base optimizer keeps for each parameter is its own business.

    Raises:
        TypeError, ValueError: It is malformed, of another shape, or from another schedule.
    """
    if not isinstance(state_dict, dict):
        raise TypeError(f"the optimizer state must be a dict, got {type(state_dict).__name__}")
    key = "param_groups" if state_dict.get(NESTED) is None else NESTED
    saved = state_dict.get(key)
    if not (isinstance(saved, list) and all(isinstance(group, dict) for group in saved)):
        raise ValueError(f"the optimizer state has no list of dicts under {key!r}")
    if len(saved) != len(groups):
        raise ValueError(f"the checkpoint has {len(saved)} param groups, the optimizer has {len(groups)}")
    if key != NESTED:
        _check_parameters(state_dict, groups)
    check_loaded(saved, custom_schedule)


def _check_parameters(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    if not isinstance(state_dict.get("state"), dict):
        raise ValueError("the optimizer state has no dict under 'state'")
    saved = state_dict["param_groups"]
    named: set[object] = set()
    for i, (theirs, ours) in enumerate(zip(saved, groups, strict=True)):
        if not isinstance(theirs.get("params"), (list, tuple)):
            raise ValueError(f"param group {i} of the checkpoint is malformed")
        if len(theirs["params"]) != len(ours["params"]):
            raise ValueError(
                f"param group {i} of the checkpoint has {len(theirs['params'])} parameters, "
                f"the optimizer's has {len(ours['params'])}: was another adapter trained?"
            )
        named.update(theirs["params"])
    if len(named) != sum(len(group["params"]) for group in groups):
        raise ValueError("the checkpoint names a parameter twice")
    # PEFT's LoRA-FA keeps its state under names of modules.
    unknown = [key for key in state_dict["state"] if isinstance(key, int) and key not in named]
    if unknown:
        raise ValueError(f"the checkpoint has state for parameters in no group: {unknown[:3]}")


def _check_group(group: dict[str, Any], custom_schedule: bool) -> None:
    if SIGMA in group:
        check_sigma(group[SIGMA])
    if not any(key in group for key in KEYS if key != SIGMA):
        return  # A checkpoint of the base optimizer alone.
    missing = [key for key in KEYS if key not in group]
    if missing:
        raise ValueError(f"the checkpoint's Flat-LoRA state lacks {', '.join(missing)}")
    unknown = [key for key in group if str(key).startswith(_PREFIX) and key not in (*KEYS, NOISE, NORMS)]
    if unknown:
        raise ValueError(f"the checkpoint is of another version of flatlora-optim: it has {unknown[0]!r}")
    check_step(group[STEP])
    check_seed(group[SEED])
    # It may be None, if the length is not known yet: Accelerate loads a new optimizer's own state.
    check_total_steps(group[TOTAL_STEPS])
    if not isinstance(group.get(NOISE, ""), str):
        raise TypeError(f"the checkpoint's noise must be a string, got {group[NOISE]!r:.60}")
    norms = group.get(NORMS, torch.empty(0, dtype=torch.float32, device="cpu"))
    if not (isinstance(norms, Tensor) and norms.dtype == torch.float32 and norms.ndim == 1):
        raise TypeError(f"the checkpoint's row norms must be a 1-D float32 tensor, got {norms!r:.60}")
    schedule = group[SCHEDULE]
    if schedule == CUSTOM_SCHEDULE:
        if not custom_schedule:
            raise ValueError(
                "the checkpoint was made with a callable schedule, which it can't hold: "
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
