"""The automatic style: forwards that train see noise, all other observers see clean weights."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..perturbation import NoisyWeights, Perturbation, change_noticed, clean_copy, forget_changed, remove_all
from ..targets import Target, sharding
from .wrapper import changes_nothing

_CALL = nn.Module._call_impl.__code__
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Forwards:
    """Which forwards are under way, and whether they see noise.

    Args:
        weights: Perturbed, suspended and resumed as forwards begin and end.
        perturb: Draws the step's noise and puts it on.
    """

    def __init__(self, weights: NoisyWeights, perturb: Callable[[], None]) -> None:
        self._weights = weights
        self._perturb = weakref.WeakMethod(perturb)
        self.running: list[nn.Module] = []
        """The watched modules whose forwards are under way, outermost first."""
        self._thread = 0
        self.explicit = False
        """Whether the user put the noise on, who may train in eval mode then."""
        self._suspended = False

    def begins(self, module: nn.Module) -> None:
        """To be called before the forward of a watched module: it finds noise, or clean weights."""
        if self.running and self._thread == threading.get_ident() and not _is_under_way(self.running[0]):
            self.running.clear()  # an interrupt kept it from ending
        if module in self.running:
            del self.running[self.running.index(module) :]  # likewise
        self.running.append(module)
        if len(self.running) > 1:
            return
        self._thread = threading.get_ident()
        self.resume()
        if self._weights.is_suspended:
            return  # the user asked for clean weights
        if self._sees_noise(module):
            perturb = self._perturb()
            if not self._weights.is_perturbed and perturb is not None:
                perturb()
        elif self._weights.is_perturbed:
            self._suspended = True
            self._weights.suspend()

    def ends(self, module: nn.Module, failed: bool) -> None:
        """To be called after it: what was suspended for it comes back, and after a failure no noise stays."""
        if module not in self.running:
            return
        del self.running[self.running.index(module) :]
        if self.running:
            return
        if self._suspended:
            self.resume()
        elif failed and self._weights.is_perturbed and not self.explicit:
            self.reset()
            self._weights.restore()

    def check_replica(self, module: nn.Module) -> None:
        """Raises RuntimeError if the replica should see noise, but was copied from clean weights."""
        if not (self.running or self._weights.is_perturbed) and self._sees_noise(module):
            raise RuntimeError(
                "nn.DataParallel copies the weights before the noise comes. Give the DataParallel module "
                "itself to FlatLoRAOptimizer; better, use DistributedDataParallel (`torchrun`), or show "
                "the process a single GPU (`CUDA_VISIBLE_DEVICES=0`)"
            )

    def resume(self) -> None:
        """Puts the noise on again that the forward of a clean observer had suspended."""
        if self._suspended:
            self._suspended = False
            self._weights.resume()

    def reset(self) -> None:
        """The weights are restored for another reason."""
        self.running.clear()
        self._suspended = self.explicit = False

    def _sees_noise(self, module: nn.Module) -> bool:
        """Evaluation, no_grad and a reference pass without adapters see clean weights."""
        return (
            (module.training or self.explicit)
            and torch.is_grad_enabled()
            and any(True for target in self._weights.targets for _ in target.all_parameters())
        )


class Owner(Protocol):
    """What hooks need of the optimizer that they belong to, which is built on them."""

    param_groups: list[dict[str, Any]]
    _weights: NoisyWeights
    _forwards: Forwards
    _steps_base: bool

    @property
    def is_perturbed(self) -> bool: ...
    @property
    def targets(self) -> list[Target]: ...
    def clean(self) -> AbstractContextManager[None]: ...
    def close(self) -> None: ...


class _ModelHook:
    """A hook that neither keeps the optimizer alive nor travels with copies of the model."""

    def __init__(self, optimizer: Owner) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Detached:
        self._refuse_while_perturbed("copy")
        return Detached()

    def __reduce__(self) -> tuple[type[Detached], tuple[()]]:
        self._refuse_while_perturbed("pickle")
        return Detached, ()

    def _refuse_while_perturbed(self, verb: str) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and optimizer.is_perturbed:
            raise RuntimeError(
                f"can't {verb} the model while its weights carry noise: "
                f"call `optimizer.restore()` first, or {verb} it right after `optimizer.step()`"
            )


class Detached:
    """What a hook becomes in a copy of the model, which no optimizer perturbs."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _Before(_ModelHook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any) -> None:
        if (optimizer := self._optimizer()) is not None and not _in_backward():
            if _is_replica(module):
                optimizer._forwards.check_replica(module)
                return
            with sharding.before_gathering(module, self):
                optimizer._forwards.begins(module)


