"""An optimizer that passes for its base: what users and trainers may ask of either."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch.optim import Optimizer

_MEMBERS = (
    "param_groups",
    "state",
    "defaults",
    "step",
    "zero_grad",
    "add_param_group",
    "state_dict",
    "load_state_dict",
)


class OptimizerWrapper(Optimizer):
    """Shares ``param_groups``, ``state`` and ``defaults`` with a base optimizer.

    It *is* a :class:`torch.optim.Optimizer`, as learning-rate schedulers, ``GradScaler`` and
    trainers demand. Those that only read and set these may hold either of the two.
    """

    # So GradScaler unscales by itself, and skips `step` when it finds an inf.
    _step_supports_amp_scaling = False

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        # As in unpickling: creates the tables of step hooks, and takes no parameters.
        super().__setstate__({})

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients. Keeps the noise: this may be called between forward and backward."""
        self.base.zero_grad(set_to_none=set_to_none)

    @property
    def _base_takes_closure(self) -> bool:
        return "closure" in inspect.signature(self.base.step).parameters

    def register_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_state_dict_pre_hook(hook, prepend)

    def register_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_state_dict_post_hook(hook, prepend)

    def register_load_state_dict_pre_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_load_state_dict_pre_hook(hook, prepend)

    def register_load_state_dict_post_hook(self, hook: Any, prepend: bool = False) -> Any:
        return self.base.register_load_state_dict_post_hook(hook, prepend)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning wraps us in an object that imitates our class. Our methods run on that object, and what
        # they assign must reach us.
        wrapped = self.__dict__.get("_optimizer")
        if isinstance(wrapped, OptimizerWrapper) and name in wrapped.__dict__:
            setattr(wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        # For the base's own methods, such as `train()` and `eval()` of schedule-free optimizers.
        if name.startswith("__") or "base" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        base = self.__dict__["base"]
        if not hasattr(base, name):
            raise AttributeError(
                f"neither {type(self).__name__} nor its base {type(base).__name__} has {name!r}"
            )
        return getattr(base, name)


def nested(optimizer: Any) -> Iterator[Any]:
    """The optimizer, and what it wraps, outermost first."""
    for _ in range(8):
        yield optimizer
        inside = getattr(optimizer, "__dict__", {})
        optimizer = inside.get("optimizer") or inside.get("_optimizer")
        if optimizer is None:
            return


def changes_nothing(groups: list[dict[str, Any]]) -> bool:
    """Whether all learning rates are 0. torch.distributed.checkpoint takes such a step, to create an
    optimizer's state."""
    return all(group.get("lr", 1) == 0 for group in groups)


def has_zero_gradients(groups: list[dict[str, Any]]) -> bool:
    """Whether all gradients are there and 0. DeepSpeed takes such a step, to create an optimizer's state."""
    gradients = [parameter.grad for group in groups for parameter in group["params"]]
    return all(gradient is not None and not gradient.any() for gradient in gradients)


def check_base(base: object) -> None:
    """Raises TypeError unless ``base`` has all the optimizer methods that we use."""
    if isinstance(base, OptimizerWrapper):
        raise TypeError(f"base is a {type(base).__name__} already; wrap the optimizer inside it instead")
    if hasattr(base, "gradient_state") and isinstance(inner := getattr(base, "optimizer", None), Optimizer):
        raise TypeError(
            f"base is an {type(base).__name__}, made by accelerator.prepare(): its steps are "
            f"micro-batches. Build FlatLoRAOptimizer(...) around the {type(inner).__name__} first, and "
            "prepare the FlatLoRAOptimizer"
        )
    if not (isinstance(base, Optimizer) or all(hasattr(base, n) for n in _MEMBERS)):
        raise TypeError(
            f"base must be an optimizer such as torch.optim.AdamW(...), got {type(base).__name__}"
        )
