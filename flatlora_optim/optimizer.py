"""FlatLoRAOptimizer: any optimizer, whose gradients are taken at W + eps.

The frozen weights are in one of three states:

    clean ──perturb──▶ perturbed ──restore──▶ clean
                         │    ▲
                    (a clean observer)
                         ▼    │
                       suspended

A step's noise is drawn once, by its first ``perturb``, and is the same until ``step`` ends it.
"""

from __future__ import annotations

import inspect
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.optim import Optimizer

from . import checkpoint, hooks, schedules, sharding
from .checkpoint import CUSTOM_SCHEDULE, KEYS, SCHEDULE, SEED, SIGMA, STEP, TOTAL_STEPS
from .noise import GaussianNoise, Noise, NoiseKey, NoiseSource
from .perturbation import (
    RESTORE_MODES,
    Perturbation,
    VirtualPerturbation,
    WeightChangedError,
    apply_all,
    choose_perturbation,
    remove_all,
)
from .scales import RowNorms, row_scales
from .schedules import Schedule
from .table import NoiseTable
from .targets import Target, UnsupportedAdapterError, find_targets

Closure = Callable[[], Any]

_OPTIMIZER_MEMBERS = (
    "param_groups",
    "state",
    "defaults",
    "step",
    "zero_grad",
    "add_param_group",
    "state_dict",
    "load_state_dict",
)

NOISE_SOURCES: dict[str, Callable[[], NoiseSource]] = {"gaussian": GaussianNoise, "table": NoiseTable}
"""A new source of noise is one class and one entry here."""


