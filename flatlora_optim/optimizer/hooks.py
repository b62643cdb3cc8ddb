"""The hooks in a model: around forwards, state dicts and merges."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn

from ..kernels.uncompiled import uncompiled
from ..perturbation import NoisyWeights, Perturbation, change_noticed, clean_copy, forget_changed, remove_all
from ..targets import Target, sharding
from .diagnostics import Adapters
from .forwards import Forwards


class Owner(Protocol):
    """What hooks need of the optimizer that they belong to."""

    base: Any
    param_groups: list[dict[str, Any]]
    _weights: NoisyWeights
    _forwards: Forwards
    _adapters: Adapters
    _steps_base: bool

    @property
    def is_perturbed(self) -> bool: ...
    @property
    def expects_steps(self) -> bool: ...
    @property
    def targets(self) -> list[Target]: ...
    def restore(self) -> None: ...
    def clean(self) -> AbstractContextManager[None]: ...
    def close(self) -> None: ...


class _ModelHook:
    """A hook that does not keep the optimizer alive, and does nothing in copies of the model."""

    def __init__(self, optimizer: Owner) -> None:
        self._optimizer = weakref.ref(optimizer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        self._refuse_while_perturbed("copy")
        return Detached()

    def __reduce__(self) -> tuple[Any, ...]:
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
    """Stands for a hook in a copy of the model, which no optimizer perturbs."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _ForwardHook(_ModelHook):
    def __init__(self, optimizer: Owner) -> None:
        super().__init__(optimizer)
        self._compiled = optimizer._forwards.compiled  # the list itself: the compiler guards what it reads

    def _is_traced_inside(self, module: nn.Module) -> bool:
        """Whether the module is a part of a compiled forward that has begun already. A forward that begins
        there can't change the noise any more, and a hook would break the graph."""
        compiled = self._compiled
        return torch.compiler.is_compiling() and len(compiled) > 0 and compiled[0] != id(module)


class _BeforeForward(_ForwardHook):
    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self._is_traced_inside(module):
            self._begins(module)

    @uncompiled
    def _begins(self, module: nn.Module) -> None:
        if (optimizer := self._optimizer()) is not None and not _in_backward():
            if _is_replica(module):
                optimizer._forwards.check_replica(module)
                return
            with sharding.before_gathering(module, self):
                optimizer._forwards.begins(module)


class _AfterForward(_ForwardHook):
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._is_traced_inside(module):
            self._ends(module, output)

    @uncompiled
    def _ends(self, module: nn.Module, output: Any) -> None:
        if (optimizer := self._optimizer()) is not None and not _in_backward() and not _is_replica(module):
            # After an exception, torch calls the hook without an output.
            failed = output is None and sys.exc_info()[0] is not None
            optimizer._forwards.ends(module, failed)
            optimizer._forwards.watch_output(module, output)


class _BeforeLayer(_ModelHook):
    def __init__(self, optimizer: Owner, target: Target) -> None:
        super().__init__(optimizer)
        self._target = weakref.ref(target)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # a hook must not break the graph at each layer
        optimizer = self._optimizer()
        if optimizer is None or not optimizer._weights.is_perturbed or _is_replica(module):
            return
        if (target := self._target()) is not None:
            optimizer._forwards.layer_begins(module, target)


def _in_backward() -> bool:
    """Whether a forward is recomputed in backward. It must see what the first one saw, and checkpointing
    ends it early by an exception of its own."""
    return torch._C._current_graph_task_id() != -1


def _is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made the module, for one device and one forward."""
    return "_is_replica" in module.__dict__  # faster than `hasattr` of an nn.Module


class _CleanStateDict(_ModelHook):
    """Puts clean values into a state dict that is taken while the weights have noise."""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if (optimizer := self._optimizer()) is None or not optimizer.is_perturbed:
            return
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            key = prefix + name
            if tensor is not None and key in state:
                clean = clean_copy(tensor)
                if clean is not None:
                    state[key] = clean


class _BeforeMerge:
    """Replaces the ``merge`` of an adapter layer: a weight must be clean before an adapter is merged."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)
        self.optimizers: weakref.WeakSet[Owner] = weakref.WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for optimizer in self.optimizers:
            if optimizer.is_perturbed:
                optimizer.restore()
        return _merge_of(self._layer())(*args, **kwargs)

    # A copied layer has its own method again.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        layer = self._layer()
        return _merge_of(memo.get(id(layer), layer))

    def __reduce__(self) -> tuple[Any, ...]:
        return _merge_of, (self._layer(),)


def _merge_of(layer: Any) -> Any:
    return MethodType(type(layer).merge, layer)


