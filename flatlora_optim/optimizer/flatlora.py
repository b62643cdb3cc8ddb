"""FlatLoRAOptimizer: any optimizer, with gradients taken at W + eps.

A step's first perturbation draws its noise, which stays the same until ``step`` ends.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..noise import Noise, NoiseKey, NoiseSource, NoiseTable, noise_source
from ..perturbation import RESTORE_MODES, NoisyWeights, choose_perturbations
from ..targets import Target, names_of, sharding
from . import diagnostics, hooks, other_steps
from .adoption import Adoption
from .checks import check_choice
from .forwards import Forwards
from .param_groups import SIGMA, initial_state, put_state, take_state
from .schedule import Schedule
from .wrapper import changes_nothing, check_base, has_zero_gradients

Closure = Callable[[], Any]

_INSIDE_CLEAN = "perturb() inside clean(): leave the `with optimizer.clean():` block first"


class FlatLoRAOptimizer(Adoption):
    """Wraps an optimizer so that LoRA looks for minima that are flat in the full weight space.

    At each optimizer step the frozen weights carry Gaussian noise during forward and backward,
    ``eps[i, j] ~ N(0, sigma_t^2 * ||W'[i, :]||^2 / n)`` (Flat-LoRA, equations 7 and 8), where
    ``W' = W + s * B @ A`` is the merged weight and n the number of its inputs. When the base optimizer
    updates A and B, they are bit-identical to before (except with ``restore="subtract"``).

    It *is* a :class:`torch.optim.Optimizer` that shares ``param_groups``, ``state`` and
    ``defaults`` with ``base``: learning-rate schedulers may hold either, but ``step`` must be called on
    this one.

    Args:
        base: The optimizer that updates the adapters.
        model: The model with the adapters, whose forward you call in training. Or several models, if
            ``base`` trains the adapters of all of them.
        sigma: Noise strength relative to the norm of each row. 0.05 is usual for LLMs, up to
            0.15 elsewhere. Param groups may carry their own ``"sigma"``.
        total_steps: Optimizer steps of the whole run, for ``"cosine"`` and ``"linear"``.
            ``"deferred"`` if it is only known later: set ``optimizer.total_steps`` then.
        schedule: ``"cosine"`` from 0 to sigma (the paper's), ``"linear"``, ``"constant"``, or a
            callable that maps the step to a factor on sigma.
        seed: The seed of the noise. torch's global generators are never touched.
        auto: Whether training forwards of ``model`` put the noise on by themselves. ``"grad"``: also those
            in eval mode, if they record gradients. With False, use ``step(closure)`` or :meth:`perturbed`.
        mode: ``"in_place"`` writes the noise into dense weights, ``"virtual"`` adds it in the
            forward of the frozen layer, ``"auto"`` writes it where it can.
        restore: How in-place noise is removed: ``"exact"`` (seed and journal), ``"snapshot"`` (a copy of
            the weights), ``"subtract"`` (the paper's; low bits drift).
        noise: ``"gaussian"`` (the paper's: independent numbers), ``"table"`` (read from a
            :class:`.NoiseTable`, about twice as fast on a CPU), ``"low_rank"`` (a product of two thin
            matrices: the same covariance, in the forward, for a few percent of a step; see
            :class:`.LowRankNoise`), or any :class:`.NoiseSource`. By default, low-rank noise in the
            forward, and the paper's in place.
        rank_noise: In data-parallel training, ``"independent"`` noise on each copy of the model
            averages the expectation better; ``"shared"`` gives all copies the same. Ranks that hold parts
            of one copy (FSDP2, tensor parallelism) always agree.

    Raises:
        TypeError: ``base`` is no optimizer, ``model`` no module, or a number is of another type.
        ValueError: No adapter was found, a base weight is trainable or on the meta device, or
            an option is out of range. Nothing has been changed then.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from flatlora_optim import FlatLoRAOptimizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))
        >>> base = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        >>> optimizer = FlatLoRAOptimizer(base, model, sigma=0.05, total_steps=100)
        >>> for x in torch.randn(3, 8, 6):
        ...     loss = model(x).square().mean()  # at W + eps
        ...     loss.backward()
        ...     optimizer.step()  # W is back, and AdamW updates A and B
        ...     optimizer.zero_grad()
        >>> optimizer.step_count
        3
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module | Sequence[nn.Module],
        *,
        sigma: float,
        total_steps: int | Literal["deferred"] | None = None,
        schedule: str | Schedule = "cosine",
        seed: int = 0,
        auto: bool | Literal["grad"] = True,
        mode: Literal["auto", "in_place", "virtual"] = "auto",
        restore: Literal["exact", "snapshot", "subtract"] = "exact",
        noise: str | NoiseSource | None = None,
        rank_noise: Literal["independent", "shared"] = "independent",
    ) -> None:
        check_base(base)
        if isinstance(model, (list, tuple)) and model and all(isinstance(m, nn.Module) for m in model):
            model = nn.ModuleList(model)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module or a list of some, got {type(model).__name__}")
        if auto not in (True, False):
            check_choice("auto", auto, ("grad",))
        check_choice("mode", mode, ("auto", "in_place", "virtual"))
        check_choice("restore", restore, RESTORE_MODES)
        check_choice("rank_noise", rank_noise, ("independent", "shared"))
        source = None if noise is None else noise_source(noise)
        initial = initial_state(
            base.param_groups, sigma=sigma, seed=seed, total_steps=total_steps, schedule=schedule
        )
        optimized = {id(p) for group in base.param_groups for p in group["params"]}
        own_sigma = [group.get(SIGMA, sigma) not in (0, sigma) for group in base.param_groups]
        perturbations, found = choose_perturbations(model, optimized, mode, restore, source)
        if isinstance(source, NoiseTable):
            for perturbation in perturbations:
                source.check_device(perturbation.target.weight.device)

        # Nothing has been changed up to here, and nothing below fails.
        for other in hooks.attached_optimizers(model):
            # It was forgotten, but not collected yet, as when a notebook's cell runs again.
            same = not optimized.isdisjoint(id(p) for group in other.param_groups for p in group["params"])
            if same or not other._weights.attached():
                other.close()
        super().__init__(base, initial, schedule)
        self._model = model
        self.skipped = {**found.skipped, **found.unrecognized}
        """Adapter layers that are not perturbed, and why."""
        self._options = {
            "auto": auto,
            "mode": mode,
            "restore": restore,
            "noise": noise,
            "rank_noise": rank_noise,
        }
        self._weights = NoisyWeights(model, perturbations)
        self._adapters = diagnostics.Adapters(self._weights.targets, optimized)
        self._forwards = Forwards(self._weights, self._put_noise_on, auto == "grad")
        self._noises: list[Noise | None] | None = None
        self._perturbing: object = None  # a new token for each call of perturb()
        self._warned_of: set[str] = set()
        self._ended = 0  # the number of the last step that had a forward
        self._resolution_checked = self._steps_base = False

        handles = [*hooks.hook_state_dicts(self, model), *hooks.hook_merges(self), other_steps.watch(self)]
        if auto:
            handles += hooks.hook_forwards(self, model)
        self._finalizer = weakref.finalize(self, hooks.release, perturbations, handles)
        if self.skipped:
            warnings.warn(
                f"this optimizer leaves these adapters unperturbed:\n{found.report()}", stacklevel=2
            )
        for complaint in diagnostics.complaints_of_build(model, self.targets, self.param_groups, own_sigma):
            warnings.warn(complaint, stacklevel=2)

    # ------------------------------------------------------------------ perturbing

    @property
    def is_perturbed(self) -> bool:
        """Whether the frozen weights have noise right now. They never do in a step of strength 0, such as the
        first step of ``"cosine"`` and ``"linear"``."""
        return self._weights.is_perturbed and not self._weights.is_suspended

    @property
    def expects_steps(self) -> bool:
        """Whether another optimizer's step of the adapters would be a mistake, because noise is on, or comes
        by itself. Inside of ``perturbed()``, with ``auto=False``, the user may do so."""
        if self._options["auto"]:
            return self._peak_sigma > 0
        return any(self._noises or ()) and not self._forwards.explicit

    @property
    def _peak_sigma(self) -> float:
        return max((float(group[SIGMA]) for group in self._filled_groups()), default=0.0)

    def perturb(self) -> None:
        """Puts this step's noise on the frozen weights.

        A second call changes nothing: noise is never added twice. Until the next :meth:`step`,
        calls after :meth:`restore` put the same noise on again.

        Raises:
            RuntimeError: Called inside :meth:`clean` or after :meth:`close`, or ``total_steps`` is
                not known yet.
        """
        self._check_open()
        self._perturbing = object()
        self._forwards.resume()
        if self._weights.is_suspended:
            raise RuntimeError(_INSIDE_CLEAN)
        if not self._weights.is_perturbed:
            self._put_noise_on()
        self._forwards.explicit = True

    def restore(self) -> None:
        """Brings the frozen weights back, bit for bit unless ``restore="subtract"``.

        Does nothing when they are clean.

        Raises:
            WeightChangedError: Somebody else wrote a weight while it carried noise. It is left
                as it is; all others are restored.
        """
        self._forwards.reset()
        self._weights.restore()

    @contextmanager
    def perturbed(self) -> Iterator[FlatLoRAOptimizer]:
        """A block in which forward and backward run at W + eps. Restores whatever happens.

        Inside of another such block, or after :meth:`perturb`, the noise stays on until that ends.

        Example:
            >>> with optimizer.perturbed():
            ...     model(x).square().mean().backward()
            >>> optimizer.step()
        """
        if self._weights.is_suspended and not self._forwards.is_observed:
            raise RuntimeError(_INSIDE_CLEAN)
        if self._forwards.explicit and not self._weights.is_suspended:
            yield self
            return
        mine = None
        try:
            self.perturb()
            mine = self._perturbing
            yield self
            self.restore()
        except BaseException as error:
            # An interrupt may have come before the restore. Restoring twice does no harm. If it came before
            # the block, this generator is collected later, perhaps in the middle of another step.
            if not isinstance(error, GeneratorExit) or mine is self._perturbing:
                self.restore()
            raise

    @contextmanager
    def clean(self) -> Iterator[None]:
        """A block with clean weights, in the middle of a step with noise.

        Afterwards the same noise is on again and pending backward passes are still valid. Use it
        around a long evaluation or generation: without it, each forward restores the weights and perturbs
        them again.

        Example:
            >>> with optimizer.perturbed():
            ...     loss = model(x).square().mean()
            ...     with optimizer.clean():
            ...         print(optimizer.is_perturbed)
            ...     loss.backward()
            False
        """
        if self._weights.is_suspended:
            yield  # inside another such block
            return
        suspension = None
        try:
            suspension = self._weights.suspend()
            yield
        finally:
            self._weights.resume(suspension)

    @contextmanager
    def recomputed(self) -> Iterator[None]:
        """A block for losses that run each forward twice, as GradCache and the cached losses of
        sentence-transformers: first without gradients, then again inside of ``backward()``.

        In it, training forwards see noise under ``no_grad``, too, so that both passes see the same.
        """
        before, self._forwards.are_recomputed = self._forwards.are_recomputed, True
        try:
            yield
        finally:
            self._forwards.are_recomputed = before

    def _put_noise_on(self) -> None:
        noises = self._draw()
        if any(noises):
            self._weights.perturb(noises)

    def _draw(self) -> list[Noise | None]:
        """This step's noise: None for a target with sigma 0 or without an active adapter."""
        # Drawn again while there is none: sigma or an adapter may have been switched on meanwhile.
        if self._noises is None or not any(self._noises):
            factor = self._factor
            replica = sharding.replica(self._model)
            sigmas = self._sigmas(self.targets)
            with self._weights.timed():
                is_shared = self._options["rank_noise"] == "shared"
                key = NoiseKey(self.seed, self.step_count, 0 if is_shared else replica)
                self._noises = self._weights.draw(key, [sigma * factor for sigma in sigmas])
                if factor > 0 and not self._resolution_checked:
                    self._resolution_checked = True
                    self._weights.check_resolution(self._noises, 1 / factor)
        return self._noises

    # ------------------------------------------------------------------ torch.optim.Optimizer

    def step(self, closure: Closure | None = None) -> Any:  # type: ignore[override]
        """Restores the frozen weights and lets the base optimizer update the adapters.

        Args:
            closure: Zeroes the gradients, computes the loss, runs backward and returns the loss.
                It runs with noise on. If the base calls it several times (LBFGS), the noise is the same
                each time.
        """
        if closure is None:
            return self._step_by(self._restore_and_update, self.base.step)
        return self._step_by(self._update_with, closure)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "second_step":
            # SAM in two calls: `first_step` leaves the noise on, and `second_step` updates.
            return functools.partial(self._step_by, self._restore_and_update, value)
        return value

    def _step_by(self, update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What each step has in common, however it updates the adapters."""
        self._forwards.forget_running()
        self._check_adapters()
        result = update(*args, **kwargs)
        self._end_step()
        return result

    def _restore_and_update(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.restore()
        return self._update(method, *args, **kwargs)

    def _update_with(self, closure: Closure) -> Any:
        if self._base_takes_closure:
            return self._update(self.base.step, lambda: self._call_perturbed(closure))
        loss = self._call_perturbed(closure)
        self._update(self.base.step)
        return loss

    def _check_adapters(self) -> None:
        """Raises RuntimeError if the step would update parameters that are no longer the model's."""
        pairs = zip(self.targets, self._noises or [None] * len(self.targets), strict=True)
        without = [target for target, noise in pairs if noise is None]
        if without and (replaced := self._adapters.replaced(self._model, without, self.param_groups)):
            self.restore()
            raise RuntimeError(f"{names_of(replaced)}: {diagnostics.REPLACED}")

    def _call_perturbed(self, closure: Closure) -> Any:
        self._forwards.explicit = False  # the noise of a `perturb()` before ends with this step
        with torch.enable_grad(), self.perturbed():
            return closure()

    def _update(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            self._steps_base = True
            return method(*args, **kwargs)
        finally:
            self._steps_base = False

    def _end_step(self) -> None:
        if self._noises is None:
            if changes_nothing(self.param_groups):
                return
            if self.step_count == 0 and has_zero_gradients(self.param_groups):
                return
            if self.step_count < self._ended:
                # DeepSpeed steps each group by itself, and the first of these steps has ended the noise.
                self._count_step()
                return
        self._warn_of_missing_noise()
        # Before it is counted: an interrupt in between must not carry noise over to the next step.
        self._noises, self._perturbing = None, None
        self._forwards.step_ends()
        self._count_step()
        self._ended = self.step_count

    def _warn_of_missing_noise(self) -> None:
        noises, complaint = self._noises or (), None
        if not self._finalizer.alive:
            complaint = "", diagnostics.CLOSED
        elif any(noises) or (self._peak_sigma > 0 and self._factor > 0):
            complaint = diagnostics.complaint_of_step(
                noises, self._weights.perturbations, lambda: self._sigmas(self.targets), self._forwards
            )
            if complaint is None and self._is_past_the_end():
                complaint = "", diagnostics.PAST_THE_END.format(self.total_steps)
        if complaint is not None and complaint[1] not in self._warned_of:
            self._warned_of.add(complaint[1])
            warnings.warn("".join(complaint), stacklevel=6)

    def _drop_noise(self) -> None:
        self._noises, self._ended = None, 0
        self.restore()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles contain the model, the base and the step."""
        self._check_open()
        if self._weights.is_perturbed:
            raise RuntimeError(
                "can't copy or pickle the optimizer while the weights carry noise: call "
                "`optimizer.restore()` first, or do it right after `optimizer.step()`"
            )
        options = {**self._options, "sigma": self._defaults_for_groups[SIGMA], "schedule": self._schedule}
        return _rebuilt, (type(self), self.base, self._model, options, self._weights.kept_norms())

    # ------------------------------------------------------------------ looking inside

    @property
    def targets(self) -> list[Target]:
        """The frozen weights that are perturbed, with their adapters."""
        return self._weights.targets

    def metrics(self) -> dict[str, float]:
        """For loggers: the current step's ``sigma`` and ``noise_norm`` (the expected Frobenius norm over all
        weights; 0 before the step's first perturbation), and the ``seconds`` spent on noise so far."""
        norm = self._weights.noise_norm(self._noises or [])
        return {"sigma": self.sigma, "noise_norm": norm, "seconds": self._weights.seconds}

    def memory(self) -> int:
        """Bytes held right now in order to restore the weights (journals or snapshots).

        On a GPU, memory for the journals stays reserved between steps.
        """
        return sum(p.nbytes() for p in self._weights.perturbations)

    def close(self) -> None:
        """Restores the weights and removes all hooks from the model. The base stays usable.

        Building another ``FlatLoRAOptimizer`` for the same adapters closes this one.
        """
        try:
            self.restore()
        finally:
            self._finalizer()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError(
                "this FlatLoRAOptimizer was closed, by close() or by a newer one for the same adapters: "
                "use that one, or build another"
            )

    def __repr__(self) -> str:
        perturbations = self._weights.perturbations
        counts = Counter((p.target.weight.kind, p.mode) for p in perturbations)
        how = ", ".join(f"{n} {kind} {mode}" for (kind, mode), n in sorted(counts.items()))
        trained = [p for group in self.param_groups for p in group["params"]]
        elements = sum(target.weight.shape.numel() for target in self.targets)
        skipped = f"{len(self.skipped)} (see .skipped)" if self.skipped else "-"
        return (
            f"{type(self).__name__}(\n"
            f"  perturbed: {len(perturbations)} of {len(perturbations) + len(self.skipped)} adapted "
            f"matrices, {elements:,} elements ({how}); {diagnostics.coverage(self.targets, trained)}\n"
            f"  not perturbed: {skipped}\n"
            f"  noise: {self._weights.description()}; sigma {self._settings()['sigma']}, "
            f"schedule {self._settings()['schedule']}\n"
            f"  step {self.step_count} of {self.total_steps or '?'}, seed {self.seed}\n"
            f"  base: {type(self.base).__name__}\n)"
        )


def _rebuilt(
    cls: type[FlatLoRAOptimizer],
    base: Optimizer,
    model: nn.Module,
    options: dict[str, Any],
    norms: Tensor | None,
) -> FlatLoRAOptimizer:
    state = take_state(base.param_groups)
    optimizer = cls(base, model, total_steps="deferred", **options)
    put_state(optimizer.param_groups, state)
    optimizer._weights.keep_norms(norms)
    return optimizer
