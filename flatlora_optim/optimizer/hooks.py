"""The automatic style: forwards that train see noise, all other observers see clean weights."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType, MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..kernels.uncompiled import uncompiled
from ..perturbation import NoisyWeights, Perturbation, change_noticed, clean_copy, forget_changed, remove_all
from ..targets import Target, sharding

_CALL = nn.Module._call_impl.__code__


class Forwards:
    """Which forwards are under way, and whether they see noise.

    Args:
        weights: Perturbed, suspended and resumed as forwards begin and end.
        perturb: Draws the step's noise and puts it on.
        by_gradient: Whether forwards in eval mode see noise, too, if they record gradients.
    """

    def __init__(self, weights: NoisyWeights, perturb: Callable[[], None], by_gradient: bool = False) -> None:
        self._weights = weights
        self._perturb = weakref.WeakMethod(perturb)
        self._by_gradient = by_gradient
        self.running: list[int] = []
        """The ids of the entrances whose forwards are under way, outermost first."""
        self._thread = 0
        self.explicit = False
        """Whether the user put the noise on, who may train in eval mode then."""
        self._suspended_for: nn.Module | None = None
        self.in_eval: list[nn.Module] = []
        """The entrances that could have trained in this step, but ran in eval mode."""
        self._warned_of_sharded = False
        self.in_transform = False
        """Whether a forward of this step ran inside of ``torch.func``."""
        self._warned_of_eval = False
        self.are_recomputed = False
        """Whether backward will run those forwards again that record no gradients now."""

    def begins(self, module: nn.Module) -> None:
        """To be called before the forward of an entrance: it finds noise, or clean weights."""
        if self.running and self._thread == threading.get_ident():
            self._drop_interrupted(module)
        self.running.append(id(module))
        if len(self.running) > 1:
            self._inside(module, self._trains)
            return
        self._thread = threading.get_ident()
        if _in_transform():
            self.in_transform = not self.explicit
            return  # nothing can be written in there
        self.resume()
        if self._weights.is_suspended:
            return  # the user asked for clean weights
        if self._sees_noise(module):
            perturb = self._perturb()
            if not self._weights.is_perturbed and perturb is not None:
                perturb()
        elif self._weights.is_perturbed:
            self._suspend_for(module)

    def ends(self, module: nn.Module, failed: bool) -> None:
        """To be called after it: what was suspended for it comes back, and after a failure no noise stays."""
        if id(module) not in self.running:
            return
        last = len(self.running) - 1 - self.running[::-1].index(id(module))
        del self.running[last:]
        if self.running and self._suspended_for is not module:
            return
        if self._suspended_for is not None:
            self.resume()
        elif failed and self._weights.is_perturbed and not self.explicit and not _in_transform():
            self.reset()
            self._weights.restore()

    def layer_begins(self, layer: nn.Module, target: Target) -> None:
        """To be called before the forward of an adapter layer.

        A teacher or reference may begin anywhere inside of a forward that trains. What it begins with is
        clean again; noise comes back with the next layer that trains, or when the forward ends.
        """
        if not self._weights.is_noisy(target):
            return
        self._inside(layer, lambda: next(target.all_parameters(), None) is not None)
        if self._suspended_for is layer and not self.running:
            # Called by itself, or in a recomputation: nothing else would bring the noise back.
            handle: list[RemovableHandle] = []

            def ended(*_: Any) -> None:
                handle[0].remove()
                if self._suspended_for is layer:
                    self.resume()

            handle.append(layer.register_forward_hook(ended, always_call=True))

    def _inside(self, module: nn.Module, trains: Callable[[], bool]) -> None:
        """What begins inside of another forward sees noise only if it trains."""
        elsewhere = self.running and self._thread != threading.get_ident()
        if not self._weights.is_perturbed or elsewhere or _in_transform():
            return
        if not self._weights.is_suspended:
            if not (self._records_gradients() and trains()) and self._can_suspend_inside():
                self._suspend_for(module)
            return
        by_user = self._suspended_for is None
        by_outermost = bool(self.running) and id(self._suspended_for) == self.running[0]
        if not (by_user or by_outermost) and self._records_gradients() and trains():
            self.resume()

    def check_replica(self, module: nn.Module) -> None:
        """Raises RuntimeError if the replica should see noise, but was copied from clean weights."""
        if not (self.running or self._weights.is_perturbed) and self._sees_noise(module):
            raise RuntimeError(
                "nn.DataParallel copies the weights before the noise comes. Give the DataParallel module "
                "itself to FlatLoRAOptimizer; better, use DistributedDataParallel (`torchrun`), or show "
                "the process a single GPU (`CUDA_VISIBLE_DEVICES=0`)"
            )

    @property
    def is_observed(self) -> bool:
        """Whether a clean observer's forward is under way."""
        return self._suspended_for is not None

    def resume(self) -> None:
        """Puts the noise on again that the forward of a clean observer had suspended."""
        if self._suspended_for is not None:
            self._suspended_for = None
            self._weights.resume()

    def reset(self) -> None:
        """The weights are restored for another reason."""
        self.running.clear()
        self._suspended_for, self.explicit = None, False

    def step_ends(self) -> None:
        """Forgets what the step's forwards were like."""
        self.in_eval.clear()
        self.in_transform = False

    def _suspend_for(self, module: nn.Module) -> None:
        self._suspended_for = module
        self._weights.suspend()

    def _can_suspend_inside(self) -> bool:
        if next(sharding.fsdp_modules(self._weights.model), None) is None:
            return True
        if not self._warned_of_sharded:
            self._warned_of_sharded = True
            warnings.warn(
                "a pass without gradients, or without adapters, inside of a forward that trains sees noise: "
                "FSDP2 would have to gather its weights anew in the middle of the forward. Run it before the "
                "forward, or inside of `with optimizer.clean():`",
                stacklevel=2,
            )
        return False

    def _sees_noise(self, module: nn.Module) -> bool:
        """Evaluation, no_grad and a reference pass without adapters see clean weights."""
        if not (self._records_gradients() and self._trains()):
            return False
        if module.training or self.explicit or self._by_gradient:
            return True
        if not any(module is other for other in self.in_eval):
            self.in_eval.append(module)
        return False

    def _records_gradients(self) -> bool:
        """Whether gradients are recorded, or will be by a recomputation."""
        return torch.is_grad_enabled() or self.are_recomputed or _in_autograd_function()

    def _trains(self) -> bool:
        return any(True for target in self._weights.targets for _ in target.all_parameters())

    def watch_output(self, module: nn.Module, output: Any) -> None:
        """Explains the error of autograd if the loss goes through this output of a forward in eval mode, and
        noise has come since."""
        if self._warned_of_eval or not any(module is other for other in self.in_eval):
            return
        forwards = weakref.ref(self)

        def explain(gradient: Tensor) -> None:
            this = forwards()
            if this is None or this._warned_of_eval or not this._weights.is_perturbed:
                return
            this._warned_of_eval = True
            warnings.warn(
                f"{type(module).__name__} ran in eval() mode, and so without noise, which came after it. Its "
                "backward pass fails now: '... modified by an inplace operation'. Train it in "
                'train() mode, or build FlatLoRAOptimizer(..., auto="grad")',
                stacklevel=2,
            )

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(explain)

    def _drop_interrupted(self, module: nn.Module) -> None:
        """Forgets forwards that an interrupt kept from ending.

        Args:
            module: Whose forward begins now. It may be under way further out already.
        """
        under_way = _modules_under_way()
        if under_way is None:
            return
        under_way[id(module)] -= 1
        for i, running in enumerate(self.running):
            if under_way[running] < 1:
                del self.running[i:]
                return
            under_way[running] -= 1


