"""An optimizer wrapper that knows how strong the noise is at which step, and saves it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer

from . import checkpoint, schedules
from .adapters import Target
from .checkpoint import CUSTOM_SCHEDULE, NOISE, SCHEDULE, SEED, SIGMA, STEP, TOTAL_STEPS
from .schedules import Schedule
from .wrapper import OptimizerWrapper


class ScheduledOptimizer(OptimizerWrapper):
    """Keeps step, seed, sigma and schedule in the param groups of the base.

    Args:
        initial: What :func:`.checkpoint.initial_state` made of the options.
        schedule: A name or a callable, which no param group can carry.
    """

    def __init__(self, base: Optimizer, initial: dict[str, Any], schedule: str | Schedule) -> None:
        super().__init__(base)
        self._defaults_for_groups = initial
        self._schedule = schedule
        self._filled_groups()

    def _filled_groups(self) -> list[dict[str, Any]]:
        """The param groups; those that came from elsewhere are given what they lack."""
        checkpoint.fill_groups(self.param_groups, self._defaults_for_groups)
        return self.param_groups

    @property
    def step_count(self) -> int:
        """Optimizer steps finished so far."""
        return int(self._filled_groups()[0][STEP])

    @property
    def seed(self) -> int:
        return int(self._filled_groups()[0][SEED])

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run. May be set before or during it."""
        value: int | None = self._filled_groups()[0][TOTAL_STEPS]
        return value

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        checked = checkpoint.check_total_steps(value)
        for group in self.param_groups:
            group[TOTAL_STEPS] = checked

    @property
    def sigma(self) -> float:
        """sigma_t of the current step, for the first param group."""
        return float(self._filled_groups()[0][SIGMA]) * self._factor

    @property
    def _factor(self) -> float:
        return schedules.factor(self._schedule, self.step_count, self.total_steps)

    def _sigmas(self, targets: Iterable[Target]) -> list[float]:
        """Of each target: that of the groups which hold its adapters."""
        sigma_of = {id(p): group[SIGMA] for group in self._filled_groups() for p in group["params"]}
        sigmas = []
        for target in targets:
            values = {sigma_of[id(p)] for p in target.all_parameters() if id(p) in sigma_of}
            if len(values) > 1:
                raise ValueError(
                    f"{target.name}: the parameters of its adapters are in groups of different sigma "
                    f"{sorted(values)}"
                )
            sigmas.append(checkpoint.check_sigma(values.pop() if values else 0.0))
        return sigmas

    def _count_step(self) -> None:
        step = self.step_count + 1
        for group in self.param_groups:
            group[STEP] = step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. Its ``sigma`` defaults to the one of this optimizer.

        Adapters of the new group that were in no group before are perturbed only by a new
        ``FlatLoRAOptimizer``.
        """
        if SIGMA in param_group:
            checkpoint.check_sigma(param_group[SIGMA])
        self.base.add_param_group(param_group)
        self._filled_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; step, seed, sigma and schedule travel in ``param_groups``."""
        for group in self._filled_groups():
            group[NOISE] = self._noise_description()
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the base optimizer alone (then the step is kept).

        Raises:
            TypeError, ValueError: The state is malformed or of another shape. Nothing was changed.
        """
        checkpoint.check_state_dict(
            state_dict,
            self._filled_groups(),
            self.defaults,
            custom_schedule=not isinstance(self._schedule, str),
        )
        before = self.state, self.param_groups
        try:
            self.base.load_state_dict(state_dict)
            checkpoint.complete_groups(self.param_groups, before[1], self.defaults)
        except BaseException as error:
            self.state, self.param_groups = before
            if isinstance(error, Exception) and not isinstance(error, (TypeError, ValueError)):
                raise ValueError(f"{type(self.base).__name__} can't load this state: {error!r}") from error
            raise
        saved = self.param_groups[0][SCHEDULE]
        if saved != CUSTOM_SCHEDULE:
            self._schedule = saved

    def _noise_description(self) -> str:
        """Whose numbers the noise is made of: with others, the same seed gives another run."""
        raise NotImplementedError

    def _tell_what_is_another(self, total_steps: int | None) -> None:
        """Warns of what a checkpoint that was just loaded has changed, or does not go on with.

        Args:
            total_steps: As they were before.
        """
        if None not in (total_steps, self.total_steps) and total_steps != self.total_steps:
            warnings.warn(
                f"total_steps is {self.total_steps} from now on, as in the checkpoint, not {total_steps}. "
                "Set `optimizer.total_steps` after loading to make the run longer or shorter",
                stacklevel=3,
            )
        before, now = self.param_groups[0][NOISE], self._noise_description()
        if self.step_count and before not in ("", now):
            warnings.warn(
                f"up to this checkpoint the noise was that of {before}; from here on it is that of {now}. "
                "The run goes on with noise of the same strength, but not with the numbers it would have had",
                stacklevel=3,
            )