class FlatLoRAOptimizer(Optimizer):
    """Wraps an optimizer so that LoRA looks for minima that are flat in the full weight space.

    At each optimizer step the frozen weights carry Gaussian noise during forward and backward,
    ``eps[i, j] ~ N(0, sigma_t^2 * ||W'[i, :]||^2 / n)`` (Flat-LoRA, equations 7 and 8), and are
    bit-identical to before when the base optimizer updates A and B.

    It *is* an :class:`torch.optim.Optimizer` that shares ``param_groups``, ``state`` and
    ``defaults`` with ``base``: learning-rate schedulers and trainers may hold either.

    Args:
        base: The optimizer that updates the adapters.
        model: The model that holds the adapters; the one whose forward is called in training.
        sigma: Noise strength relative to the norm of each row. 0.05 is usual for LLMs, up to
            0.15 elsewhere. Param groups may carry their own ``"sigma"``.
        total_steps: Optimizer steps of the whole run, for ``"cosine"`` and ``"linear"``.
            ``"deferred"`` if it is only known later: set ``optimizer.total_steps`` then.
        schedule: ``"cosine"`` from 0 to sigma (the paper's), ``"linear"``, ``"constant"``, or a
            callable that maps the step to a factor on sigma.
        seed: The only source of the noise; the global generators are never touched.
        auto: Whether training forwards of ``model`` perturb by themselves. Without it, use
            ``step(closure)`` or :meth:`perturbed`.
        mode: ``"in_place"`` writes the noise into dense weights, ``"virtual"`` adds it in the
            forward of the frozen layer, ``"auto"`` does the first where it can.
        restore: How in-place noise is taken away: ``"exact"`` (seed and journal),
            ``"snapshot"`` (a copy of the weights), ``"subtract"`` (the paper's; low bits drift).
        noise: ``"gaussian"`` (independent numbers), ``"table"`` (read from a :class:`NoiseTable`,
            several times faster on a CPU), or any :class:`NoiseSource`.
        rank_noise: In data-parallel training, ``"independent"`` noise on each copy of the model
            averages the expectation better; ``"shared"`` gives all of them the same. Ranks that
            hold parts of one copy (FSDP2, tensor parallelism) always agree.

    Raises:
        TypeError: ``base`` is no optimizer, ``model`` no module, or a number is of another type.
        ValueError: No adapter was found, a base weight is trainable or on the meta device, or
            an option is out of range. Nothing has been changed then.
    """

    # GradScaler then unscales by itself and skips `step` when it found an inf.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        *,
        sigma: float,
        total_steps: int | Literal["deferred"] | None = None,
        schedule: str | Schedule = "cosine",
        seed: int = 0,
        auto: bool = True,
        mode: Literal["auto", "in_place", "virtual"] = "auto",
        restore: Literal["exact", "snapshot", "subtract"] = "exact",
        noise: str | NoiseSource = "gaussian",
        rank_noise: Literal["independent", "shared"] = "independent",
    ) -> None:
        _check_base(base)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        checkpoint.check_schedule(schedule)
        deferred = total_steps == "deferred"
        checked_total = None if deferred else checkpoint.check_total_steps(total_steps)
        if checked_total is None and not deferred and schedules.needs_total_steps(schedule):
            raise ValueError(
                f"the {schedule!r} schedule needs `total_steps`, the number of optimizer steps of "
                "the run; pass it, or schedule='constant'"
            )
        _check_choice("mode", mode, ("auto", "in_place", "virtual"))
        _check_choice("restore", restore, tuple(RESTORE_MODES))
        _check_choice("rank_noise", rank_noise, ("independent", "shared"))
        if isinstance(noise, str):
            _check_choice("noise", noise, tuple(NOISE_SOURCES))
        initial = {
            SIGMA: checkpoint.check_sigma(sigma),
            STEP: 0,
            SEED: checkpoint.check_seed(seed),
            TOTAL_STEPS: checked_total,
            SCHEDULE: schedule if isinstance(schedule, str) else CUSTOM_SCHEDULE,
        }
        for group in base.param_groups:
            checkpoint.check_sigma(group.get(SIGMA, sigma))
            if STEP in group:
                raise ValueError(
                    "the param groups of base carry the state of another FlatLoRAOptimizer, which would "
                    "silently replace these options: make a new base optimizer, and load a checkpoint "
                    "by `FlatLoRAOptimizer.load_state_dict`"
                )

        optimized = {id(p) for group in base.param_groups for p in group["params"]}
        found = find_targets(model, lambda target: _why_not_optimized(target, optimized))
        self.targets = found.targets
        self._perturbations: list[Perturbation] = []
        for target in list(self.targets):
            try:
                self._perturbations.append(choose_perturbation(target, mode, restore))
            except UnsupportedAdapterError as reason:
                if mode != "auto":
                    raise ValueError(f"{target.name}: {reason}") from None
                self.targets.remove(target)
                found.skipped[target.name] = str(reason)
        if not self.targets:
            raise ValueError(_nothing_found(model, found.report()))

        # Nothing has been changed up to here, and nothing below fails.
        for other in hooks.attached_optimizers(model):
            # One that is forgotten but not collected yet, as when a notebook's cell runs again.
            if not optimized.isdisjoint(id(p) for group in other.param_groups for p in group["params"]):
                other.close()
        self.base = base
        self._model = model
        self.skipped = found.skipped
        """Adapter layers that are not perturbed, and why."""
        self._defaults_for_groups = initial
        self._schedule = schedule
        self._source = NOISE_SOURCES[noise]() if isinstance(noise, str) else noise
        self._rank_noise = rank_noise
        self._norms = [RowNorms(target) for target in self.targets]
        self._noises: list[Noise | None] | None = None
        self._is_perturbed = False
        self._explicit = False
        self._suspension: ExitStack | None = None
        self._clean_versions: list[int] = []
        self._suspended_by_forward = False
        self._running: list[nn.Module] = []
        self._noise_was_on = False
        self._warned = False
        self._seconds = 0.0
        # What unpickling does: creates the tables of step hooks without taking parameters.
        super().__setstate__({})
        self._fill_groups()

        handles = hooks.hook_state_dicts(self, model)
        if auto:
            handles += hooks.hook_forwards(self, model)
        self._finalizer = weakref.finalize(self, _finalize, self._perturbations, handles)
        if self.skipped:
            warnings.warn(f"Flat-LoRA leaves these adapters unperturbed:\n{found.report()}", stacklevel=2)

    # ------------------------------------------------------------------ perturbing

    @property
    def is_perturbed(self) -> bool:
        """Whether the frozen weights carry noise right now."""
        return self._is_perturbed and self._suspension is None

    def perturb(self) -> None:
        """Puts this step's noise on the frozen weights.

        A second call changes nothing: noise is never added twice. Until the next :meth:`step`,
        further calls after :meth:`restore` put the same noise on again.

        Raises:
            RuntimeError: Called inside :meth:`clean` or after :meth:`close`, or ``total_steps`` is
                still unknown.
        """
        if not self._finalizer.alive:
            raise RuntimeError(
                "this FlatLoRAOptimizer was closed, by close() or by a newer one for the same adapters: "
                "use that one, or build another"
            )
        if self._suspended_by_forward:
            self._resume()  # an interrupt kept the forward from ending
        if self._suspension is not None:
            raise RuntimeError("perturb() inside clean(): leave the `with optimizer.clean():` block first")
        if not self._is_perturbed:
            self._apply()
        self._explicit = True

    def restore(self) -> None:
        """Brings the frozen weights back, bit for bit. Does nothing when they are clean.

        Raises:
            WeightChangedError: Somebody else wrote a weight while it carried noise. It is left
                as it is; all others are restored.
        """
        suspension, self._suspension = self._suspension, None
        self._suspended_by_forward = self._explicit = False
        try:
            if self._is_perturbed:
                self._remove()
        finally:
            if suspension is not None:
                # Not closed: a graph built on the noise must not run backward without it.
                suspension.pop_all()

    @contextmanager
    def perturbed(self) -> Iterator[FlatLoRAOptimizer]:
        """A block in which forward and backward run at W + eps. Restores whatever happens."""
        try:
            self.perturb()
            yield self
        finally:
            self.restore()

    @contextmanager
    def clean(self) -> Iterator[None]:
        """A block that sees clean weights also in the middle of a perturbed step.

        Afterwards the same noise is on again and pending backward passes are still valid. Use it
        around a long evaluation or generation: each forward outside of it restores and perturbs
        anew.
        """
        if self._suspension is not None:
            yield  # inside another such block
            return
        self._suspend()
        try:
            yield
        finally:
            self._resume()

    def _apply(self) -> None:
        self._reshard()
        noises = self._draw()
        if not any(noises):
            return
        with self._timed():
            # Known before it is true: an interrupt right after must find something to restore.
            self._is_perturbed = True
            try:
                apply_all(self._perturbations, noises)
            except BaseException:
                self._is_perturbed = False
                raise
            self._noise_was_on = True

    def _remove(self) -> None:
        self._reshard()
        with self._timed():
            checks = [(p, p.changed()) for p in self._perturbations]
            changed = [p for p, check in checks if check()]
            for perturbation in changed:
                perturbation.abandon()
            rewritten = [
                n for p, n in zip(self._perturbations, self._norms, strict=True) if p.written() is not None
            ]
            try:
                remove_all(self._perturbations)
            except BaseException:
                # It may have been interrupted before it began. Removing twice does no harm.
                remove_all(self._perturbations)
                raise
            finally:
                self._is_perturbed = self._explicit = False
            for norms in rewritten:
                norms.rewritten()
        if changed:
            names = ", ".join(p.target.name for p in changed[:3])
            raise WeightChangedError(
                f"the frozen weight of {names}{' …' if len(changed) > 3 else ''} was written while "
                "it carried noise (merged, loaded or moved in the middle of a step?). It was left "
                "as it is, noise included: load it again, and change weights only after "
                "`optimizer.restore()` or `optimizer.step()`"
            )

    def _suspend(self) -> None:
        guard = ExitStack()
        was_perturbed, explicit = self._is_perturbed, self._explicit
        if was_perturbed:
            for perturbation in self._perturbations:
                if (tensor := perturbation.written()) is not None:
                    # Values will be the same bits again: the graphs that saved them stay valid.
                    guard.enter_context(_unsafe_preserve_version_counter(tensor))
            self._remove()
        self._is_perturbed, self._explicit, self._suspension = was_perturbed, explicit, guard
        self._clean_versions = self._versions()

    def _resume(self) -> None:
        guard, self._suspension = self._suspension, None
        self._suspended_by_forward = False
        if guard is None or not self._is_perturbed:
            return  # restored in the meantime, or clean before
        self._is_perturbed = False
        explicit = self._explicit
        self._reshard()
        untouched = self._versions() == self._clean_versions
        self._apply()
        self._explicit = explicit
        if untouched:
            guard.close()
        else:
            # New weights were loaded meanwhile: backward passes through the old ones must fail.
            guard.pop_all()
        for perturbation in self._perturbations:
            perturbation.seal()

    def _draw(self) -> list[Noise | None]:
        """This step's noise: None for a target with sigma 0 or without an active adapter."""
        if self._noises is None or not any(self._noises):
            factor = schedules.factor(self._schedule, self.step_count, self.total_steps)
            sigmas = self._sigmas()
            with self._timed():
                replica = sharding.replica(self._model)
                key = NoiseKey(
                    self.seed, self.step_count, replica if self._rank_noise == "independent" else 0
                )
                self._noises = [
                    self._noise_of(target, norms, sigma * factor, key)
                    for target, norms, sigma in zip(self.targets, self._norms, sigmas, strict=True)
                ]
        return self._noises

    def _noise_of(self, target: Target, norms: RowNorms, sigma: float, key: NoiseKey) -> Noise | None:
        weight = target.weight
        # The forward that brought us here may run under autocast; norms need float32.
        with torch.autocast(weight.device.type, enabled=False):
            # A merged layer trains nothing, and its weight is W' already.
            delta = target.delta() if sigma > 0 and not target.merged else None
            if delta is None:
                return None
            scales = row_scales(norms.merged(delta), sigma, weight.columns)
        return Noise(self._source, key, weight.grid(target.first_block), scales, weight.row_dim)

    def _sigmas(self) -> list[float]:
        self._fill_groups()
        sigma_of = {id(p): group[SIGMA] for group in self.param_groups for p in group["params"]}
        sigmas = []
        for target in self.targets:
            values = {sigma_of[id(p)] for p in target.adapter_parameters() if id(p) in sigma_of}
            if len(values) > 1:
                raise ValueError(
                    f"{target.name}: its A and B are in groups of different sigma {sorted(values)}"
                )
            sigmas.append(checkpoint.check_sigma(values.pop() if values else 0.0))
        return sigmas

    def _reshard(self) -> None:
        """Gives FSDP2 modules their shards back: noise goes there, and is gathered from there.

        FSDP2 keeps the gathered weights of the root module after a forward; they would not see
        what is written to the shards.
        """
        for module in sharding.fsdp_modules(self._model):
            module.reshard()

    # ------------------------------------------------------------------ the automatic style

    def _forward_begins(self, module: nn.Module) -> None:
        if module in self._running:
            # An interrupt kept an earlier forward from ending.
            del self._running[self._running.index(module) :]
        self._running.append(module)
        if len(self._running) > 1:
            return
        if self._suspended_by_forward:
            self._resume()
        if self._suspension is not None:
            return  # the user asked for clean weights
        if self._sees_noise(module):
            if not self._is_perturbed:
                self._apply()
        elif self._is_perturbed:
            self._suspend()
            self._suspended_by_forward = True

    def _sees_noise(self, module: nn.Module) -> bool:
        """Evaluation, no_grad and a reference pass without adapters see clean weights."""
        training = module.training or self._explicit
        return (
            training
            and torch.is_grad_enabled()
            and any(True for target in self.targets for _ in target.adapter_parameters())
        )

    def _forward_ends(self, module: nn.Module, failed: bool) -> None:
        if module not in self._running:
            return
        del self._running[self._running.index(module) :]
        if self._running:
            return
        if self._suspended_by_forward:
            self._resume()
        elif failed and self._is_perturbed and not self._explicit:
            self.restore()

    # ------------------------------------------------------------------ torch.optim.Optimizer

    @property  # type: ignore[override]
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property  # type: ignore[override]
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Restores the frozen weights and lets the base optimizer update the adapters.

        Args:
            closure: Zeroes the gradients, computes the loss, runs backward and returns the loss.
                It runs with noise on; if the base calls it several times (LBFGS), each time with
                the same noise.
        """
        self._running.clear()
        if closure is None:
            self.restore()
            loss = self.base.step()
        elif self._base_takes_closure():
            loss = self.base.step(lambda: self._call_perturbed(closure))
        else:
            loss = self._call_perturbed(closure)
            self.base.step()
        self._end_step()
        return loss

    def _base_takes_closure(self) -> bool:
        return bool(inspect.signature(self.base.step).parameters)

    def _call_perturbed(self, closure: Closure) -> Any:
        with torch.enable_grad(), self.perturbed():
            return closure()

    def _end_step(self) -> None:
        if self._noises is None and all(group.get("lr", 1) == 0 for group in self.param_groups):
            return  # torch.distributed.checkpoint lets an optimizer create its state by such a step
        sigma = max((group[SIGMA] for group in self.param_groups), default=0.0)
        if not self._noise_was_on and not self._warned and sigma > 0 and self.sigma > 0:
            self._warned = True
            warnings.warn(
                "optimizer.step() came without a perturbed forward since the last step, so this was "
                "a plain LoRA step. Call the model that was passed to FlatLoRAOptimizer, in train() "
                "mode and with gradients enabled, or use step(closure) or `with optimizer.perturbed():`",
                stacklevel=4,
            )
        self._noises = None
        self._noise_was_on = False
        for group in self.param_groups:
            group[STEP] += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients. Leaves the noise alone: it may come between forward and backward."""
        self.base.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to the base optimizer. Its ``sigma`` defaults to the one of this optimizer.

        Adapters of the new group that were in no group before are perturbed only by a new
        ``FlatLoRAOptimizer``.
        """
        if SIGMA in param_group:
            checkpoint.check_sigma(param_group[SIGMA])
        self.base.add_param_group(param_group)
        self._fill_groups()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state; step, seed, sigma and schedule travel in ``param_groups``."""
        self._fill_groups()
        return self.base.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state of this class, or of the base optimizer alone (then the step is kept).

        Raises:
            TypeError, ValueError: The state is malformed or of another shape. Nothing was changed.
        """
        self._fill_groups()
        checkpoint.check_state_dict(
            state_dict, self.param_groups, custom_schedule=not isinstance(self._schedule, str)
        )
        self.restore()
        before = [{key: group[key] for key in KEYS} for group in self.param_groups]
        self.base.load_state_dict(state_dict)
        for group, known in zip(self.param_groups, before, strict=True):
            for key, value in known.items():
                group.setdefault(key, value)
        saved = self.param_groups[0][SCHEDULE]
        if saved != CUSTOM_SCHEDULE:
            self._schedule = saved
        self._noises = None
        self._noise_was_on = False

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_load_state_dict_post_hook(hook, prepend)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning's wrapper imitates our class around us: our methods run on it, and it would
        # keep what they assign to itself.
        wrapped = self.__dict__.get("_optimizer")
        if isinstance(wrapped, FlatLoRAOptimizer) and name in wrapped.__dict__:
            setattr(wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # The base's own methods: `train()` and `eval()` of schedule-free optimizers, for example.
        if name.startswith("__") or "base" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__dict__["base"], name)

    def _fill_groups(self) -> None:
        """Gives groups that came from elsewhere (a plain checkpoint, the base) what is missing."""
        for group in self.param_groups:
            for key in KEYS:
                if key not in group:
                    known = self.param_groups[0].get(key, self._defaults_for_groups[key])
                    group[key] = self._defaults_for_groups[key] if key == SIGMA else known

    # ------------------------------------------------------------------ looking inside

    @property
    def step_count(self) -> int:
        """Optimizer steps finished so far."""
        return int(self.param_groups[0][STEP])

    @property
    def seed(self) -> int:
        return int(self.param_groups[0][SEED])

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run. May be set before or during it."""
        value: int | None = self.param_groups[0][TOTAL_STEPS]
        return value

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        checked = checkpoint.check_total_steps(value)
        for group in self.param_groups:
            group[TOTAL_STEPS] = checked

    @property
    def sigma(self) -> float:
        """sigma_t of the current step, for the first param group."""
        factor = schedules.factor(self._schedule, self.step_count, self.total_steps)
        return float(self.param_groups[0][SIGMA]) * factor

    def metrics(self) -> dict[str, float]:
        """For loggers: the current step's ``sigma`` and expected ``noise_norm`` (over all weights;
        0 before the step's first perturbation), and the ``seconds`` spent on noise so far."""
        squared = sum(
            float(noise.scales.double().square().sum()) * target.weight.columns
            for noise, target in zip(self._noises or [], self.targets, strict=False)
            if noise is not None
        )
        return {"sigma": self.sigma, "noise_norm": squared**0.5, "seconds": self._seconds}

    def memory(self) -> int:
        """Bytes held right now to be able to restore (journals or snapshots)."""
        return sum(p.nbytes() for p in self._perturbations)

    def close(self) -> None:
        """Restores the weights and removes all hooks from the model. The base stays usable.

        Building another ``FlatLoRAOptimizer`` for the same adapters closes this one.
        """
        try:
            self.restore()
        finally:
            self._finalizer()

    def __repr__(self) -> str:
        counts = Counter(
            (t.weight.kind, p.mode) for t, p in zip(self.targets, self._perturbations, strict=True)
        )
        lines = [f"  {n} {kind} weights: {how}" for (kind, how), n in sorted(counts.items())]
        lines += [f"  {len(self.skipped)} adapters skipped (see .skipped)"] if self.skipped else []
        head = f"step {self.step_count} of {self.total_steps or '?'}, seed {self.seed}"
        body = "\n".join(lines)
        return f"{type(self).__name__} ({head}\n{body}\n  base: {self.base}\n)"

    def _weights(self) -> Iterator[Tensor]:
        """The tensors that in-place noise is written to."""
        for target, perturbation in zip(self.targets, self._perturbations, strict=True):
            if not isinstance(perturbation, VirtualPerturbation):
                yield target.weight.tensor  # type: ignore[attr-defined]

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self._weights()]

    def _clean_copy(self, tensor: Tensor) -> Tensor | None:
        for perturbation in self._perturbations:
            if perturbation.written() is tensor:
                return perturbation.clean_copy()
        return None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - start