def _modules_under_way() -> Counter[int] | None:
    """How often each module's forward is on the stack. None in compiled code, where that can't be seen."""
    counts: Counter[int] = Counter()
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            counts[id(frame.f_locals.get("self"))] += 1
        elif code.co_name == _CALL.co_name or code.co_name.startswith("torch_dynamo"):
            return None
        frame = frame.f_back
    return counts


def _in_transform() -> bool:
    """Whether a transform of ``torch.func`` is under way, in which tensors are not what they seem."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _in_autograd_function() -> bool:
    """Whether gradients are off because the forward of an ``autograd.Function`` is under way, as in
    reentrant checkpointing, and not because the user said so."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals.get("ctx")
            # Without edges, gradients were off when it was called: ask the one around it.
            if isinstance(ctx, FunctionCtx) and getattr(ctx, "next_functions", None):
                return True
        frame = frame.f_back
    return False


class Owner(Protocol):
    """What hooks need of the optimizer that they belong to, which is built on them."""

    param_groups: list[dict[str, Any]]
    _weights: NoisyWeights
    _forwards: Forwards

    @property
    def is_perturbed(self) -> bool: ...
    @property
    def targets(self) -> list[Target]: ...
    def restore(self) -> None: ...
    def clean(self) -> AbstractContextManager[None]: ...
    def close(self) -> None: ...


