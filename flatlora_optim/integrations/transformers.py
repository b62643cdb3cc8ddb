"""For Hugging Face ``Trainer`` and those built on it: TRL, axolotl, ms-swift, LLaMA-Factory,
sentence-transformers, SetFit."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optimizer import FlatLoRAOptimizer
from ..optimizer.adoption import innermost, layers_of
from .options import checked_options, metrics_of


class FlatLoRACallback(TrainerCallback):  # type: ignore[misc]
    """Flat-LoRA in one line of any trainer that takes callbacks::

        trainer = Trainer(model, args, ..., callbacks=[FlatLoRACallback(sigma=0.05)])

    When training begins, it wraps the optimizer that the trainer has built; when training ends, it unwraps
    it. ``args.optim``, learning rate, weight decay, scheduler and checkpoints stay the trainer's. The
    length of the run and the step are the trainer's, too, also when it resumes or starts over. Each time
    the trainer logs a loss, it also logs sigma and the noise norm of the last step. ``print(callback)`` shows
    what is perturbed, also after training.

    Args:
        optimizer: Only for an optimizer of your own, which you gave to the trainer as
            ``optimizers=(optimizer, None)``. It stays in place when training ends.
        sigma: Noise strength, as in :class:`.FlatLoRAOptimizer`.
        seed: The seed of the noise. By default, the trainer's ``args.seed``.
        **options: Further options of :class:`.FlatLoRAOptimizer`.

    Raises:
        TypeError, ValueError: An option is unknown or out of range, or both or neither of ``optimizer``
            and ``sigma`` are given.
        RuntimeError: When training begins, if the trainer's optimizer is no ``FlatLoRAOptimizer`` and can't
            become one.
    """

    def __init__(
        self,
        optimizer: FlatLoRAOptimizer | None = None,
        *,
        sigma: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        if optimizer is not None and not isinstance(optimizer, FlatLoRAOptimizer):
            raise TypeError(
                f"optimizer must be a FlatLoRAOptimizer, got {type(optimizer).__name__}; for the trainer's "
                "own, say FlatLoRACallback(sigma=0.05)"
            )
        if (optimizer is None) == (sigma is None):
            raise TypeError(
                "give FlatLoRACallback either sigma, to wrap the trainer's optimizer, or an optimizer"
            )
        if sigma is None and (seed is not None or options):
            raise TypeError(
                "options have no effect on an optimizer that is given: pass them to its constructor"
            )
        seeded = options if seed is None else {"seed": seed, **options}
        self._options = None if sigma is None else checked_options(sigma=sigma, **seeded)
        self.optimizer = optimizer
        """The optimizer in use, if any."""
        self._described = "has not wrapped an optimizer yet: that is done when training begins"
        self._handles: list[Any] = []
        self._wanted: int | None = None  # the step whose metrics the trainer will log
        self._metrics: dict[str, float] = {}

    # ------------------------------------------------------------------ the trainer's events

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (trainer := _trainer_of(self)) is not None:
            self.prepare(trainer)

    def prepare(self, trainer: Any) -> None:
        """Makes the trainer call this callback before those that report logs. With DeepSpeed, which takes
        the optimizer apart, also makes the trainer build a ``FlatLoRAOptimizer`` in the first place."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)
        if self._options is None or not getattr(trainer, "is_deepspeed_enabled", False):
            return
        create = trainer.create_optimizer

        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            config = trainer.args.hf_deepspeed_config
            offloaded = config.get_value("zero_optimization.offload_optimizer.device", "none") != "none"
            if offloaded and config.get_value("zero_force_ds_cpu_optimizer", True):
                raise RuntimeError(
                    "with the optimizer offloaded, Accelerate puts DeepSpeedCPUAdam in the place of the "
                    "trainer's optimizer, and Flat-LoRA's: write \"zero_force_ds_cpu_optimizer\": false in "
                    "DeepSpeed's config"
                )
            made = create(*args, **kwargs)
            if made is not self.optimizer and hasattr(made, "param_groups"):
                made = self._wrap(made, trainer.model, trainer.args)
                trainer.optimizer = made
            return made

        trainer.create_optimizer = create_optimizer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        trainer = _trainer_of(self)
        if trainer is not None and trainer.callback_handler.callbacks[0] is not self:
            self.prepare(trainer)
        if getattr(trainer, "is_deepspeed_enabled", False) and not _is_deepspeed(optimizer):
            raise RuntimeError(
                "transformers goes on with the first train()'s DeepSpeed engine and steps its optimizer, not "
                "the trainer's: build a new Trainer for each train() with DeepSpeed"
            )
        inside = layers_of(optimizer)
        found = next((layer for layer in inside if isinstance(layer, FlatLoRAOptimizer)), None)
        if found is None or found is not self.optimizer:
            self._check_missing(optimizer, found)
        if self._options is not None and not _is_deepspeed(optimizer):
            self._wrap(optimizer, model, args)
        flat = self.optimizer
        assert flat is not None
        if self._options is not None:
            flat.install(optimizer)
        flat.total_steps = state.max_steps
        flat.step_count = state.global_step
        self._remove_hooks()
        # The last moment at which a step's noise is known, also if another object calls `step`.
        self._handles = [flat.register_step_pre_hook(self._measure), *_hook_cached_losses(trainer, flat)]

    def _check_missing(self, optimizer: Any, found: FlatLoRAOptimizer | None) -> None:
        """Raises RuntimeError if training would run without this callback's noise."""
        if found is not None:
            raise RuntimeError(
                "the trainer has another FlatLoRAOptimizer than this callback: give it that one, "
                "FlatLoRACallback(optimizer), or leave the trainer its own optimizer"
            )
        kind = type(innermost(optimizer)).__name__
        if self._options is None:
            raise RuntimeError(
                f"the trainer has dropped the FlatLoRAOptimizer and would train with {kind}, as it does "
                "with DeepSpeed: leave `optimizers` out, and say "
                "`callbacks=[FlatLoRACallback(sigma=...)]` when you build the trainer"
            )
        if _is_deepspeed(optimizer):
            raise RuntimeError(
                f"DeepSpeed has taken {kind} apart before this callback could wrap it: say "
                "`callbacks=[FlatLoRACallback(sigma=...)]` when you build the trainer, or "
                "`attach(trainer, sigma=...)` after; and keep the optimizer out of DeepSpeed's own config"
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        logged = (
            args.logging_strategy == "epoch"
            or (args.logging_strategy == "steps" and step % state.logging_steps == 0)
            or (args.logging_first_step and step == 1)
        )
        self._wanted = step if logged else None

    def _measure(self, optimizer: FlatLoRAOptimizer, args: Any, kwargs: Any) -> None:
        if self._wanted is not None:
            self._metrics, self._wanted = metrics_of(optimizer), None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "learning_rate" in logs:  # SetFit has another name for the loss
            logs.update(self._metrics)
            state.log_history[-1].update(self._metrics)
            self._metrics = {}

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._remove_hooks()
        if self.optimizer is not None:
            if self._options is None:
                self.optimizer.restore()
            else:
                self._take_out()

    # ------------------------------------------------------------------ in and out

    def _wrap(self, optimizer: Any, model: Any, args: TrainingArguments) -> FlatLoRAOptimizer:
        assert self._options is not None
        self._take_out()  # a run that failed may have left one
        options = {"seed": args.seed, **self._options}
        model = getattr(model, "model_body", model)  # a SetFitModel is no module, but has one
        self.optimizer = FlatLoRAOptimizer.adopt(optimizer, model, **options)
        return self.optimizer

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}: {self.optimizer or self._described}"

    def _take_out(self) -> None:
        if self.optimizer is not None:
            self._described = repr(self.optimizer)
            self.optimizer.detach()
            self.optimizer = None