class _After(_ModelHook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if (optimizer := self._optimizer()) is not None and not _in_backward() and not _is_replica(module):
            # torch calls the hook without an output for an exception on its way out.
            failed = output is None and sys.exc_info()[0] is not None
            optimizer._forwards.ends(module, failed)


def _in_backward() -> bool:
    """Whether a forward is a recomputation, which must see what the first one saw, and which
    checkpointing ends early by an exception of its own."""
    return torch._C._current_graph_task_id() != -1


def _is_under_way(module: nn.Module) -> bool:
    """Whether the module's forward is on the stack. In compiled code it can't be seen, and is taken to be."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            if frame.f_locals.get("self") is module:
                return True
        elif code.co_name == _CALL.co_name or code.co_name.startswith("torch_dynamo"):
            return True
        frame = frame.f_back
    return False


def _is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made the module, for one device and one forward."""
    return getattr(module, "_is_replica", False)


class _CleanStateDict(_ModelHook):
    """Puts clean values into a state dict that is taken while the weights carry noise."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if (optimizer := self._optimizer()) is None or not optimizer.is_perturbed:
            return
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = prefix + name
            if tensor is not None and key in state:
                clean = clean_copy(tensor)
                if clean is not None:
                    state[key] = clean


def hook_forwards(optimizer: Owner, model: nn.Module) -> list[RemovableHandle]:
    """Watches each module through which a whole forward may begin.

    The pre-hooks come first of all: FSDP gathers a module's shards in a pre-hook of its own, and
    must find the noise in them.
    """
    before, after = _Before(optimizer), _After(optimizer)
    handles = []
    layers = {id(sharing.layer) for target in optimizer.targets for sharing in target.sharing}
    for module in entrances(model, layers):
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    return handles


def hook_state_dicts(optimizer: Owner, model: nn.Module) -> list[RemovableHandle]:
    """Watches the model and each module that owns a perturbed tensor, under whatever name."""
    hook = _CleanStateDict(optimizer)
    places = {sharding.place_of(tensor) for tensor in optimizer._weights.tensors()} - {None}
    return [
        module._register_state_dict_hook(hook)
        for module in model.modules()
        if module is model
        or any(
            sharding.place_of(tensor) in places
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
    ]


class _BeforeBaseStep(_ModelHook):
    """Refuses steps of the base that its wrapper knows nothing of."""

    def __call__(self, base: Optimizer, args: Any, kwargs: Any) -> None:
        optimizer = self._optimizer()
        if optimizer is None or optimizer._steps_base or changes_nothing(base.param_groups):
            return
        raise RuntimeError(
            "the base optimizer was stepped by itself, so that noise would neither come nor go: give the "
            "loop, trainer or GradScaler the FlatLoRAOptimizer, or call its close() first"
        )


def hook_base(optimizer: Owner, base: Optimizer) -> list[RemovableHandle]:
    """Watches who steps the base, if it has all of torch's own optimizers."""
    if not hasattr(base, "_optimizer_step_pre_hooks"):
        return []
    return [base.register_step_pre_hook(_BeforeBaseStep(optimizer))]


def attached_optimizers(model: nn.Module) -> list[Owner]:
    """The optimizers that perturb modules of the model, each once."""
    tables = ((m._forward_pre_hooks, m._state_dict_hooks) for m in model.modules())
    hooks: Iterator[object] = (hook for both in tables for table in both for hook in table.values())
    found = (hook._optimizer() for hook in hooks if isinstance(hook, _ModelHook))
    return list({id(optimizer): optimizer for optimizer in found if optimizer is not None}.values())


def entrances(model: nn.Module, targets: set[int]) -> Iterator[nn.Module]:
    """The model and the modules inside that users call by themselves (generation, an encoder).

    The walk stops at containers: a single layer of a stack is called from within the model, or
    by a recomputation in backward, and must not decide anything.
    """
    yield model
    if isinstance(model, _CONTAINERS) or id(model) in targets:
        return
    for child in model.children():
        inside = {id(module) for module in child.modules()}
        if inside & targets and id(child) not in targets and not isinstance(child, _CONTAINERS):
            yield from entrances(child, targets)


def release(perturbations: Sequence[Perturbation], handles: list[RemovableHandle]) -> None:
    """Leaves the model as it was before it had an optimizer."""
    for handle in handles:
        handle.remove()
    try:
        if changed := forget_changed(perturbations):
            warnings.warn(str(change_noticed(changed)), stacklevel=2)
    finally:
        remove_all(perturbations)