def _check_base(base: object) -> None:
    if isinstance(base, FlatLoRAOptimizer):
        raise TypeError("base is a FlatLoRAOptimizer already; wrap the optimizer inside it instead")
    if not (isinstance(base, Optimizer) or all(hasattr(base, n) for n in _OPTIMIZER_MEMBERS)):
        raise TypeError(
            f"base must be an optimizer such as torch.optim.AdamW(...), got {type(base).__name__}"
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _why_not_optimized(target: Target, optimized: set[int]) -> str | None:
    parameters = list(target.adapter_parameters())
    if not parameters:
        return "none of its adapters is active"
    if not any(id(p) in optimized for p in parameters):
        return "its adapter's parameters are not in the optimizer"
    return None


def _nothing_found(model: nn.Module, report: str) -> str:
    looked_for = (
        "Looked for PEFT layers (`base_layer` with `lora_A`/`lora_B` of an active adapter), "
        "loralib-style layers (`weight`, `lora_A`, `lora_B`, `scaling`) and modules described by "
        "`flatlora_optim.register`, whose adapter parameters are in the base optimizer."
    )
    skipped = f"\nFound, but not usable:\n{report}" if report else ""
    return f"no LoRA module to perturb in {type(model).__name__}. {looked_for}{skipped}"


def _finalize(perturbations: list[Perturbation], handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()
    for perturbation in perturbations:
        if perturbation.changed()():
            perturbation.abandon()
        else:
            perturbation.remove()