def attach(trainer: Any, *, sigma: float, **options: Any) -> FlatLoRACallback:
    """Adds Flat-LoRA to a trainer that exists already.

    With DeepSpeed, ``trainer.add_callback(FlatLoRACallback(sigma=...))`` would be too late.

    Args:
        trainer: A ``transformers.Trainer``, before its ``train()``.
        sigma: As in :class:`FlatLoRACallback`.
        **options: As in :class:`FlatLoRACallback`.
    """
    callback = FlatLoRACallback(sigma=sigma, **options)
    trainer.add_callback(callback)
    callback.prepare(trainer)
    return callback


def _trainer_of(callback: FlatLoRACallback) -> Any:
    """The trainer that is calling the callback, which events don't pass. None if it is not transformers'."""
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _hook_cached_losses(trainer: Any, optimizer: FlatLoRAOptimizer) -> list[Any]:
    """Makes both passes of sentence-transformers' cached losses see noise."""
    losses = getattr(trainer, "loss", None)
    handles = []
    loss: Any
    for loss in losses.values() if isinstance(losses, dict) else [losses]:
        if not (hasattr(loss, "embed_minibatch") or hasattr(loss, "predict_minibatch")):
            continue
        block = ExitStack()

        def begins(*_: Any, block: ExitStack = block) -> None:
            if torch.is_grad_enabled():  # otherwise it evaluates
                block.enter_context(optimizer.recomputed())

        def ends(*_: Any, block: ExitStack = block) -> None:
            block.close()

        handles.append(loss.register_forward_pre_hook(begins))
        handles.append(loss.register_forward_hook(ends, always_call=True))
    return handles


def _is_deepspeed(optimizer: Any) -> bool:
    return any("deepspeed" in type(layer).__module__ for layer in layers_of(optimizer))