class _MergeHandle:
    """Takes an optimizer out of a ``_BeforeMerge``. The last one puts the layer's own method back."""

    def __init__(self, layer: nn.Module, hook: _BeforeMerge, optimizer: Owner) -> None:
        self._layer, self._hook, self._optimizer = weakref.ref(layer), hook, weakref.ref(optimizer)

    def remove(self) -> None:
        layer, optimizer = self._layer(), self._optimizer()
        if optimizer is not None:
            self._hook.optimizers.discard(optimizer)
        if (
            layer is not None
            and not list(self._hook.optimizers)
            and layer.__dict__.get("merge") is self._hook
        ):
            del layer.__dict__["merge"]


class Handle(Protocol):
    """Removes a hook."""

    def remove(self) -> None: ...


def hook_forwards(optimizer: Owner, model: nn.Module) -> list[Handle]:
    """Watches each module through which a whole forward may begin, and each adapter layer.

    The pre-hooks run first: FSDP gathers a module's shards in a pre-hook of its own, and they must have
    the noise by then.
    """
    before, after = _BeforeForward(optimizer), _AfterForward(optimizer)
    handles: list[Handle] = []
    layers = {id(sharing.layer): target for target in optimizer.targets for sharing in target.sharing}
    for module in entrances(model, set(layers)):
        handles.append(module.register_forward_pre_hook(before, prepend=True))
        handles.append(module.register_forward_hook(after, always_call=True))
    for target in optimizer.targets:
        hook = _BeforeLayer(optimizer, target)
        handles += [sharing.layer.register_forward_pre_hook(hook) for sharing in target.sharing]
    return handles


def hook_state_dicts(optimizer: Owner, model: nn.Module) -> list[Handle]:
    """Watches the model, and each module that owns a tensor with noise."""
    hook = _CleanStateDict(optimizer)
    places = {sharding.place_of(tensor) for tensor in optimizer._weights.tensors()} - {None}
    # A layer that an adapter holds, but not as a submodule, as kohya's do, is not among the model's modules.
    owners = (sharing.owner for target in optimizer.targets for sharing in target.sharing)
    return [
        module._register_state_dict_hook(hook)
        for module in dict.fromkeys((*model.modules(), *owners))
        if module is model
        or any(
            sharding.place_of(tensor) in places
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        )
    ]


def hook_merges(optimizer: Owner) -> list[Handle]:
    """Watches each adapter layer that has a ``merge``."""
    handles: list[Handle] = []
    for target in optimizer.targets:
        for sharing in target.sharing:
            layer = sharing.layer
            if callable(getattr(type(layer), "merge", None)):
                hook = layer.__dict__.get("merge")
                if not isinstance(hook, _BeforeMerge):
                    hook = layer.__dict__["merge"] = _BeforeMerge(layer)
                hook.optimizers.add(optimizer)
                handles.append(_MergeHandle(layer, hook, optimizer))
    return handles


def attached_optimizers(model: nn.Module) -> list[Owner]:
    """The optimizers that perturb modules of the model, each once."""
    tables = ((m._forward_pre_hooks, m._state_dict_hooks) for m in model.modules())
    hooks: Iterator[object] = (hook for both in tables for table in both for hook in table.values())
    found = (hook._optimizer() for hook in hooks if isinstance(hook, _ModelHook))
    return list({id(optimizer): optimizer for optimizer in found if optimizer is not None}.values())


def entrances(module: nn.Module, layers: set[int]) -> Iterator[nn.Module]:
    """The modules through which users begin a forward: the model, and parts of it that are called by
    themselves (generation, an encoder).

    A module without a forward only holds others, which users call instead. Inside of a module that has a
    forward, the walk stops at containers: a single layer of a stack is called from within the model, or
    by a recomputation in backward, and must not decide anything.

    Args:
        layers: The ids of the adapter layers.
    """
    is_called = _has_forward(module)
    if is_called:
        yield module
        if isinstance(module, nn.Sequential) or id(module) in layers:
            return
    for child in module.children():
        if is_called and (id(child) in layers or isinstance(child, nn.Sequential) or not _has_forward(child)):
            continue
        if not layers.isdisjoint(id(inner) for inner in child.modules()):
            yield from entrances(child, layers)


def _has_forward(module: nn.Module) -> bool:
    return "forward" in module.__dict__ or type(module).forward is not nn.Module.forward


def release(perturbations: Sequence[Perturbation], handles: list[Handle]) -> None:
    """Leaves the model as it was before it had this optimizer."""
    for handle in handles:
        handle.remove()
    try:
        if changed := forget_changed(perturbations):
            warnings.warn(str(change_noticed(changed)), stacklevel=2)
    finally:
        remove_all(perturbations)