class _ModelHook:
    """A hook that neither keeps the optimizer alive nor travels with copies of the model."""

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
    """What a hook becomes in a copy of the model, which no optimizer perturbs."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        return None


class _ForwardHook(_ModelHook):
    def __init__(self, optimizer: Owner) -> None:
        super().__init__(optimizer)
        self._running = optimizer._forwards.running  # the list itself: the compiler guards what it reads

    def _is_traced_inside(self, module: nn.Module) -> bool:
        """Whether the module is compiled as a part of a forward that has begun already. What begins in there
        can't change the noise any more, and would break the graph."""
        running = self._running
        return torch.compiler.is_compiling() and len(running) > 0 and running[0] != id(module)


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
            # torch calls the hook without an output for an exception on its way out.
            failed = output is None and sys.exc_info()[0] is not None
            optimizer._forwards.ends(module, failed)
            optimizer._forwards.watch_output(module, output)


class _BeforeLayer(_ModelHook):
    def __init__(self, optimizer: Owner, target: Target) -> None:
        super().__init__(optimizer)
        self._target = weakref.ref(target)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # it must not break the graph at each layer
        optimizer = self._optimizer()
        if optimizer is None or not optimizer._weights.is_perturbed or _is_replica(module):
            return
        if (target := self._target()) is not None:
            optimizer._forwards.layer_begins(module, target)


def _in_backward() -> bool:
    """Whether a forward is a recomputation, which must see what the first one saw, and which
    checkpointing ends early by an exception of its own."""
    return torch._C._current_graph_task_id() != -1


def _is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made the module, for one device and one forward."""
    return "_is_replica" in module.__dict__  # without nn.Module's exception for what it lacks


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


class _BeforeMerge:
    """Stands before the ``merge`` of an adapter layer: what is merged into must carry no noise."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = weakref.ref(layer)
        self.optimizers: weakref.WeakSet[Owner] = weakref.WeakSet()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for optimizer in self.optimizers:
            if optimizer.is_perturbed:
                optimizer.restore()
        return _merge_of(self._layer())(*args, **kwargs)

    # In copies, the method is that of the copied layer.
    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        layer = self._layer()
        return _merge_of(memo.get(id(layer), layer))

    def __reduce__(self) -> tuple[Any, ...]:
        return _merge_of, (self._layer(),)


def _merge_of(layer: Any) -> Any:
    return MethodType(type(layer).merge, layer)


class _MergeHandle:
    """Takes an optimizer out of a ``_BeforeMerge``, and that away with the last."""

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
    """What takes a hook away again."""

    def remove(self) -> None: ...


def hook_forwards(optimizer: Owner, model: nn.Module) -> list[Handle]:
    """Watches each module through which a whole forward may begin, and each adapter layer.

    The pre-hooks come first of all: FSDP gathers a module's shards in a pre-hook of its own, and
    must find the noise in them.
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
    """Watches the model and each module that owns a perturbed tensor, under whatever name."""
    hook = _CleanStateDict(optimizer)
    places = {sharding.place_of(tensor) for tensor in optimizer._weights.tensors()} - {None}
    # What an adapter holds as no submodule, as kohya's do, is none of the model's modules.
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
    """Watches each adapter layer that can merge its adapter into the weight."""
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

    A module without a forward only holds others, which are then what is called. Inside of one that has a
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
    """Leaves the model as it was before it had an optimizer."""
    for handle in handles:
        handle.remove()
    try:
        if changed := forget_changed(perturbations):
            warnings.warn(str(change_noticed(changed)), stacklevel=2)
    finally:
        remove_all(perturbations)
