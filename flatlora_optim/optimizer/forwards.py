"""Which forwards see noise: those that train. All other observers see clean weights."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from ..perturbation import NoisyWeights
from ..targets import Target, sharding

_CALL = nn.Module._call_impl.__code__


class Forwards:
    """Which forwards are running, and whether they see noise.

    Entrances are the modules through which a whole forward may begin (``hooks.entrances``).

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
        """The ids of the entrances whose forwards are running, outermost first."""
        self.compiled: list[int] = []
        """The id of the outermost entrance, if its whole forward is compiled."""
        self._thread = 0
        self.explicit = False
        """Whether the user put the noise on. Then forwards in eval mode may train, too."""
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
        """Call this before the forward of an entrance. It decides: noise, or clean weights."""
        if self.running and self._thread == threading.get_ident():
            self._drop_interrupted(module)
        self.running.append(id(module))
        if len(self.running) > 1:
            self._inside(module, self._trains)
            return
        self._thread = threading.get_ident()
        is_compiled = "_orig_mod" in module._modules or _modules_under_way() is None
        self.compiled[:] = [id(module)] if is_compiled else []
        if _in_transform():
            self.in_transform = not self.explicit
            return  # weights can't be written inside of a transform
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
        """Call this after it: noise that was suspended for it comes back, and after a failure none stays."""
        if id(module) not in self.running:
            return
        last = len(self.running) - 1 - self.running[::-1].index(id(module))
        del self.running[last:]
        if not self.running:
            self.forget_running()
        elif self._suspended_for is not module:
            return
        if self._suspended_for is not None:
            self.resume()
        elif failed and self._weights.is_perturbed and not self.explicit and not _in_transform():
            self.reset()
            self._weights.restore()

    def layer_begins(self, layer: nn.Module, target: Target) -> None:
        """Call this before the forward of an adapter layer.

        A teacher's or reference's pass may begin anywhere inside of a forward that trains. It sees clean
        weights; the noise comes back with the next layer that trains, or when the forward ends.
        """
        if not self._weights.is_noisy(target):
            return
        self._inside(layer, lambda: next(target.all_parameters(), None) is not None)
        if self._suspended_for is layer and not self.running:
            # The layer was called by itself, or is recomputed: nothing else would bring the noise back.
            handle: list[RemovableHandle] = []

            def ended(*_: Any) -> None:
                handle[0].remove()
                if self._suspended_for is layer:
                    self.resume()

            handle.append(layer.register_forward_hook(ended, always_call=True))

    def _inside(self, module: nn.Module, trains: Callable[[], bool]) -> None:
        """A forward inside of another one sees noise only if it trains."""
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
        """Raises RuntimeError if a replica should see noise, but was copied from clean weights."""
        if not (self.running or self._weights.is_perturbed) and self._sees_noise(module):
            raise RuntimeError(
                "nn.DataParallel copies the weights before the noise comes. Give the DataParallel module "
                "itself to FlatLoRAOptimizer; better, use DistributedDataParallel (`torchrun`), or show "
                "the process a single GPU (`CUDA_VISIBLE_DEVICES=0`)"
            )

    @property
    def is_observed(self) -> bool:
        """Whether a forward that sees clean weights is running inside of a noisy step."""
        return self._suspended_for is not None

    def resume(self) -> None:
        """Puts the noise on again, if it is suspended for a forward."""
        if self._suspended_for is not None:
            self._suspended_for = None
            self._weights.resume()

    def forget_running(self) -> None:
        self.running.clear()
        self.compiled.clear()

    def reset(self) -> None:
        """Forgets all forwards, because the weights are being restored."""
        self.forget_running()
        self._suspended_for, self.explicit = None, False

    def step_ends(self) -> None:
        """Forgets how the step's forwards ran."""
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
                "FSDP2 would have to gather its weights again in the middle of the forward. Run it before "
                "that, or inside of `with optimizer.clean():`",
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
        """Explains autograd's error, if the loss uses this output of a forward in eval mode and the noise
        came after it."""
        if self._warned_of_eval or not any(module is other for other in self.in_eval):
            return
        forwards = weakref.ref(self)

        def explain(gradient: Tensor) -> None:
            this = forwards()
            if this is None or this._warned_of_eval or not this._weights.is_perturbed:
                return
            this._warned_of_eval = True
            warnings.warn(
                f"{type(module).__name__} ran in eval() mode, so without noise, and the noise came after it. "
                "Its backward pass fails now: '... modified by an inplace operation'. Train it in "
                'train() mode, or build FlatLoRAOptimizer(..., auto="grad")',
                stacklevel=2,
            )

        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(explain)

    def _drop_interrupted(self, module: nn.Module) -> None:
        """Forgets forwards that an interrupt has ended without a hook.

        Args:
            module: Its forward begins now. Another one of it may be running further out.
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
    """How often each module's forward is on the stack. None in compiled code, whose stack says nothing."""
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
    """Whether this runs inside of a ``torch.func`` transform, which wraps the tensors."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def _in_autograd_function() -> bool:
    """Whether gradients are off because the forward of an ``autograd.Function`` is running, as in
    reentrant checkpointing, and not because the user switched them off."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_varnames[:1] == ("ctx",):
            ctx = frame.f_locals.get("ctx")
            # Without edges, gradients were off already when it was called: look further out.
            if isinstance(ctx, FunctionCtx) and getattr(ctx, "next_functions", None):
                return True
        frame = frame.f_back
    return False
