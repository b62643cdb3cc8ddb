"""The state of the noise: step, seed, sigma and schedule, and how a checkpoint holds it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from ..perturbation import NoisyWeights
from ..targets import Target
from .checks import check_sigma, check_step, check_total_steps
from .param_groups import (
    CUSTOM_SCHEDULE,
    KEYS,
    NESTED,
    NOISE,
    NORMS,
    SCHEDULE,
    SEED,
    SIGMA,
    STEP,
    TOTAL_STEPS,
    check_state_dict,
    complete_groups,
    fill_groups,
)
from .schedule import Schedule, factor, needs_total_steps
from .wrapper import OptimizerWrapper


class NoiseState(OptimizerWrapper):
    """Keeps step, seed, sigma and schedule in the param groups of the base.

    Args:
        initial: What :func:`.param_groups.initial_state` made of the options.
        schedule: A name or a callable, which no param group can carry.
    """

    _weights: NoisyWeights
    """Set by the subclass."""

    def __init__(self, base: Optimizer, initial: dict[str, Any], schedule: str | Schedule) -> None:
        super().__init__(base)
        self._defaults_for_groups = initial
        self._schedule = schedule
        self._is_detached = False
        self._group_of = WeakTensorKeyDictionary()
        self._remember_groups()

    def _filled_groups(self) -> list[dict[str, Any]]:
        """The param groups, with what is missing added to those that came from elsewhere."""
        groups = [dict(group) for group in self.param_groups] if self._is_detached else self.param_groups
        fill_groups(groups, self._defaults_for_groups)
        return groups

    @property
    def step_count(self) -> int:
        """Optimizer steps finished so far. May be set between steps, to start a run at another step."""
        return int(self._filled_groups()[0][STEP])

    @step_count.setter
    def step_count(self, value: int) -> None:
        checked = check_step(value)
        if checked != self.step_count:
            self._drop_noise()
            for group in self.param_groups:
                group[STEP] = checked

    @property
    def seed(self) -> int:
        """The seed of the noise."""
        return int(self._filled_groups()[0][SEED])

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run. May be set before or during it."""
        value: int | None = self._filled_groups()[0][TOTAL_STEPS]
        return value

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        checked = check_total_steps(value)
        for group in self.param_groups:
            group[TOTAL_STEPS] = checked

    @property
    def sigma(self) -> float:
        """sigma_t of the current step, for the first param group, whose ``"sigma"`` is the peak.

        Raises:
            RuntimeError: ``total_steps`` is not set yet.
        """
        return float(self._filled_groups()[0][SIGMA]) * self._factor

    @property
    def _factor(self) -> float:
        return factor(self._schedule, self.step_count, self.total_steps)

    def _is_past_the_end(self) -> bool:
        total = self.total_steps
        return needs_total_steps(self._schedule) and total is not None and self.step_count >= total

    def _sigmas(self, targets: Sequence[Target]) -> list[float]:
        """The sigma of each target, from the groups that hold its adapters."""
        groups = self._groups_in_use()
        current = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        parameters = [list(target.all_parameters()) for target in targets]
        held = {current.get(id(p)) for adapters in parameters for p in adapters}
        sigmas = []
        for target, adapters in zip(targets, parameters, strict=True):
            indices = {current.get(id(p)) for p in adapters}
            # In a group without any of the model's parameters, others stand for them.
            indices |= {self._group_of.get(p) for p in adapters} - held
            values = {groups[i][SIGMA] for i in indices if i is not None}
            if len(values) > 1:
                raise ValueError(
                    f"{target.name}: the parameters of its adapters are in groups of different sigma "
                    f"{sorted(values)}"
                )
            sigmas.append(check_sigma(values.pop() if values else 0.0))
        return sigmas

    def _groups_in_use(self) -> list[dict[str, Any]]:
        """The groups with parameters. DeepSpeed drops empty ones."""
        return [group for group in self._filled_groups() if group["params"]]

    def _remember_groups(self) -> None:
        """Notes which group each parameter is in, before DeepSpeed replaces them by flat partitions."""
        for i, group in enumerate(self._groups_in_use()):
            for parameter in group["params"]:
                self._group_of[parameter] = i

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
            check_sigma(param_group[SIGMA])
        self.base.add_param_group(param_group)
        self._remember_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, with step, seed, sigma and schedule in its ``param_groups``."""
        groups, noise, norms = self._filled_groups(), self._weights.description(), self._weights.kept_norms()
        state = self.base.state_dict()
        if isinstance(state.get("param_groups"), list):
            for group in state["param_groups"]:
                group[NOISE] = noise
            if norms is not None:
                state["param_groups"][0][NORMS] = norms
            return state
        # A base that wraps another optimizer, as Lookahead, may keep its state under another name.
        ours = [{NOISE: noise, **{key: group[key] for key in KEYS}} for group in groups]
        if norms is not None:
            ours[0][NORMS] = norms
        return {**state, NESTED: ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the base optimizer alone (then the step stays).

        From then on, step, seed, sigma and schedule are the state's. A warning names those that differed,
        except the step. If the current step has noise, it is removed.

        Raises:
            TypeError, ValueError: The state is malformed or of another shape. Nothing was changed.
        """
        check_state_dict(state_dict, self._filled_groups(), not isinstance(self._schedule, str))
        nested = state_dict.get(NESTED)
        state_dict = {key: value for key, value in state_dict.items() if key != NESTED}
        before, settings = (self.state, self.param_groups), self._settings()
        try:
            self.base.load_state_dict(state_dict)
            for group, values in zip(self.param_groups, nested or (), strict=False):
                group.update(values)
            complete_groups(self.param_groups, before[1], self.defaults)
        except BaseException as error:
            self.state, self.param_groups = before
            if isinstance(error, Exception) and not isinstance(error, (TypeError, ValueError)):
                raise ValueError(f"{type(self.base).__name__} can't load this state: {error!r}") from error
            raise
        self._was_loaded(settings)

    def _was_loaded(self, settings: dict[str, Any]) -> None:
        """Call this when the groups hold a loaded state, with the settings from before."""
        # How the noise is made is noted when a state is saved.
        noises = [group.pop(NOISE, None) for group in self.param_groups]
        norms = [group.pop(NORMS, None) for group in self.param_groups]
        saved = self.param_groups[0][SCHEDULE]
        if saved != CUSTOM_SCHEDULE:
            self._schedule = saved
        self._drop_noise()
        self._weights.keep_norms(norms[0])
        self._warn_of_differences(settings, noises[0])

    def _drop_noise(self) -> None:
        """Ends the current step's noise, if there is any."""
        raise NotImplementedError

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint replaces."""
        sigmas = [group[SIGMA] for group in self._filled_groups()]
        return {
            "total_steps": self.total_steps,
            "sigma": sigmas if len(set(sigmas)) > 1 else sigmas[0],
            "schedule": self._filled_groups()[0][SCHEDULE],
            "seed": self.seed,
        }

    def _warn_of_differences(self, before: dict[str, Any], noise_before: str | None) -> None:
        """Warns of what a loaded checkpoint has changed, and of noise that differs from its own.

        Args:
            before: The settings that it replaced.
            noise_before: The checkpoint's description of the noise.
        """
        others = [
            f"{name} is {value!r} (not {before[name]!r})"
            for name, value in self._settings().items()
            if value != before[name] and None not in (value, before[name])
        ]
        if others:
            warnings.warn(
                f"as in the checkpoint, from now on {', '.join(others)}. To change it during a run, set "
                '`optimizer.total_steps`, or the param groups\' "sigma", after loading',
                stacklevel=3,
            )
        noise = self._weights.description()
        if self.step_count and noise_before not in (None, noise):
            warnings.warn(
                f"up to this checkpoint the noise came from {noise_before}; from here on, from {noise}. "
                "The run goes on with noise of the same strength, but not with the numbers it would have had",
                stacklevel=3,
            )
