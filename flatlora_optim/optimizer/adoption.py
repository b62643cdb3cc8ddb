"""Taking over an optimizer that somebody else has built, wrapped and loaded, and giving it back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from .param_groups import SIGMA, STEP, check_loaded, put_state, take_state
from .schedule import Schedule
from .state import NoiseState
from .wrapper import check_base, nested

if TYPE_CHECKING:
    from typing_extensions import Self


class Adoption(NoiseState):
    """A wrapper that can be put around an optimizer, and taken off, while others hold that optimizer."""

    def __init__(self, base: Optimizer, initial: dict[str, Any], schedule: str | Schedule) -> None:
        self._own_sigmas = [group.get(SIGMA) for group in base.param_groups]
        self._wrapper: Any = None
        super().__init__(base, initial, schedule)

    @classmethod
    def adopt(cls, base: Any, model: nn.Module, **options: Any) -> Self:
        """Wraps an optimizer that is in use already: trainers build, load and wrap their own.

        Args:
            base: If a ``FlatLoRAOptimizer``'s saved state was loaded into ``base`` alone, the run goes on
                from there, as after :meth:`load_state_dict`. ``base`` may be inside a wrapper of
                Accelerate's or DeepSpeed's: the new optimizer takes its place there, see :meth:`install`.
            model: As in the constructor.
            **options: As in the constructor.

        Raises:
            TypeError, ValueError: As in the constructor, or the loaded state is malformed. Nothing was
                changed.

        Example:
            >>> from flatlora_optim import FlatLoRAOptimizer
            >>> base = optimizer.detach()
            >>> again = FlatLoRAOptimizer.adopt(base, model, sigma=0.05, total_steps=100)
            >>> again.detach() is base
            True
        """
        wrapper, base = base, innermost(base)
        check_base(base)
        loaded = take_state(base.param_groups)
        try:
            check_loaded(loaded, callable(options.get("schedule")))
            build: Any = cls  # a subclass has a constructor of its own
            optimizer: Self = build(base, model, **options)
        except BaseException:
            put_state(base.param_groups, loaded)
            raise
        if any(STEP in group for group in loaded):
            settings = optimizer._settings()
            put_state(optimizer.param_groups, loaded)
            optimizer._was_loaded(settings)
        if wrapper is not base:
            optimizer.install(wrapper)
        return optimizer

    def install(self, wrapper: Any) -> None:
        """Takes the place of its base inside a wrapper, such as Accelerate's ``AcceleratedOptimizer``.

        The wrapper's ``GradScaler`` goes on as before, and so do schedulers and trainers, which hold the
        wrapper.

        Raises:
            ValueError: The wrapper holds neither this optimizer nor its base.
        """
        if self not in layers_of(wrapper):
            _exchange(wrapper, self.base, self)
        self._wrapper = wrapper

    def detach(self) -> Optimizer:
        """Closes, and leaves nothing behind: no noise, no hook, no key in the param groups.

        Returns:
            The base. If :meth:`install` had put this optimizer in its place, it is back there.
        """
        self.close()
        if self._wrapper is not None and self in layers_of(self._wrapper):
            _exchange(self._wrapper, self, self.base)
        self._wrapper = None
        take_state(self.param_groups)
        self._is_detached = True
        for group, sigma in zip(self.param_groups, self._own_sigmas, strict=False):
            if sigma is not None:
                group[SIGMA] = sigma
        return self.base

    def close(self) -> None:
        """Restores the weights and removes all hooks from the model."""
        raise NotImplementedError


def layers_of(optimizer: Any) -> Iterator[Any]:
    """The optimizer, and what it wraps if it is Accelerate's or DeepSpeed's, outermost first."""
    for each in nested(optimizer):
        yield each
        if not type(each).__module__.startswith(("accelerate.", "deepspeed.")):
            return


def innermost(optimizer: Any) -> Any:
    """The optimizer itself, without Accelerate's and DeepSpeed's wrappers."""
    return list(layers_of(optimizer))[-1]


def _exchange(wrapper: Any, old: Any, new: Any) -> None:
    for holder in layers_of(wrapper):
        if holder is not old and getattr(holder, "optimizer", None) is old:
            holder.optimizer = new
            if getattr(holder, "scaler", None) is not None:
                # With a GradScaler, Accelerate calls bound methods of the optimizer. `__setstate__` binds
                # them again; the constructor would load the state a second time.
                holder.__setstate__({})
            return
    raise ValueError(f"{type(wrapper).__name__} does not hold this {type(old).__name__}")
